//! What the person in front of the terminal sees: a line a round, which grows with each way, and how long it will go on.

use std::io::Write;
use std::time::{Duration, Instant};

/// The progress of the whole run.
pub(crate) struct Progress {
    begun: Instant,
    /// Seconds that all of it takes, as roughly known before.
    planned: u32,
    /// Of these, what is done.
    done: u32,
}

impl Progress {
    pub(crate) fn new(planned: u32) -> Self {
        Progress {
            begun: Instant::now(),
            planned,
            done: 0,
        }
    }

    /// Adds to the line. A closed standard error is no reason to stop.
    pub(crate) fn say(&self, text: &str) {
        let mut stderr = std::io::stderr().lock();
        let _ = stderr.write_all(text.as_bytes());
        let _ = stderr.flush();
    }

    /// So many of the planned seconds are over, whatever they took.
    pub(crate) fn pass(&mut self, planned: u32) {
        self.done += planned;
    }

    /// Ends the line with the time left.
    pub(crate) fn end_line(&self) {
        let left = self.planned.saturating_sub(self.done);
        let pace = match self.done {
            0 => 1.0,
            done => self.begun.elapsed().as_secs_f64() / f64::from(done),
        };
        let left = Duration::from_secs_f64(f64::from(left) * pace);
        self.say(&match left.as_secs() {
            0 => "\n".to_owned(),
            seconds @ 1..90 => format!("   ({seconds} s left)\n"),
            seconds => format!("   ({} min left)\n", (seconds + 30) / 60),
        });
    }
}
