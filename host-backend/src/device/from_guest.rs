//! Bytes the guest wrote, from its ring into a sink.

use std::io;

use vhost_user_backend::{VringState, VringT};
use virtio_queue::QueueT;
use virtproxy_engine::channel::{Progress, Sink};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::port::{Cell, Rings};
use super::ring::{self, Batch, Direction, Fault, Limits};
use super::sessions::{Standing, chains_left};
use super::vring::{Memory, is_running};

/// One transaction. Linux puts up to 32 KiB in a chain. The bounds are on how long others wait for the port.
const LIMITS: Limits = Limits {
    chains: 64,
    bytes: 1 << 20,
};

/// Hands one batch of chains to `sink`; those up to the boundary, if the session is closed. `goes` says whether the ring
/// does (`check_restart`).
pub(super) fn receive(
    cell: &Cell,
    rings: &Rings,
    goes: bool,
    standing: Standing,
    reused: &mut Batch<'static>,
    sink: &mut Sink<'_>,
) -> io::Result<Progress> {
    let memory = rings.memory.memory();
    let mut ring = rings.from_guest.get_mut();
    let before = ring.get_queue().next_avail();
    let mut limits = LIMITS;
    if let Standing::Closed { end } = standing {
        let left = usize::from(chains_left(before, end, ring.get_queue().size()));
        if left == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        limits.chains = limits.chains.min(left);
    }
    if !goes || !is_running(&ring) {
        return Ok(Progress::Wait);
    }

    let mut batch = Batch::recycle(std::mem::take(reused));
    let result = transact(cell, &mut ring, &memory, limits, &mut batch, sink);
    *reused = Batch::recycle(batch);
    if ring.get_queue().next_avail() == before && standing != Standing::Open {
        // Nothing where the boundary says there is something: the driver took it back.
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    result.or_else(|fault| {
        cell.report(Direction::FromGuest, &fault);
        Ok(Progress::Wait)
    })
}

fn transact<'m>(
    cell: &Cell,
    ring: &mut VringState<Memory>,
    memory: &'m GuestMemoryMmap,
    limits: Limits,
    batch: &mut Batch<'m>,
    sink: &mut Sink<'_>,
) -> Result<Progress, Fault> {
    let queue = ring.get_queue_mut();
    let (before, since) = (queue.next_avail(), queue.next_used());
    queue.disable_notification(memory)?;
    let report = |fault| cell.report(Direction::FromGuest, &fault);
    batch.fill(queue, memory, Direction::FromGuest, limits, report)?;
    if !batch.chains.is_empty() {
        sink(&batch.segments);
        batch.give_back_read(queue, memory)?;
    }
    if queue.next_avail() != before {
        ring::notify(ring, memory, since)?;
        return Ok(Progress::Again);
    }
    let more = queue.enable_notification(memory)?;
    Ok(if more {
        Progress::Again
    } else {
        Progress::Wait
    })
}
