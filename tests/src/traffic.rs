//! Transfers that go on while whatever carries them dies, and what became of them.
//!
//! Each transfer is hashed and has a pattern of its own. It may be *whole*, or *cut* with an error that its client sees. It must
//! never be *wrong*, which is an error at once, and should not end as if it were over ([`Traffic::silent`]).

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::Duration;

use anyhow::{Error, Result, ensure};

use crate::peer;

/// A transfer: to where, how many bytes, and which.
type Transfer = fn(&str, u64, u64) -> Result<()>;

/// The pause after a transfer that was cut off: most are refused then.
const PAUSE: Duration = Duration::from_millis(10);

/// What the transfers have come to.
#[derive(Default)]
pub struct Traffic {
    whole: AtomicUsize,
    cut: AtomicUsize,
    silent: AtomicUsize,
    seed: AtomicU64,
    done: AtomicBool,
}

impl Traffic {
    /// Transfers of `bytes` bytes with the peer at `address`, to it, from it and both ways, until [`Traffic::end`].
    pub fn start<'s>(
        &'s self,
        scope: &'s Scope<'s, '_>,
        address: &'s str,
        bytes: u64,
    ) -> Vec<ScopedJoinHandle<'s, Result<()>>> {
        let transfers: [Transfer; 3] = [peer::upload, peer::download, peer::echo];
        let start = |transfer| scope.spawn(move || self.run(address, bytes, transfer));
        transfers.into_iter().map(start).collect()
    }

    fn run(&self, address: &str, bytes: u64, transfer: Transfer) -> Result<()> {
        while !self.done.load(Ordering::Relaxed) {
            let seed = self.seed.fetch_add(1, Ordering::Relaxed);
            let count = match transfer(address, bytes, seed) {
                Ok(()) => &self.whole,
                Err(error) => {
                    ensure!(!is_wrong(&error), "{error:#}");
                    thread::sleep(PAUSE);
                    if is_silent(&error) {
                        &self.silent
                    } else {
                        &self.cut
                    }
                }
            };
            count.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// No transfer is begun any more.
    pub fn end(&self) {
        self.done.store(true, Ordering::Relaxed);
    }

    /// How many arrived, hashes equal.
    pub fn whole(&self) -> usize {
        self.whole.load(Ordering::Relaxed)
    }

    /// How many ended with an error of their connection, or were refused.
    pub fn cut(&self) -> usize {
        self.cut.load(Ordering::Relaxed)
    }

    /// How many ended too early with an end of file, as if that were all.
    pub fn silent(&self) -> usize {
        self.silent.load(Ordering::Relaxed)
    }
}

fn is_wrong(error: &Error) -> bool {
    format!("{error:#}").contains("differs")
}

fn is_silent(error: &Error) -> bool {
    match error.root_cause().downcast_ref::<io::Error>() {
        Some(error) => error.kind() == io::ErrorKind::UnexpectedEof,
        // Fewer bytes came than were asked for.
        None => true,
    }
}

/// Numbers that look like chance, and are the same again for the same seed.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Those of the seed in the environment variable `name`; without that, of a new one. It is told.
    pub fn from_environment(name: &str) -> Result<Self> {
        let now = || {
            std::time::UNIX_EPOCH
                .elapsed()
                .unwrap_or_default()
                .as_secs()
        };
        let seed = match std::env::var(name) {
            Ok(seed) => seed.parse()?,
            Err(_) => now(),
        };
        println!("{name}={seed} makes the same choices again");
        Ok(Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1))
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % end
    }

    /// Puts all of them in another order.
    pub fn shuffle<T>(&mut self, all: &mut [T]) {
        for last in (1..all.len()).rev() {
            let other = self.below(last as u64 + 1);
            all.swap(last, usize::try_from(other).unwrap_or(last));
        }
    }
}

/// Sends a signal to a process of this test.
pub fn signal(pid: u32, number: i32) {
    // SAFETY: a system call without pointers; the process is a child of the test, or one of such a child.
    unsafe { libc::kill(pid.cast_signed(), number) };
}
