//! What is true of every stream, whatever the two ends believe: who opened it and which bytes it carries.

use std::collections::BTreeMap;
use std::format;
use std::string::String;

use super::{Plan, Side};
use crate::seal::{GOLDEN, mix};

/// The opener's part of a stream, or the acceptor's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Opener = 0,
    Acceptor = 1,
}

impl Role {
    pub(crate) fn other(self) -> Self {
        match self {
            Role::Opener => Role::Acceptor,
            Role::Acceptor => Role::Opener,
        }
    }
}

pub(crate) struct Record {
    pub(crate) opener: Side,
    /// The opener's session.
    pub(crate) epoch: u64,
    pub(crate) plan: Plan,
    pub(crate) asked: bool,
    /// Bytes each role has sent, and whether it has ended.
    pub(crate) sent: [u64; 2],
    pub(crate) finished: [bool; 2],
}

#[derive(Default)]
pub(crate) struct Truth {
    pub(crate) records: BTreeMap<u64, Record>,
    keys: u64,
}

impl Truth {
    pub(crate) fn add(&mut self, opener: Side, epoch: u64, plan: Plan) -> u64 {
        self.keys += 1;
        let record = Record {
            opener,
            epoch,
            plan,
            asked: false,
            sent: [0; 2],
            finished: [false; 2],
        };
        self.records.insert(self.keys, record);
        self.keys
    }

    pub(crate) fn record(&mut self, key: u64) -> &mut Record {
        self.records
            .get_mut(&key)
            .expect("every stream is on record")
    }
}

/// The service that stream `key` is opened to.
pub(crate) fn service(key: u64) -> String {
    format!("k{key}")
}

/// The stream that is opened to `service`.
pub(crate) fn key(service: &str) -> Option<u64> {
    service.strip_prefix('k')?.parse().ok()
}

/// The bytes from `offset` on of what `role` sends on stream `key`: no other stream, and no other offset, has the same run.
pub(crate) fn bytes(key: u64, role: Role, offset: u64) -> impl Iterator<Item = u8> {
    let seed = (key << 1 | role as u64).wrapping_mul(GOLDEN);
    let blocks = (offset >> 3..).flat_map(move |block| mix(seed ^ block).to_le_bytes());
    blocks.skip(usize::try_from(offset & 7).unwrap_or(0))
}
