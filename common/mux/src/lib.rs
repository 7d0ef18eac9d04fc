//! The wire format of virtproxy and the session state machine that speaks it.
//!
//! A [`Session`] multiplexes byte streams over one reliable, ordered run of bytes, opens them by service
//! name and gives each its own credit, so that one stuck stream stalls no other. It does no I/O, has no
//! clock and no source of randomness: bytes, time and the epoch are handed in, frames and events come out
//! (see the call contract in [`session`]). Both ends of virtproxy, its simulator, its fuzz targets and its
//! model checker drive this same code.
//!
//! The protocol itself is written down in `PROTOCOL.md` beside this crate.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(feature = "sim")]
extern crate std;

pub mod credit;
pub mod frame;
pub mod hello;
pub mod reason;
mod schedule;
pub mod seal;
pub mod session;
#[cfg(feature = "sim")]
pub mod sim;
mod stream;
mod table;

pub use hello::{Hello, VERSION};
pub use reason::{End, Reason, Violation};
pub use session::{
    Config, CreditView, DEFAULT_TURN, Envelope, Event, OpenError, Payload, Session, Stats, Time,
    Transmit,
};
pub use stream::StreamId;
