//! The floors: a plain copy, and a UNIX socket with nothing else at either end.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::MIB;
use crate::ends::{End, Payload};
use virtproxy_engine::segment::Segment;

/// Memory that is walked through.
pub(crate) const MEMORY: usize = 64 * MIB;
/// What fits in a cache.
const CACHED: usize = 32 * 1024;
/// Buffers copied in one go, so that going from one to the next costs the copy as little as it can.
const AT_ONCE: usize = 16;
const MAX_READ: usize = 256 * 1024;
/// Bytes of a call, and of its answer.
const CALL: usize = 64;

/// Copies between the buffers of a ring and memory.
pub(crate) struct Copier {
    to_guest: bool,
    buffers: Vec<Segment<'static>>,
    next: usize,
    payload: Payload,
    cached: Payload,
}

impl Copier {
    pub(crate) fn new((to_guest, buffers): (bool, Vec<Segment<'static>>)) -> Self {
        Copier {
            to_guest,
            buffers,
            next: 0,
            payload: Payload::copied(MEMORY),
            cached: Payload::copied(CACHED),
        }
    }

    /// Through all buffers in turn.
    pub(crate) fn copy(&mut self, bytes: usize) -> Duration {
        let start = Instant::now();
        let mut left = bytes;
        self.payload.send_more(bytes);
        while left > 0 {
            let buffers = &self.buffers[self.next..self.next + AT_ONCE];
            self.next = (self.next + AT_ONCE) % self.buffers.len();
            match self.to_guest {
                true => drop(self.payload.fill(buffers)),
                false => self.payload.on_bytes(buffers),
            }
            left = left.saturating_sub(AT_ONCE * buffers[0].len());
        }
        start.elapsed()
    }

    /// The same buffer again and again.
    pub(crate) fn copy_cached(&mut self, bytes: usize) -> Duration {
        let start = Instant::now();
        let len = self.buffers[0].len();
        self.cached.send_more(bytes);
        for _ in 0..bytes / len {
            match self.to_guest {
                true => drop(self.cached.fill(&self.buffers[..1])),
                false => self.cached.on_bytes(&self.buffers[..1]),
            }
        }
        start.elapsed()
    }
}

/// What a thread is to do with its socket.
enum Order {
    Read(usize),
    Write {
        bytes: usize,
        each: usize,
    },
    /// Say a little, hear as much, so many times.
    Call(usize),
    /// The other side of that.
    Answer(usize),
}

/// How long each call took; empty for other orders.
type Done = oneshot::Sender<Vec<Duration>>;

/// A thread that reads a socket into memory and writes it from memory.
pub(crate) struct Peer(mpsc::Sender<(Order, Done)>);

impl Peer {
    /// The socket is there when `connect` returns.
    pub(crate) fn start(connect: impl FnOnce() -> UnixStream + Send + 'static) -> Self {
        let (orders, come) = mpsc::channel::<(Order, Done)>();
        thread::spawn(move || {
            let mut socket = connect();
            let mut memory = vec![1; MEMORY];
            let mut at = 0;
            for (order, done) in come {
                let mut calls = Vec::new();
                let mut word = [0; CALL];
                match order {
                    Order::Read(bytes) => {
                        let mut left = bytes;
                        while left > 0 {
                            let most = MAX_READ.min(left);
                            let n = socket.read(&mut memory[..most]).unwrap();
                            assert!(n > 0, "cut off");
                            left -= n;
                        }
                    }
                    Order::Write { bytes, each } => {
                        for _ in 0..bytes / each {
                            socket.write_all(&memory[at..at + each]).unwrap();
                            at = (at + each) % MEMORY;
                        }
                    }
                    Order::Call(count) => {
                        for _ in 0..count {
                            let start = Instant::now();
                            socket.write_all(&word).unwrap();
                            socket.read_exact(&mut word).unwrap();
                            calls.push(start.elapsed());
                        }
                    }
                    Order::Answer(count) => {
                        for _ in 0..count {
                            socket.read_exact(&mut word).unwrap();
                            socket.write_all(&word).unwrap();
                        }
                    }
                }
                let _ = done.send(calls);
            }
        });
        Peer(orders)
    }

    /// Completes when so much was read.
    pub(crate) fn read(&self, bytes: usize) -> oneshot::Receiver<Vec<Duration>> {
        self.order(Order::Read(bytes))
    }

    /// Completes when so much was written.
    pub(crate) fn write(&self, bytes: usize, each: usize) -> oneshot::Receiver<Vec<Duration>> {
        self.order(Order::Write { bytes, each })
    }

    /// Completes with how long each of so many calls took.
    pub(crate) fn call(&self, count: usize) -> oneshot::Receiver<Vec<Duration>> {
        self.order(Order::Call(count))
    }

    fn order(&self, order: Order) -> oneshot::Receiver<Vec<Duration>> {
        let (done, when_done) = oneshot::channel();
        self.0.send((order, done)).unwrap();
        when_done
    }
}

/// A socket pair between two threads.
pub(crate) struct Pair {
    writer: Peer,
    reader: Peer,
}

impl Pair {
    pub(crate) fn new() -> Self {
        let (near, far) = UnixStream::pair().unwrap();
        Pair {
            writer: Peer::start(move || near),
            reader: Peer::start(move || far),
        }
    }

    /// Carries so many bytes, with writes of this length.
    pub(crate) async fn carry(&mut self, bytes: usize, each: usize) -> Duration {
        let start = Instant::now();
        let read = self.reader.read(bytes);
        let _written = self.writer.write(bytes, each);
        read.await.unwrap();
        start.elapsed()
    }

    /// How long each of so many calls takes.
    pub(crate) async fn call(&mut self, count: usize) -> Vec<Duration> {
        let _answered = self.reader.order(Order::Answer(count));
        self.writer.call(count).await.unwrap()
    }
}
