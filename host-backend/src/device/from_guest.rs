//! Bytes the guest wrote, from its ring into a sink.

use std::io;

use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use virtproxy_engine::channel::{Progress, Sink};
use vm_memory::GuestAddressSpace;

use super::chains::{Batch, Direction, Limits};
use super::gather::Gather;
use super::late::Late;
use super::port::{Cell, Rings};
use super::ring::{Fault, Ring};
use super::sessions::{Standing, chains_left};
use super::vring::is_running;

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
    (gather, late): (&mut Gather, &mut Late),
    reused: &mut Batch<'static>,
    sink: &mut Sink<'_>,
) -> io::Result<Progress> {
    let memory = rings.memory.memory();
    let mut vring = rings.from_guest.get_mut();
    let before = vring.get_queue().next_avail();
    let mut limits = LIMITS;
    if let Standing::Closed { end } = standing {
        let left = usize::from(chains_left(before, end, vring.get_queue().size()));
        if left == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        limits.chains = limits.chains.min(left);
    }
    if !goes || !is_running(&vring) {
        return Ok(Progress::Wait);
    }

    let mut batch = Batch::recycle(std::mem::take(reused));
    let result = Ring::new(&mut vring, &memory)
        .and_then(|ring| transact(cell, ring, limits, (gather, late), &mut batch, sink));
    *reused = Batch::recycle(batch);
    if vring.get_queue().next_avail() == before && standing != Standing::Open {
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
    mut ring: Ring<'_, 'm>,
    limits: Limits,
    (gather, late): (&mut Gather, &mut Late),
    batch: &mut Batch<'m>,
    sink: &mut Sink<'_>,
) -> Result<Progress, Fault> {
    let before = ring.next();
    ring.disarm();
    let report = |fault| cell.report(Direction::FromGuest, &fault);
    batch.fill(&mut ring, Direction::FromGuest, limits, report)?;
    if batch.is_empty() {
        return Ok(progress(&ring, before, gather));
    }
    sink(&batch.segments);
    gather.came(batch.len(), batch.chains());
    let pieces = batch.pieces();
    batch.give_back_read(&mut ring);
    let progress = progress(&ring, before, gather);
    late.finish(ring, pieces);
    Ok(progress)
}

/// Whether there is more behind what was taken since `before`, with a kick asked for if there is not.
fn progress(ring: &Ring<'_, '_>, before: u16, gather: &mut Gather) -> Progress {
    match ring.next() != before || gather.arm(ring) {
        true => Progress::Again,
        false => Progress::Wait,
    }
}
