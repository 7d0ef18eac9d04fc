//! How long to wait before something is tried again: the one back-off of every channel.
//!
//! Whatever fails is tried again after 50 ms, then 100, up to 1 s. A link that ended soon counts as a failure, so
//! that a peer that keeps hanging up does not keep us busy; but its pause counts from its beginning, so one that lived
//! longer than that is followed at once. After [`STEADY`] the pauses start anew; so they do with a link that carried a
//! session, since then it was not the other end's absence that ended it, but its end. (20 of those a second are the most:
//! as many sessions may follow each other on one link.)

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// A link that lived this long was a good one: the next is opened at once.
pub const STEADY: Duration = Duration::from_secs(3);

const FIRST: Duration = Duration::from_millis(50);
const LAST: Duration = Duration::from_secs(1);

/// The pauses between attempts at one thing.
#[derive(Debug)]
pub struct Pauses {
    next: Duration,
    until: Option<Instant>,
}

impl Default for Pauses {
    fn default() -> Self {
        Pauses {
            next: FIRST,
            until: None,
        }
    }
}

impl Pauses {
    /// Waits out the current pause. Cancelled, it is still to be waited out.
    pub async fn pass(&mut self) {
        if let Some(until) = self.until {
            sleep_until(until).await;
            self.until = None;
        }
    }

    /// What is open is what it was opened for: the pauses start anew.
    pub fn worked(&mut self) {
        self.next = FIRST;
    }

    /// An attempt failed.
    pub fn lengthen(&mut self) {
        self.lengthen_from(Instant::now());
    }

    /// What was opened then is closed now.
    pub fn ended(&mut self, opened: Instant) {
        if opened.elapsed() >= STEADY {
            *self = Self::default();
        } else {
            self.lengthen_from(opened);
        }
    }

    fn lengthen_from(&mut self, start: Instant) {
        self.until = Some(start + self.next);
        self.next = LAST.min(self.next * 2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_second_and_a_good_link_ends_them() {
        let mut pauses = Pauses::default();
        let mut next = |lived: Duration| {
            let now = Instant::now();
            pauses.ended(now.checked_sub(lived).unwrap());
            let pause = pauses.until.map(|until| until.duration_since(now));
            pause.map_or(0, |pause| pause.as_millis())
        };
        let bad: Vec<_> = (0..7).map(|_| next(Duration::ZERO)).collect();
        assert_eq!(bad, [50, 100, 200, 400, 800, 1000, 1000]);
        assert_eq!(next(Duration::from_millis(600)), 400);
        assert_eq!(next(Duration::from_millis(1500)), 0);
        assert_eq!(next(Duration::ZERO), 1000);
        assert_eq!(
            [next(STEADY), next(Duration::ZERO), next(Duration::ZERO)],
            [0, 50, 100]
        );
        pauses.worked();
        pauses.ended(Instant::now());
        let pause = pauses.until.unwrap() - Instant::now();
        assert!(pause <= FIRST, "{pause:?}");
    }
}
