//! Interrupts that can wait: those for what the guest wrote and we have read.
//!
//! # Theory of operation
//!
//! Linux takes buffers that were read back by itself, whenever it writes or polls, and waits for one only when the ring is
//! full. Yet it asks for an interrupt for each, and each makes it leave what it does and wake all who wait for the port.
//! So a link puts such an interrupt off, and mostly it need not come any more:
//!
//! | the driver | is told |
//! | --- | --- |
//! | has half of the ring or more in use | at once |
//! | has taken the buffers back meanwhile | never |
//! | waits, or has nothing to write | by the link's timer, when it was owed for all of [`PERIOD`], or as the link ends |
//! | says not how far it has taken them back (no EVENT_IDX) | at once |
//!
//! A driver that waits for each buffer would come to one in a `PERIOD`. So what had to be told by the timer is a doubt, and
//! the next interrupts are not put off, twice as many each time; whenever the driver went on by itself, there is a doubt less.
//!
//! The timer is armed once, and not for each batch: when it expires it looks whether what is owed is older than it is, and
//! else waits once more. It is on the reactor of who polls the link.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

use super::ring::Ring;

/// How long an interrupt can wait. Twice that, and what the reactor adds, if it was owed soon after the timer was armed.
const PERIOD: Duration = Duration::from_millis(1);

/// Interrupts of a link that are owed. See the [module](self).
pub(super) struct Late {
    /// From which position of the used ring on the driver wants to be told.
    owed: Option<u16>,
    timer: Pin<Box<Sleep>>,
    armed: bool,
    /// Where the used ring ended when the timer was armed.
    mark: u16,
    trust: Trust,
}

impl Late {
    /// Nothing is owed. Panics outside a tokio runtime.
    pub(super) fn new() -> Self {
        Late {
            owed: None,
            timer: Box::pin(tokio::time::sleep(PERIOD)),
            armed: false,
            mark: 0,
            trust: Trust::default(),
        }
    }

    /// Ends a transaction that gave chains back, of about so many descriptors each.
    pub(super) fn finish(&mut self, mut ring: Ring<'_, '_>, descriptors: usize) {
        let before = self.owed.take();
        let wanted = ring.show(before);
        if before.is_some() && wanted != before {
            self.trust.went_on();
        }
        let Some(from) = wanted else {
            return;
        };
        let in_use = usize::from(ring.in_use(from)) * descriptors;
        let has_room = in_use < usize::from(ring.size() / 2);
        if has_room && ring.tells_how_far() && self.trust.may_wait() {
            self.put_off(&ring, from);
        } else {
            ring.interrupt();
        }
    }

    /// Tells the driver what it was owed for a period, or all of it.
    pub(super) fn settle(&mut self, mut ring: Ring<'_, '_>, all: bool) {
        let Some(before) = self.owed.take() else {
            return;
        };
        match ring.show(Some(before)) {
            None => self.trust.went_on(),
            Some(from) if !all && ring.used_since(from) <= ring.used_since(self.mark) => {
                self.put_off(&ring, from);
            }
            Some(_) => {
                self.trust.had_to_be_told();
                ring.interrupt();
            }
        }
    }

    fn put_off(&mut self, ring: &Ring<'_, '_>, from: u16) {
        self.owed = Some(from);
        if !self.armed {
            self.armed = true;
            self.mark = ring.used_end();
            self.timer.as_mut().reset(Instant::now() + PERIOD);
        }
    }

    /// Whether it is time to `settle`; once.
    pub(super) fn is_due(&mut self) -> bool {
        let due = self.armed && self.timer.is_elapsed();
        self.armed &= !due;
        due
    }

    /// Waits until it is.
    pub(super) fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.armed {
            return Poll::Pending;
        }
        ready!(self.timer.as_mut().poll(cx));
        self.armed = false;
        Poll::Ready(())
    }
}

/// Whether the driver goes on without being told, or taken notice of.
#[derive(Debug, Default)]
pub(super) struct Trust {
    doubts: u8,
    /// So many interrupts are not to be put off.
    prompt: u8,
}

impl Trust {
    /// Whether to put it to the test once more.
    pub(super) fn may_wait(&mut self) -> bool {
        let may = self.prompt == 0;
        self.prompt = self.prompt.saturating_sub(1);
        may
    }

    /// It did.
    pub(super) fn went_on(&mut self) {
        self.doubts = self.doubts.saturating_sub(1);
    }

    /// It waited.
    pub(super) fn had_to_be_told(&mut self) {
        self.doubts = self.doubts.saturating_mul(2).saturating_add(1);
        self.prompt = self.doubts;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of so many interrupts are put off for a driver that waits for each of those.
    fn put_off(trust: &mut Trust, interrupts: u32) -> u32 {
        (0..interrupts)
            .map(|_| {
                let waits = trust.may_wait();
                if waits {
                    trust.had_to_be_told();
                }
                u32::from(waits)
            })
            .sum()
    }

    #[test]
    fn a_driver_that_waits_is_soon_told_at_once() {
        let mut trust = Trust::default();
        assert_eq!(put_off(&mut trust, 1000), 10);
        assert_eq!(
            put_off(&mut trust, 256_000),
            1000,
            "it is tried now and then"
        );
    }

    #[test]
    fn a_driver_that_goes_on_is_trusted_again() {
        let mut trust = Trust::default();
        put_off(&mut trust, 1000);
        let mut at_once = 0;
        for _ in 0..1000 {
            match trust.may_wait() {
                true => trust.went_on(),
                false => at_once += 1,
            }
        }
        assert!(at_once < 256, "{at_once}");
        trust.had_to_be_told();
        let then = [(); 3].map(|()| trust.may_wait());
        assert_eq!(then, [false, true, true], "one pause is no habit");
    }
}
