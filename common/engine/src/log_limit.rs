//! Keeps what others can make us log within bounds.

use std::fmt;
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
    /// Whether to log now; if so, what to append: how many messages were held back before this one.
    pub fn pass(&mut self, now: Instant) -> Option<Suppressed> {
        if self.window.is_none_or(|start| now - start >= WINDOW) {
            self.window = Some(now);
            self.passed = 0;
        }
        self.passed += 1;
        if self.passed > BURST {
            self.suppressed += 1;
            return None;
        }
        Some(Suppressed(std::mem::take(&mut self.suppressed)))
    }
}

/// How many messages were held back; prints nothing if none was.
#[derive(Debug, PartialEq, Eq)]
pub struct Suppressed(u64);

impl fmt::Display for Suppressed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            n => write!(f, " (and {n} messages like it)"),
        }
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
        assert_eq!(limit.pass(start + WINDOW), Some(Suppressed(990)));
    }
}
