//! Seals: how a session notices that its channel lost or added bytes (`PROTOCOL.md`, "Seals").
//!
//! Behind each frame of a sealed session stand four bytes that are right in that place only. They follow from both epochs,
//! the direction and the frame's number, so they cost nothing per byte, and are right only behind a frame that begins
//! where its predecessor ended and is as long as its header says. A session acts on a frame only when it has seen
//! its seal; so however a run of bytes is lost, inserted, doubled or cut off, none of what lies behind it is ever taken for
//! a stream's. What a seal cannot see is a change that keeps the length of a frame: a channel that flips bits needs
//! a checksum below the session.

/// Length of a seal, in bytes.
pub const SEAL_LEN: usize = 4;

/// What splitmix64 adds to its state for each number: 2^64 divided by the golden ratio.
pub(crate) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// What splitmix64 makes of its state.
pub(crate) const fn mix(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// The seals of one direction of a session, in order.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "sim", derive(Hash))]
pub struct Seals(u64);

impl Seals {
    /// Those of the frames that the end of epoch `sender` sends to the end of epoch `receiver`.
    pub const fn new(sender: u64, receiver: u64) -> Self {
        Seals(mix(sender).wrapping_add(receiver))
    }

    /// The seal of the next frame.
    pub const fn next_seal(&mut self) -> [u8; SEAL_LEN] {
        self.0 = self.0.wrapping_add(GOLDEN);
        let [_, _, _, _, seal @ ..] = mix(self.0).to_le_bytes();
        seal
    }
}
