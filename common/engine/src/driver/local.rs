//! The local side of one stream: a socket, what it has not taken yet, and how far its life has come.
//!
//! ```text
//!  client of -o:   Waiting --session--> Opening --accepted--> Open
//!  target of -i:                     Connecting --connected--> Open --both ways ended--> gone
//! ```
//!
//! Events are edge-triggered, so `readable` and `writable` stay true until a call says "not now".

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Instant;

use socket2::SockRef;
use tokio::task::AbortHandle;
use virtproxy_mux::StreamId;

use crate::backlog::Backlog;
use crate::segment::{Cursor, Segment, readv, writev};
use crate::socket::Socket;

/// How far a local side has come.
#[derive(Debug)]
pub(super) enum Phase {
    /// A client that came before the other end did; until when it waits.
    Waiting(Instant),
    /// A client whose stream the peer has not answered yet.
    Opening,
    /// A target that is being connected to, by a task unless it is done at once.
    Connecting(Option<AbortHandle>),
    /// Bytes flow.
    Open,
}

/// The local side of one stream.
#[derive(Debug)]
pub(super) struct Local {
    pub(super) service: Rc<str>,
    pub(super) phase: Phase,
    /// Its stream; none while it waits.
    pub(super) stream: Option<StreamId>,
    /// Its socket; none while connecting.
    pub(super) socket: Option<Socket>,
    pub(super) backlog: Backlog,
    /// Bytes that the socket took, and that it gave.
    pub(super) moved: [u64; 2],
    /// There may be bytes to read.
    pub(super) readable: bool,
    writable: bool,
    /// The other side of the socket will send no more: read on to the end of file.
    read_closing: bool,
    /// End of file was read and the peer told.
    read_done: bool,
    /// The peer will send no more.
    peer_done: bool,
    /// ... and the socket was told.
    write_done: bool,
}

/// What reading a local socket gave.
pub(super) enum Read {
    Bytes(usize),
    Blocked,
    End,
}

impl Local {
    pub(super) fn new(service: Rc<str>, phase: Phase) -> Self {
        Local {
            service,
            phase,
            stream: None,
            socket: None,
            backlog: Backlog::default(),
            moved: [0; 2],
            readable: false,
            writable: true,
            read_closing: false,
            read_done: false,
            peer_done: false,
            write_done: false,
        }
    }

    /// Notes a readiness event.
    pub(super) fn ready(&mut self, event: &mio::event::Event) {
        self.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
        self.writable |= event.is_writable() || event.is_write_closed();
        self.read_closing |= event.is_read_closed();
    }

    /// Reads up to `max` bytes to where `room` stands.
    pub(super) fn read(&mut self, room: &Cursor<'_, '_>, max: usize) -> io::Result<Read> {
        let Some(socket) = &self.socket else {
            return Ok(Read::Blocked);
        };
        let mut segments = Vec::with_capacity(32);
        let offered = room.take(max, &mut segments);
        match readv(socket.as_fd(), &segments) {
            Ok(0) => {
                self.readable = false;
                self.read_done = true;
                Ok(Read::End)
            }
            Ok(n) => {
                // A short read has emptied the socket (epoll(7)), unless its end of file is still to be read.
                self.readable = n == offered || self.read_closing;
                self.moved[1] += n as u64;
                Ok(Read::Bytes(n))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(Read::Blocked)
            }
            Err(error) => Err(error),
        }
    }

    /// Writes `segments`, at most [`MAX_IOV`](crate::segment::MAX_IOV) of them, and keeps what the socket does not take now.
    /// Returns how many bytes it took.
    pub(super) fn write(&mut self, segments: &[Segment<'_>]) -> io::Result<usize> {
        let mut cursor = Cursor::new(segments);
        let len = cursor.remaining();
        if let (Some(socket), true, true) = (&self.socket, self.backlog.is_empty(), self.writable) {
            match writev(socket.as_fd(), segments) {
                Ok(taken) => cursor.advance(taken),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            self.writable = cursor.remaining() == 0;
        }
        let left = cursor.remaining();
        self.backlog.push(&mut cursor, left);
        self.moved[0] += (len - left) as u64;
        Ok(len - left)
    }

    /// Whether bytes, or their end, are there to be read: `readable` only says that it may be so.
    pub(super) fn has_bytes(&self) -> bool {
        let Some(socket) = self.socket.as_ref().filter(|_| self.readable) else {
            return false;
        };
        SockRef::from(&socket.as_fd())
            .peek(&mut [MaybeUninit::uninit()])
            .is_ok()
    }

    /// Writes what waits, as far as the socket takes it; returns how many bytes it took.
    pub(super) fn flush(&mut self) -> (usize, io::Result<()>) {
        let Some(socket) = &self.socket else {
            return (0, Ok(()));
        };
        let result = self.backlog.flush(socket.as_fd());
        self.writable = self.backlog.is_empty();
        self.moved[0] += result.0 as u64;
        result
    }

    /// The peer will send no more.
    pub(super) fn peer_finished(&mut self) {
        self.peer_done = true;
    }

    /// Passes the peer's end of data on to the socket once all of it is written.
    pub(super) fn settle(&mut self) {
        if self.peer_done && self.backlog.is_empty() && !self.write_done {
            self.write_done = true;
            if let Some(socket) = &self.socket {
                socket.finish();
            }
        }
    }

    /// Whether both directions have ended in order.
    pub(super) fn is_done(&self) -> bool {
        self.read_done && self.write_done
    }
}
