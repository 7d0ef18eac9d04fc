//! A flow's way to the driver: datagrams, framed, on a pair of UNIX sockets.
//!
//! ```text
//! frame = length, u16 little-endian | that many bytes
//! ```
//!
//! Towards the driver a pipe is short, and what it cannot take is dropped. It may take a part of a datagram; the rest
//! is then kept, and goes before anything else. From the driver, a datagram whose end is not there yet is kept.

use std::io::{self, IoSlice, Read, Write};

use mio::event::Source;
use mio::net::UnixStream;
use mio::{Interest, Registry, Token};

/// The largest datagram, in bytes: what IPv6 can carry without jumbograms.
pub(super) const MAX_DATAGRAM: usize = u16::MAX as usize - UDP_HEADER;
const UDP_HEADER: usize = 8;
const FRAME_HEADER: usize = 2;

/// Bytes that may wait for the driver, as SO_SNDBUF counts them; there may be the rest of one datagram more.
const QUEUE: usize = 32 * 1024;

/// The bridge's end of a flow's pair of sockets.
#[derive(Debug)]
pub(super) struct Pipe {
    stream: UnixStream,
    /// The rest of a datagram of which the stream took a part.
    unsent: Vec<u8>,
    /// What was read, whose first `taken` bytes are done with.
    received: Vec<u8>,
    taken: usize,
}

impl Pipe {
    /// The bridge's end, and the driver's.
    pub(super) fn pair() -> io::Result<(Self, UnixStream)> {
        let (stream, driver) = UnixStream::pair()?;
        socket2::SockRef::from(&stream).set_send_buffer_size(QUEUE)?;
        let pipe = Pipe {
            stream,
            unsent: Vec::new(),
            received: Vec::new(),
            taken: 0,
        };
        Ok((pipe, driver))
    }

    /// Its events, edge-triggered, under `token`.
    pub(super) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        let both = Interest::READABLE | Interest::WRITABLE;
        self.stream.register(registry, token, both)
    }

    /// Sends a datagram to the driver; false: there is no room for it. An error ends the flow.
    pub(super) fn put(&mut self, datagram: &[u8]) -> io::Result<bool> {
        self.flush()?;
        if !self.unsent.is_empty() {
            return Ok(false);
        }
        let Ok(length) = u16::try_from(datagram.len()) else {
            return Ok(false);
        };
        let header = length.to_le_bytes();
        match (&self.stream).write_vectored(&[IoSlice::new(&header), IoSlice::new(datagram)]) {
            Ok(n) => {
                let rest_of_header = &header[n.min(FRAME_HEADER)..];
                self.unsent.extend_from_slice(rest_of_header);
                let rest = &datagram[n.saturating_sub(FRAME_HEADER)..];
                self.unsent.extend_from_slice(rest);
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sends the rest of a datagram, as far as there is room.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match (&self.stream).write(&self.unsent) {
                Ok(n) if n == self.unsent.len() => self.unsent = Vec::new(),
                Ok(n) => drop(self.unsent.drain(..n)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Hands up to `max` datagrams from the driver to `sink`; whether there may be more. An error ends the flow.
    /// `buffer` is for bytes on their way, and of any size.
    pub(super) fn take(
        &mut self,
        buffer: &mut [u8],
        max: usize,
        mut sink: impl FnMut(&[u8]),
    ) -> io::Result<bool> {
        let mut drained = false;
        if first(&self.received[self.taken..])?.is_none() {
            match (&self.stream).read(buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    self.received.drain(..std::mem::take(&mut self.taken));
                    self.received.extend_from_slice(&buffer[..n]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => drained = true,
                Err(error) => return Err(error),
            }
        }
        for _ in 0..max {
            let Some(datagram) = first(&self.received[self.taken..])? else {
                break;
            };
            sink(datagram);
            self.taken += FRAME_HEADER + datagram.len();
        }
        if self.taken == self.received.len() {
            self.received = Vec::new();
            self.taken = 0;
        }
        Ok(!drained)
    }
}

/// The datagram that `bytes` begin with, if all of it is there.
fn first(bytes: &[u8]) -> io::Result<Option<&[u8]>> {
    let Some((header, rest)) = bytes.split_first_chunk() else {
        return Ok(None);
    };
    let length = u16::from_le_bytes(*header).into();
    if length > MAX_DATAGRAM {
        let what = format!("a datagram of {length} bytes, more than UDP can carry");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    Ok(rest.get(..length))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take_all(pipe: &mut Pipe) -> Vec<Vec<u8>> {
        let (mut buffer, mut all) = (vec![0; 1 << 16], Vec::new());
        while pipe
            .take(&mut buffer, 3, |datagram| all.push(datagram.to_vec()))
            .unwrap()
        {}
        all
    }

    #[test]
    fn boundaries_survive_any_cut() {
        let datagrams: Vec<Vec<u8>> = [0, 1, 0, 0, 300, MAX_DATAGRAM, 2, 9000, 0]
            .iter()
            .map(|len| vec![7; *len])
            .collect();
        let mut bytes = Vec::new();
        for datagram in &datagrams {
            bytes.extend(u16::try_from(datagram.len()).unwrap().to_le_bytes());
            bytes.extend(datagram);
        }
        for step in [1, 2, 3, 1000, 65_536, bytes.len()] {
            let (mut pipe, driver) = Pipe::pair().unwrap();
            let mut received = Vec::new();
            let mut left = &bytes[..];
            while !left.is_empty() {
                let n = (&driver).write(&left[..step.min(left.len())]).unwrap();
                left = &left[n..];
                received.extend(take_all(&mut pipe));
            }
            assert!(received == datagrams, "in steps of {step}");
            assert_eq!(pipe.received.capacity(), 0, "holds memory");
        }
    }

    #[test]
    fn what_has_no_room_is_dropped_whole() {
        let (mut near, driver) = Pipe::pair().unwrap();
        let (mut far, back) = Pipe::pair().unwrap();
        let mut sent = Vec::new();
        let mut dropped = 0;
        for seed in 0..1000_u32 {
            let mut datagram = vec![0; 9000];
            datagram[..4].copy_from_slice(&seed.to_le_bytes());
            match near.put(&datagram).unwrap() {
                true => sent.push(datagram),
                false => dropped += 1,
            }
        }
        assert!(dropped > 900, "{dropped} dropped");
        assert!(near.unsent.len() < 9002);
        // The driver takes what there is and carries it to the other pipe, a little at a time.
        let mut received = Vec::new();
        let mut buf = [0; 1000];
        while received.len() < sent.len() {
            let n = (&driver).read(&mut buf).unwrap();
            (&back).write_all(&buf[..n]).unwrap();
            near.flush().unwrap();
            received.extend(take_all(&mut far));
        }
        assert!(received == sent);
        assert!(near.put(b"fits again").unwrap());
    }

    #[test]
    fn a_length_that_udp_cannot_carry_is_an_error() {
        let (mut pipe, driver) = Pipe::pair().unwrap();
        (&driver).write_all(&[2, 0, 1, 2, 0xf8, 0xff]).unwrap();
        let mut count = 0;
        let result = pipe.take(&mut vec![0; 1 << 16], 9, |_| count += 1);
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(count, 1, "what came before it is sound");
    }
}
