//! Receiving: puts frames in order, and decides when to acknowledge them.
//!
//! A line keeps its order, and every transmission has a number of its own (`order`). So a number that was left out is a
//! frame that was lost, and the sender is told at once; otherwise it is told when it asks, or when [`DELAY`] is over,
//! with whatever data goes its way.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use super::{Time, Violation};
use crate::frame::{Ack, Data, MAX_FRAMES};

/// How long an acknowledgement waits for data that it can go with, in microseconds. Each one that does not costs an
/// emulated guest an interrupt and its agent a wake-up.
const DELAY: Time = 20_000;

/// What is owed to the sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "sim", derive(Hash))]
enum Owed {
    Nothing,
    At(Time),
    Now,
}

#[cfg_attr(feature = "sim", derive(Clone, Hash))]
pub(super) struct Receiver {
    /// The first frame that has not arrived.
    next: u8,
    /// The order of the last frame that arrived.
    seen: u8,
    /// Frames that arrived before their time: the first one is `next + 1`.
    early: VecDeque<Option<Vec<u8>>>,
    owed: Owed,
    pub(super) duplicates: u64,
}

impl Receiver {
    pub(super) fn new() -> Self {
        Receiver {
            next: 0,
            seen: u8::MAX,
            early: VecDeque::with_capacity(MAX_FRAMES),
            owed: Owed::Nothing,
            duplicates: 0,
        }
    }

    /// Takes a frame; what is now in order goes to `out`.
    pub(super) fn take(
        &mut self,
        now: Time,
        data: Data<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), Violation> {
        let lost = data.order != self.seen.wrapping_add(1);
        self.seen = data.order;
        let ahead = usize::from(data.seq.wrapping_sub(self.next));
        let duplicate = match ahead {
            0 => {
                out.extend_from_slice(data.payload);
                self.next = self.next.wrapping_add(1);
                while let Some(payload) = self.early.pop_front() {
                    let Some(payload) = payload else { break };
                    out.extend(payload);
                    self.next = self.next.wrapping_add(1);
                }
                false
            }
            1..MAX_FRAMES => {
                while self.early.len() < ahead {
                    self.early.push_back(None);
                }
                self.early[ahead - 1]
                    .replace(data.payload.to_vec())
                    .is_some()
            }
            128.. => true,
            _ => return Err(Violation::Ahead),
        };
        self.duplicates += u64::from(duplicate);
        if data.ask || lost || duplicate {
            self.owed = Owed::Now;
        } else if self.owed == Owed::Nothing {
            self.owed = Owed::At(now + DELAY);
        }
        Ok(())
    }

    /// What to tell the sender, with whatever frame goes out.
    pub(super) fn ack(&mut self) -> Ack {
        self.owed = Owed::Nothing;
        let early = self.early.iter().enumerate();
        Ack {
            next: self.next,
            seen: self.seen,
            gaps: early.fold(0, |gaps, (at, frame)| {
                gaps | u32::from(frame.is_some()) << at
            }),
        }
    }

    /// Whether that must not wait for other data any longer.
    pub(super) fn is_due(&self, now: Time) -> bool {
        self.due().is_some_and(|due| due <= now)
    }

    /// When it must go.
    pub(super) fn due(&self) -> Option<Time> {
        match self.owed {
            Owed::Nothing => None,
            Owed::At(time) => Some(time),
            Owed::Now => Some(0),
        }
    }

    /// Bytes held that are not in order yet.
    pub(super) fn held(&self) -> usize {
        self.early.iter().flatten().map(Vec::len).sum()
    }
}
