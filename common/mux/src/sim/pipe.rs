//! One direction of the channel between the ends: bytes in flight, in virtual time.

use std::collections::VecDeque;
use std::vec::Vec;

use super::Rng;
use crate::session::Time;

/// How a pipe hands out what has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "arbitrary", derive(arbitrary::Arbitrary))]
pub enum Split {
    /// All at once.
    Whole,
    /// Byte by byte.
    Bytes,
    /// In pieces of any size.
    Random,
}

/// What a channel that nobody watches does to a run of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "arbitrary", derive(arbitrary::Arbitrary))]
pub enum Fault {
    /// Loses so many.
    Lose(u16),
    /// Delivers so many twice.
    Double(u16),
    /// Adds so many of its own.
    Insert(u8),
}

pub(crate) struct Pipe {
    bytes: VecDeque<u8>,
    /// When which number of `bytes` arrives, oldest first.
    batches: VecDeque<(Time, usize)>,
    pub(crate) latency: Time,
    /// Bytes that fit in at once.
    pub(crate) capacity: usize,
    /// Nothing arrives before.
    pub(crate) stalled_until: Time,
    /// Nor is anything taken.
    pub(crate) blocked: bool,
    pub(crate) split: Split,
}

impl Pipe {
    pub(crate) fn new(capacity: usize) -> Self {
        Pipe {
            bytes: VecDeque::new(),
            batches: VecDeque::new(),
            latency: 100,
            capacity,
            stalled_until: 0,
            blocked: false,
            split: Split::Whole,
        }
    }

    pub(crate) fn room(&self, now: Time) -> usize {
        if self.blocked && now < self.stalled_until {
            return 0;
        }
        self.capacity.saturating_sub(self.bytes.len())
    }

    pub(crate) fn push(&mut self, now: Time, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let before = self.batches.back().map_or(0, |(at, _)| *at);
        let at = before.max(now + self.latency);
        match self.batches.back_mut() {
            Some((last, len)) if *last == at => *len += bytes.len(),
            _ => self.batches.push_back((at, bytes.len())),
        }
        self.bytes.extend(bytes);
    }

    /// When the next bytes arrive, or can be sent again.
    pub(crate) fn next_time(&self, now: Time) -> Option<Time> {
        let unblocked = self.blocked && now < self.stalled_until;
        let arrival = self.batches.front().map(|(at, _)| *at);
        let next = arrival.or(unblocked.then_some(0))?;
        Some(next.max(self.stalled_until))
    }

    /// Some of what has arrived.
    pub(crate) fn take(&mut self, now: Time, rng: &mut Rng) -> Vec<u8> {
        let arrival = self.batches.front().map(|(at, _)| *at);
        if arrival.is_none_or(|at| at.max(self.stalled_until) > now) {
            return Vec::new();
        }
        let arrived = self.batches.iter().take_while(|(at, _)| *at <= now);
        let arrived: usize = arrived.map(|(_, len)| *len).sum();
        let n = match self.split {
            Split::Whole => arrived,
            Split::Bytes => 1,
            Split::Random => 1 + rng.index(arrived.min(3000)),
        };
        let mut left = n;
        while let Some((_, len)) = self.batches.front_mut() {
            if *len > left {
                *len -= left;
                break;
            }
            left -= *len;
            self.batches.pop_front();
        }
        self.bytes.drain(..n).collect()
    }

    /// Loses the youngest `n` bytes; returns whether there were any.
    pub(crate) fn cut(&mut self, n: usize) -> bool {
        let n = n.min(self.bytes.len());
        self.replace(self.bytes.len() - n, n, &[]);
        n > 0
    }

    /// Does something to the bytes in flight from `place` on; returns whether there were any.
    pub(crate) fn suffer(&mut self, place: usize, fault: Fault, rng: &mut Rng) -> bool {
        let len = self.bytes.len();
        if len == 0 {
            return false;
        }
        let at = place % len;
        let run = |n: u16| usize::from(n).clamp(1, len - at);
        match fault {
            Fault::Lose(n) => self.replace(at, run(n), &[]),
            Fault::Double(n) => {
                let again: Vec<u8> = self.bytes.range(at..at + run(n)).copied().collect();
                self.replace(at, 0, &again);
            }
            Fault::Insert(n) => {
                let noise = (0..n.max(1)).map(|_| rng.number().to_le_bytes()[0]);
                self.replace(at, 0, &noise.collect::<Vec<_>>());
            }
        }
        true
    }

    /// Puts `new` in the place of `n` bytes in flight.
    fn replace(&mut self, at: usize, n: usize, new: &[u8]) {
        let behind = self.bytes.split_off(at);
        self.bytes.extend(new);
        self.bytes.extend(behind.into_iter().skip(n));
        let mut start = 0;
        for (_, len) in &mut self.batches {
            let end = start + *len;
            let lost = end.min(at + n).saturating_sub(start.max(at));
            let gained = if (start..end).contains(&at) {
                new.len()
            } else {
                0
            };
            *len = *len - lost + gained;
            start = end;
        }
        self.batches.retain(|(_, len)| *len > 0);
    }

    /// Changes a byte in flight; returns whether there was one.
    pub(crate) fn flip(&mut self, at: usize, mask: u8) -> bool {
        let len = self.bytes.len();
        if len == 0 || mask == 0 {
            return false;
        }
        self.bytes[at % len] ^= mask;
        true
    }
}
