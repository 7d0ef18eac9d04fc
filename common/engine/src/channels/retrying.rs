//! A channel that is opened by trying again and again: all that a kind of channel adds is its attempt.
//!
//! An attempt gives a link, or says what stands in the way. What may pass is logged once, for as long as it stays the
//! same and no good link came in between, and is tried again after a pause (see [`crate::pauses`]); what can never pass
//! ends the program.

use std::io;

use tokio::time::Instant;
use tracing::{info, warn};

use crate::channel::{BoxFuture, Channel, Link};
use crate::pauses::{Pauses, STEADY};

/// Why an attempt gave no link.
#[derive(Debug)]
pub(super) enum Obstacle {
    /// It may pass; the text says what it is.
    Passing(String),
    /// It never will.
    Final(io::Error),
}

impl Obstacle {
    /// What can never pass: what is wrong, and the cure.
    pub(super) fn never(message: impl Into<String>) -> Self {
        Obstacle::Final(io::Error::other(message.into()))
    }
}

/// What an attempt gives.
pub(super) type Attempt = Result<Box<dyn Link>, Obstacle>;

/// A channel whose links come from `attempt`.
pub(super) struct Retrying<A> {
    name: String,
    attempt: A,
    pauses: Pauses,
    /// Since when there has been a link.
    opened: Option<Instant>,
    /// What was last logged to stand in the way, since the last good link.
    reported: Option<String>,
    /// Whether it was the last that was logged.
    waiting: bool,
}

impl<A: AsyncFnMut() -> Attempt> Retrying<A> {
    pub(super) fn new(name: String, attempt: A) -> Self {
        Retrying {
            name,
            attempt,
            pauses: Pauses::default(),
            opened: None,
            reported: None,
            waiting: false,
        }
    }

    async fn next(&mut self) -> io::Result<Box<dyn Link>> {
        if let Some(opened) = self.opened.take() {
            self.pauses.ended(opened);
            if opened.elapsed() >= STEADY {
                self.reported = None;
            }
        }
        loop {
            self.pauses.pass().await;
            match (self.attempt)().await {
                Ok(link) => {
                    if std::mem::take(&mut self.waiting) {
                        info!(channel = %self.name, "the way is clear");
                    }
                    self.opened = Some(Instant::now());
                    return Ok(link);
                }
                Err(Obstacle::Final(error)) => return Err(error),
                Err(Obstacle::Passing(obstacle)) => {
                    if self.reported.as_ref() != Some(&obstacle) {
                        warn!(channel = %self.name, "waiting: {obstacle}");
                        self.reported = Some(obstacle);
                        self.waiting = true;
                    }
                }
            }
            self.pauses.lengthen();
        }
    }
}

impl<A: AsyncFnMut() -> Attempt> Channel for Retrying<A> {
    fn open(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Link>>> {
        Box::pin(self.next())
    }

    fn carried(&mut self) {
        self.pauses.worked();
    }

    fn name(&self) -> &str {
        &self.name
    }
}
