//! Bytes for the guest, from a source into the buffers that its driver left in the ring.
//!
//! # Theory of operation
//!
//! Linux leaves one page in each buffer and one buffer in each chain, and gives each page back as soon as it was
//! read. Two habits keep that cheap:
//!
//! * **A small offer for a small source.** Each buffer that is offered has to be looked at, so a source with
//!   little to say is not offered the whole ring: the offer doubles while the source fills it.
//! * **A late kick.** When the ring is full, we ask to be kicked not for the first buffer that comes back but when a
//!   quarter of all have (with EVENT_IDX). The guest has three quarters left to read meanwhile, so nothing waits
//!   for it, and it leaves its kernel once for hundreds of pages. How many buffers the driver has is what it once had
//!   in the ring at the same time: a driver with few is never waited for in vain, as all of them come back when
//!   it has read them.

use std::io;

use vhost_user_backend::VringT;
use virtproxy_engine::channel::{Progress, Source};
use vm_memory::GuestAddressSpace;

use super::chains::{Batch, Direction, Limits};
use super::port::{Cell, Rings};
use super::ring::{Fault, Ring};
use super::vring::is_running;

/// Buffers offered at first and at most.
const FEWEST: usize = 8;
const MOST: usize = 128;
const MAX_BYTES: usize = 1 << 20;

/// A source is never offered less ([`virtproxy_engine::channel::Link::min_room`]).
const MIN_ROOM: usize = 4096;

/// What a link has learnt of its source and its driver.
pub(super) struct Pace {
    /// How many buffers to offer next time.
    offer: usize,
    /// The most buffers the driver had in the ring at once.
    seen: u16,
}

impl Pace {
    pub(super) fn new() -> Self {
        Pace {
            offer: FEWEST,
            seen: 0,
        }
    }

    /// The source wrote so much of the room it was offered.
    fn learn(&mut self, written: usize, room: usize) {
        self.offer = if written >= room / 2 {
            (self.offer * 2).min(MOST)
        } else {
            (self.offer / 2).max(FEWEST)
        };
    }

    /// How many buffers are worth a kick.
    fn wanted(&self) -> u16 {
        (self.seen / 4).max(1)
    }
}

/// Offers what room there is to `source` and sends what it wrote.
pub(super) fn send(
    cell: &Cell,
    rings: &Rings,
    pace: &mut Pace,
    reused: &mut Batch<'static>,
    source: &mut Source<'_>,
) -> io::Result<Progress> {
    let memory = rings.memory.memory();
    let mut vring = rings.to_guest.get_mut();
    if !is_running(&vring) {
        return Ok(Progress::Wait);
    }
    let mut batch = Batch::recycle(std::mem::take(reused));
    let result = Ring::new(&mut vring, &memory)
        .and_then(|ring| transact(cell, ring, pace, &mut batch, source));
    *reused = Batch::recycle(batch);
    result.or_else(|fault| {
        cell.report(Direction::ToGuest, &fault);
        Ok(Progress::Wait)
    })
}

fn transact<'m>(
    cell: &Cell,
    mut ring: Ring<'_, 'm>,
    pace: &mut Pace,
    batch: &mut Batch<'m>,
    source: &mut Source<'_>,
) -> Result<Progress, Fault> {
    ring.disarm();
    let (written, progress) = match take_room(cell, &mut ring, pace, batch)? {
        Some(progress) => (0, progress),
        None => {
            let room = batch.len();
            let written = source(&batch.segments).min(room);
            pace.learn(written, room);
            match written {
                0 => (0, Progress::Wait),
                _ => (written, Progress::Again),
            }
        }
    };
    batch.give_back_written(&mut ring, written);
    Ok(progress)
}

/// Takes buffers with enough room together; else says how to go on, with the notification armed for `Wait`.
fn take_room<'m>(
    cell: &Cell,
    ring: &mut Ring<'_, 'm>,
    pace: &mut Pace,
    batch: &mut Batch<'m>,
) -> Result<Option<Progress>, Fault> {
    pace.seen = pace.seen.max(ring.available()?);
    let mut limits = Limits {
        chains: pace.offer,
        bytes: MAX_BYTES,
    };
    for attempt in 0..4 {
        let before = ring.next();
        let report = |fault| cell.report(Direction::ToGuest, &fault);
        batch.fill(ring, Direction::ToGuest, limits, report)?;
        if batch.len() >= MIN_ROOM {
            return Ok(None);
        }
        // Armed behind what was taken: that much is known to be too little. If there is more, but nothing that
        // could be taken, the driver must come up with something better first.
        let stuck = attempt > 0 && ring.next() == before;
        let wanted = match batch.is_empty() {
            true => pace.wanted(),
            false => 1,
        };
        if !ring.arm(wanted) || stuck {
            return Ok(Some(Progress::Wait));
        }
        limits = Limits {
            chains: MOST,
            bytes: MIN_ROOM,
        };
    }
    Ok(Some(Progress::Again))
}
