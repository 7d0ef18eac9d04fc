//! Descriptor chains in, segments out.
//!
//! # Theory of operation
//!
//! A [`Batch`] is filled with chains from the head of a ring, used, and given back in whole or in part; it
//! never outlives the ring's lock. A chain that is malformed is given back unused, with one warning (rate-limited by the
//! caller), and can neither stop the chains behind it nor be met twice. A ring whose index is absurd yields
//! nothing until the driver starts it anew.
//!
//! Chains taken too many are put back by rewinding the ring. So that this never puts back a malformed one,
//! which was given back already, a batch ends before a malformed chain and the next batch begins with it.

use virtproxy_engine::segment::{MAX_IOV, Segment};
use vm_memory::GuestMemoryBackend;

use super::ring::{Fault, Ring, descriptor, descriptors_in};

/// The largest chain that is not called malformed. Linux sends at most what a pipe holds (`splice`), 1 MiB
/// unless root says otherwise. The bound is on work under one lock.
const MAX_CHAIN: usize = 4 << 20;

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
struct Chain {
    head: u16,
    len: usize,
}

/// Chains that were taken from a ring and not given back yet.
#[derive(Default)]
pub(super) struct Batch<'m> {
    pub(super) segments: Vec<Segment<'m>>,
    chains: Vec<Chain>,
    len: usize,
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
        Batch {
            segments,
            chains,
            len: 0,
        }
    }

    /// Bytes in all chains.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no chains.
    pub(super) fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// How many chains there are.
    pub(super) fn chains(&self) -> usize {
        self.chains.len()
    }

    /// Pieces in a chain, on average and rounded up: a piece takes a descriptor of the ring, unless its chain has a table of
    /// its own.
    pub(super) fn pieces(&self) -> usize {
        self.segments.len().div_ceil(self.chains.len().max(1))
    }

    /// Takes chains from the head of the ring. Malformed ones are given back and told to `report`.
    ///
    /// # Errors
    /// The ring itself is unusable. Nothing was taken.
    pub(super) fn fill(
        &mut self,
        ring: &mut Ring<'_, 'm>,
        direction: Direction,
        limits: Limits,
        mut report: impl FnMut(Fault),
    ) -> Result<(), Fault> {
        let mut left = limits.chains.min(usize::from(ring.available()?));
        let mut next = ring.next();
        while left > 0 && self.len < limits.bytes && self.segments.len() < MAX_IOV {
            let (head, before) = (ring.head(next), self.segments.len());
            match read_chain(ring, head, direction, &mut self.segments) {
                Ok(_) if before > 0 && self.segments.len() > MAX_IOV => {
                    self.segments.truncate(before);
                    break;
                }
                Ok(len) => {
                    self.chains.push(Chain { head, len });
                    self.len += len;
                }
                Err(fault) => {
                    self.segments.truncate(before);
                    if !self.is_empty() {
                        break;
                    }
                    ring.give_back(head, 0);
                    report(fault);
                }
            }
            next = next.wrapping_add(1);
            left -= 1;
        }
        ring.go_to(next);
        Ok(())
    }

    /// Gives the chains back, read; none of them had room to fill.
    pub(super) fn give_back_read(&mut self, ring: &mut Ring<'_, '_>) {
        self.len = 0;
        for chain in self.chains.drain(..) {
            ring.give_back(chain.head, 0);
        }
    }

    /// Gives those chains back that the first `written` bytes lie in, and rewinds the ring over the others.
    pub(super) fn give_back_written(&mut self, ring: &mut Ring<'_, '_>, written: usize) {
        let mut left = written.min(std::mem::take(&mut self.len));
        let mut unused: u16 = 0;
        for chain in self.chains.drain(..) {
            if left == 0 {
                unused += 1;
                continue;
            }
            let filled = chain.len.min(left);
            left -= filled;
            ring.give_back(chain.head, u32::try_from(filled).expect("MAX_CHAIN fits"));
        }
        ring.go_to(ring.next().wrapping_sub(unused));
    }
}

/// Takes up to `max` chains from the head of the ring and gives them back unread.
pub(super) fn discard(ring: &mut Ring<'_, '_>, max: u16) -> Result<(), Fault> {
    for _ in 0..max.min(ring.available()?) {
        let next = ring.next();
        ring.give_back(ring.head(next), 0);
        ring.go_to(next.wrapping_add(1));
    }
    Ok(())
}

/// Appends the chain's pieces to `segments` and returns its length. After an error they are to be taken off.
fn read_chain<'m>(
    ring: &Ring<'_, 'm>,
    head: u16,
    direction: Direction,
    segments: &mut Vec<Segment<'m>>,
) -> Result<usize, Fault> {
    let first = segments.len();
    let mut len = 0;
    let mut table = ring.descriptors();
    // One more than there are would be met twice.
    let mut left = descriptors_in(&table);
    let (mut index, mut indirect) = (head, false);
    loop {
        left = left.checked_sub(1).ok_or(Fault::Broken)?;
        let next = descriptor(&table, index).ok_or(Fault::Broken)?;
        if next.refers_to_indirect_table() {
            if std::mem::replace(&mut indirect, true) {
                return Err(Fault::Broken);
            }
            // Its length is a multiple of a descriptor's, or the rest is never met.
            table = ring
                .memory()
                .get_slice(next.addr(), next.len() as usize)
                .map_err(|_| Fault::Broken)?;
            (index, left) = (0, descriptors_in(&table));
            continue;
        }
        if next.is_write_only() != (direction == Direction::ToGuest) {
            return Err(Fault::Direction);
        }
        len += next.len() as usize;
        if len > MAX_CHAIN {
            return Err(Fault::TooLong);
        }
        for piece in ring.memory().get_slices(next.addr(), next.len() as usize) {
            let piece = piece.map_err(|_| Fault::Memory)?;
            // SAFETY: the piece is mapped, readable and writable for as long as the map of the guest's memory is borrowed,
            // which is 'm, and guest memory is only ever reached through raw pointers.
            let segment =
                unsafe { Segment::from_raw_parts(piece.ptr_guard_mut().as_ptr(), piece.len()) };
            segments.push(segment);
        }
        if segments.len() - first > MAX_IOV {
            return Err(Fault::TooLong);
        }
        if !next.has_next() {
            break;
        }
        index = next.next();
    }
    match len {
        0 => Err(Fault::Empty),
        len => Ok(len),
    }
}
