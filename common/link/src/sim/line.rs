//! One direction of a serial line with a 16550 at its far end.
//!
//! ```text
//! writer -> buffer of the tty -> one byte each byte_time, damaged as asked -> FIFO of 16 bytes -> reader
//! ```
//!
//! Without hardware flow control a byte that finds the FIFO full is gone, without a word; so it is when QEMU's model of
//! the chip finds its chardev full. With it, the line waits.

use std::collections::VecDeque;
use std::vec::Vec;

use virtproxy_mux::sim::Rng;

use crate::endpoint::Time;

/// What happens to bytes, each so often in a million.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// A byte is lost.
    pub drop: u32,
    /// It comes twice.
    pub double: u32,
    /// One of its bits is another.
    pub flip: u32,
    /// One that nobody sent comes before it.
    pub insert: u32,
}

impl Faults {
    /// All of them equally often.
    pub const fn all(in_a_million: u32) -> Self {
        Faults {
            drop: in_a_million,
            double: in_a_million,
            flip: in_a_million,
            insert: in_a_million,
        }
    }
}

/// How a line is built.
#[derive(Clone, Copy, Debug)]
pub struct Build {
    /// How long a byte takes, in microseconds.
    pub byte_time: Time,
    /// Bytes that the writer's side takes beforehand.
    pub buffer: usize,
    /// Bytes that wait for the reader.
    pub fifo: usize,
    /// Whether the line waits for the reader.
    pub hardware_flow: bool,
}

impl Build {
    /// A 16550 at 115200 bits a second without hardware flow control.
    pub const UART: Self = Build {
        byte_time: 87,
        buffer: 4096,
        fifo: 16,
        hardware_flow: false,
    };
}

/// One direction of the line.
pub struct Line {
    build: Build,
    pub(crate) faults: Faults,
    rng: Rng,
    buffer: VecDeque<u8>,
    fifo: VecDeque<u8>,
    next_byte: Time,
    /// Bytes that found the FIFO full.
    pub overruns: u64,
}

impl Line {
    /// An idle line.
    pub fn new(build: Build, faults: Faults, seed: u64) -> Self {
        Line {
            build,
            faults,
            rng: Rng::new(seed),
            buffer: VecDeque::new(),
            fifo: VecDeque::new(),
            next_byte: 0,
            overruns: 0,
        }
    }

    /// Bytes that can be written now.
    pub fn room(&self) -> usize {
        self.build.buffer.saturating_sub(self.buffer.len())
    }

    /// Writes bytes; the caller looked for room.
    pub fn write(&mut self, now: Time, bytes: &[u8]) {
        if self.buffer.is_empty() {
            self.next_byte = self.next_byte.max(now + self.build.byte_time);
        }
        self.buffer.extend(bytes);
    }

    /// Others (the kernel, a getty) write in between, without asking for room.
    pub fn intrude(&mut self, now: Time, bytes: &[u8]) {
        let rest = self.buffer.split_off(self.buffer.len() / 2);
        self.write(now, bytes);
        self.buffer.extend(rest);
    }

    /// When the next byte arrives.
    pub fn next_time(&self) -> Option<Time> {
        let waits = self.build.hardware_flow && self.fifo.len() >= self.build.fifo;
        (!self.buffer.is_empty() && !waits).then_some(self.next_byte)
    }

    /// Lets arrive what arrives until `now`.
    pub fn advance(&mut self, now: Time) {
        while self.next_time().is_some_and(|time| time <= now) {
            let Some(byte) = self.buffer.pop_front() else {
                break;
            };
            self.next_byte += self.build.byte_time;
            self.arrive(byte);
        }
    }

    fn arrive(&mut self, byte: u8) {
        let mut fate = |in_a_million: u32| self.rng.below(1_000_000) < u64::from(in_a_million);
        let faults = self.faults;
        let [drop, double, flip, insert] =
            [faults.drop, faults.double, faults.flip, faults.insert].map(&mut fate);
        let [random, ..] = self.rng.number().to_le_bytes();
        if insert {
            self.deliver(random);
        }
        if drop {
            return;
        }
        let byte = if flip { byte ^ 1 << (random % 8) } else { byte };
        self.deliver(byte);
        if double {
            self.deliver(byte);
        }
    }

    fn deliver(&mut self, byte: u8) {
        if self.fifo.len() < self.build.fifo {
            self.fifo.push_back(byte);
        } else {
            self.overruns += 1;
        }
    }

    /// Takes what has arrived; the hardware's wait, if it was one, is over at `now`.
    pub fn read(&mut self, now: Time) -> Vec<u8> {
        if self.build.hardware_flow && self.fifo.len() >= self.build.fifo {
            self.next_byte = self.next_byte.max(now + self.build.byte_time);
        }
        self.fifo.drain(..).collect()
    }
}
