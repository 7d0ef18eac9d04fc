//! Joins a port with whoever is at its place, both ways, until it is told to stop.
//!
//! # Theory of operation
//!
//! The guest's side and the host's side come and go independently: a program in the guest may keep its port open
//! over many clients, and a client may wait for a guest that is not there yet. So a relay has a link or not, and a
//! peer or not:
//!
//! | guest | peer | |
//! | --- | --- | --- |
//! | has it open | there | bytes go both ways |
//! | has it open | none | it sees the port closed on our side; what it wrote before it saw that is discarded |
//! | closed | there | the peer is not read, so it waits |
//!
//! Each new peer is told to the guest, as a port that closes and opens again. **The guest is held back by a peer that
//! does not read**: a batch from the ring is written at once, what is not taken waits here, and no other batch is
//! taken before it is gone. The guest's ring fills, and a write there blocks or gives EAGAIN.
//!
//! **A console is never held back**, because Linux spins for each write to it, with interrupts off: its processor
//! would stand still until somebody reads. So a console's side always looks open, and what its peer does not take
//! in time is dropped, as on a line that nobody listens to.
//!
//! A peer that has said all it has to (a half-closed socket) still gets answers; it is gone when it hangs up. What it
//! said before is delivered first, as fast as the guest reads it, if the guest has the port open.

use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use tokio::sync::oneshot;
use tokio::time::Interval;
use tracing::{debug, warn};
use virtproxy_engine::channel::{Link, Progress};
use virtproxy_engine::log_limit::LogLimit;
use virtproxy_engine::segment::{Cursor, Segment};

use super::Status;
use super::peer::{Door, Peer};
use super::terminal::looks;
use crate::device::Port;

/// Looks at what is stale: enough for a full ring and some sessions, and an end for a guest that writes and writes.
const MOST_STALE: usize = 128;

/// What a console's peer may be behind, in bytes.
const CONSOLE_BACKLOG: usize = 64 * 1024;

pub(super) struct Relay {
    name: String,
    port: Port,
    door: Door,
    console: bool,
    link: Option<Box<dyn Link>>,
    peer: Option<Peer>,
    /// What the guest wrote and the peer has not taken: less than a batch ([`Link::receive`]) and a
    /// [`CONSOLE_BACKLOG`].
    pending: Pending,
    /// What the guest was told.
    size: Option<(u16, u16)>,
    looks: Interval,
    complaints: LogLimit,
    status: Rc<Status>,
}

impl Relay {
    pub(super) fn new(
        name: &str,
        port: Port,
        door: Door,
        console: bool,
        status: Rc<Status>,
    ) -> Self {
        Relay {
            name: name.to_owned(),
            port,
            door,
            console,
            link: None,
            peer: None,
            pending: Pending::default(),
            size: None,
            looks: looks(),
            complaints: LogLimit::default(),
            status,
        }
    }

    /// Runs until `stop` is sent or dropped, and gives the port back.
    pub(super) async fn run(mut self, mut stop: oneshot::Receiver<()>) -> Port {
        loop {
            if self.turn() {
                // Others have their turn; and are we to stop?
                tokio::task::yield_now().await;
                if stop.try_recv() != Err(oneshot::error::TryRecvError::Empty) {
                    break;
                }
                continue;
            }
            self.status.guest_open.set(self.link.is_some());
            self.status.connected.set(self.peer.is_some());
            tokio::select! {
                _ = &mut stop => break,
                () = self.wait() => {}
            }
        }
        self.port
    }

    /// Waits until there is something to do.
    async fn wait(&mut self) {
        let (port, link, pending) = (&mut self.port, &mut self.link, &mut self.pending);
        let (door, peer, name) = (&mut self.door, &mut self.peer, &self.name);
        let complaints = &mut self.complaints;
        let came = peer.is_none();
        let watched = self.console && peer.as_ref().is_some_and(Peer::is_terminal);
        let guest = poll_fn(|cx| {
            let mut ready = port.poll_emergency(cx, &mut pending.bytes).is_ready();
            match link {
                Some(link) => ready |= link.poll_ready(cx).is_ready(),
                None => {
                    if let Poll::Ready(opened) = port.poll_open(cx) {
                        *link = Some(opened);
                        ready = true;
                    }
                }
            }
            if ready {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        });
        let host = async {
            match peer {
                Some(peer) => poll_fn(|cx| peer.poll_ready(cx)).await,
                None => *peer = Some(door.next(name, complaints).await),
            }
        };
        tokio::select! {
            () = guest => {}
            () = host => {}
            _ = self.looks.tick(), if watched => {}
        }
        if came && self.peer.is_some() {
            self.met();
        }
        if watched {
            self.resize();
        }
    }

    /// Does a bounded piece of everything; whether there may be more to do.
    fn turn(&mut self) -> bool {
        let mut moved = self.write_on();
        moved |= self.carry_from_guest();
        moved |= self.carry_to_guest();
        moved | self.part()
    }

    fn met(&mut self) {
        debug!(port = self.name, "somebody is there");
        if !self.console {
            self.discard();
            self.port.set_connected(true);
        }
    }

    /// Discards what the guest wrote to whoever was there before, and has not been looked at since.
    fn discard(&mut self) {
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..MOST_STALE {
            let Some(link) = &mut self.link else {
                match self.port.poll_open(&mut cx) {
                    Poll::Ready(opened) => self.link = Some(opened),
                    Poll::Pending => return,
                }
                continue;
            };
            match link.receive(&mut |_| {}) {
                Ok(Progress::Again) => {}
                Ok(_) => return,
                Err(_) => self.link = None,
            }
        }
    }

    /// Tells a console's guest the size of the terminal, if it is another one.
    fn resize(&mut self) {
        let size = self.peer.as_ref().and_then(Peer::size);
        if let Some((columns, rows)) = size.filter(|_| size != self.size) {
            self.port.resize(columns, rows);
            self.size = size;
        }
    }

    /// Lets go of a peer that has gone, once all it said is delivered or there is nobody to hear it.
    fn part(&mut self) -> bool {
        let said_all = self.link.is_none() || !self.peer.as_ref().is_some_and(Peer::speaks);
        if !said_all || !self.peer.as_ref().is_some_and(Peer::is_gone) {
            return false;
        }
        debug!(port = self.name, "nobody is there any more");
        self.peer = None;
        self.pending.skip(usize::MAX);
        if !self.console {
            self.port.set_connected(false);
        }
        true
    }

    /// Writes what the peer has not taken so far.
    fn write_on(&mut self) -> bool {
        let mut moved = false;
        while !self.pending.is_empty() {
            let written = match &self.peer {
                Some(peer) => peer.write(&[self.pending.segment()]),
                None => Ok(usize::MAX),
            };
            match written {
                Ok(0) => break,
                Ok(n) => self.pending.skip(n),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    self.pending.skip(usize::MAX);
                    complain(&mut self.complaints, &self.name, &error);
                }
            }
            moved = true;
        }
        moved
    }

    fn carry_from_guest(&mut self) -> bool {
        let Some(link) = &mut self.link else {
            return false;
        };
        if !self.pending.is_empty() && !self.console {
            return false;
        }
        let (peer, pending) = (&self.peer, &mut self.pending);
        let room = match self.console {
            true => CONSOLE_BACKLOG,
            false => usize::MAX,
        };
        let (name, complaints) = (&self.name, &mut self.complaints);
        let received = link.receive(&mut |segments| {
            if let Some(peer) = peer
                && let Err(error) = deliver(peer, segments, pending, room)
            {
                complain(complaints, name, &error);
            }
        });
        match received {
            Ok(progress) => progress == Progress::Again,
            Err(_) => {
                debug!(port = self.name, "the guest has closed the port");
                self.link = None;
                true
            }
        }
    }

    fn carry_to_guest(&mut self) -> bool {
        let (Some(link), Some(peer)) = (&mut self.link, &mut self.peer) else {
            return false;
        };
        if !peer.speaks() {
            return false;
        }
        // An end of the link shows when it is received from.
        let sent = link.send(&mut |room| peer.read(room));
        sent.is_ok_and(|progress| progress == Progress::Again)
    }
}

/// Writes what the guest wrote to the peer; what that does not take is kept, up to `room` bytes in all.
fn deliver(
    peer: &Peer,
    segments: &[Segment<'_>],
    pending: &mut Pending,
    room: usize,
) -> io::Result<()> {
    let mut cursor = Cursor::new(segments);
    if pending.is_empty() {
        match peer.write(segments) {
            Ok(n) => cursor.advance(n),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    pending.append(&mut cursor, room);
    Ok(())
}

/// Bytes for the peer that it has not taken.
#[derive(Default)]
struct Pending {
    bytes: Vec<u8>,
    /// So many of them it has.
    taken: usize,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.taken == self.bytes.len()
    }

    fn segment(&mut self) -> Segment<'_> {
        Segment::from_slice(&mut self.bytes[self.taken..])
    }

    /// The first `n` are taken. Once all are, no memory is kept.
    fn skip(&mut self, n: usize) {
        self.taken = self.taken.saturating_add(n);
        if self.taken >= self.bytes.len() {
            *self = Self::default();
        }
    }

    /// Adds what follows, so that there are at most `room` bytes.
    fn append(&mut self, cursor: &mut Cursor<'_, '_>, room: usize) {
        self.bytes.drain(..std::mem::take(&mut self.taken));
        let start = self.bytes.len();
        let kept = cursor.remaining().min(room.saturating_sub(start));
        self.bytes.resize(start + kept, 0);
        cursor.read(&mut self.bytes[start..]);
    }
}

/// A peer that has hung up is not worth a word.
fn complain(complaints: &mut LogLimit, port: &str, error: &io::Error) {
    let hung_up = matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    );
    if !hung_up && let Some(held_back) = complaints.pass(Instant::now()) {
        warn!(port, "what the guest wrote is lost: {error}{held_back}");
    }
}
