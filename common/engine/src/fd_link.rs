//! A link over a non-blocking file descriptor (a virtio port in the guest, a socket, a terminal), or over two of them,
//! one to read and one to write (pipes).
//!
//! # Theory of operation
//!
//! **To receive** is one `readv` into up to [`PAGES`] segments of [`PAGE`] bytes. That shape is for the guest's
//! virtio port: its driver has only a plain `read`, which gives at most one receive buffer, a page, and the
//! kernel turns `readv` into one such `read` for each segment, until one is short. So one system call
//! takes dozens of pages (measured: 620-720 MB/s, against 216 with one page a call), and the bytes always
//! lie contiguously at the front of the buffer. To other descriptors it is just one large read. The kernel
//! looks at each segment it is handed, used or not, so their number follows what comes.
//! A short read does not mean that all was taken (a host may send half a page at a time), so only `EAGAIN`
//! says [`Progress::Wait`], and a pause, if there is a pace (below).
//!
//! **To send** offers a buffer of [`CHUNK`] bytes to the source, and writes what it filled with one system
//! call. [`CHUNK`] is what the port's driver takes in one `write`, as one descriptor: whole or not at all.
//! What a socket did not take stays in the buffer and goes out before the next offer; frames never mix.
//!
//! **The end**: a `read` of 0 is the end of a file or socket, and of a virtio port whose host end is not
//! connected (which the driver repeats for as long as that lasts, with `POLLHUP`); both end the link, as
//! a port that hung up must be closed: the next session starts from an empty port.
//!
//! # Readiness
//!
//! The descriptor is not given to tokio itself: tokio keeps a `HUP` it once saw as "closed", for good, but
//! on a virtio port it is a state that comes and goes, and a waiting task would spin. Instead each link
//! has an `edges::Edges` of its own.
//!
//! *No wake-up is lost*: the port's epoll is edge-triggered, so every call that says `Wait` has seen
//! `EAGAIN` (or an idle source) first, or set the timer of a pause, and whatever changes after that is a new edge. Adding interest in
//! writing looks at the state again, in the kernel. *No wake-up is repeated*: an edge is taken out when it
//! is seen, so a lasting `HUP` wakes us once. Writability is watched only while there is something to
//! write: the port's driver wakes its waiters each time the host took a buffer, and those wake-ups mean
//! nothing to an idle sender.
//!
//! **At a pace** ([`Link::set_pace`]): after each read, but one that filled the buffer, nothing is read, nor watched for, until
//! a timer has run out. So a wake-up gets what has gathered, where bytes come one by one and never stop for long enough to
//! see `EAGAIN`.
//!
//! The driver has a trap here: a `poll` of the port also reclaims sent buffers, and then the interrupt that
//! announces them wakes nobody. That is harmless as long as every poll's answer reaches the one who
//! waits for it. So nobody but this epoll may poll the port while a link waits to write;
//! [`FdLink::revents`] is for before.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Interest, Token};

use crate::channel::{Link, Needs, Progress, Sink, Source};
use crate::edges::Edges;
use crate::fine_timer::FineTimer;
use crate::segment::{Segment, readv, writev};

/// Bytes in one segment of a receive: the most that one `read` of a virtio port gives.
pub const PAGE: usize = 4096;

/// Segments in one receive, at most: what a host sends at once, 64 pages of data and a header for each few of them, and
/// some to spare. Far more gained nothing with a ring of 1024 buffers.
pub const PAGES: usize = 72;

/// Bytes of payload in a long frame: 64 pages with its header.
const LONG_FRAME: u32 = 64 * 4096 - 8;

/// Segments in one receive, at least.
const FEWEST_PAGES: usize = 4;

/// Bytes in one send: the most that one `write` to a virtio port takes.
pub const CHUNK: usize = 32 * 1024;

/// A link over a file descriptor.
pub struct FdLink {
    watch: Watch,
    /// What is read; and written, unless there is another one for that.
    fd: OwnedFd,
    /// What is written instead of `fd`.
    out: Option<OwnedFd>,
    /// Room for one receive; untouched pages of it are not resident.
    inbound: Box<[u8]>,
    /// How many pages of it the next receive takes.
    pages: usize,
    /// Room for one send.
    outbound: Box<[u8]>,
    /// What part of `outbound` is yet to be written.
    pending: Range<usize>,
    needs: Needs,
    pace: Option<Pace>,
}

impl FdLink {
    /// A link over `fd`, which is made non-blocking. It must be something that epoll takes.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O enabled.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        Self::of(fd, None)
    }

    /// A link that reads `from` and writes `to`, otherwise as [`FdLink::new`].
    ///
    /// # Panics
    /// As [`FdLink::new`].
    pub fn pair(from: OwnedFd, to: OwnedFd) -> io::Result<Self> {
        set_nonblocking(to.as_fd())?;
        Self::of(from, Some(to))
    }

    fn of(fd: OwnedFd, out: Option<OwnedFd>) -> io::Result<Self> {
        set_nonblocking(fd.as_fd())?;
        Ok(FdLink {
            watch: Watch::new(fd.as_fd(), out.as_ref().map(AsFd::as_fd))?,
            fd,
            out,
            inbound: vec![0; PAGE * PAGES].into(),
            pages: FEWEST_PAGES,
            outbound: vec![0; CHUNK].into(),
            pending: 0..0,
            needs: Needs::default(),
            pace: None,
        })
    }

    /// The same link, over which every frame is sealed.
    #[must_use]
    pub fn sealed(mut self) -> Self {
        self.needs.seal = true;
        self
    }

    /// The same link, over which the other end may send long frames: what one receive takes.
    #[must_use]
    pub fn with_long_frames(mut self) -> Self {
        self.needs.frame = LONG_FRAME;
        self
    }

    /// What `poll(2)` says now: some of `POLLIN`, `POLLOUT`, `POLLHUP` and `POLLERR`.
    /// Until the first [`Link::send`], [`Link::poll_ready`] becomes ready when any of them is set or (on a
    /// virtio port) the host connects.
    pub fn revents(&self) -> io::Result<libc::c_short> {
        let mut poll = libc::pollfd {
            fd: self.fd.as_raw_fd(),
            events: libc::POLLIN | libc::POLLOUT,
            revents: 0,
        };
        // SAFETY: one valid `pollfd`; the call does not block.
        match unsafe { libc::poll(&raw mut poll, 1, 0) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(poll.revents),
        }
    }

    fn watch_writable(&mut self, writable: bool) -> io::Result<()> {
        let out = self.out.as_ref().unwrap_or(&self.fd);
        self.watch.watch_writable(out.as_fd(), writable)
    }

    /// After a read of `n` bytes into all of `pages`: takes more of them next time, or fewer.
    fn learn(&mut self, n: usize) {
        let room = self.pages * PAGE;
        if n == room {
            self.pages = (self.pages * 2).min(PAGES);
        } else if n < room / 4 {
            self.pages = (self.pages / 2).max(FEWEST_PAGES);
        }
    }

    /// After a read that left room: begins a pause, if there is a pace.
    fn pause(&mut self) -> io::Result<Progress> {
        match &mut self.pace {
            Some(pace) => {
                pace.timer.set(pace.pause)?;
                pace.pausing = true;
                self.watch.watch_readable(self.fd.as_fd(), false)?;
                Ok(Progress::Wait)
            }
            None => Ok(Progress::Again),
        }
    }

    /// Writes what is pending; false if some of it is left.
    fn flush(&mut self) -> io::Result<bool> {
        while !self.pending.is_empty() {
            let segment = Segment::from_slice(&mut self.outbound[self.pending.clone()]);
            let out = self.out.as_ref().unwrap_or(&self.fd);
            match writev(out.as_fd(), &[segment]) {
                // A virtio port's way to say that its ring was full after all.
                Ok(0) => return Ok(false),
                Ok(n) => self.pending.start += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(ended(error)),
            }
        }
        Ok(true)
    }
}

impl AsFd for FdLink {
    /// What is read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Link for FdLink {
    fn needs(&self) -> Needs {
        self.needs
    }

    fn min_room(&self) -> usize {
        CHUNK
    }

    fn set_pace(&mut self, pause: Duration) {
        // Without a timer it just wakes more often; and two descriptors are watched otherwise.
        if let (None, Ok(timer)) = (&self.out, FineTimer::new()) {
            self.pace = Some(Pace {
                timer,
                pause,
                pausing: false,
            });
        }
    }

    fn receive(&mut self, sink: &mut Sink<'_>) -> io::Result<Progress> {
        if self.pace.as_ref().is_some_and(|pace| pace.pausing) {
            return Ok(Progress::Wait);
        }
        let room = self.pages * PAGE;
        let mut pages = self.inbound.chunks_exact_mut(PAGE);
        let segments: [Segment<'_>; PAGES] =
            std::array::from_fn(|_| Segment::from_slice(pages.next().expect("PAGES pages")));
        match readv(self.fd.as_fd(), &segments[..self.pages]) {
            Ok(0) => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the other side hung up",
            )),
            Ok(n) => {
                sink(&[Segment::from_slice(&mut self.inbound[..n])]);
                self.learn(n);
                match n == room {
                    true => Ok(Progress::Again),
                    false => self.pause(),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Progress::Wait),
            Err(error) => Err(ended(error)),
        }
    }

    fn send(&mut self, source: &mut Source<'_>) -> io::Result<Progress> {
        if self.flush()? {
            let filled = source(&[Segment::from_slice(&mut self.outbound)]);
            if filled == 0 {
                self.watch_writable(false)?;
                return Ok(Progress::Wait);
            }
            assert!(filled <= CHUNK, "the source wrote past its room");
            self.pending = 0..filled;
            if self.flush()? {
                return Ok(Progress::Again);
            }
        }
        self.watch_writable(true)?;
        Ok(Progress::Wait)
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(pace) = &mut self.pace
            && pace.pausing
            && pace.timer.poll(cx).is_ready()
        {
            pace.pausing = false;
            // If that fails, so will whatever comes next.
            let _ = self.watch.watch_readable(self.fd.as_fd(), true);
            return Poll::Ready(());
        }
        self.watch.poll_edge(cx)
    }
}

/// Lets bytes that come in very small pieces gather (see [`Link::set_pace`]).
struct Pace {
    timer: FineTimer,
    pause: Duration,
    /// Nothing is read until the timer has run out. Else the next byte is read at once.
    pausing: bool,
}

/// Watches the link's descriptors.
struct Watch {
    edges: Edges,
    events: mio::Events,
    writable: bool,
    /// What there is to see when nothing is to be written.
    idle: Interest,
}

impl Watch {
    /// Starts to watch `fd`, and `out` if that is another one, for everything: the first `send` tells whether to go
    /// on so.
    fn new(fd: BorrowedFd<'_>, out: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        let edges = Edges::new()?;
        let watch = |fd: BorrowedFd<'_>, token, interest| {
            let mut source = SourceFd(&fd.as_raw_fd());
            edges.registry().register(&mut source, token, interest)
        };
        let idle = match out {
            None => {
                watch(fd, Token(0), Interest::READABLE | Interest::WRITABLE)?;
                Interest::READABLE
            }
            Some(out) => {
                watch(fd, Token(1), Interest::READABLE)?;
                watch(out, Token(0), Interest::WRITABLE)?;
                // Which pipes never have: only what cannot be left out, the end, is seen.
                Interest::PRIORITY
            }
        };
        Ok(Watch {
            edges,
            // One for each descriptor.
            events: mio::Events::with_capacity(2),
            writable: true,
            idle,
        })
    }

    /// Whether what comes on `fd`, the only descriptor, is to be told. Its end always is.
    fn watch_readable(&mut self, fd: BorrowedFd<'_>, readable: bool) -> io::Result<()> {
        self.idle = match readable {
            true => Interest::READABLE,
            false => Interest::PRIORITY,
        };
        let interest = match self.writable {
            true => self.idle | Interest::WRITABLE,
            false => self.idle,
        };
        let registry = self.edges.registry();
        registry.reregister(&mut SourceFd(&fd.as_raw_fd()), Token(0), interest)
    }

    /// Whether room to write on `out`, the descriptor that is written, is to be told.
    fn watch_writable(&mut self, out: BorrowedFd<'_>, writable: bool) -> io::Result<()> {
        if self.writable != writable {
            let interest = match writable {
                true => self.idle | Interest::WRITABLE,
                false => self.idle,
            };
            let registry = self.edges.registry();
            registry.reregister(&mut SourceFd(&out.as_raw_fd()), Token(0), interest)?;
            self.writable = writable;
        }
        Ok(())
    }

    /// Ready at an edge; a failure will show when the link is used.
    fn poll_edge(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.edges.poll_ready(cx));
            if self.edges.take(&mut self.events).is_err() || !self.events.is_empty() {
                return Poll::Ready(());
            }
        }
    }
}

/// A peer that is gone is the ordinary end, whatever the kind of descriptor calls it. (`ENODEV`: the port
/// was unplugged.)
fn ended(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EPIPE | libc::ECONNRESET | libc::ENODEV) => {
            io::Error::new(io::ErrorKind::UnexpectedEof, error)
        }
        _ => error,
    }
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: F_GETFL and F_SETFL take and give plain integers.
    let done = unsafe {
        match libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) {
            -1 => -1,
            flags if flags & libc::O_NONBLOCK != 0 => 0,
            flags => libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK),
        }
    };
    match done {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
