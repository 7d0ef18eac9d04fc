//! The handshake frame (`PROTOCOL.md`, "Handshake"); its layout is the same in every version, for ever.
//!
//! ```text
//! magic 8 | rest u16 | min u8 | max u8 | epoch u64 | ack u64 | features u64 |
//! max_frame u32 | session_window u32 | max_streams u32 | n u8 | product n | (later fields) | crc32c u32
//! ```
//!
//! `rest` counts the bytes behind it, the checksum included. Fields that a later version appends lie
//! between the product and the checksum and are skipped here. The checksum is over all bytes before it.

use alloc::string::String;
use alloc::vec::Vec;

use crate::frame::HEADER_LEN;

/// What a handshake starts with; the first byte is never a frame type.
pub const MAGIC: [u8; HEADER_LEN] = [0xd6, b'V', b'P', b'M', b'U', b'X', b'\r', b'\n'];
/// The protocol version this crate speaks.
pub const VERSION: u8 = 1;
/// The longest handshake frame, in bytes.
pub const MAX_HELLO_LEN: usize = 512;
/// The least `max_frame` and `session_window`, in bytes.
pub const MIN_LIMIT: u32 = 4096;
/// The longest product name and version, in bytes.
pub const MAX_PRODUCT_LEN: usize = 64;
/// The feature of sealed frames, which is in force as soon as one side asks for it.
pub const SEAL: u64 = 1;

const REST_AT: usize = MAGIC.len();
const BODY_AT: usize = REST_AT + 2;
const FIXED_BODY: usize = 2 + 3 * 8 + 3 * 4 + 1;
const CRC_LEN: usize = 4;

/// CRC-32C (Castagnoli; RFC 3720, appendix B.4).
const CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI);

/// What one side says of itself when a session starts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "sim", derive(Hash))]
pub struct Hello {
    /// The lowest protocol version it speaks.
    pub min_version: u8,
    /// The highest protocol version it speaks.
    pub max_version: u8,
    /// Random, not 0: names this start of this side.
    pub epoch: u64,
    /// The other side's epoch that this answers; 0 if it has heard none.
    pub ack: u64,
    /// Bits of optional behaviour; in force are those that both sides set, and [`SEAL`] if either does.
    pub features: u64,
    /// The longest DATA payload it takes, in bytes.
    pub max_frame: u32,
    /// Bytes of data it lets be on their way to it at first, over all streams.
    pub session_window: u32,
    /// How many streams the other side may have open towards it.
    pub max_streams: u32,
    /// Name and version of the program, UTF-8, for messages.
    pub product: String,
}

/// What a run of bytes is, seen as a handshake.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parse {
    /// The start of one; it needs more bytes.
    Partial,
    /// A whole one.
    Whole(Hello),
    /// No handshake.
    Garbage,
}

impl Hello {
    /// The frame's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let product = truncate(&self.product, MAX_PRODUCT_LEN).as_bytes();
        let mut out = Vec::with_capacity(BODY_AT + FIXED_BODY + product.len() + CRC_LEN);
        out.extend(MAGIC);
        #[allow(clippy::cast_possible_truncation)] // at most MAX_HELLO_LEN
        out.extend(((FIXED_BODY + product.len() + CRC_LEN) as u16).to_le_bytes());
        out.extend([self.min_version, self.max_version]);
        for word in [self.epoch, self.ack, self.features] {
            out.extend(word.to_le_bytes());
        }
        for word in [self.max_frame, self.session_window, self.max_streams] {
            out.extend(word.to_le_bytes());
        }
        #[allow(clippy::cast_possible_truncation)] // at most MAX_PRODUCT_LEN
        out.push(product.len() as u8);
        out.extend(product);
        out.extend(CRC.checksum(&out).to_le_bytes());
        out
    }

    /// The first sound handshake that lies in `bytes`, whatever is before it.
    pub fn find(bytes: &[u8]) -> Option<Self> {
        let starts = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(&MAGIC));
        starts
            .map(|at| Self::parse(&bytes[at..]))
            .find_map(|parse| match parse {
                Parse::Whole(hello) => Some(hello),
                Parse::Partial | Parse::Garbage => None,
            })
    }

    /// Reads a handshake from the front of `bytes`.
    pub(crate) fn parse(bytes: &[u8]) -> Parse {
        let seen = bytes.len().min(MAGIC.len());
        if bytes[..seen] != MAGIC[..seen] {
            return Parse::Garbage;
        }
        let Some(len) = Self::claimed_len(bytes) else {
            return Parse::Partial;
        };
        if !(BODY_AT + FIXED_BODY + CRC_LEN..=MAX_HELLO_LEN).contains(&len) {
            return Parse::Garbage;
        }
        let Some(frame) = bytes.get(..len) else {
            return Parse::Partial;
        };
        let (checked, crc) = frame.split_at(len - CRC_LEN);
        if crc != CRC.checksum(checked).to_le_bytes() {
            return Parse::Garbage;
        }
        match Self::fields(&checked[BODY_AT..]) {
            Some(hello) => Parse::Whole(hello),
            None => Parse::Garbage,
        }
    }

    /// How long the handshake at the front of `bytes` says it is.
    pub(crate) fn claimed_len(bytes: &[u8]) -> Option<usize> {
        let rest = bytes.get(REST_AT..BODY_AT)?;
        Some(BODY_AT + usize::from(u16::from_le_bytes([rest[0], rest[1]])))
    }

    fn fields(body: &[u8]) -> Option<Self> {
        let (versions, body) = body.split_first_chunk::<2>()?;
        let (words, body) = body.split_first_chunk::<24>()?;
        let (limits, body) = body.split_first_chunk::<12>()?;
        let (&product_len, body) = body.split_first()?;
        let product = body.get(..usize::from(product_len))?;
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&words[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let limit = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&limits[at..at + 4]);
            u32::from_le_bytes(bytes)
        };
        let hello = Hello {
            min_version: versions[0],
            max_version: versions[1],
            epoch: word(0),
            ack: word(8),
            features: word(16),
            max_frame: limit(0),
            session_window: limit(4),
            max_streams: limit(8),
            product: printable(product, MAX_PRODUCT_LEN),
        };
        let sound = hello.epoch != 0
            && hello.min_version <= hello.max_version
            && hello.max_frame >= MIN_LIMIT
            && hello.session_window >= MIN_LIMIT;
        sound.then_some(hello)
    }

    /// The highest version that both this side and a side speaking `min..=max` speak.
    pub fn common_version(&self, min: u8, max: u8) -> Option<u8> {
        let version = self.max_version.min(max);
        (version >= self.min_version && version >= min).then_some(version)
    }
}

/// Text from the other end, made fit for a log line: at most `max` bytes, control characters replaced.
pub(crate) fn printable(bytes: &[u8], max: usize) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(max)])
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// The longest prefix of `text` of at most `max` bytes that ends at a character.
pub(crate) fn truncate(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    fn sample() -> Hello {
        Hello {
            min_version: 1,
            max_version: 3,
            epoch: 7,
            ack: 0,
            features: 0,
            max_frame: 65536,
            session_window: 1 << 20,
            max_streams: 100,
            product: "virtproxy 0.1.0".to_string(),
        }
    }

    #[test]
    fn round_trips_and_needs_every_byte() {
        let bytes = sample().encode();
        for cut in 0..bytes.len() {
            assert_eq!(Hello::parse(&bytes[..cut]), Parse::Partial, "{cut} bytes");
        }
        assert_eq!(Hello::parse(&bytes), Parse::Whole(sample()));
    }

    #[test]
    fn any_flipped_bit_is_garbage_or_waits() {
        let bytes = sample().encode();
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(
                !matches!(Hello::parse(&bad), Parse::Whole(..)),
                "bit {bit} went unnoticed"
            );
        }
    }

    #[test]
    fn the_highest_common_version_wins() {
        assert_eq!(sample().common_version(1, 1), Some(1));
        assert_eq!(sample().common_version(2, 9), Some(3));
        assert_eq!(sample().common_version(4, 9), None);
    }
}
