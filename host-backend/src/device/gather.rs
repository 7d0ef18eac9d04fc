//! Letting gather what a busy guest writes.
//!
//! # Theory of operation
//!
//! Linux writes 32 KiB at a time at most. Who asks for a kick at each of these chains is woken at each, and the guest leaves
//! what it does to give it. So a link that has just had much looks again by itself, a little later, at all that has gathered
//! until then:
//!
//! | since the link last found nothing, it had | it is kicked | it looks by itself |
//! | --- | --- | --- |
//! | less than [`MUCH`] | at the next chain | no |
//! | [`MUCH`] or more | at [`CHAINS`], so that a fast guest is never held up | after [`PAUSE`] |
//! | anything, from a driver that cannot be told how many chains to wait for (no EVENT_IDX) | at the next chain | no |
//!
//! A look that finds little, or nothing, ends it. So calls back and forth never wait, and one beside bulk for a `PAUSE` at most.
//!
//! A driver that waits until each write was taken (Linux spins, if the file is not `O_NONBLOCK`) lets nothing gather. It is
//! recognized: a look behind a pause finds one chain. That is a doubt, and the next pauses are left out, as in [`late`](super::late).

use std::io;
use std::task::{Context, Poll};
use std::time::Duration;

use virtproxy_engine::fine_timer::FineTimer;

use super::late::Trust;
use super::ring::Ring;

/// Bytes that make a busy guest.
const MUCH: usize = 16 * 1024;
/// How long it is left alone.
const PAUSE: Duration = Duration::from_micros(100);
/// Chains that are worth a kick nevertheless; a quarter of a small ring.
const CHAINS: u16 = 16;

/// See the [module](self).
pub(super) struct Gather {
    /// Bytes and chains since nothing was found.
    bytes: usize,
    chains: usize,
    /// The last word was to pause.
    paused: bool,
    trust: Trust,
    /// None: it asks for each kick.
    timer: Option<FineTimer>,
}

impl Gather {
    /// Panics outside a tokio runtime.
    pub(super) fn new() -> Self {
        Gather {
            bytes: 0,
            chains: 0,
            paused: false,
            trust: Trust::default(),
            timer: FineTimer::new().ok(),
        }
    }

    /// So much came.
    pub(super) fn came(&mut self, bytes: usize, chains: usize) {
        self.bytes += bytes;
        self.chains += chains;
    }

    /// Nothing was found in the ring: asks for a kick. True if there is something already.
    pub(super) fn arm(&mut self, ring: &Ring<'_, '_>) -> bool {
        let much = std::mem::take(&mut self.bytes) >= MUCH;
        let chains = std::mem::take(&mut self.chains);
        if std::mem::take(&mut self.paused) {
            match chains {
                0 => {}
                1 => self.trust.had_to_be_told(),
                _ => self.trust.went_on(),
            }
        }
        let gathers = much && ring.tells_how_far() && self.trust.may_wait();
        if !gathers || self.pause().is_err() {
            return ring.arm(1);
        }
        ring.arm(CHAINS.min(ring.size() / 4).max(1))
    }

    fn pause(&mut self) -> io::Result<()> {
        let timer = self.timer.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        timer.set(PAUSE)?;
        self.paused = true;
        Ok(())
    }

    /// Ready once it is time to look.
    pub(super) fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &self.timer {
            Some(timer) if self.paused => timer.poll(cx),
            _ => Poll::Pending,
        }
    }
}
