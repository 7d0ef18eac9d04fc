//! Input: what the link received goes through the session to the local sockets.
//!
//! Data is written straight from the link's memory, and that of frames of one stream that follow each other at once. In a
//! sealed session it may not be written before the seal behind it
//! was seen; a frame that lies in one batch is looked at from behind, and only one that is cut by the end of a batch is
//! copied, into `staged`, until the rest of it is here.

use std::time::Instant;

use tracing::{debug, info, trace, warn};
use virtproxy_mux::seal::SEAL_LEN;
use virtproxy_mux::{Event, Reason, StreamId};

use super::local::Phase;
use super::{Driver, STALL};
use crate::counters::Ended;
use crate::segment::{Cursor, MAX_IOV, Segment};
use crate::spec::is_udp;

/// Bytes looked at in one go for headers and control frames.
const GLANCE: usize = 64;

/// Pieces of a run after which it is written. The next frame may have as many.
const LONG_RUN: usize = MAX_IOV / 2;

/// Payloads of one stream that follow each other.
#[derive(Default)]
struct Run<'a> {
    /// Whose they are; nobody's are dropped.
    stream: Option<StreamId>,
    segments: Vec<Segment<'a>>,
}

impl Driver {
    /// Takes all bytes of `segments`. What follows the end of a session is dropped: whoever restarted says nothing more
    /// before it is answered. Returns how many they were.
    pub(super) fn on_bytes(&mut self, segments: &[Segment<'_>]) -> usize {
        let cursor = Cursor::new(segments);
        let len = cursor.remaining();
        self.counters.link_received.add(len as u64);
        self.take_all(cursor);
        let waits = self.session.is_sealed() && self.session.is_mid_frame();
        self.stall = waits.then(|| self.clock + self.patience);
        len
    }

    fn take_all(&mut self, mut cursor: Cursor<'_, '_>) {
        let mut glance = [0; GLANCE];
        let mut run = Run::default();
        while cursor.remaining() > 0 && self.ended.is_none() {
            if let Some(len) = self.session.unverified() {
                self.verify(len, &mut cursor);
            } else if let Some(payload) = self.session.payload() {
                if run.stream != payload.stream || run.segments.len() >= LONG_RUN {
                    self.deliver(&mut run);
                    run.stream = payload.stream;
                }
                let n = cursor.take(payload.remaining, &mut run.segments);
                cursor.advance(n);
                self.session.payload_taken(n);
            } else {
                let n = cursor.peek(&mut glance);
                let used = self.session.handle_bytes(self.now(), &glance[..n]);
                cursor.advance(used);
            }
            while let Some(event) = self.session.poll_event() {
                self.deliver(&mut run);
                self.on_event(event);
            }
        }
        self.deliver(&mut run);
    }

    /// Shows the session the seal behind the payload of `len` bytes that comes next, if it is here.
    fn verify(&mut self, len: usize, cursor: &mut Cursor<'_, '_>) {
        let whole = len + SEAL_LEN;
        let mut seal = [0; SEAL_LEN];
        if self.staged.is_empty() && cursor.remaining() >= whole {
            let mut behind = cursor.clone();
            behind.advance(len);
            behind.peek(&mut seal);
            return self.session.verify(seal);
        }
        let (have, n) = (self.staged.len(), cursor.remaining());
        self.staged.resize(whole.min(have + n), 0);
        cursor.read(&mut self.staged[have..]);
        if self.staged.len() == whole {
            let mut staged = std::mem::take(&mut self.staged);
            seal.copy_from_slice(&staged[len..]);
            self.session.verify(seal);
            self.take_all(Cursor::new(&[Segment::from_slice(&mut staged)]));
            staged.clear();
            self.staged = staged;
        }
    }

    /// Ends a run: it goes to its stream's socket.
    fn deliver(&mut self, run: &mut Run<'_>) {
        if let Some(stream) = run.stream.take() {
            self.write(stream, &run.segments);
        }
        run.segments.clear();
    }

    /// Moves bytes to a stream's socket.
    fn write(&mut self, stream: StreamId, segments: &[Segment<'_>]) {
        let n = segments.iter().map(Segment::len).sum();
        let now = self.now();
        trace!(%stream, hop = "channel-to-socket", bytes = n);
        self.patience = STALL;
        let Some(key) = self.key_of(stream) else {
            return self.session.consumed(now, stream, n);
        };
        match self.locals[key].write(segments) {
            Ok(written) => {
                self.session.consumed(now, stream, written);
                if written < n {
                    self.kept(stream);
                }
            }
            Err(error) => {
                self.session.consumed(now, stream, n);
                self.broken(stream, &error);
            }
        }
    }

    /// A socket did not take all that came: counts when its stream may keep no more.
    fn kept(&self, stream: StreamId) {
        let credit = self.session.stream_credit(stream);
        if credit.is_some_and(|credit| credit.granted == 0) {
            self.counters.limits.stream_buffer.reached.inc();
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Established(peer) => {
                info!(peer = peer.product, "session established");
                self.counters.sessions.established.inc();
                self.incompatible = false;
                self.carried = true;
                self.open_waiting();
            }
            Event::Incompatible(peer) => {
                let (min, max) = self.settings.session.versions;
                warn!(
                    "the other end ({}) speaks protocol versions {} to {}, this one {min} to {max}: \
                     install matching versions of virtproxy and virtproxy-agent",
                    peer.product, peer.min_version, peer.max_version
                );
                self.incompatible = true;
                self.refuse_waiting("the other end speaks another protocol version");
            }
            Event::Asked { stream, service } => self.asked(stream, &service),
            Event::Accepted(stream) => self.accepted(stream),
            Event::Refused {
                stream,
                reason,
                text,
            } => {
                if let Some(more) = self.refusals.pass(Instant::now()) {
                    let service = self.service_of(stream);
                    warn!("{service}: refused by the other end: {reason}: {text}{more}");
                }
                self.remove_stream(stream, Ended::RefusedByPeer(reason, &text));
            }
            Event::Finished(stream) => {
                if let Some(key) = self.key_of(stream) {
                    self.locals[key].peer_finished();
                    self.settle(key, stream);
                }
            }
            Event::Reset {
                stream,
                reason,
                text,
            } => {
                self.quota.reset(self.now(), stream);
                let usual = reason == Reason::Cancelled || is_udp(self.service_of(stream));
                let worth_telling = if usual {
                    None
                } else {
                    self.resets.pass(Instant::now())
                };
                let service = self.service_of(stream);
                if let Some(more) = worth_telling {
                    info!(%stream, service, %reason, text, "reset by the other end{more}");
                }
                self.remove_stream(stream, Ended::ResetByPeer(reason, &text));
            }
            Event::RoundTrip(micros) => {
                debug!(micros, "round trip");
                if std::mem::take(&mut self.peer_silent) {
                    info!("the other end answers again");
                }
            }
            Event::GoingAway { .. } => info!("the other end is shutting down"),
            Event::Ended(end) => self.ended = Some(end),
        }
    }

    fn accepted(&mut self, stream: StreamId) {
        let Some(key) = self.key_of(stream) else {
            return;
        };
        let local = &mut self.locals[key];
        local.phase = Phase::Open;
        if local.readable {
            self.session.set_readable(stream);
        }
        debug!(%stream, service = %local.service, "accepted");
    }

    fn service_of(&self, stream: StreamId) -> &str {
        let key = self.key_of(stream);
        key.map_or("?", |key| &self.locals[key].service)
    }
}
