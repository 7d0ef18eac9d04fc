//! The handshake: HELLO in and out, and the filler that goes with it.

use super::receive::Taken;
use super::{Event, MAX_WINDOW, Sealing, Session, State};
use crate::credit::Credit;
use crate::frame::MAX_PAYLOAD;
use crate::hello::{Hello, MAGIC, MAX_PRODUCT_LEN, Parse, SEAL, truncate};
use crate::reason::{End, Violation};
use crate::seal::{SEAL_LEN, Seals};

impl Session {
    /// Skips garbage up to a whole handshake; returns the bytes used.
    pub(super) fn seek(&mut self, bytes: &[u8]) -> usize {
        if self.partial.is_empty() {
            let garbage = bytes.iter().take_while(|byte| **byte != MAGIC[0]).count();
            self.stats.skipped += garbage as u64;
            if garbage > 0 {
                return garbage;
            }
        }
        self.partial.push(bytes[0]);
        let end = self.partial.len();
        let mut keep = end;
        // Garbage may look like the start of a handshake and claim a length that never comes, so a whole one is
        // looked for inside it too.
        for start in 0..end {
            let candidate = &self.partial[start..];
            let ended = || Hello::claimed_len(candidate).is_some_and(|len| start + len < end);
            if candidate[0] != MAGIC[0] || ended() {
                continue;
            }
            match Hello::parse(candidate) {
                Parse::Whole(hello) => {
                    self.stats.skipped += start as u64;
                    self.partial.clear();
                    self.greet(hello);
                    return 1;
                }
                Parse::Partial => keep = keep.min(start),
                Parse::Garbage => {}
            }
        }
        self.stats.skipped += keep as u64;
        self.partial.drain(..keep);
        1
    }

    /// Takes the handshake at the front of `bytes`, in mid-session.
    pub(super) fn hello_again(&mut self, bytes: &[u8]) -> Result<Taken, Violation> {
        let len = Hello::claimed_len(bytes);
        match Hello::parse(bytes) {
            Parse::Whole(hello) => {
                self.greet(hello);
                Ok(Taken::Whole(len.unwrap_or(bytes.len())))
            }
            Parse::Partial => Ok(Taken::Needs(len.unwrap_or(bytes.len() + 1))),
            Parse::Garbage => Err(Violation::BadHello),
        }
    }

    /// The peer's handshake, while seeking or in mid-session.
    fn greet(&mut self, hello: Hello) {
        if hello.epoch == self.epoch {
            return; // our own bytes came back: a terminal that echoes
        }
        let for_us = hello.ack == self.epoch;
        if self.is_established() {
            let same = self
                .peer
                .as_ref()
                .is_some_and(|peer| peer.epoch == hello.epoch);
            if !(same && for_us) {
                self.end(End::PeerRestarted);
            } else if self.sealing.is_some() {
                // It waits for the rest of a frame. That is late, or lost: then what we send next shows it.
                self.owed.padding = hello.max_frame.min(MAX_PAYLOAD) as usize + SEAL_LEN;
            }
            return;
        }
        let (min, max) = self.config.versions;
        let compatible = hello.common_version(min, max).is_some();
        let new = self
            .peer
            .as_ref()
            .is_none_or(|peer| peer.epoch != hello.epoch);
        self.peer = Some(hello.clone());
        if hello.ack == 0 || for_us {
            // Where our answer may have been lost, who asks again gets another one.
            let again = hello.ack == 0 && self.is_sealed();
            if self.answered != hello.epoch || again {
                self.answered = hello.epoch;
                self.owed.hello = Some(hello.epoch);
            }
            self.owed.filler = 0;
        } else if new {
            // It takes us for whoever was here before, and may wait for the rest of a frame of theirs. Nothing is
            // acknowledged yet, so that no session can start before the filler ends.
            self.owed.hello = Some(0);
            self.owed.filler = hello.max_frame.min(MAX_PAYLOAD) as usize;
        }
        if !compatible {
            if new {
                self.events.push_back(Event::Incompatible(hello));
            }
        } else if for_us {
            self.state = State::Established;
            self.sealing = self.is_sealed().then(|| Sealing {
                sending: Seals::new(self.epoch, hello.epoch),
                receiving: Seals::new(hello.epoch, self.epoch),
            });
            self.send = Credit::new(hello.session_window.min(MAX_WINDOW)).unwrap_or_default();
            self.owed.ping = true;
            self.events.push_back(Event::Established(hello));
        }
    }

    /// What is sent outside of all sessions, and never sealed: HELLO, and filler.
    pub(super) fn handshake(&mut self, buf: &mut [u8]) -> Option<usize> {
        if let Some(ack) = self.owed.hello.take() {
            let hello = self.hello(ack).encode();
            buf[..hello.len()].copy_from_slice(&hello);
            return Some(hello.len());
        }
        if self.owed.filler > 0 {
            let len = self.owed.filler.min(buf.len());
            buf[..len].fill(0);
            self.owed.filler -= len;
            if self.owed.filler == 0 {
                self.owed.hello = Some(0);
            }
            return Some(len);
        }
        None
    }

    fn hello(&self, ack: u64) -> Hello {
        let (min_version, max_version) = self.config.versions;
        Hello {
            min_version,
            max_version,
            epoch: self.epoch,
            ack,
            features: if self.config.seal { SEAL } else { 0 },
            max_frame: self.config.max_frame,
            session_window: self.config.session_window,
            max_streams: self.config.max_streams,
            product: truncate(&self.config.product, MAX_PRODUCT_LEN).into(),
        }
    }
}
