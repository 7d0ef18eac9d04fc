//! What lies between the two ends: the one trait behind which each kind of channel is a small file.
//!
//! # Theory of operation
//!
//! A [`Channel`] is what a user names with `-c`. It is opened again and again, for as long as the
//! program runs: each [`Channel::open`] waits until the other end may be there and gives a [`Link`],
//! one uninterrupted run of bytes each way. When the link ends (a hang-up, the guest closed its port, an
//! error) the driver drops it, ends the session that ran over it and opens the channel again.
//!
//! A link never blocks. Bytes move in *transactions*, so that a link over guest memory can hold its ring's
//! lock exactly as long as it must and never carries a half-used descriptor chain from one call to the next:
//!
//! * [`Link::receive`] hands bytes that arrived to a sink, which takes **all** of them;
//! * [`Link::send`] offers room to a source, which fills it from the front with **whole frames**.
//!
//! The driver calls both until they say [`Progress::Wait`], then waits for [`Link::poll_ready`]. It may call either at any
//! other time, but need not: what said `Wait` has nothing to tell until the link is ready.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::segment::Segment;

/// A boxed future that borrows for `'a`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// A way to the other end, named with `-c`.
pub trait Channel {
    /// Waits until the other end may be there (for ever, if need be), and returns a link to it.
    /// Cancel-safe. An error is final: the channel cannot ever work and the program says so and ends;
    /// what may pass (a port not there yet, a refused connect) is retried inside, with bounded back-off.
    /// `UnexpectedEof` alone is no failure: a channel that can be had only once, such as standard input and output, has
    /// ended with its link.
    fn open(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Link>>>;

    /// The last link carried a session: if another is opened, then not as after a failure.
    fn carried(&mut self) {}

    /// How the user named it, for messages: `vhost-user:/run/vp.sock`.
    fn name(&self) -> &str;
}

/// Whether a [`Link`] call may be repeated at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// More can be done right away: call again.
    Again,
    /// Nothing more for now. The link has armed its notification: [`Link::poll_ready`] will tell.
    Wait,
}

/// What a link asks of the sessions that run over it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Frames are to be sealed: bytes may vanish or appear in the channel, and nothing below the session notices.
    pub seal: bool,
    /// Bytes that a stream may send in one turn while others wait.
    pub turn: u32,
    /// Bytes that must be allowed to be on their way to us for the channel to be kept busy, if the session's own measure
    /// is less.
    pub window: u32,
    /// Bytes that a frame for us may have, if the session's own measure is less: where the other end can read so much at
    /// a time, fewer frames are cheaper.
    pub frame: u32,
}

impl Default for Needs {
    /// Those of a fast channel that keeps what it is given.
    fn default() -> Self {
        Needs {
            seal: false,
            turn: virtproxy_mux::DEFAULT_TURN,
            window: 0,
            frame: 0,
        }
    }
}

/// Takes every byte of the segments it is given.
pub type Sink<'f> = dyn FnMut(&[Segment<'_>]) + 'f;

/// Fills the segments it is given from the front, with whole frames only, and returns the number of
/// bytes written; 0 means there is nothing to send.
pub type Source<'f> = dyn FnMut(&[Segment<'_>]) -> usize + 'f;

/// One uninterrupted run of bytes each way.
///
/// Every method may return an error; it ends the link for good. `UnexpectedEof` is the ordinary end:
/// the other side went away (hang-up, port closed, end of file).
pub trait Link {
    /// What it asks of its sessions; the same for all its life.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// The least room, in bytes, that a source passed to [`Link::send`] is ever offered.
    fn min_room(&self) -> usize {
        4096
    }

    /// Asks it to let so much time pass after each small read before it looks again: for a channel whose bytes come in ones
    /// and eights, each of which would be a wake-up. Until then `receive` says `Wait`. A link may not care.
    fn set_pace(&mut self, _pause: Duration) {}

    /// Hands at most one batch of received bytes to `sink`. `Wait`: all that had arrived was handed over.
    fn receive(&mut self, sink: &mut Sink<'_>) -> io::Result<Progress>;

    /// Offers room to `source` at most once and sends what it wrote. `Wait`: either the source had nothing
    /// (it was offered room and returned 0), or the link has no room now.
    fn send(&mut self, source: &mut Source<'_>) -> io::Result<Progress>;

    /// Ready when a `receive` or `send` that said `Wait` may do something again, or the link has ended.
    /// May be ready without reason.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()>;
}
