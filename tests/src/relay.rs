//! The floor under every figure: a bare relay between one link and one socket, with no mux and nothing else to do.
//!
//! It uses the same links as the programs (guest memory at the host, vectored reads and large writes in the guest), so
//! that what it is faster by is what the mux and the driver cost. It has one conversation at a time; what a socket does
//! not take stays here until it does, and nothing more is received meanwhile.

use std::future::poll_fn;
use std::io;
use std::os::fd::AsFd;

use tokio::io::Interest;
use tokio::net::TcpStream;
use virtproxy_engine::channel::{Link, Progress};
use virtproxy_engine::segment::{Cursor, Segment, readv, writev};

/// What the socket has not taken yet.
#[derive(Default)]
struct Rest {
    bytes: Vec<u8>,
    written: usize,
}

impl Rest {
    fn is_empty(&self) -> bool {
        self.written == self.bytes.len()
    }

    fn flush(&mut self, socket: &TcpStream) -> io::Result<()> {
        while !self.is_empty() {
            let segment = Segment::from_slice(&mut self.bytes[self.written..]);
            match socket.try_io(Interest::WRITABLE, || writev(socket.as_fd(), &[segment])) {
                Ok(n) => self.written += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.bytes.clear();
        self.written = 0;
        Ok(())
    }

    fn write(&mut self, socket: &TcpStream, segments: &[Segment<'_>]) -> io::Result<()> {
        let written = match socket.try_io(Interest::WRITABLE, || writev(socket.as_fd(), segments)) {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error),
        };
        let mut cursor = Cursor::new(segments);
        cursor.advance(written);
        self.bytes.resize(cursor.remaining(), 0);
        cursor.read(&mut self.bytes);
        Ok(())
    }
}

/// Relays until either side ends.
pub async fn relay(link: &mut dyn Link, socket: &TcpStream) -> io::Result<()> {
    let mut rest = Rest::default();
    loop {
        let mut busy = false;
        rest.flush(socket)?;
        if rest.is_empty() {
            let mut result = Ok(());
            let received = link.receive(&mut |segments| result = rest.write(socket, segments))?;
            result?;
            busy |= received == Progress::Again;
        }
        let mut ended = Ok(false);
        let mut full = true;
        let sent = link.send(&mut |segments| {
            full = false;
            match socket.try_io(Interest::READABLE, || readv(socket.as_fd(), segments)) {
                Ok(0) => {
                    ended = Ok(true);
                    0
                }
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => {
                    ended = Err(error);
                    0
                }
            }
        })?;
        if ended? {
            return Ok(());
        }
        busy |= sent == Progress::Again;
        if !busy {
            // While the link has no room, what the socket has is no reason to wake up.
            let (reads, writes) = (!full, !rest.is_empty());
            tokio::select! {
                biased;
                () = poll_fn(|cx| link.poll_ready(cx)) => {}
                ready = socket.readable(), if reads => ready?,
                ready = socket.writable(), if writes => ready?,
            }
        }
    }
}
