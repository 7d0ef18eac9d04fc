//! A model checker over the real state machines of virtproxy: [`virtproxy_mux::Session`] and [`virtproxy_link::Endpoint`].
//!
//! # Why
//!
//! The first version's known fault was a deadlock. `ARCHITECTURE.md` says why there is none now ("Credit, twice, and why
//! nothing deadlocks"); here that is checked. The simulators of both crates go along *some* of all orders in which things may
//! happen, with large sizes; a model checker goes along *all* of them, with tiny ones. Both find what the other cannot.
//!
//! # How
//!
//! What runs is the production code and no model of it: both state machines have neither I/O nor clock nor randomness, so one can
//! be copied, given one more byte or asked for one more frame, and compared with those seen before. Under their feature
//! `sim` they can be copied and hashed for that; the programs are built without it.
//!
//! * [`world`]: what is asked of every state, how all are gone through (with [stateright]), what a failure shows.
//! * [`mux`]: two sessions, bare and sealed, their drivers, local sides and channel.
//! * [`link`]: two endpoints and a line that drops, doubles, changes and adds.
//! * `tests/`: the bounds that are searched, in each test run; the larger ones when asked for; and drivers that break their
//!   contract, whose deadlock must be found.
//!
//! # What it shows, and what not
//!
//! Within the bounds of a search there is, in any order of events, no state without progress, no credit lost or won, no
//! byte lost, doubled, stale or out of order, and no stream that is over without a cause. Beyond them:
//!
//! * *Sizes*: one or two streams (three when asked for) with one to four sendings of half the least window. Windows and a session's
//!   credit are at their least, two sendings; two or three frames are under way each way.
//! * *Mishaps*: as many as the test allows, one to three in a run.
//! * *Pieces*: where a frame arrives in parts, it is cut once in its header and then in halves, not at every byte (the mux's
//!   fuzzing and property tests do that).
//! * *Time* stands still for the mux, whose only uses of it are round trips and growing windows; for the link it
//!   goes from timer to timer.
//! * *Drivers* are those of these models, written to the same call contract as the engine's, which is not searched. Nor are hostile
//!   peers (fuzzing), generations that start over, GOAWAY, and the session over the link layer: each is searched by itself,
//!   and what the mux asks of its channel is what the link gives.
//! * *Restarts of the link*: `an_end_restarts` finds nothing wrong in a minute, but does not come to an end, so it shows nothing yet.
//! * States are told apart by a hash of 64 bits: among a million states two are taken for one with a chance below
//!   one in ten million.

pub mod link;
pub mod mux;
pub mod world;
