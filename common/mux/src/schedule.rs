//! Which stream sends next: deficit round robin, new and sparse streams first.
//!
//! The scheme is fq_codel's (RFC 8290, section 4.2) without the dropping: a stream that has just got something to send
//! waits in `fresh` and goes before all others until it has used up one turn or run dry; then it takes its turn
//! in `bulk`, and leaves only when it is found dry there, so that running dry for an instant gains nothing. A stream that is
//! alone in line is not held to its turn: nobody waits, and few large frames are cheaper than many.

use alloc::collections::VecDeque;

use crate::stream::{Stream, StreamId};
use crate::table::{Streams, line_up};

/// The part of a turn that is not worth a frame of its own: such a rest is let go. Where a link takes half a turn and its
/// header at a time, every third frame would be a crumb.
const CRUMB: i32 = 16;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "sim", derive(Hash))]
enum Queue {
    #[default]
    None,
    Fresh,
    Bulk,
}

/// A stream's place in the schedule.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(feature = "sim", derive(Hash))]
pub(crate) struct Place {
    queue: Queue,
    /// Bytes left in its turn; at least minus a turn, when the last frame went over.
    deficit: i32,
}

#[cfg_attr(feature = "sim", derive(Clone, Hash))]
pub(crate) struct Schedule {
    /// Bytes a stream may send in one turn.
    turn: i32,
    fresh: VecDeque<StreamId>,
    bulk: VecDeque<StreamId>,
}

impl Schedule {
    pub(crate) fn new(turn: u32) -> Self {
        Schedule {
            turn: i32::try_from(turn).unwrap_or(i32::MAX),
            fresh: VecDeque::new(),
            bulk: VecDeque::new(),
        }
    }

    /// Gives a stream that can send a place, if it has none; whether it is to be put in line with [`Schedule::line_up`].
    pub(crate) fn admit(&self, stream: &mut Stream) -> bool {
        let enters = stream.queue.queue == Queue::None && stream.sendable();
        if enters {
            stream.queue = Place {
                queue: Queue::Fresh,
                deficit: self.turn,
            };
        }
        enters
    }

    /// Puts a stream in line that was just admitted.
    pub(crate) fn line_up(&mut self, streams: &Streams, id: StreamId) {
        line_up(&mut self.fresh, streams, id);
    }

    /// The stream whose turn it is, and how many bytes it may send in it.
    pub(crate) fn next(&mut self, streams: &mut Streams) -> Option<(StreamId, u32)> {
        loop {
            let alone = self.fresh.len() + self.bulk.len() == 1;
            let from_fresh = !self.fresh.is_empty();
            let line = if from_fresh {
                &mut self.fresh
            } else {
                &mut self.bulk
            };
            let id = *line.front()?;
            let Some(stream) = streams.get_mut(id) else {
                line.pop_front();
                continue;
            };
            let sendable = stream.sendable();
            let place = &mut stream.queue;
            if place.deficit <= self.turn / CRUMB {
                place.deficit = place.deficit.min(0);
            }
            if let (true, Ok(left @ 1..)) = (sendable, u32::try_from(place.deficit)) {
                let most = if alone { u32::MAX } else { left };
                return Some((id, most.min(stream.send.bytes())));
            }
            line.pop_front();
            if sendable || from_fresh {
                if place.deficit <= 0 {
                    place.deficit += self.turn;
                }
                stream.queue.queue = Queue::Bulk;
                line_up(&mut self.bulk, streams, id);
            } else {
                stream.queue.queue = Queue::None;
            }
        }
    }

    /// Whether nobody is in line.
    pub(crate) fn is_empty(&self) -> bool {
        self.fresh.is_empty() && self.bulk.is_empty()
    }

    /// Entries in both lines, those of streams that are gone included.
    #[cfg(feature = "sim")]
    pub(crate) fn len(&self) -> usize {
        self.fresh.len() + self.bulk.len()
    }

    /// Counts `bytes` that the stream sent against its turn.
    pub(crate) fn spent(&self, stream: &mut Stream, bytes: u32) {
        let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
        let left = stream.queue.deficit.saturating_sub(bytes);
        // What it sent while nobody waited is not held against it.
        stream.queue.deficit = left.max(-self.turn);
    }
}
