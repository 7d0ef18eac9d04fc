//! What configures the device: everything that QEMU said and would not say again.
//!
//! # Theory of operation
//!
//! Messages are kept as they came, one for each thing that can be set, and replayed in an order in which none depends
//! on a later one. What QEMU said without asking for an answer counts at once; the rest counts when it was answered, so
//! that a worker which died over a request is not told of it twice.
//!
//! A ring's position is only kept until the ring starts. From then on the guest's memory tells it: our device gives
//! buffers back in the order in which it took them, so a worker that is told of no position goes on where the used
//! ring ends.

use std::rc::Rc;

use super::wire::{Broken, Message};

/// The most rings of a device, as the vhost-user library has it.
const MAX_RINGS: usize = 64;
/// The most messages about memory: regions, and what was not found to be removed.
const MAX_MEMORY: usize = 1024;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const RESET_OWNER: u32 = 4;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const RESET_DEVICE: u32 = 34;
const GET_MAX_MEM_SLOTS: u32 = 36;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;

/// What is always answered, of what the device offers.
const ANSWERED: [u32; 6] = [
    GET_FEATURES,
    GET_VRING_BASE,
    GET_PROTOCOL_FEATURES,
    GET_QUEUE_NUM,
    GET_CONFIG,
    GET_MAX_MEM_SLOTS,
];

/// VHOST_USER_PROTOCOL_F_REPLY_ACK.
const REPLY_ACK: u64 = 1 << 3;

/// The most messages of a replay.
#[cfg(feature = "rogue")]
pub(super) const MOST: usize = 5 + MAX_MEMORY + 7 * MAX_RINGS;

type Kept = Option<Rc<Message>>;

/// See the [module](self).
#[derive(Default)]
pub(super) struct Record {
    protocol_features: Kept,
    owner: Kept,
    features: Kept,
    memory: Vec<Rc<Message>>,
    rings: Vec<Ring>,
}

#[derive(Clone, Default)]
struct Ring {
    num: Kept,
    /// Only while the ring is stopped.
    base: Kept,
    addr: Kept,
    call: Kept,
    err: Kept,
    kick: Kept,
    enable: Kept,
}

impl Record {
    /// Whether the device answers a request. (As the vhost-user library does: it must not be waited for in vain.)
    pub(super) fn awaits_answer(&self, request: &Message) -> bool {
        let features = match request.request {
            // It is in force when this very message is answered.
            SET_PROTOCOL_FEATURES => Some(request),
            _ => self.protocol_features.as_deref(),
        };
        let acknowledged = features.is_some_and(|features| features.u64(0) & REPLY_ACK != 0);
        ANSWERED.contains(&request.request) || request.needs_reply() && acknowledged
    }

    /// Takes note of a request that was answered.
    pub(super) fn answered(
        &mut self,
        request: Rc<Message>,
        answer: &Message,
    ) -> Result<(), Broken> {
        if request.request == GET_VRING_BASE {
            if let Some(ring) = self.ring(request.u32(0)) {
                let stopped = Message::new(SET_VRING_BASE, answer.payload.clone());
                ring.base = Some(Rc::new(stopped));
                (ring.addr, ring.call, ring.kick) = (None, None, None);
            }
            return Ok(());
        }
        // Anything but 0 is a refusal.
        match ANSWERED.contains(&request.request) || answer.u64(0) != 0 {
            true => Ok(()),
            false => self.note(request),
        }
    }

    /// Takes note of a request.
    pub(super) fn note(&mut self, message: Rc<Message>) -> Result<(), Broken> {
        match message.request {
            SET_PROTOCOL_FEATURES => self.protocol_features = Some(message),
            SET_OWNER => self.owner = Some(message),
            SET_FEATURES => self.features = Some(message),
            SET_MEM_TABLE => self.memory = vec![message],
            ADD_MEM_REG | REM_MEM_REG => self.note_region(message)?,
            SET_VRING_NUM..=SET_VRING_BASE | SET_VRING_ENABLE => {
                self.note_ring(message.u32(0), message);
            }
            // The other bits say whether there is a descriptor.
            SET_VRING_KICK..=SET_VRING_ERR => self.note_ring(message.u32(0) & 0xff, message),
            RESET_OWNER => {
                *self = Record {
                    memory: std::mem::take(&mut self.memory),
                    ..Record::default()
                }
            }
            RESET_DEVICE => {
                self.features = None;
                self.rings.clear();
            }
            _ => {}
        }
        Ok(())
    }

    fn note_region(&mut self, message: Rc<Message>) -> Result<(), Broken> {
        // Behind 8 bytes of padding: where in the guest, how long, where in QEMU.
        let same = |other: &Rc<Message>| {
            other.request == ADD_MEM_REG
                && [8, 16, 24].map(|at| other.u64(at)) == [8, 16, 24].map(|at| message.u64(at))
        };
        let at = self.memory.iter().position(same);
        match at.filter(|_| message.request == REM_MEM_REG) {
            Some(at) => drop(self.memory.remove(at)),
            None if self.memory.len() < MAX_MEMORY => self.memory.push(message),
            None => return Err(Broken::TooMany),
        }
        Ok(())
    }

    fn note_ring(&mut self, index: u32, message: Rc<Message>) {
        let Some(ring) = self.ring(index) else {
            return;
        };
        match message.request {
            SET_VRING_NUM => ring.num = Some(message),
            SET_VRING_BASE => ring.base = Some(message),
            SET_VRING_ADDR => ring.addr = Some(message),
            SET_VRING_ENABLE => ring.enable = Some(message),
            SET_VRING_CALL => ring.call = Some(message),
            SET_VRING_ERR => ring.err = Some(message),
            _ => {
                ring.base = None;
                ring.kick = Some(message);
            }
        }
    }

    /// Panics unless the bounds hold.
    #[cfg(feature = "rogue")]
    pub(super) fn check(&self) {
        assert!(self.memory.len() <= MAX_MEMORY && self.rings.len() <= MAX_RINGS);
        assert!(self.replay().0.len() <= MOST);
    }

    /// There is none beyond those that a device can have: it will refuse the message.
    fn ring(&mut self, index: u32) -> Option<&mut Ring> {
        let index = usize::try_from(index)
            .ok()
            .filter(|index| *index < MAX_RINGS)?;
        if index >= self.rings.len() {
            self.rings.resize(index + 1, Ring::default());
        }
        Some(&mut self.rings[index])
    }

    /// All that a device must be told to be as the one before, and how many of it are answered. No ring is enabled
    /// before all are set up: the control queue tells of what lies in the others.
    pub(super) fn replay(&self) -> (Vec<Rc<Message>>, usize) {
        // The library answers no other request before it was asked for its features.
        let hello = Rc::new(Message::new(GET_FEATURES, Vec::new()));
        let mut all = vec![hello.clone()];
        let parts = [&self.protocol_features, &self.owner, &self.features];
        all.extend(parts.into_iter().flatten().cloned());
        all.extend(self.memory.iter().cloned());
        for ring in &self.rings {
            let parts = [
                &ring.num, &ring.base, &ring.addr, &ring.call, &ring.err, &ring.kick,
            ];
            all.extend(parts.into_iter().flatten().cloned());
        }
        all.extend(self.rings.iter().filter_map(|ring| ring.enable.clone()));
        // When this is answered, all the others were taken.
        all.push(hello);
        (all, 2)
    }
}

#[cfg(test)]
mod tests;
