//! What can be done to a pair of sessions. Every value of every field means something, so that operations may come from a
//! property test, a fuzzer or a seed.

use super::{Fault, Rng, Split};

/// One of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "arbitrary", derive(arbitrary::Arbitrary))]
pub enum Side {
    /// One.
    A,
    /// The other.
    B,
}

impl Side {
    /// The end across.
    pub fn other(self) -> Side {
        match self {
            Side::A => Side::B,
            Side::B => Side::A,
        }
    }
}

/// How fast a local side takes what arrives for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "arbitrary", derive(arbitrary::Arbitrary))]
pub enum Reading {
    /// At once.
    Fast,
    /// A few hundred bytes a millisecond.
    Slow,
    /// Not at all.
    Never,
}

/// What the accepting side does with an OPEN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "arbitrary", derive(arbitrary::Arbitrary))]
pub enum Answer {
    /// Accepts it at once.
    Accept,
    /// Accepts it a few milliseconds later.
    AcceptLater,
    /// Refuses it at once.
    Refuse,
    /// Refuses it a few milliseconds later.
    RefuseLater,
    /// Says nothing.
    Hang,
}

/// What becomes of a stream, if nothing else happens to it. The opener's part comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "arbitrary", derive(arbitrary::Arbitrary))]
pub struct Plan {
    /// What the acceptor does.
    pub answer: Answer,
    /// Bytes each side sends, in units of 16.
    pub bytes: [u16; 2],
    /// Whether each side half-closes behind them.
    pub ends: [bool; 2],
    /// How each side takes what comes.
    pub reading: [Reading; 2],
}

/// Bytes that lie in the channel before a session starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "arbitrary", derive(arbitrary::Arbitrary))]
pub enum Garbage {
    /// Nothing.
    None,
    /// So many random bytes.
    Random(u8),
    /// The start of a handshake that claims to be long.
    FalseStart(u8),
    /// A handshake of somebody who is gone; it answers nobody, or somebody else who is gone.
    Stale(bool),
    /// What the reading end says first comes back to it.
    Echo,
}

/// Something to do to a pair. `which` counts the streams of that end round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "arbitrary", derive(arbitrary::Arbitrary))]
pub enum Op {
    /// Opens a stream.
    Open(Side, Plan),
    /// Changes how fast a stream's local side reads.
    Read(Side, u8, Reading),
    /// Gives a stream more to send, in units of 16 bytes.
    Write(Side, u8, u16),
    /// Lets a stream's local side end once it has sent what it has.
    Finish(Side, u8),
    /// Resets a stream.
    Reset(Side, u8),
    /// Answers a stream that was left hanging: accept or refuse.
    Answer(Side, u8, bool),
    /// Measures the round trip.
    Ping(Side),
    /// Takes no more streams.
    GoAway(Side),
    /// What this end sends arrives no more for so many microseconds; if they are odd, it can send nothing either.
    Stall(Side, u16),
    /// How what this end sends is delivered.
    Deliver(Side, Split, u16),
    /// This end starts anew; of what it sent and the other has not got, the youngest so many bytes are lost without a
    /// word.
    Restart(Side, u16),
    /// The channel breaks, which both ends are told, and comes up again with this garbage on the way to A and B.
    LinkDown(Garbage, Garbage),
    /// A byte on the way from this end is damaged.
    Corrupt(Side, u16, u8),
    /// From this byte on the way from this end, bytes are lost or added without a word. Nothing happens where the last such
    /// fault may not have been noticed yet: two of them that cancel each other in one frame are what no seal can see.
    Fault(Side, u16, Fault),
    /// So many times 10 microseconds pass.
    Run(u16),
    /// Time passes until all is quiet; then everything is checked.
    Settle,
}

impl Side {
    fn random(rng: &mut Rng) -> Self {
        [Side::A, Side::B][rng.index(2)]
    }
}

impl Reading {
    fn random(rng: &mut Rng) -> Self {
        [
            Reading::Fast,
            Reading::Fast,
            Reading::Fast,
            Reading::Slow,
            Reading::Never,
        ][rng.index(5)]
    }
}

impl Plan {
    /// Any plan.
    pub fn random(rng: &mut Rng) -> Self {
        let answers = [
            Answer::Accept,
            Answer::Accept,
            Answer::Accept,
            Answer::Accept,
            Answer::AcceptLater,
            Answer::Refuse,
            Answer::RefuseLater,
            Answer::Hang,
        ];
        let mut bytes = || [0, rng_u16(rng, 16), rng_u16(rng, 4_000)][rng.index(3)];
        Plan {
            bytes: [bytes(), bytes()],
            answer: answers[rng.index(8)],
            ends: [rng.one_in(2), rng.one_in(2)],
            reading: [Reading::random(rng), Reading::random(rng)],
        }
    }
}

impl Garbage {
    fn random(rng: &mut Rng) -> Self {
        match rng.index(5) {
            0 => Garbage::None,
            1 => Garbage::Random(rng_u8(rng)),
            2 => Garbage::FalseStart(rng_u8(rng)),
            3 => Garbage::Stale(rng.one_in(2)),
            _ => Garbage::Echo,
        }
    }
}

impl Op {
    /// Any fault.
    pub fn random_fault(rng: &mut Rng) -> Self {
        let (side, place) = (Side::random(rng), rng_u16(rng, u16::MAX));
        let fault = match rng.index(3) {
            0 => Fault::Lose(rng_u16(rng, 6_000)),
            1 => Fault::Double(rng_u16(rng, 6_000)),
            _ => Fault::Insert(rng_u8(rng)),
        };
        Op::Fault(side, place, fault)
    }

    /// Any operation but [`Op::Corrupt`] and [`Op::Fault`], with the weights of a long run.
    pub fn random(rng: &mut Rng) -> Self {
        let side = Side::random(rng);
        let which = rng_u8(rng);
        match rng.index(100) {
            0..30 => Op::Open(side, Plan::random(rng)),
            30..38 => Op::Read(side, which, Reading::random(rng)),
            38..44 => Op::Write(side, which, rng_u16(rng, 4_000)),
            44..50 => Op::Finish(side, which),
            50..60 => Op::Reset(side, which),
            60..64 => Op::Answer(side, which, rng.one_in(2)),
            64..67 => Op::Ping(side),
            67 => Op::GoAway(side),
            68..72 => Op::Stall(side, rng_u16(rng, 60_000)),
            72..76 => {
                let split = [Split::Whole, Split::Bytes, Split::Random][rng.index(3)];
                Op::Deliver(side, split, rng_u16(rng, 5_000))
            }
            76..78 => Op::Restart(side, 0),
            78 => Op::Restart(side, rng_u16(rng, 5_000)),
            79 => Op::LinkDown(Garbage::random(rng), Garbage::random(rng)),
            80..98 => Op::Run(rng_u16(rng, 500)),
            _ => Op::Settle,
        }
    }
}

fn rng_u16(rng: &mut Rng, end: u16) -> u16 {
    u16::try_from(rng.below(u64::from(end))).unwrap_or(0)
}

fn rng_u8(rng: &mut Rng) -> u8 {
    u8::try_from(rng.below(256)).unwrap_or(0)
}
