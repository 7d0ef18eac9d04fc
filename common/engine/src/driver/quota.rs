//! Whether the other end may open one more stream: its rates, and the connects under way.
//!
//! A rate is a bucket of tokens that holds a second's worth. An open takes one, or is refused. A reset cannot be refused; so it takes
//! one that may not be there, and until that debt is paid opens are refused. Without that, a peer that opens and resets at
//! once would have as many connects made as it likes, whatever may be under way at a time. Only resets of streams that
//! the peer opened count: those of others are as many as our own clients.

use virtproxy_mux::{StreamId, Time};

use crate::counters::Counters;
use crate::limits::Limits;

/// Tokens are counted in millionths, as time is.
const TOKEN: i64 = 1_000_000;

/// See the [module](self).
pub(super) struct Quota {
    connecting: usize,
    opens: Bucket,
    resets: Bucket,
}

impl Quota {
    pub(super) fn new(limits: &Limits) -> Self {
        Quota {
            connecting: usize::try_from(limits.max_connecting).unwrap_or(usize::MAX),
            opens: Bucket::new(limits.max_open_rate),
            resets: Bucket::new(limits.max_reset_rate),
        }
    }

    /// The peer opens a stream while so many connects are under way. An error says which limit is reached; it is counted.
    pub(super) fn open(
        &mut self,
        now: Time,
        connecting: usize,
        counters: &Counters,
    ) -> Result<(), &'static str> {
        if !self.resets.is_solvent(now) {
            counters.limits.reset_rate.reached.inc();
            Err("too many streams are reset")
        } else if !self.opens.take(now) {
            counters.limits.open_rate.reached.inc();
            Err("too many streams are opened")
        } else if connecting >= self.connecting {
            counters.limits.connecting.reached.inc();
            Err("too many connects under way")
        } else {
            Ok(())
        }
    }

    /// The peer reset a stream.
    pub(super) fn reset(&mut self, now: Time, stream: StreamId) {
        if stream.peer_opened() {
            self.resets.spend(now);
        }
    }
}

/// So many a second, and a second's worth at once.
struct Bucket {
    /// Tokens a second; none: there is no limit.
    rate: Option<i64>,
    /// What is there, in millionths of a token.
    level: i64,
    at: Time,
}

impl Bucket {
    fn new(rate: u32) -> Self {
        let rate = (rate > 0).then_some(i64::from(rate));
        Bucket {
            rate,
            level: rate.unwrap_or(0) * TOKEN,
            at: 0,
        }
    }

    /// Fills it up to `now`; what is there, if there is a limit.
    fn level(&mut self, now: Time) -> Option<&mut i64> {
        let rate = self.rate?;
        let elapsed = i64::try_from(now.saturating_sub(self.at)).unwrap_or(i64::MAX);
        self.at = now;
        let filled = self.level.saturating_add(elapsed.saturating_mul(rate));
        self.level = filled.min(rate * TOKEN);
        Some(&mut self.level)
    }

    fn is_solvent(&mut self, now: Time) -> bool {
        self.level(now).is_none_or(|level| *level >= 0)
    }

    fn take(&mut self, now: Time) -> bool {
        match self.level(now) {
            Some(level) if *level < TOKEN => false,
            Some(level) => {
                *level -= TOKEN;
                true
            }
            None => true,
        }
    }

    /// Takes one even where none is.
    fn spend(&mut self, now: Time) {
        if let Some(level) = self.level(now) {
            *level = level.saturating_sub(TOKEN);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Time = 1_000_000;

    #[test]
    fn a_bucket_lets_a_seconds_worth_through_and_then_its_rate() {
        let mut bucket = Bucket::new(100);
        let taken = |bucket: &mut Bucket, now| (0..1000).filter(|_| bucket.take(now)).count();
        assert_eq!(taken(&mut bucket, 0), 100);
        assert_eq!(taken(&mut bucket, SECOND / 10), 10);
        assert_eq!(taken(&mut bucket, 3600 * SECOND), 100);
        assert_eq!(taken(&mut bucket, Time::MAX), 100);
        let steady = (0..10_000)
            .filter(|n| bucket.take(Time::MAX - 10_000 + n))
            .count();
        assert_eq!(steady, 0, "time that goes back gives nothing");
    }

    #[test]
    fn what_is_spent_beyond_the_rate_is_owed() {
        let mut bucket = Bucket::new(100);
        for _ in 0..300 {
            bucket.spend(0);
        }
        assert!(!bucket.is_solvent(2 * SECOND - 1));
        assert!(bucket.is_solvent(2 * SECOND));
    }

    #[test]
    fn without_a_rate_there_is_no_limit() {
        let mut bucket = Bucket::new(0);
        for _ in 0..1_000_000 {
            bucket.spend(0);
            assert!(bucket.take(0));
        }
        assert!(bucket.is_solvent(0));
    }
}
