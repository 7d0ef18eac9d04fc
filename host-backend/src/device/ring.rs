//! Descriptor chains in, segments out: the only place that looks at what the guest wrote into a ring.
//!
//! # Theory of operation
//!
//! A [`Batch`] is filled with chains from the head of a ring, used, and given back in whole or in part; it
//! never outlives the ring's lock. Everything in a ring is the guest's word and is believed only as far as it
//! was checked: a chain that is malformed is given back unused, with one warning (rate-limited by the
//! caller), and can neither stop the chains behind it nor be met twice. A ring whose index is absurd yields
//! nothing until the driver starts it anew.
//!
//! Chains taken too many are put back by rewinding the ring. So that this never puts back a malformed one,
//! which was given back already, a batch ends before a malformed chain and the next batch begins with it.

use std::sync::atomic::Ordering;

use thiserror::Error;
use vhost_user_backend::VringState;
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use virtproxy_engine::segment::{MAX_IOV, Segment};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::vring::Memory;

/// The largest chain that is not called malformed. Linux sends at most what a pipe holds (`splice`), 1 MiB
/// unless root says otherwise. The bound is on work under one lock.
const MAX_CHAIN: usize = 4 << 20;

/// What a guest's driver did wrong.
#[derive(Debug, Error)]
pub(super) enum Fault {
    #[error("unusable ring: {0}")]
    Ring(#[from] virtio_queue::Error),
    #[error("chain with a descriptor of the wrong direction")]
    Direction,
    #[error("chain with a descriptor outside memory")]
    Memory,
    #[error("chain that loops or breaks off")]
    Broken,
    #[error("chain without bytes")]
    Empty,
    #[error("chain of too many descriptors or bytes")]
    TooLong,
}

/// Which way the bytes of a chain go. (virtio's words, receive and transmit, are the guest's view.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    ToGuest,
    FromGuest,
}

/// How much to take at once.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    pub(super) chains: usize,
    /// No further chain is taken once there are this many bytes.
    pub(super) bytes: usize,
}

/// A chain that was taken from the ring.
#[derive(Clone, Copy)]
pub(super) struct Chain {
    head: u16,
    pub(super) len: usize,
}

/// Chains that were taken from a ring and not given back yet.
#[derive(Default)]
pub(super) struct Batch<'m> {
    pub(super) segments: Vec<Segment<'m>>,
    pub(super) chains: Vec<Chain>,
}

impl<'m> Batch<'m> {
    /// An empty batch that takes over the buffers of a used one.
    pub(super) fn recycle(used: Batch<'_>) -> Self {
        let (mut segments, mut chains) = (used.segments, used.chains);
        segments.clear();
        chains.clear();
        // Nothing is left to be mapped; the collection is in place, so only the lifetime changes.
        let segments = segments
            .into_iter()
            .map(|_| -> Segment<'m> { unreachable!("the list is empty") })
            .collect();
        Batch { segments, chains }
    }

    /// Bytes in all chains.
    pub(super) fn len(&self) -> usize {
        self.chains.iter().map(|chain| chain.len).sum()
    }

    /// Takes chains from the head of the ring. Malformed ones are given back and told to `report`.
    ///
    /// # Errors
    /// The ring itself is unusable. Nothing was taken.
    pub(super) fn fill(
        &mut self,
        queue: &mut Queue,
        memory: &'m GuestMemoryMmap,
        direction: Direction,
        limits: Limits,
        mut report: impl FnMut(Fault),
    ) -> Result<(), Fault> {
        let mut bytes = self.len();
        for _ in 0..limits.chains {
            if bytes >= limits.bytes || self.segments.len() >= MAX_IOV {
                break;
            }
            let Some(chain) = queue.iter(memory)?.next() else {
                break;
            };
            let (head, before) = (chain.head_index(), self.segments.len());
            match read_chain(chain, memory, direction, &mut self.segments) {
                Ok(_) if before > 0 && self.segments.len() > MAX_IOV => {
                    self.segments.truncate(before);
                    queue.go_to_previous_position();
                    break;
                }
                Ok(len) => {
                    self.chains.push(Chain { head, len });
                    bytes += len;
                }
                Err(fault) => {
                    self.segments.truncate(before);
                    if !self.chains.is_empty() {
                        queue.go_to_previous_position();
                        break;
                    }
                    give_back(queue, memory, head, 0)?;
                    report(fault);
                }
            }
        }
        Ok(())
    }

    /// Gives the chains back, read; none of them had room to fill.
    pub(super) fn give_back_read(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<(), Fault> {
        for chain in self.chains.drain(..) {
            give_back(queue, memory, chain.head, 0)?;
        }
        Ok(())
    }

    /// Gives those chains back that the first `written` bytes lie in, and rewinds the ring over the others.
    pub(super) fn give_back_written(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        written: usize,
    ) -> Result<(), Fault> {
        let mut left = written.min(self.len());
        let mut unused: u16 = 0;
        let mut result = Ok(());
        for chain in self.chains.drain(..) {
            if left == 0 {
                unused += 1;
                continue;
            }
            let filled = chain.len.min(left);
            left -= filled;
            let filled = u32::try_from(filled).expect("MAX_CHAIN fits");
            result = result.and(give_back(queue, memory, chain.head, filled));
        }
        queue.set_next_avail(queue.next_avail().wrapping_sub(unused));
        result
    }
}

/// Takes up to `max` chains from the head of the ring and gives them back unread. Returns how many there were.
pub(super) fn discard(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    max: usize,
) -> Result<usize, Fault> {
    for done in 0..max {
        let Some(chain) = queue.iter(memory)?.next() else {
            return Ok(done);
        };
        give_back(queue, memory, chain.head_index(), 0)?;
    }
    Ok(max)
}

/// Appends the chain's pieces to `segments` and returns its length. After an error they are to be taken off.
fn read_chain<'m>(
    chain: DescriptorChain<&'m GuestMemoryMmap>,
    memory: &'m GuestMemoryMmap,
    direction: Direction,
    segments: &mut Vec<Segment<'m>>,
) -> Result<usize, Fault> {
    let first = segments.len();
    let mut len = 0;
    // The iterator just ends where a chain is broken; the last descriptor seen says that more was to come.
    let mut more = true;
    for descriptor in chain {
        if descriptor.is_write_only() != (direction == Direction::ToGuest) {
            return Err(Fault::Direction);
        }
        more = descriptor.has_next();
        len += descriptor.len() as usize;
        if len > MAX_CHAIN {
            return Err(Fault::TooLong);
        }
        let pieces =
            GuestMemoryBackend::get_slices(memory, descriptor.addr(), descriptor.len() as usize);
        for piece in pieces {
            let piece = piece.map_err(|_| Fault::Memory)?;
            // SAFETY: the piece is mapped, readable and writable for as long as `memory` is borrowed, which
            // is 'm, and guest memory is only ever reached through raw pointers.
            let segment =
                unsafe { Segment::from_raw_parts(piece.ptr_guard_mut().as_ptr(), piece.len()) };
            segments.push(segment);
        }
        if segments.len() - first > MAX_IOV {
            return Err(Fault::TooLong);
        }
    }
    match (more, len) {
        (true, _) => Err(Fault::Broken),
        (false, 0) => Err(Fault::Empty),
        (false, len) => Ok(len),
    }
}

fn give_back(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    head: u16,
    len: u32,
) -> Result<(), Fault> {
    // A head that does not exist cannot be given back; the library would say so in the log each time.
    if head < queue.size() {
        queue.add_used(memory, head, len)?;
    }
    Ok(())
}

/// Tells the driver about the chains given back since [`Queue::next_used`] was `since`, if it wants to be told.
pub(super) fn notify(
    ring: &mut VringState<Memory>,
    memory: &GuestMemoryMmap,
    since: u16,
) -> Result<(), Fault> {
    let queue = ring.get_queue_mut();
    if queue.next_used() == since {
        return Ok(());
    }
    let wanted = queue.needs_notification(memory)?
        && (queue.event_idx_enabled() || !interrupts_off(queue, memory));
    if wanted {
        // Fails only when the eventfd's counter is full, and then it is signalled already.
        let _ = ring.signal_used_queue();
    }
    Ok(())
}

/// Asks for a kick when there are `count` more chains than were taken; true if they are there already. Without
/// EVENT_IDX the kick comes for the first of them.
pub(super) fn arm(queue: &mut Queue, memory: &GuestMemoryMmap, count: u16) -> Result<bool, Fault> {
    let next = queue.next_avail();
    // The library asks for a kick at the chain that it would take next.
    queue.set_next_avail(next.wrapping_add(count - 1));
    let armed = queue.enable_notification(memory);
    queue.set_next_avail(next);
    armed?;
    Ok(distance(next, available_to(queue, memory)) >= count)
}

/// Without EVENT_IDX the driver says with a flag that it wants no interrupts.
fn interrupts_off(queue: &Queue, memory: &GuestMemoryMmap) -> bool {
    memory
        .load::<u16>(GuestAddress(queue.avail_ring()), Ordering::Relaxed)
        .is_ok_and(|flags| u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0)
}

/// The position behind the last chain that the driver has made available; where the next to be taken is, if
/// what the driver says makes no sense.
pub(super) fn available_to(queue: &Queue, memory: &GuestMemoryMmap) -> u16 {
    let next = queue.next_avail();
    match queue.avail_idx(memory, Ordering::Acquire) {
        Ok(index) if distance(next, index.0) <= queue.size() => index.0,
        _ => next,
    }
}

/// Chains from one position of a ring to a later one.
pub(super) fn distance(from: u16, to: u16) -> u16 {
    to.wrapping_sub(from)
}
