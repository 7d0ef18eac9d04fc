//! A reliable, ordered byte pipe over a line that drops, doubles, flips and inserts bytes.
//!
//! A serial line carries what the mux must not see: bytes that its emulated chip dropped, kernel messages, a login
//! prompt. An [`Endpoint`] at each end turns such a line into what the mux asks for, or says why it cannot: the other end
//! restarted, or what it says makes no sense. It does no I/O, has no clock and no source of randomness: bytes, time and
//! the incarnation's number are handed in (see the call contract in [`endpoint`]).
//!
//! The protocol itself is written down in `PROTOCOL.md` beside this crate.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(feature = "sim")]
extern crate std;

mod deframe;
pub mod endpoint;
pub mod frame;
#[cfg(feature = "sim")]
pub mod sim;

pub use deframe::Deframer;
pub use endpoint::{Config, End, Endpoint, Stats, Time, Violation};
pub use frame::Hello;
