//! What can be done to a pair; a fuzzer and a property test choose.

/// One of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "arbitrary", derive(arbitrary::Arbitrary))]
pub enum Side {
    /// The one that knows the line's speed.
    A,
    /// The other one.
    B,
}

/// One thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "arbitrary", derive(arbitrary::Arbitrary))]
pub enum Op {
    /// This side has so many more bytes to send.
    Send(Side, u16),
    /// It starts anew.
    Restart(Side),
    /// It does nothing for so many milliseconds.
    Stop(Side, u16),
    /// The kernel on its side prints a message, in the middle of what it sends.
    KernelMessage(Side),
    /// A getty prints its banner there.
    Banner(Side),
    /// So many bytes of anything.
    Garbage(Side, u8),
    /// From here on each kind of damage happens so often in a million.
    Faults(u16),
    /// So many milliseconds pass.
    Run(u16),
}
