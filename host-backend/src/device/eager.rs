//! Looking on for a while before sleeping, as long as it pays.
//!
//! # Theory of operation
//!
//! Who sleeps is woken late: a processor that went idle takes tens of microseconds to come back, more in a virtual machine.
//! So a link with nothing to do may ask to be polled again at once, each time behind one look at the reactor: what comes from
//! the guest and from sockets is found alike, other tasks have their turn, and no lock is held. How long it does so adapts
//! as Linux's `halt_poll_ns` does: the time doubles when the sleep that followed was so short that looking on would have
//! spared it, and halves when it was longer than would ever be looked for.
//!
//! ```text
//!   nothing to do        looking on        sleeping
//!   ------------> begin -----------> .... ---------> .... woken
//!                 |<---- time ----->|               |
//!                 |<------------- waited ---------->|
//! ```

use std::pin::pin;
use std::task::Context;
use std::time::{Duration, Instant};

/// The shortest time to look on.
const LEAST: Duration = Duration::from_micros(5);

/// See the [module](self).
pub(super) struct Eager {
    /// How long to look on at most; zero: not at all.
    most: Duration,
    /// How long now.
    time: Duration,
    /// Since when there has been nothing to do.
    begin: Option<Instant>,
}

impl Eager {
    pub(super) fn new(most: Duration) -> Self {
        Eager {
            most,
            time: Duration::ZERO,
            begin: None,
        }
    }

    /// There is nothing to do: sleeps, or asks to be polled again.
    pub(super) fn idle(&mut self, cx: &mut Context<'_>) {
        if self.most.is_zero() {
            return;
        }
        let begin = *self.begin.get_or_insert_with(Instant::now);
        if begin.elapsed() < self.time {
            // Polled once, it has the task polled again behind the reactor. Nothing else is needed of it.
            let _ = pin!(tokio::task::yield_now()).poll(cx);
        }
    }

    /// There is something to do.
    pub(super) fn busy(&mut self) {
        if let Some(begin) = self.begin.take() {
            self.learn(begin.elapsed());
        }
    }

    fn learn(&mut self, waited: Duration) {
        if waited > self.most {
            self.time /= 2;
            if self.time < LEAST {
                self.time = Duration::ZERO;
            }
        } else if waited > self.time {
            self.time = (2 * self.time).max(LEAST).min(self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_looks_on_for_as_long_as_that_pays() {
        let micros = Duration::from_micros;
        let mut eager = Eager::new(micros(50));
        let mut after = |waited| {
            eager.learn(micros(waited));
            eager.time
        };
        assert_eq!(after(1000), micros(0), "there is nothing to be gained");
        assert_eq!(after(30), micros(5), "there was");
        assert_eq!([after(30), after(30), after(30)], [10, 20, 40].map(micros));
        assert_eq!(after(30), micros(40), "it came in time");
        assert_eq!(after(45), micros(50), "and never longer than asked for");
        assert_eq!(
            [after(60), after(60)],
            [25_000, 12_500].map(Duration::from_nanos)
        );
        assert_eq!([after(60), after(60)], [6250, 0].map(Duration::from_nanos));
    }
}
