//! Looks inside a session, for its simulator, its model checker and tests; nothing here changes anything.
//!
//! For the model checker a session can also be copied and hashed, parts and all: two that hash alike will do alike.

use alloc::vec::Vec;
use core::hash::{Hash, Hasher};

use super::{Envelope, Session, Stats};
use crate::stream::Stream;

/// Counters tell what a session has done, not what it will do.
impl Hash for Stats {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

impl Envelope {
    /// The frame that it makes of `payload`.
    pub fn around(&self, payload: &[u8]) -> Vec<u8> {
        let seal = self.seal.as_ref().map_or(&[][..], |seal| seal);
        [&self.header, payload, seal].concat()
    }
}

impl Session {
    /// How many entries the session keeps beside its streams: in its lines, its events and its unfinished frame.
    pub fn backlog(&self) -> usize {
        self.control.len() + self.schedule.len() + self.events.len() + self.partial.len()
    }

    /// Checks what must always hold; for tests, fuzzing and model checking.
    ///
    /// # Panics
    /// If it does not.
    pub fn check_invariants(&self) {
        for stream in self.streams.iter() {
            let receive = &stream.receive;
            if stream.exposure() > 0 {
                assert_eq!(
                    receive.granted.bytes() + receive.held + receive.returnable,
                    receive.window,
                    "stream {}: what was granted, is held and is to be returned makes up its window",
                    stream.id
                );
            }
            assert!(
                !stream.is_gone(),
                "stream {} is gone but still there",
                stream.id
            );
        }
        let exposed: u64 = self.streams.iter().map(Stream::exposure).sum();
        assert!(
            exposed <= self.committed,
            "every grant is accounted for in the session's memory"
        );
        assert!(
            self.committed <= self.memory(),
            "no more is granted and held than the session's memory"
        );
        assert!(
            self.streams() as u64 <= u64::from(self.config.max_streams) * 2,
            "no more streams than both sides allow"
        );
        assert_eq!(
            self.receive.granted.bytes() + self.receive.held + self.receive.returnable,
            self.receive.window,
            "the session's credit is conserved"
        );
    }
}
