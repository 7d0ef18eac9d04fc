//! The frames (`PROTOCOL.md`, "Frames").
//!
//! ```text
//! HELLO   0x80 | "VPL" | version | flags | id u64 | ack u64 | speed u32 | (later fields) | crc u32
//! other   flags | next | seen [ | gaps u32 ] [ | seq | order | payload 1..=512 ] | crc u32
//! ```
//!
//! The checksum is CRC-32C. That of a HELLO is over the HELLO alone, so that anybody can read it. That of any other
//! frame starts with the numbers of the sender's and the receiver's incarnation, which it does not carry: a frame of
//! a dead incarnation, or one's own frame that comes back as an echo, is noise.

use alloc::vec::Vec;

use crc::{CRC_32_ISCSI, Crc, Digest, Table};

/// The version of the protocol.
pub const VERSION: u8 = 1;
/// The longest payload of a frame, in bytes.
pub const MAX_PAYLOAD: usize = 512;
/// Frames that may be on their way at once, the first unacknowledged one included.
pub const MAX_FRAMES: usize = 32;

/// The longest frame, unstuffed.
pub const MAX_BODY: usize = HEADER + DATA_HEADER + MAX_PAYLOAD + CRC_LEN;

const HEADER: usize = 3 + 4;
const DATA_HEADER: usize = 2;
const CRC_LEN: usize = 4;

const HELLO: [u8; 4] = [0x80, b'V', b'P', b'L'];
const HELLO_FIELDS: usize = 2 + 8 + 8 + 4;

mod flag {
    /// A payload follows.
    pub(super) const DATA: u8 = 1;
    /// An acknowledgement is wanted at once.
    pub(super) const ASK: u8 = 2;
    /// `gaps` is there.
    pub(super) const GAPS: u8 = 4;
    pub(super) const ALL: u8 = DATA | ASK | GAPS;
}

/// In HELLO: the sender has heard the receiver, and its handshake is done.
const OPEN: u8 = 1;

/// Slicing tables: in an emulated guest each step counts.
static CRC: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

/// What one end says of itself until both have heard each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The version it speaks.
    pub version: u8,
    /// Whether it has heard the other end answer.
    pub open: bool,
    /// Names this incarnation; random and not 0.
    pub id: u64,
    /// The incarnation of the other end that it has heard; 0 if none.
    pub ack: u64,
    /// The line's speed in bits a second; 0 if it does not know.
    pub speed: u32,
}

impl Hello {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(HELLO.len() + HELLO_FIELDS + CRC_LEN);
        body.extend(HELLO);
        body.extend([self.version, if self.open { OPEN } else { 0 }]);
        body.extend(self.id.to_le_bytes());
        body.extend(self.ack.to_le_bytes());
        body.extend(self.speed.to_le_bytes());
        body.extend(CRC.checksum(&body).to_le_bytes());
        body
    }

    /// Reads an unstuffed frame; `None` if it is not a sound HELLO.
    pub fn decode(body: &[u8]) -> Option<Self> {
        let (checked, crc) = body.split_last_chunk::<CRC_LEN>()?;
        let fields = checked.strip_prefix(&HELLO)?;
        if CRC.checksum(checked).to_le_bytes() != *crc {
            return None;
        }
        let ([version, flags], fields) = fields.split_first_chunk()?;
        let (id, fields) = fields.split_first_chunk()?;
        let (ack, fields) = fields.split_first_chunk()?;
        let hello = Hello {
            version: *version,
            open: flags & OPEN != 0,
            id: u64::from_le_bytes(*id),
            ack: u64::from_le_bytes(*ack),
            speed: u32::from_le_bytes(*fields.first_chunk()?),
        };
        (hello.id != 0).then_some(hello)
    }
}

/// What a frame says of the other direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ack {
    /// The first frame that has not arrived.
    pub(crate) next: u8,
    /// The order of the frame that arrived last.
    pub(crate) seen: u8,
    /// Bit n: frame `next + 1 + n` has arrived.
    pub(crate) gaps: u32,
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Data<'b> {
    /// Its place in the stream.
    pub(crate) seq: u8,
    /// Its place among all that was transmitted: a retransmission has one of its own.
    pub(crate) order: u8,
    /// Whether an acknowledgement is wanted at once.
    pub(crate) ask: bool,
    pub(crate) payload: &'b [u8],
}

/// Makes and checks the checksums of one direction between two incarnations.
#[derive(Clone)]
pub(crate) struct Seal(Digest<'static, u32, Table<16>>);

/// For the model checker.
#[cfg(feature = "sim")]
impl core::hash::Hash for Seal {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        self.0.clone().finalize().hash(state);
    }
}

impl Seal {
    pub(crate) fn new(sender: u64, receiver: u64) -> Self {
        let mut digest = CRC.digest();
        digest.update(&sender.to_le_bytes());
        digest.update(&receiver.to_le_bytes());
        Seal(digest)
    }

    fn checksum(&self, body: &[u8]) -> [u8; CRC_LEN] {
        let mut digest = self.0.clone();
        digest.update(body);
        digest.finalize().to_le_bytes()
    }

    pub(crate) fn encode(&self, ack: Ack, data: Option<Data<'_>>, body: &mut Vec<u8>) {
        body.clear();
        body.extend([0, ack.next, ack.seen]);
        if ack.gaps != 0 {
            body[0] |= flag::GAPS;
            body.extend(ack.gaps.to_le_bytes());
        }
        if let Some(data) = data {
            body[0] |= flag::DATA | if data.ask { flag::ASK } else { 0 };
            body.extend([data.seq, data.order]);
            body.extend_from_slice(data.payload);
        }
        body.extend(self.checksum(body));
    }

    /// Reads an unstuffed frame; `None` if it was damaged or is not between these two.
    pub(crate) fn decode<'b>(&self, body: &'b [u8]) -> Option<(Ack, Option<Data<'b>>)> {
        let (checked, crc) = body.split_last_chunk::<CRC_LEN>()?;
        let ([flags, next, seen], mut rest) = checked.split_first_chunk()?;
        if flags & !flag::ALL != 0 || self.checksum(checked) != *crc {
            return None;
        }
        let mut gaps = 0;
        if flags & flag::GAPS != 0 {
            let field;
            (field, rest) = rest.split_first_chunk()?;
            gaps = u32::from_le_bytes(*field);
        }
        let ack = Ack {
            next: *next,
            seen: *seen,
            gaps,
        };
        if flags & flag::DATA == 0 {
            return Some((ack, None));
        }
        let ([seq, order], payload) = rest.split_first_chunk()?;
        let sound = (1..=MAX_PAYLOAD).contains(&payload.len());
        let data = Data {
            seq: *seq,
            order: *order,
            ask: flags & flag::ASK != 0,
            payload,
        };
        sound.then_some((ack, Some(data)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_comes_back_and_may_grow() {
        let hello = Hello {
            version: VERSION,
            open: true,
            id: 0x0102_0304_0506_0708,
            ack: u64::MAX,
            speed: 115_200,
        };
        let body = hello.encode();
        assert_eq!(Hello::decode(&body), Some(hello));

        let mut longer = body[..body.len() - CRC_LEN].to_vec();
        longer.extend(b"later fields");
        longer.extend(CRC.checksum(&longer).to_le_bytes());
        assert_eq!(Hello::decode(&longer), Some(hello));
        for at in 0..body.len() {
            let mut damaged = body.clone();
            damaged[at] ^= 1;
            assert_eq!(Hello::decode(&damaged), None);
        }
    }

    #[test]
    fn a_frame_is_for_one_pair_of_incarnations_and_one_direction() {
        let ack = Ack {
            next: 3,
            seen: 9,
            gaps: 5,
        };
        let data = Data {
            seq: 1,
            order: 2,
            ask: true,
            payload: b"payload",
        };
        let mut body = Vec::new();
        for (ack, data) in [
            (ack, Some(data)),
            (ack, None),
            (Ack { gaps: 0, ..ack }, Some(data)),
        ] {
            Seal::new(1, 2).encode(ack, data, &mut body);
            assert_eq!(Seal::new(1, 2).decode(&body), Some((ack, data)));
            assert_eq!(Seal::new(2, 1).decode(&body), None);
            assert_eq!(Seal::new(3, 2).decode(&body), None);
            assert_eq!(Hello::decode(&body), None);
        }
    }
}
