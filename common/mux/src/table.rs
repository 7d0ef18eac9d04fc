//! The streams of a session, found by slot: one table for those opened here, one for the peer's.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::stream::{Address, GENERATIONS, Stream, StreamId};

/// All live streams of a session.
#[derive(Default)]
#[cfg_attr(feature = "sim", derive(Clone, Hash))]
pub(crate) struct Streams {
    mine: Table,
    theirs: Table,
    addresses: Addresses,
    serials: u64,
}

/// Streams that one side opened.
#[derive(Default)]
#[cfg_attr(feature = "sim", derive(Clone, Hash))]
struct Table {
    slots: Vec<Option<Box<Stream>>>,
    live: usize,
}

/// Hands out addresses for streams opened here; a slot comes back with its next generation, oldest first.
#[derive(Default)]
#[cfg_attr(feature = "sim", derive(Clone, Hash))]
struct Addresses {
    free: VecDeque<Address>,
    used: u32,
    /// Those whose generations start over. They stay here until a PING sent later has come back: by then no frame of an
    /// earlier stream at this address can be under way.
    fenced: VecDeque<Address>,
    /// How many of them the PING under way frees.
    covered: usize,
}

impl Streams {
    pub(crate) fn len(&self) -> usize {
        self.mine.live + self.theirs.live
    }

    pub(crate) fn get(&self, id: StreamId) -> Option<&Stream> {
        let slots = &self.table(id.address()).slots;
        let stream = slots.get(id.address().slot() as usize)?.as_deref()?;
        (stream.id == id).then_some(stream)
    }

    /// The stream that lives at `address`.
    pub(crate) fn at(&self, address: Address) -> Option<StreamId> {
        let slots = &self.table(address).slots;
        let stream = slots.get(address.slot() as usize)?.as_deref()?;
        (stream.id.address() == address).then_some(stream.id)
    }

    pub(crate) fn at_mut(&mut self, address: Address) -> Option<&mut Stream> {
        let slots = &mut self.table_mut(address).slots;
        let stream = slots.get_mut(address.slot() as usize)?;
        let stream = stream.as_deref_mut()?;
        (stream.id.address() == address).then_some(stream)
    }

    pub(crate) fn get_mut(&mut self, id: StreamId) -> Option<&mut Stream> {
        self.at_mut(id.address()).filter(|stream| stream.id == id)
    }

    /// A new id for a stream at `address`.
    pub(crate) fn name(&mut self, address: Address) -> StreamId {
        self.serials += 1;
        StreamId::new(address, self.serials)
    }

    /// A free address for a stream to open here, if one with a slot below `limit` is left.
    pub(crate) fn new_address(&mut self, limit: u32) -> Option<Address> {
        let addresses = &mut self.addresses;
        match addresses.free.pop_front() {
            Some(address) => Some(address),
            None => (addresses.used < limit).then(|| {
                addresses.used += 1;
                Address::new(addresses.used - 1, 0)
            }),
        }
    }

    /// Whether addresses wait for the answer to a PING that is still to be sent.
    pub(crate) fn wants_fence(&self) -> bool {
        self.addresses.fenced.len() > self.addresses.covered
    }

    /// A PING goes out.
    pub(crate) fn fence(&mut self) {
        self.addresses.covered = self.addresses.fenced.len();
    }

    /// It came back.
    pub(crate) fn fence_passed(&mut self) {
        let addresses = &mut self.addresses;
        let freed = addresses.fenced.drain(..addresses.covered);
        addresses.free.extend(freed);
        addresses.covered = 0;
    }

    /// Adds a stream, unless its slot is taken.
    pub(crate) fn insert(&mut self, stream: Stream) -> Option<()> {
        let address = stream.id.address();
        let slot = address.slot() as usize;
        let table = self.table_mut(address);
        if table.slots.len() <= slot {
            table.slots.resize_with(slot + 1, || None);
        }
        let entry = &mut table.slots[slot];
        if entry.is_some() {
            return None;
        }
        *entry = Some(Box::new(stream));
        table.live += 1;
        Some(())
    }

    pub(crate) fn remove(&mut self, id: StreamId) {
        if self.get(id).is_none() {
            return;
        }
        let address = id.address();
        let table = self.table_mut(address);
        table.slots[address.slot() as usize] = None;
        table.live -= 1;
        if !address.peer_opened() {
            let generation = (address.generation() + 1) % GENERATIONS;
            let next = Address::new(address.slot(), generation);
            match generation {
                0 => self.addresses.fenced.push_back(next),
                _ => self.addresses.free.push_back(next),
            }
        }
    }

    /// Forgets all streams.
    pub(crate) fn clear(&mut self) {
        (self.mine, self.theirs) = (Table::default(), Table::default());
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Stream> {
        let slots = self.mine.slots.iter().chain(&self.theirs.slots);
        slots.filter_map(|slot| slot.as_deref())
    }

    fn table(&self, address: Address) -> &Table {
        if address.peer_opened() {
            &self.theirs
        } else {
            &self.mine
        }
    }

    fn table_mut(&mut self, address: Address) -> &mut Table {
        if address.peer_opened() {
            &mut self.theirs
        } else {
            &mut self.mine
        }
    }
}

/// Adds a live stream to a line. Streams that are gone leave theirs lazily; before a line grows past twice what
/// lives they are swept out, so that a peer that opens and resets without end costs no memory.
pub(crate) fn line_up(line: &mut VecDeque<StreamId>, streams: &Streams, id: StreamId) {
    if line.len() >= 2 * streams.len() + 64 {
        line.retain(|id| streams.get(*id).is_some());
    }
    line.push_back(id);
}
