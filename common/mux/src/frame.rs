//! Frames on the wire: an 8-byte header and a payload (`PROTOCOL.md`, "Frames").
//!
//! ```text
//!  byte 0      1..4                4..8                8..
//! +--------+------------------+--------------------+----------------+
//! | type   | payload length   | stream (u32 LE)    | payload        |
//! | u8     | u24 LE           | bit 31: whose      |                |
//! +--------+------------------+--------------------+----------------+
//! ```
//!
//! The header has a fixed size so that a sender can leave room for it, read a local socket straight into
//! the room behind it, and write it once the length is known.

use crate::reason::Violation;

/// Length of a frame header, in bytes.
pub const HEADER_LEN: usize = 8;
/// The longest service name, in bytes.
pub const MAX_SERVICE_LEN: usize = 255;
/// The longest explanation in a REFUSE, RESET or GOAWAY, in bytes; senders cut longer ones.
pub const MAX_TEXT_LEN: usize = 255;
/// The longest payload of any frame but DATA that this version knows, in bytes.
pub const MAX_CONTROL_PAYLOAD: usize = 4 + MAX_SERVICE_LEN;
/// The longest payload a header can tell, in bytes: 24 bits.
pub const MAX_PAYLOAD: u32 = (1 << 24) - 1;
/// Room that every control frame fits in, in bytes.
pub const MAX_CONTROL_FRAME: usize = crate::hello::MAX_HELLO_LEN;
/// Bit 31 of the stream field: the stream was opened by the *receiver* of this frame.
pub const PEER_OPENED: u32 = 1 << 31;
/// Frame types with this bit set may be skipped by who does not know them.
pub const IGNORABLE: u8 = 0x80;

/// Frame types.
pub mod kind {
    /// Not a frame: what an end that restarted sends, to fill up a frame that its predecessor left unfinished.
    pub const FILLER: u8 = 0x00;
    /// Opens a stream to a service: window u32, name.
    pub const OPEN: u8 = 0x01;
    /// Accepts a stream: window u32.
    pub const ACCEPT: u8 = 0x02;
    /// Refuses a stream: reason u16, text.
    pub const REFUSE: u8 = 0x03;
    /// Bytes of a stream.
    pub const DATA: u8 = 0x04;
    /// No more bytes from this side of the stream.
    pub const FIN: u8 = 0x05;
    /// Ends both sides of the stream at once: reason u16, text.
    pub const RESET: u8 = 0x06;
    /// More credit for a stream: bytes u32.
    pub const CREDIT: u8 = 0x07;
    /// More credit for the session: bytes u32.
    pub const SESSION_CREDIT: u8 = 0x08;
    /// Asks for a PONG: token u64.
    pub const PING: u8 = 0x09;
    /// Answers a PING: its token.
    pub const PONG: u8 = 0x0a;
    /// The sender is going away: reason u16, text.
    pub const GOAWAY: u8 = 0x0b;
    /// Means nothing; completes a frame that lost bytes, so that the loss shows.
    pub const PADDING: u8 = 0x80;
    /// First byte of the handshake's magic; never a frame type.
    pub const HELLO: u8 = crate::hello::MAGIC[0];
}

/// A frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "sim", derive(Hash))]
pub struct Header {
    /// Frame type, one of [`kind`].
    pub kind: u8,
    /// Payload length, in bytes; 24 bits.
    pub len: u32,
    /// Stream field as it is on the wire.
    pub stream: u32,
}

impl Header {
    /// The header as bytes.
    pub const fn encode(self) -> [u8; HEADER_LEN] {
        let len = self.len.to_le_bytes();
        let stream = self.stream.to_le_bytes();
        [
            self.kind, len[0], len[1], len[2], stream[0], stream[1], stream[2], stream[3],
        ]
    }

    /// The header in `bytes`.
    pub const fn decode(bytes: [u8; HEADER_LEN]) -> Self {
        let [kind, l0, l1, l2, s0, s1, s2, s3] = bytes;
        Header {
            kind,
            len: u32::from_le_bytes([l0, l1, l2, 0]),
            stream: u32::from_le_bytes([s0, s1, s2, s3]),
        }
    }

    /// Checks the payload length against the frame type; unknown types pass if they may be skipped.
    pub const fn check(self) -> Result<(), Violation> {
        let (min, max) = match self.kind {
            kind::OPEN => (5, 4 + MAX_SERVICE_LEN),
            kind::REFUSE | kind::RESET | kind::GOAWAY => (2, 2 + MAX_TEXT_LEN),
            kind::DATA => (1, usize::MAX),
            kind::FIN => (0, 0),
            kind::ACCEPT | kind::CREDIT | kind::SESSION_CREDIT => (4, 4),
            kind::PING | kind::PONG => (8, 8),
            unknown if unknown & IGNORABLE != 0 => (0, usize::MAX),
            unknown => return Err(Violation::UnknownFrame(unknown)),
        };
        let len = self.len as usize;
        if len < min || len > max {
            return Err(Violation::BadLength {
                kind: self.kind,
                len: self.len,
            });
        }
        Ok(())
    }
}

/// Builds control frames at the front of a buffer.
pub(crate) struct Writer<'a> {
    buf: &'a mut [u8],
    len: usize,
}

impl<'a> Writer<'a> {
    /// Starts a frame of `kind` for wire stream `stream`; `buf` holds [`MAX_CONTROL_FRAME`] bytes.
    pub(crate) fn new(buf: &'a mut [u8], kind: u8, stream: u32) -> Self {
        let header = Header {
            kind,
            len: 0,
            stream,
        };
        buf[..HEADER_LEN].copy_from_slice(&header.encode());
        Writer {
            buf,
            len: HEADER_LEN,
        }
    }

    /// Appends payload bytes.
    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.buf[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
        self
    }

    /// Fills in the payload length and returns the frame's length, in bytes.
    pub(crate) fn finish(self) -> usize {
        #[allow(clippy::cast_possible_truncation)] // at most MAX_CONTROL_FRAME
        let payload = ((self.len - HEADER_LEN) as u32).to_le_bytes();
        self.buf[1..4].copy_from_slice(&payload[..3]);
        self.len
    }
}

/// Splits a payload into its leading little-endian `u32` and the rest.
pub(crate) fn split_u32(payload: &[u8]) -> Option<(u32, &[u8])> {
    let (head, rest) = payload.split_first_chunk()?;
    Some((u32::from_le_bytes(*head), rest))
}

/// Splits a payload into its leading little-endian `u16` and the rest.
pub(crate) fn split_u16(payload: &[u8]) -> Option<(u16, &[u8])> {
    let (head, rest) = payload.split_first_chunk()?;
    Some((u16::from_le_bytes(*head), rest))
}

/// Whether `name` may name a service: 1 to [`MAX_SERVICE_LEN`] graphic ASCII bytes.
pub fn valid_service_name(name: &[u8]) -> bool {
    (1..=MAX_SERVICE_LEN).contains(&name.len()) && name.iter().all(u8::is_ascii_graphic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_round_trips() {
        let header = Header {
            kind: kind::DATA,
            len: 0x00ab_cdef,
            stream: 0x8001_0203,
        };
        assert_eq!(
            header.encode(),
            [4, 0xef, 0xcd, 0xab, 0x03, 0x02, 0x01, 0x80]
        );
        assert_eq!(Header::decode(header.encode()), header);
    }
}
