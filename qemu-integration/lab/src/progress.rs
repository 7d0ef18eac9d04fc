//! Tells the person in front of the terminal what the lab is doing, one line at a time.
//!
//! Long work (a download, an extraction, a boot) names itself when it starts, counts while it runs and says how long
//! it took. Lines go straight to standard error and not through `eprintln!`, because the test harness would swallow
//! those until the test is over, and a first run that downloads for a minute would look like a hang.

use std::io::Write;
use std::time::{Duration, Instant};

/// Prints one line.
pub fn note(text: &str) {
    // A closed standard error is no reason to stop working.
    let _ = writeln!(std::io::stderr().lock(), "lab: {text}");
}

/// One piece of long work with a known number of parts.
#[derive(Debug)]
pub struct Task {
    what: String,
    total: usize,
    begun: Instant,
    shown: Instant,
}

/// A line is printed for a part when this much time has passed since the last one.
const QUIET: Duration = Duration::from_millis(400);

impl Task {
    /// Announces the work; `total` is its number of parts (0 when it has none).
    pub fn start(what: &str, total: usize) -> Self {
        note(&format!("{what} ..."));
        let now = Instant::now();
        Self {
            what: what.to_owned(),
            total,
            begun: now,
            shown: now,
        }
    }

    /// Part number `done` (from 1) is being worked on. Quick parts are skipped, so the log stays readable.
    pub fn part(&mut self, done: usize, name: &str, bytes: u64) {
        if self.shown.elapsed() < QUIET && done != self.total {
            return;
        }
        self.shown = Instant::now();
        let size = if bytes == 0 {
            String::new()
        } else {
            format!(", {}", size(bytes))
        };
        note(&format!("  {done}/{} {name}{size}", self.total));
    }

    /// The work is over.
    pub fn done(self, result: &str) {
        note(&format!(
            "{}: {result} ({:.1} s)",
            self.what,
            self.begun.elapsed().as_secs_f64()
        ));
    }
}

/// Bytes for people.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{} kB", bytes / 1_000),
        _ => format!("{}.{} MB", bytes / 1_000_000, bytes / 100_000 % 10),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_are_short() {
        assert_eq!(super::size(999), "999 B");
        assert_eq!(super::size(33_460_000), "33.4 MB");
        assert_eq!(super::size(12_345), "12 kB");
    }
}
