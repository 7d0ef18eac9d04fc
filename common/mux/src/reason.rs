//! Why streams and sessions end: codes that travel, and what only this side knows.

use core::fmt;

/// Why a stream was refused or reset, or a session is ending; travels as a 16-bit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Nobody serves a service of that name.
    NoSuchService,
    /// The target refused the connection.
    TargetRefused,
    /// The target cannot be reached (name unknown, no route, no such socket, permission).
    TargetUnreachable,
    /// The target did not answer in time.
    Timeout,
    /// A limit of the refusing side is reached.
    Limit,
    /// The side is shutting down.
    ShuttingDown,
    /// The local connection broke (reset by its peer, or an I/O error).
    ConnectionBroken,
    /// The opener gave up before it was answered.
    Cancelled,
    /// The other side broke the protocol.
    ProtocolError,
    /// A code this version does not know.
    Other(u16),
}

const CODES: [(Reason, u16, &str); 9] = [
    (Reason::NoSuchService, 1, "no such service"),
    (Reason::TargetRefused, 2, "target refused the connection"),
    (Reason::TargetUnreachable, 3, "target cannot be reached"),
    (Reason::Timeout, 4, "target did not answer in time"),
    (Reason::Limit, 5, "limit reached"),
    (Reason::ShuttingDown, 6, "shutting down"),
    (Reason::ConnectionBroken, 7, "connection broke"),
    (Reason::Cancelled, 8, "cancelled"),
    (Reason::ProtocolError, 9, "protocol error"),
];

impl Reason {
    /// The code on the wire.
    pub fn code(self) -> u16 {
        match self {
            Reason::Other(code) => code,
            known => CODES
                .iter()
                .find(|(reason, ..)| *reason == known)
                .map_or(0, |(_, code, _)| *code),
        }
    }

    /// The reason a code stands for.
    pub fn from_code(code: u16) -> Self {
        CODES
            .iter()
            .find(|(_, known, _)| *known == code)
            .map_or(Reason::Other(code), |(reason, ..)| *reason)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match CODES.iter().find(|(reason, ..)| reason == self) {
            Some((_, _, text)) => f.write_str(text),
            None => write!(f, "reason {}", self.code()),
        }
    }
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "sim", derive(Hash))]
pub enum End {
    /// The other end started anew on the same channel.
    PeerRestarted,
    /// The other end said that it ends the session.
    PeerAborted(Reason),
    /// The channel lost or added bytes: what arrived is not what the other end sent.
    Damaged,
    /// The other end broke the protocol.
    Violation(Violation),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::PeerRestarted => f.write_str("the other end restarted"),
            End::PeerAborted(reason) => write!(f, "the other end ended the session: {reason}"),
            End::Damaged => {
                f.write_str("the channel lost or added bytes, as when an end dies in mid-frame")
            }
            End::Violation(violation) => write!(f, "the other end broke the protocol: {violation}"),
        }
    }
}

/// What the other end did that no correct end does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "sim", derive(Hash))]
pub enum Violation {
    /// A frame type below 0x80 that this version does not know.
    UnknownFrame(u8),
    /// A payload of a length that its frame type never has.
    BadLength {
        /// Frame type.
        kind: u8,
        /// Payload length, in bytes.
        len: u32,
    },
    /// More data than the credit granted, or a frame over the announced maximum.
    CreditOverdrawn,
    /// Credit that adds up to more than the protocol allows.
    CreditOverflow,
    /// A stream number above the limit announced, or one still in use.
    BadOpen,
    /// A service name that is empty, too long or not made of graphic ASCII.
    BadServiceName,
    /// A frame that the stream's state does not allow, such as data after its end.
    Unexpected(u8),
    /// A handshake frame that does not check.
    BadHello,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::UnknownFrame(kind) => write!(f, "unknown frame type {kind:#04x}"),
            Violation::BadLength { kind, len } => {
                write!(f, "frame type {kind:#04x} with a payload of {len} bytes")
            }
            Violation::CreditOverdrawn => f.write_str("sent more than its credit allows"),
            Violation::CreditOverflow => f.write_str("granted more credit than can be"),
            Violation::BadOpen => f.write_str("opened a stream number it may not use"),
            Violation::BadServiceName => f.write_str("asked for a malformed service name"),
            Violation::Unexpected(kind) => {
                write!(
                    f,
                    "frame type {kind:#04x} in a state that does not allow it"
                )
            }
            Violation::BadHello => f.write_str("malformed handshake"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_round_trip() {
        for code in 0..20 {
            assert_eq!(Reason::from_code(code).code(), code);
        }
    }
}
