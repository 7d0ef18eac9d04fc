//! Bytes for the guest, from a source into the buffers that its driver left in the ring.
//!
//! Linux leaves one page in each buffer and one buffer in each chain. Looking at a buffer costs some fifty
//! nanoseconds, so a source with little to say is not offered the whole ring: the offer doubles while the source
//! fills it.

use std::io;

use vhost_user_backend::{VringState, VringT};
use virtio_queue::QueueT;
use virtproxy_engine::channel::{Progress, Source};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::port::{Cell, Rings};
use super::ring::{self, Batch, Direction, Fault, Limits};
use super::vring::{Memory, is_running};

/// Buffers offered at first and at most.
pub(super) const FEWEST: usize = 8;
const MOST: usize = 128;
const MAX_BYTES: usize = 1 << 20;

/// A source is never offered less ([`virtproxy_engine::channel::Link::min_room`]).
const MIN_ROOM: usize = 4096;

/// Offers what room there is to `source` and sends what it wrote.
pub(super) fn send(
    cell: &Cell,
    rings: &Rings,
    appetite: &mut usize,
    reused: &mut Batch<'static>,
    source: &mut Source<'_>,
) -> io::Result<Progress> {
    let memory = rings.memory.memory();
    let mut ring = rings.to_guest.get_mut();
    if !is_running(&ring) {
        return Ok(Progress::Wait);
    }
    let mut batch = Batch::recycle(std::mem::take(reused));
    let result = transact(cell, &mut ring, &memory, appetite, &mut batch, source);
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
    appetite: &mut usize,
    batch: &mut Batch<'m>,
    source: &mut Source<'_>,
) -> Result<Progress, Fault> {
    let since = ring.get_queue().next_used();
    ring.get_queue_mut().disable_notification(memory)?;
    let short = take_room(cell, ring, memory, *appetite, batch)?;
    let (written, progress) = match short {
        Some(progress) => (0, progress),
        None => {
            let room = batch.len();
            let written = source(&batch.segments).min(room);
            *appetite = if written >= room / 2 {
                (*appetite * 2).min(MOST)
            } else {
                (*appetite / 2).max(FEWEST)
            };
            let more = written > 0;
            (
                written,
                if more {
                    Progress::Again
                } else {
                    Progress::Wait
                },
            )
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
    appetite: usize,
    batch: &mut Batch<'m>,
) -> Result<Option<Progress>, Fault> {
    let queue = ring.get_queue_mut();
    let mut limits = Limits {
        chains: appetite,
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
        if !queue.enable_notification(memory)? || stuck {
            return Ok(Some(Progress::Wait));
        }
        limits = Limits {
            chains: MOST,
            bytes: MIN_ROOM,
        };
    }
    Ok(Some(Progress::Again))
}
