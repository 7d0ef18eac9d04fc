//! What a process that takes over must know of the guest and cannot learn from it.
//!
//! # Theory of operation
//!
//! The keeper ([`keeper`](crate::keeper)) holds the latest state of each device, without a look at it. It is sent whenever it
//! changed, and in an order that makes a death at any point harmless:
//!
//! * what the guest *said* is saved before its message is given back: a guest that was heard is not asked again, and one
//!   that says the same twice does no harm;
//! * what the guest *was told* is saved afterwards: it may be told twice, which Linux takes without harm (of a port that it
//!   has it says PORT_READY once more, and what else it knows it ignores).

use serde::{Deserialize, Serialize};
use tracing::error;

use super::control::Machine;
use crate::keeper::{Leash, MAX_STATE};

/// The control queue's state, as it is saved.
#[derive(Serialize)]
pub(super) struct Current<'a> {
    pub(super) machine: &'a Machine,
    pub(super) heard: bool,
    pub(super) most: u16,
}

/// The same, read back.
#[derive(Deserialize)]
pub(super) struct Saved {
    pub(super) machine: Machine,
    pub(super) heard: bool,
    pub(super) most: u16,
}

impl Saved {
    /// What another process saved of a device with room for `room` ports, if that makes sense.
    pub(super) fn read(bytes: &[u8], room: usize) -> Option<Self> {
        if bytes.is_empty() {
            return None;
        }
        let saved = serde_json::from_slice(bytes);
        let saved =
            saved.inspect_err(|error| error!("the last worker's state makes no sense: {error}"));
        saved
            .ok()
            .filter(|saved: &Saved| saved.machine.room() == room)
    }
}

/// Where it is saved.
#[derive(Debug)]
pub(super) struct Saver {
    leash: Leash,
    last: Vec<u8>,
}

impl Saver {
    pub(super) fn new(leash: Leash) -> Self {
        let last = Vec::new();
        Saver { leash, last }
    }

    pub(super) fn save(&mut self, current: &Current<'_>) {
        let bytes = serde_json::to_vec(current).unwrap_or_default();
        debug_assert!((1..=MAX_STATE).contains(&bytes.len()));
        if bytes != self.last {
            self.leash.state(&bytes);
            self.last = bytes;
        }
    }
}
