//! One stream of a session: its halves, its credit each way, and the frames it still owes.
//!
//! ```text
//!            open()                          OPEN arrives
//!              |                                  |
//!              v                                  v
//!          [Opening] --ACCEPT--> [Open] <--accept()-- [Asked]
//!              |                  |  |                 |
//!     REFUSE / RESET / reset()    |  | RESET/reset()   | refuse() / RESET
//!              |      FIN each way|  |                 |
//!              v                  v  v                 v
//!            gone               gone                 gone
//! ```
//!
//! A stream whose last frame is still to be sent (a REFUSE or RESET) is [`Phase::Closing`] until it is out:
//! so what a peer makes us owe is bounded by the streams it may have.

use alloc::boxed::Box;
use core::fmt;

use crate::credit::Credit;
use crate::frame::PEER_OPENED;
use crate::reason::Reason;

/// Names a stream within its session, on this side. No other stream of the session ever has the same one, even when
/// the peer gives its address again at once.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId {
    address: Address,
    serial: u64,
}

/// What names a stream on the wire, seen from this side: bit 31 tells that the peer opened it, then come an
/// 11-bit generation and a 20-bit slot (`PROTOCOL.md`, "Streams").
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Address(u32);

/// Streams one side can have open at once: the slot's 20 bits.
pub(crate) const MAX_SLOTS: u32 = 1 << SLOT_BITS;
const SLOT_BITS: u32 = 20;
/// Generations of a slot: 11 bits.
pub(crate) const GENERATIONS: u16 = 1 << 11;

impl StreamId {
    /// `serial` is one that no other stream of the session has.
    pub(crate) fn new(address: Address, serial: u64) -> Self {
        StreamId { address, serial }
    }

    pub(crate) fn address(self) -> Address {
        self.address
    }

    /// Whether the other end opened it.
    pub fn peer_opened(self) -> bool {
        self.address.peer_opened()
    }

    /// A number below twice the streams that each side may have, which no other live stream of the session has: the place in
    /// a table of what belongs to this one. The next stream in its slot gets the same; so what may outlive its stream
    /// stands there with its id.
    pub fn index(self) -> usize {
        self.address.slot() as usize * 2 + usize::from(self.address.peer_opened())
    }
}

impl Address {
    /// The address of a stream opened here.
    pub(crate) fn new(slot: u32, generation: u16) -> Self {
        Address((u32::from(generation % GENERATIONS) << SLOT_BITS) | (slot % MAX_SLOTS))
    }

    /// The address a frame that arrived means: what its sender opened, its sender calls its own.
    pub(crate) fn from_wire(stream: u32) -> Self {
        Address(stream ^ PEER_OPENED)
    }

    /// The stream field of a frame to send.
    pub(crate) fn to_wire(self) -> u32 {
        self.0
    }

    pub(crate) fn peer_opened(self) -> bool {
        self.0 & PEER_OPENED != 0
    }

    pub(crate) fn slot(self) -> u32 {
        self.0 & (MAX_SLOTS - 1)
    }

    pub(crate) fn generation(self) -> u16 {
        #[allow(clippy::cast_possible_truncation)] // 11 bits
        let generation = ((self.0 & !PEER_OPENED) >> SLOT_BITS) as u16;
        generation
    }
}

impl fmt::Debug for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `>3.0` for slot 3, generation 0, opened here; `<3.0` for one the peer opened.
impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = self.address;
        let side = if at.peer_opened() { '<' } else { '>' };
        write!(f, "{side}{}.{}", at.slot(), at.generation())
    }
}

/// Where a stream is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "sim", derive(Hash))]
pub(crate) enum Phase {
    /// Opened here, not answered yet.
    Opening,
    /// Opened by the peer, not answered yet.
    Asked,
    /// Data may flow.
    Open,
    /// Over; a REFUSE or RESET is still to be sent.
    Closing,
}

/// One direction of an open stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "sim", derive(Hash))]
pub(crate) enum Half {
    Open,
    Ended,
}

/// Frames a stream owes, at most one of each.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(feature = "sim", derive(Hash))]
pub(crate) struct Owed {
    pub(crate) open: bool,
    pub(crate) accept: bool,
    pub(crate) refuse: bool,
    pub(crate) credit: bool,
    pub(crate) fin: bool,
    pub(crate) reset: bool,
}

impl Owed {
    /// Whether it owes any.
    pub(crate) fn any(self) -> bool {
        self.open | self.accept | self.refuse | self.credit | self.fin | self.reset
    }
}

/// What the receiver of a stream has granted and what became of it.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(feature = "sim", derive(Hash))]
pub(crate) struct Receive {
    /// Bytes the peer may still send.
    pub(crate) granted: Credit,
    /// Bytes that arrived and the local side has not taken yet.
    pub(crate) held: u32,
    /// Bytes taken and not yet granted anew.
    pub(crate) returnable: u32,
    /// What `granted + held + returnable` adds up to while the half is open.
    pub(crate) window: u32,
    /// Bytes taken since `since`, to see how long a whole window takes.
    pub(crate) measured: u32,
    /// When the current measurement began, in microseconds.
    pub(crate) since: u64,
}

#[cfg_attr(feature = "sim", derive(Clone, Hash))]
pub(crate) struct Stream {
    pub(crate) id: StreamId,
    pub(crate) phase: Phase,
    pub(crate) sending: Half,
    pub(crate) receiving: Half,
    pub(crate) send: Credit,
    pub(crate) receive: Receive,
    pub(crate) owed: Owed,
    /// Is in the queue of streams that owe frames.
    pub(crate) in_control: bool,
    /// The local side has bytes to send.
    pub(crate) readable: bool,
    pub(crate) queue: crate::schedule::Place,
    /// Payload of the OPEN, REFUSE or RESET it owes.
    pub(crate) note: Option<Note>,
}

/// Payload of a frame that is still to be sent.
#[cfg_attr(feature = "sim", derive(Clone, Hash))]
pub(crate) enum Note {
    Service(Box<[u8]>),
    Why(Reason, Box<str>),
}

impl Stream {
    pub(crate) fn new(id: StreamId, phase: Phase) -> Self {
        Stream {
            id,
            phase,
            sending: Half::Open,
            receiving: Half::Open,
            send: Credit::default(),
            receive: Receive::default(),
            owed: Owed::default(),
            in_control: false,
            readable: false,
            queue: crate::schedule::Place::default(),
            note: None,
        }
    }

    /// Whether data frames may be sent right now, as far as this stream is concerned.
    pub(crate) fn sendable(&self) -> bool {
        self.phase == Phase::Open
            && self.sending == Half::Open
            && self.readable
            && self.send.bytes() > 0
    }

    /// Whether the stream is over and has nothing left to say.
    pub(crate) fn is_gone(&self) -> bool {
        let owes_end = self.owed.refuse || self.owed.reset || self.owed.fin;
        match self.phase {
            Phase::Opening | Phase::Asked => false,
            Phase::Open => {
                self.sending == Half::Ended && self.receiving == Half::Ended && !owes_end
            }
            Phase::Closing => !owes_end,
        }
    }

    /// Bytes the local side may have to hold for the peer on this stream.
    pub(crate) fn exposure(&self) -> u64 {
        let receive = &self.receive;
        match (self.phase, self.receiving) {
            (Phase::Closing, _) | (_, Half::Ended) => 0,
            _ => u64::from(receive.window),
        }
    }
}
