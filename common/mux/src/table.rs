//! The streams of a session, found by slot: one table for those opened here, one for the peer's.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::stream::{GENERATIONS, Stream, StreamId};

/// All live streams of a session.
#[derive(Default)]
pub(crate) struct Streams {
    mine: Table,
    theirs: Table,
    ids: Ids,
}

/// Streams that one side opened.
#[derive(Default)]
struct Table {
    slots: Vec<Option<Box<Stream>>>,
    live: usize,
}

/// Hands out ids for streams opened here; a slot comes back with its next generation, oldest first.
#[derive(Default)]
struct Ids {
    free: VecDeque<StreamId>,
    used: u32,
}

impl Streams {
    pub(crate) fn len(&self) -> usize {
        self.mine.live + self.theirs.live
    }

    pub(crate) fn get(&self, id: StreamId) -> Option<&Stream> {
        let table = if id.peer_opened() {
            &self.theirs
        } else {
            &self.mine
        };
        let stream = table.slots.get(id.slot() as usize)?.as_deref()?;
        (stream.id == id).then_some(stream)
    }

    pub(crate) fn get_mut(&mut self, id: StreamId) -> Option<&mut Stream> {
        let slots = &mut self.table(id).slots;
        let stream = slots.get_mut(id.slot() as usize)?.as_deref_mut()?;
        (stream.id == id).then_some(stream)
    }

    /// An unused id for a stream to open here, if one with a slot below `limit` is left.
    pub(crate) fn new_id(&mut self, limit: u32) -> Option<StreamId> {
        let ids = &mut self.ids;
        match ids.free.pop_front() {
            Some(id) => Some(id),
            None => (ids.used < limit).then(|| {
                ids.used += 1;
                StreamId::new(false, ids.used - 1, 0)
            }),
        }
    }

    /// Adds a stream, unless its slot is taken.
    pub(crate) fn insert(&mut self, stream: Stream) -> Option<()> {
        let slot = stream.id.slot() as usize;
        let table = self.table(stream.id);
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
        let table = self.table(id);
        table.slots[id.slot() as usize] = None;
        table.live -= 1;
        if !id.peer_opened() {
            let next = (id.generation() + 1) % GENERATIONS;
            self.ids
                .free
                .push_back(StreamId::new(false, id.slot(), next));
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Stream> {
        let slots = self.mine.slots.iter().chain(&self.theirs.slots);
        slots.filter_map(|slot| slot.as_deref())
    }

    fn table(&mut self, id: StreamId) -> &mut Table {
        if id.peer_opened() {
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
