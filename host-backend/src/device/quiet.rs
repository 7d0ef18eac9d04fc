//! Keeps a guest from filling the log: some messages, then silence with a count.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Messages let through in each [`PERIOD`].
const BURST: u32 = 5;
const PERIOD: Duration = Duration::from_secs(10);

/// A limit on one kind of message.
#[derive(Default)]
pub(super) struct Quiet(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    since: Option<Instant>,
    passed: u32,
    missed: u64,
}

impl Quiet {
    /// Whether the message may be written now, and how many were held back before it.
    pub(super) fn permit(&self) -> Option<u64> {
        let now = Instant::now();
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.since.is_none_or(|since| now - since >= PERIOD) {
            inner.since = Some(now);
            inner.passed = 0;
        }
        if inner.passed == BURST {
            inner.missed += 1;
            return None;
        }
        inner.passed += 1;
        Some(std::mem::take(&mut inner.missed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_to_a_burst() {
        let quiet = Quiet::default();
        let passed = (0..1000).filter(|_| quiet.permit().is_some()).count();
        assert_eq!(passed, BURST as usize);
        assert_eq!(quiet.0.lock().unwrap().missed, 1000 - u64::from(BURST));
    }
}
