//! Bytes that a local socket has not taken yet.
//!
//! Their number is bounded by the credit granted for the stream; memory is held only while there are any.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use crate::segment::{Cursor, Segment, writev};

/// Size of a piece of memory, in bytes.
const CHUNK: usize = 16 * 1024;
/// Pieces written in one system call.
const BATCH: usize = 64;

/// A queue of bytes on their way to a socket.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    chunks: VecDeque<Vec<u8>>,
    /// Bytes of the first chunk that are written already.
    written: usize,
    len: usize,
}

impl Backlog {
    /// Bytes that wait.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Whether none wait.
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends the next `n` bytes of `cursor` and goes past them.
    pub(crate) fn push(&mut self, cursor: &mut Cursor<'_, '_>, n: usize) {
        self.len += n;
        let mut left = n;
        while left > 0 {
            if self.chunks.back().is_none_or(|last| last.len() == CHUNK) {
                self.chunks.push_back(Vec::with_capacity(left.min(CHUNK)));
            }
            let Some(last) = self.chunks.back_mut() else {
                return;
            };
            let at = last.len();
            let take = left.min(CHUNK - at);
            last.resize(at + take, 0);
            cursor.read(&mut last[at..]);
            left -= take;
        }
    }

    /// Writes what the socket takes; returns the number of bytes, and an error other than "not now".
    pub(crate) fn flush(&mut self, fd: BorrowedFd<'_>) -> (usize, io::Result<()>) {
        let mut total = 0;
        while !self.is_empty() {
            let mut skip = self.written;
            let segments: Vec<_> = self
                .chunks
                .iter_mut()
                .take(BATCH)
                .map(|chunk| Segment::from_slice(&mut chunk[std::mem::take(&mut skip)..]))
                .collect();
            let offered: usize = segments.iter().map(Segment::len).sum();
            match writev(fd, &segments) {
                Ok(n) => {
                    total += n;
                    self.advance(n);
                    if n < offered {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return (total, Err(error)),
            }
        }
        (total, Ok(()))
    }

    fn advance(&mut self, n: usize) {
        self.len -= n;
        self.written += n;
        while let Some(first) = self.chunks.front() {
            if self.written < first.len() {
                return;
            }
            self.written -= first.len();
            self.chunks.pop_front();
        }
        self.chunks = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn keeps_order_over_partial_writes_and_frees_its_memory() {
        let (near, mut far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let mut data: Vec<u8> = (0..1_000_000u32)
            .map(|i| i.wrapping_mul(7).to_le_bytes()[1])
            .collect();
        let expected = data.clone();
        let mut backlog = Backlog::default();
        let segments = [Segment::from_slice(&mut data)];
        let mut cursor = Cursor::new(&segments);
        for n in [1, 16 * 1024, 3, 500_000] {
            backlog.push(&mut cursor, n);
        }
        let rest = cursor.remaining();
        backlog.push(&mut cursor, rest);
        assert_eq!(backlog.len(), expected.len());
        let mut received = Vec::new();
        while received.len() < expected.len() {
            let (_, result) = backlog.flush(near.as_fd());
            result.unwrap();
            let mut buf = [0; 10_000];
            let n = far.read(&mut buf).unwrap();
            received.extend_from_slice(&buf[..n]);
        }
        assert!(received == expected);
        assert_eq!((backlog.len(), backlog.chunks.capacity()), (0, 0));
    }
}
