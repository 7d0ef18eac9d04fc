//! Bytes for the guest, from a source into the buffers that its driver left in the ring.
//!
//! # Theory of operation
//!
//! Linux leaves one page in each buffer and one buffer in each chain, and gives each page back as soon as it was
//! read. Two habits keep that cheap:
//!
//! * **A small offer for a small source.** Looking at a buffer costs some hundred nanoseconds, so a source with
//!   little to say is not offered the whole ring: the offer doubles while the source fills it.
//! * **A late kick.** When the ring is full, we ask to be kicked not for the first buffer that comes back but when a
//!   quarter of all have (with EVENT_IDX). The guest has three quarters left to read meanwhile, so nothing waits
//!   for it, and it leaves its kernel once for hundreds of pages. How many buffers the driver has is what it once had
//!   in the ring at the same time: a driver with few is never waited for in vain, as all of them come back when
//!   it has read them.

use std::io;

use vhost_user_backend::{VringState, VringT};
use virtio_queue::QueueT;
use virtproxy_engine::channel::{Progress, Source};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::port::{Cell, Rings};
use super::ring::{self, Batch, Direction, Fault, Limits, distance};
use super::vring::{Memory, is_running};

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
    let mut ring = rings.to_guest.get_mut();
    if !is_running(&ring) {
        return Ok(Progress::Wait);
    }
    let mut batch = Batch::recycle(std::mem::take(reused));
    let result = transact(cell, &mut ring, &memory, pace, &mut batch, source);
    *reused = Batch::recycle(batch);
    result.or_else(|fault| {
        cell.report(Direction::ToGuest, &fault);
        Ok(Progress::Wait)
    })
}

fn transact<'m>(
    cell: &Cell,
    ring: &mut VringState<Memory>,
    memory: &'m GuestMemoryMmap,
    pace: &mut Pace,
    batch: &mut Batch<'m>,
    source: &mut Source<'_>,
) -> Result<Progress, Fault> {
    let since = ring.get_queue().next_used();
    ring.get_queue_mut().disable_notification(memory)?;
    let (written, progress) = match take_room(cell, ring, memory, pace, batch)? {
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
    batch.give_back_written(ring.get_queue_mut(), memory, written)?;
    ring::notify(ring, memory, since)?;
    Ok(progress)
}

/// Takes buffers with enough room together; else says how to go on, with the notification armed for `Wait`.
fn take_room<'m>(
    cell: &Cell,
    ring: &mut VringState<Memory>,
    memory: &'m GuestMemoryMmap,
    pace: &mut Pace,
    batch: &mut Batch<'m>,
) -> Result<Option<Progress>, Fault> {
    let queue = ring.get_queue_mut();
    let available = distance(queue.next_avail(), ring::available_to(queue, memory));
    pace.seen = pace.seen.max(available);
    let mut limits = Limits {
        chains: pace.offer,
        bytes: MAX_BYTES,
    };
    for attempt in 0..4 {
        let before = queue.next_avail();
        let report = |fault| cell.report(Direction::ToGuest, &fault);
        batch.fill(queue, memory, Direction::ToGuest, limits, report)?;
        if batch.len() >= MIN_ROOM {
            return Ok(None);
        }
        // Armed behind what was taken: that much is known to be too little. If there is more, but nothing that
        // could be taken, the driver must come up with something better first.
        let stuck = attempt > 0 && queue.next_avail() == before;
        let wanted = if batch.chains.is_empty() {
            pace.wanted()
        } else {
            1
        };
        if !ring::arm(queue, memory, wanted)? || stuck {
            return Ok(Some(Progress::Wait));
        }
        limits = Limits {
            chains: MOST,
            bytes: MIN_ROOM,
        };
    }
    Ok(Some(Progress::Again))
}
