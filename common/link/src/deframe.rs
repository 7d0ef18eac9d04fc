//! Where frames begin and end: consistent overhead byte stuffing (COBS), with a zero byte on either side.
//!
//! A stuffed frame has no zero byte in it, so a zero is always a border. Whatever was lost, doubled or slipped in, the
//! next zero puts the reader right again: damage costs the frames it touches and no other. What lies between two
//! zeros and is no frame (a kernel message, the tail of a frame) is noise.

use alloc::vec::Vec;

use crate::frame::MAX_BODY;

/// What separates frames.
const DELIMITER: u8 = 0;

/// Bytes in one block of COBS: a code of 255 is followed by 254 bytes and stands for no zero.
const BLOCK: usize = 254;

/// The longest stuffed frame, without its delimiters.
pub(crate) const MAX_STUFFED: usize = MAX_BODY + MAX_BODY / BLOCK + 1;

/// Appends `body`, stuffed and between delimiters, to `out`.
pub(crate) fn stuff(body: &[u8], out: &mut Vec<u8>) {
    out.push(DELIMITER);
    let mut rest = body;
    loop {
        let head = &rest[..rest.len().min(BLOCK)];
        let run = head.iter().position(|byte| *byte == 0);
        let len = run.unwrap_or(head.len());
        out.push(u8::try_from(len + 1).unwrap_or(u8::MAX));
        out.extend_from_slice(&head[..len]);
        rest = &rest[len..];
        match run {
            Some(_) => rest = &rest[1..],
            None if rest.is_empty() => break,
            None => {}
        }
    }
    out.push(DELIMITER);
}

/// Undoes [`stuff`] in place; `None` if it cannot have made this.
fn unstuff(bytes: &mut Vec<u8>) -> Option<()> {
    let (mut read, mut write) = (0, 0);
    while let Some(code) = bytes.get(read).copied() {
        let len = usize::from(code).checked_sub(1)?;
        let next = read + 1 + len;
        if next > bytes.len() {
            return None;
        }
        bytes.copy_within(read + 1..next, write);
        write += len;
        read = next;
        if len < BLOCK && read < bytes.len() {
            bytes[write] = 0;
            write += 1;
        }
    }
    bytes.truncate(write);
    Some(())
}

/// Finds frames in what arrives.
#[derive(Default)]
#[cfg_attr(feature = "sim", derive(Clone, Hash))]
pub struct Deframer {
    /// What came since the last delimiter, as far as it may be a frame.
    partial: Vec<u8>,
    /// It was longer than any frame: noise, up to the next delimiter.
    overlong: bool,
    /// It has been handed out.
    done: bool,
}

impl Deframer {
    /// Takes bytes from the front of `bytes`, up to the next border at most. `Some`: this is what lay before the border,
    /// or `None` if no frame did. Call again until nothing is left.
    pub fn next(&mut self, bytes: &mut &[u8]) -> Option<Option<&[u8]>> {
        if core::mem::take(&mut self.done) {
            self.partial.clear();
            self.overlong = false;
        }
        let end = bytes.iter().position(|byte| *byte == DELIMITER);
        let (piece, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
        if self.partial.len() + piece.len() > MAX_STUFFED {
            self.overlong = true;
        }
        if self.overlong {
            self.partial.clear();
        } else {
            self.partial.extend_from_slice(piece);
        }
        let Some(rest) = end.and_then(|_| rest.get(1..)) else {
            *bytes = rest;
            return None;
        };
        *bytes = rest;
        self.done = true;
        if self.overlong {
            return Some(None);
        }
        if self.partial.is_empty() {
            // Two delimiters in a row: between frames there is nothing.
            return Some(Some(&[]));
        }
        let sound = unstuff(&mut self.partial);
        Some(sound.map(|()| &self.partial[..]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    /// All that comes out of `bytes`, given in pieces of `step`.
    fn frames(bytes: &[u8], step: usize) -> Vec<Option<Vec<u8>>> {
        let mut deframer = Deframer::default();
        let mut found = Vec::new();
        for mut piece in bytes.chunks(step) {
            while !piece.is_empty() {
                match deframer.next(&mut piece) {
                    Some(Some([])) | None => {}
                    Some(frame) => found.push(frame.map(<[u8]>::to_vec)),
                }
            }
        }
        found
    }

    #[test]
    fn what_is_stuffed_comes_out() {
        for len in [1, 2, 253, 254, 255, 256, 507, 508, 509, MAX_BODY] {
            for zeros in [1, 2, 254, 255, 1000] {
                let body: Vec<u8> = (0..len)
                    .map(|at| u8::from(at % zeros != zeros - 1))
                    .collect();
                let mut line = Vec::new();
                stuff(&body, &mut line);
                assert!(line.len() <= MAX_STUFFED + 2);
                assert_eq!(line.iter().filter(|byte| **byte == 0).count(), 2);
                for step in [1, 7, line.len()] {
                    assert_eq!(frames(&line, step), [Some(body.clone())], "{len} {zeros}");
                }
            }
        }
    }

    #[test]
    fn noise_costs_nothing_but_itself() {
        let mut line = b"login: ".to_vec();
        stuff(b"one", &mut line);
        line.extend(vec![b'x'; 3 * MAX_STUFFED]);
        stuff(b"two", &mut line);
        let found = frames(&line, 100);
        assert_eq!(found.len(), 4);
        assert_eq!(found[0], None);
        assert_eq!(found[1].as_deref(), Some(&b"one"[..]));
        assert_eq!(found[2], None);
        assert_eq!(found[3].as_deref(), Some(&b"two"[..]));
    }
}
