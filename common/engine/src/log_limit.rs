//! Keeps what others can make us log within bounds.

use std::time::{Duration, Instant};

/// Messages let through in one [`WINDOW`].
const BURST: u32 = 10;
/// After this long, messages flow again.
const WINDOW: Duration = Duration::from_secs(1);

/// Lets a few messages a second through and counts the others.
#[derive(Debug, Default)]
pub struct LogLimit {
    window: Option<Instant>,
    passed: u32,
    suppressed: u64,
}

impl LogLimit {
    /// Whether to log now; if so, how many messages were held back before this one.
    pub fn pass(&mut self, now: Instant) -> Option<u64> {
        if self.window.is_none_or(|start| now - start >= WINDOW) {
            self.window = Some(now);
            self.passed = 0;
        }
        self.passed += 1;
        if self.passed > BURST {
            self.suppressed += 1;
            return None;
        }
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_counted_and_not_logged() {
        let mut limit = LogLimit::default();
        let start = Instant::now();
        let passed = (0..1000).filter(|_| limit.pass(start).is_some()).count();
        assert_eq!(passed, 10);
        assert_eq!(limit.pass(start + WINDOW), Some(990));
    }
}
