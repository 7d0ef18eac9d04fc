//! A link over a line that loses and damages bytes: it puts `virtproxy_link` and real time over another link.
//!
//! # Theory of operation
//!
//! The inner link carries bytes, as it can. Frames are made only when it offers room, so that as little as possible lies
//! in queues: what the session decides to send next (the answer to a small request, before the bulk) is then the
//! next on the line. At most `BURST` bytes are made for one offer.
//!
//! One timer wakes the driver for what is due without anything having arrived: a HELLO, a retransmission, an
//! acknowledgement. While the inner link has no room it is not set, for nothing could be sent.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};
use tracing::debug;
use virtproxy_link::{Config, Endpoint, Time};

use crate::channel::{Link, Needs, Progress, Sink, Source};
use crate::segment::{Cursor, Segment};

/// Bytes of frames made for one offer of room; a serial port's driver takes about as much at once.
const BURST: usize = 4096;
/// What one frame may add to that, and all control bytes.
const LONGEST_FRAME: usize = 640;
/// Room offered to the session: for one turn of a stream, behind a few control frames.
const ROOM: usize = 1536;
/// What a stream may send in one turn while others wait: 10 ms of a line of 100 kB/s.
const TURN: u32 = 1024;
/// How long bytes may gather. The driver of a 16550 gets eight at a time; QEMU writes each single one to its chardev's socket,
/// and the kernel lets fewer than 300 of those wait there.
const PACE_AT_CHIP: Duration = Duration::from_millis(2);
const PACE_AT_SOCKET: Duration = Duration::from_micros(300);

/// See the [module](self).
pub struct LossyLink {
    inner: Box<dyn Link>,
    endpoint: Endpoint,
    started: Instant,
    timer: Pin<Box<Sleep>>,
    /// The inner link offered no room when it was last asked.
    blocked: bool,
    arrived: Vec<u8>,
    in_order: Vec<u8>,
    frames: Vec<u8>,
    room: Box<[u8]>,
}

impl LossyLink {
    /// A new incarnation of this end, over `inner`, whose speed (in bits a second) it may know.
    pub fn new(mut inner: Box<dyn Link>, speed: Option<u32>) -> io::Result<Self> {
        inner.set_pace(match speed {
            Some(_) => PACE_AT_CHIP,
            None => PACE_AT_SOCKET,
        });
        let id = getrandom::u64().map_err(io::Error::other)?;
        Ok(LossyLink {
            inner,
            endpoint: Endpoint::new(Config { id, speed }),
            started: Instant::now(),
            timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
            blocked: false,
            arrived: Vec::new(),
            in_order: Vec::new(),
            frames: Vec::with_capacity(BURST + LONGEST_FRAME),
            room: vec![0; ROOM].into(),
        })
    }

    fn now(&self) -> Time {
        Time::try_from(self.started.elapsed().as_micros()).unwrap_or(Time::MAX)
    }

    /// Whether the endpoint is over.
    fn check(&self) -> io::Result<()> {
        let Some(end) = self.endpoint.end() else {
            return Ok(());
        };
        let kind = match end {
            virtproxy_link::End::PeerRestarted => io::ErrorKind::UnexpectedEof,
            _ => io::ErrorKind::InvalidData,
        };
        Err(io::Error::new(kind, end.to_string()))
    }
}

impl Drop for LossyLink {
    fn drop(&mut self) {
        debug!(stats = ?self.endpoint.stats(), "line closed");
    }
}

impl Link for LossyLink {
    fn needs(&self) -> Needs {
        Needs {
            turn: TURN,
            ..Needs::default()
        }
    }

    fn min_room(&self) -> usize {
        ROOM
    }

    fn receive(&mut self, sink: &mut Sink<'_>) -> io::Result<Progress> {
        let arrived = &mut self.arrived;
        let progress = self.inner.receive(&mut |segments| {
            let mut cursor = Cursor::new(segments);
            arrived.resize(cursor.remaining(), 0);
            cursor.read(arrived);
        })?;
        if !self.arrived.is_empty() {
            let now = self.now();
            self.endpoint
                .handle_bytes(now, &self.arrived, &mut self.in_order);
            self.arrived.clear();
        }
        if !self.in_order.is_empty() {
            sink(&[Segment::from_slice(&mut self.in_order)]);
            self.in_order.clear();
        }
        self.check()?;
        Ok(progress)
    }

    fn send(&mut self, source: &mut Source<'_>) -> io::Result<Progress> {
        let now = self.now();
        let (endpoint, frames, room) = (&mut self.endpoint, &mut self.frames, &mut self.room);
        self.blocked = true;
        let blocked = &mut self.blocked;
        self.inner.send(&mut |segments| {
            *blocked = false;
            let mut cursor = Cursor::new(segments);
            let mut dry = false;
            frames.clear();
            while frames.len() + LONGEST_FRAME <= cursor.remaining().min(BURST + LONGEST_FRAME) {
                while !dry && endpoint.wants_data() {
                    let filled = source(&[Segment::from_slice(room)]);
                    endpoint.push(&room[..filled]);
                    dry = filled == 0;
                }
                if !endpoint.poll_transmit(now, frames) {
                    break;
                }
            }
            cursor.write(frames);
            frames.len()
        })
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.inner.poll_ready(cx).is_ready() {
            return Poll::Ready(());
        }
        let due = match self.endpoint.next_timeout() {
            Some(due) if !self.blocked => self.started + Duration::from_micros(due),
            _ => return Poll::Pending,
        };
        if self.timer.deadline() != due {
            self.timer.as_mut().reset(due);
        }
        self.timer.as_mut().poll(cx)
    }
}
