//! A virtqueue for the length of one transaction.
//!
//! # Theory of operation
//!
//! The library's queue knows where the ring is and how far it has come. What lies in the ring is read and written here, by
//! pointers that a [`Ring`] looks up in the map of the guest's memory once, when it is made: the library looks each index,
//! descriptor and used element up anew, which cost as much as copying the page behind it. Chains that are given back
//! become visible together, with one interrupt at most, when the `Ring` is dropped or [`shown`](Ring::show).
//!
//! Everything in a ring is the guest's word: it is read once and believed only as far as it was checked.

use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use vhost_user_backend::VringState;
use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory};

use super::vring::Memory;

/// A stretch of the guest's memory.
pub(super) type Slice<'m> = vm_memory::VolatileSlice<'m>;

/// Bytes of a descriptor.
const DESCRIPTOR: usize = size_of::<Descriptor>();
/// Where in the available and the used ring the index is, and the first element. Behind the last element is where the
/// other side wants to be told (EVENT_IDX).
const INDEX: usize = 2;
const ELEMENTS: usize = 4;
const AVAIL: usize = size_of::<u16>();
/// Head and length, 32 bits each.
const USED: usize = size_of::<u64>();

/// What a guest's driver did wrong.
#[derive(Debug, Error)]
pub(super) enum Fault {
    #[error("unusable ring: it is not in memory")]
    Nowhere,
    #[error("unusable ring: more chains than it has room for")]
    Index,
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

/// See the [module](self).
pub(super) struct Ring<'r, 'm> {
    state: &'r mut VringState<Memory>,
    memory: &'m GuestMemoryMmap,
    descriptors: Slice<'m>,
    avail: Slice<'m>,
    used: Slice<'m>,
    /// Where the driver sees the used ring end.
    shown: u16,
}

impl<'r, 'm> Ring<'r, 'm> {
    /// A ring that is running.
    pub(super) fn new(
        state: &'r mut VringState<Memory>,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Self, Fault> {
        let queue = state.get_queue();
        let size = usize::from(queue.size());
        let part = |at, element, around| {
            let part = memory.get_slice(GuestAddress(at), element * size + around);
            part.map_err(|_| Fault::Nowhere)
        };
        let ring = Ring {
            descriptors: part(queue.desc_table(), DESCRIPTOR, 0)?,
            avail: part(queue.avail_ring(), AVAIL, ELEMENTS + size_of::<u16>())?,
            used: part(queue.used_ring(), USED, ELEMENTS + size_of::<u16>())?,
            shown: queue.next_used(),
            memory,
            state,
        };
        // So that no other access can fail: all are within their part, and aligned if these are.
        for part in [&ring.avail, &ring.used] {
            part.load::<u16>(INDEX, Ordering::Relaxed)
                .map_err(|_| Fault::Nowhere)?;
        }
        Ok(ring)
    }

    pub(super) fn memory(&self) -> &'m GuestMemoryMmap {
        self.memory
    }

    pub(super) fn size(&self) -> u16 {
        self.queue().size()
    }

    /// The position of the next chain to take.
    pub(super) fn next(&self) -> u16 {
        self.queue().next_avail()
    }

    /// Goes there, back or forth.
    pub(super) fn go_to(&mut self, position: u16) {
        self.state.get_queue_mut().set_next_avail(position);
    }

    /// How many chains there are to take.
    pub(super) fn available(&self) -> Result<u16, Fault> {
        let index = load(&self.avail, INDEX, Ordering::Acquire);
        let available = distance(self.next(), index);
        match available <= self.size() {
            true => Ok(available),
            false => Err(Fault::Index),
        }
    }

    /// The first descriptor of the chain at a position.
    pub(super) fn head(&self, position: u16) -> u16 {
        let at = ELEMENTS + AVAIL * self.slot(position);
        load(&self.avail, at, Ordering::Relaxed)
    }

    /// The table of descriptors that chains begin in.
    pub(super) fn descriptors(&self) -> Slice<'m> {
        self.descriptors
    }

    /// Gives a chain back, with so many bytes written to it.
    pub(super) fn give_back(&mut self, head: u16, len: u32) {
        // A head that does not exist cannot be given back.
        if head >= self.size() {
            return;
        }
        let position = self.used_end();
        let at = ELEMENTS + USED * self.slot(position);
        self.used
            .get_ref(at)
            .expect("within the ring")
            .store((u64::from(head) | u64::from(len) << 32).to_le());
        let queue = self.state.get_queue_mut();
        queue.set_next_used(position.wrapping_add(1));
    }

    /// Asks for no kicks. (With EVENT_IDX there is none until the next one is asked for.)
    pub(super) fn disarm(&self) {
        if !self.queue().event_idx_enabled() {
            let flag = u16::try_from(VRING_USED_F_NO_NOTIFY).expect("one bit");
            store(&self.used, 0, flag, Ordering::Relaxed);
        }
    }

    /// Asks for a kick when there are `count` more chains than were taken; true if they are there already. Without
    /// EVENT_IDX the kick comes for the first of them.
    pub(super) fn arm(&self, count: u16) -> bool {
        if self.queue().event_idx_enabled() {
            let at = ELEMENTS + USED * usize::from(self.size());
            let event = self.next().wrapping_add(count - 1);
            store(&self.used, at, event, Ordering::Relaxed);
        } else {
            store(&self.used, 0, 0, Ordering::Relaxed);
        }
        // What was asked for is visible before we look whether it is there.
        fence(Ordering::SeqCst);
        self.available().is_ok_and(|available| available >= count)
    }

    /// Shows the driver what was given back. From where on it wants an interrupt, if it does and was told of nothing since
    /// `told` (or since this was shown last).
    pub(super) fn show(&mut self, told: Option<u16>) -> Option<u16> {
        let (told, index) = (told.unwrap_or(self.shown), self.used_end());
        if told == index {
            return None;
        }
        self.shown = index;
        store(&self.used, INDEX, index, Ordering::Release);
        // The index is visible before we look whether somebody waits for it.
        fence(Ordering::SeqCst);
        if !self.tells_how_far() {
            let flags = load(&self.avail, 0, Ordering::Relaxed);
            return (u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0).then_some(told);
        }
        let at = ELEMENTS + AVAIL * usize::from(self.size());
        let event = load(&self.avail, at, Ordering::Relaxed);
        (distance(told, event) < distance(told, index)).then_some(event)
    }

    pub(super) fn interrupt(&self) {
        // Fails only when the eventfd's counter is full, and then it is signalled already.
        let _ = self.state.signal_used_queue();
    }

    /// Whether the driver says how far it has taken back what was given back (EVENT_IDX).
    pub(super) fn tells_how_far(&self) -> bool {
        self.queue().event_idx_enabled()
    }

    /// Where the used ring ends.
    pub(super) fn used_end(&self) -> u16 {
        self.queue().next_used()
    }

    /// Chains that were given back from a position of the used ring on.
    pub(super) fn used_since(&self, position: u16) -> u16 {
        distance(position, self.used_end())
    }

    /// Chains that the device has, or gave back from a position of the used ring on. (If the driver can be believed.)
    pub(super) fn in_use(&self, position: u16) -> u16 {
        distance(position, load(&self.avail, INDEX, Ordering::Acquire))
    }

    fn slot(&self, position: u16) -> usize {
        usize::from(position % self.size())
    }

    fn queue(&self) -> &Queue {
        self.state.get_queue()
    }
}

impl Drop for Ring<'_, '_> {
    /// Shows the driver what was given back, and interrupts it if it wants that.
    fn drop(&mut self) {
        if self.show(None).is_some() {
            self.interrupt();
        }
    }
}

fn load(part: &Slice<'_>, at: usize, order: Ordering) -> u16 {
    u16::from_le(part.load(at, order).expect("within the ring"))
}

fn store(part: &Slice<'_>, at: usize, value: u16, order: Ordering) {
    part.store(value.to_le(), at, order)
        .expect("within the ring");
}

/// The descriptor at `index` of a table, if there is one.
pub(super) fn descriptor(table: &Slice<'_>, index: u16) -> Option<Descriptor> {
    let at = DESCRIPTOR * usize::from(index);
    Some(table.get_ref(at).ok()?.load())
}

/// How many descriptors a table has.
pub(super) fn descriptors_in(table: &Slice<'_>) -> usize {
    table.len() / DESCRIPTOR
}

/// Chains from one position of a ring to a later one.
pub(super) fn distance(from: u16, to: u16) -> u16 {
    to.wrapping_sub(from)
}
