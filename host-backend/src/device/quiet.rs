//! Keeps a guest from filling the log: a few messages a second, the others are counted.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use virtproxy_engine::log_limit::{LogLimit, Suppressed};

/// A limit on one kind of message, for all threads.
#[derive(Default)]
pub(super) struct Quiet(Mutex<LogLimit>);

impl Quiet {
    /// Whether the message may be written now, and how many were held back before it.
    pub(super) fn permit(&self) -> Option<Suppressed> {
        let mut limit = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        limit.pass(Instant::now())
    }
}
