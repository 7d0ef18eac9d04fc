//! One end: a session, the driver it needs, and the local sides of its streams.

use std::collections::BTreeMap;
use std::vec::Vec;

use super::pipe::Pipe;
use super::truth::{self, Role, Truth};
use super::{Answer, Plan, Reading, Rng, Side, Tally};
use crate::frame::MAX_CONTROL_FRAME;
use crate::hello::{Hello, SEAL};
use crate::reason::{End as SessionEnd, Reason};
use crate::seal::SEAL_LEN;
use crate::session::{Config, Event, OpenError, Session, Time, Transmit};
use crate::stream::StreamId;

/// How long an answer that comes later takes, in microseconds.
const LATER: Time = 3_000;
/// What a slow local side reads, and how often.
const SLOW_BYTES: u64 = 400;
const SLOW_PAUSE: Time = 1_000;
/// Frames sent in one go.
const BURST: u64 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Opening,
    Asked,
    Open,
}

/// The local side of a stream.
pub(crate) struct Local {
    pub(crate) key: u64,
    pub(crate) role: Role,
    pub(crate) phase: Phase,
    pub(crate) answer: (Answer, Time),
    pub(crate) to_send: u64,
    pub(crate) sent: u64,
    pub(crate) ends: bool,
    pub(crate) finished: bool,
    pub(crate) reading: Reading,
    pub(crate) next_read: Time,
    pub(crate) held: u64,
    pub(crate) received: u64,
    pub(crate) peer_finished: bool,
    /// Said that it had nothing to send although it had.
    pub(crate) napping: bool,
}

impl Local {
    fn new(key: u64, role: Role, plan: &Plan, now: Time) -> Self {
        let part = role as usize;
        let delay = match plan.answer {
            Answer::AcceptLater | Answer::RefuseLater => LATER,
            _ => 0,
        };
        Local {
            key,
            role,
            phase: match role {
                Role::Opener => Phase::Opening,
                Role::Acceptor => Phase::Asked,
            },
            answer: (plan.answer, now + delay),
            to_send: u64::from(plan.bytes[part]) * 16,
            sent: 0,
            ends: plan.ends[part],
            finished: false,
            reading: plan.reading[part],
            next_read: now,
            held: 0,
            received: 0,
            peer_finished: false,
            napping: false,
        }
    }

    /// Whether it would send something if it were asked.
    pub(crate) fn wants_to_send(&self) -> bool {
        self.phase == Phase::Open && !self.finished && (self.to_send > 0 || self.ends)
    }

    fn is_done(&self) -> bool {
        self.finished && self.peer_finished && self.held == 0
    }

    /// When it will do something of its own accord.
    fn next_time(&self) -> Option<Time> {
        let answers = self.phase == Phase::Asked && self.answer.0 != Answer::Hang;
        let reads = self.held > 0 && self.reading == Reading::Slow;
        match (answers, reads) {
            (true, _) => Some(self.answer.1),
            (_, true) => Some(self.next_read),
            _ => None,
        }
    }
}

pub(crate) struct End {
    side: Side,
    config: Config,
    pub(crate) session: Session,
    pub(crate) epoch: u64,
    pub(crate) locals: BTreeMap<StreamId, Local>,
    pub(crate) tally: Tally,
    /// Why the last session of this end ended, if not by restart.
    pub(crate) last_end: Option<SessionEnd>,
    /// Bytes were damaged on the way here: what this session delivers may be wrong.
    pub(crate) tainted: bool,
    /// Bytes were lost or added on the way here, but frames are sealed: this session may end, nothing else.
    pub(crate) disturbed: bool,
    /// A PING was answered.
    pub(crate) answered: bool,
    /// The part that is here of a payload whose seal is not.
    staged: Vec<u8>,
}

impl End {
    pub(crate) fn new(side: Side, config: Config, rng: &mut Rng) -> Self {
        let epoch = rng.number() | 1;
        End {
            side,
            session: Session::new(config.clone(), epoch),
            config,
            epoch,
            locals: BTreeMap::new(),
            tally: Tally::default(),
            last_end: None,
            tainted: false,
            disturbed: false,
            answered: false,
            staged: Vec::new(),
        }
    }

    pub(crate) fn asks_for_seals(&self) -> bool {
        self.config.seal
    }

    /// Starts over with a new session; every stream of the old one is over.
    pub(crate) fn renew(&mut self, rng: &mut Rng) {
        self.tally.session_ended += self.locals.len() as u64;
        self.tally.sessions += 1;
        self.locals.clear();
        self.epoch = rng.number() | 1;
        self.session = Session::new(self.config.clone(), self.epoch);
        (self.tainted, self.disturbed, self.answered) = (false, false, false);
        self.staged.clear();
    }

    pub(crate) fn set_config(&mut self, config: Config) {
        self.config = config;
    }

    /// The HELLO that its session starts with.
    pub(crate) fn hello(&self) -> Hello {
        Hello {
            min_version: self.config.versions.0,
            max_version: self.config.versions.1,
            epoch: self.epoch,
            ack: 0,
            features: if self.config.seal { SEAL } else { 0 },
            max_frame: self.config.max_frame.max(crate::hello::MIN_LIMIT),
            session_window: self.config.session_window.max(crate::hello::MIN_LIMIT),
            max_streams: self.config.max_streams,
            product: self.config.product.clone(),
        }
    }

    pub(crate) fn open(&mut self, now: Time, plan: Plan, truth: &mut Truth) -> Option<StreamId> {
        let key = truth.add(self.side, self.epoch, plan);
        match self.session.open(&truth::service(key)) {
            Ok(id) => {
                self.tally.opened += 1;
                let local = Local::new(key, Role::Opener, &plan, now);
                let previous = self.locals.insert(id, local);
                assert!(previous.is_none(), "stream {id} twice");
                Some(id)
            }
            Err(error) => {
                truth.records.remove(&key);
                assert_ne!(error, OpenError::BadServiceName);
                None
            }
        }
    }

    pub(crate) fn reset(&mut self, now: Time, id: StreamId) {
        if let Some(local) = self.locals.remove(&id) {
            self.session.reset(id, Reason::Cancelled, "by an operation");
            self.drop_held(now, id, &local);
            self.tally.reset_here += 1;
        }
    }

    pub(crate) fn answer(&mut self, id: StreamId, accept: bool) {
        let Some(local) = self.locals.get_mut(&id) else {
            return;
        };
        if local.phase != Phase::Asked {
            return;
        }
        if accept {
            local.phase = Phase::Open;
            self.session.accept(id);
            self.session.set_readable(id);
        } else {
            self.session.refuse(id, Reason::TargetRefused, "as planned");
            self.locals.remove(&id);
            self.tally.refused_here += 1;
        }
    }

    fn drop_held(&mut self, now: Time, id: StreamId, local: &Local) {
        let held = usize::try_from(local.held).unwrap_or(usize::MAX);
        self.session.consumed(now, id, held);
    }

    /// Takes bytes from the channel, as a driver does.
    pub(crate) fn receive(&mut self, now: Time, bytes: &[u8], truth: &mut Truth, rng: &mut Rng) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let used = if let Some(len) = self.session.unverified() {
                let n = (len + SEAL_LEN - self.staged.len()).min(rest.len());
                self.staged.extend(&rest[..n]);
                if self.staged.len() == len + SEAL_LEN {
                    let staged = core::mem::take(&mut self.staged);
                    self.session
                        .verify(*staged.last_chunk().expect("a seal at its end"));
                    self.receive(now, &staged, truth, rng);
                }
                n
            } else if let Some(payload) = self.session.payload() {
                let n = payload.remaining.min(rest.len());
                if let Some(id) = payload.stream {
                    self.deliver(now, id, &rest[..n], truth);
                }
                self.session.payload_taken(n);
                n
            } else {
                self.session.handle_bytes(now, rest)
            };
            rest = &rest[used..];
            let mut events = 0;
            while let Some(event) = self.session.poll_event() {
                events += 1;
                self.handle(now, event, truth);
            }
            assert!(used + events > 0, "input neither used nor answered");
            if self.session.is_ended() {
                self.session.check_invariants();
                self.renew(rng);
                if rng.one_in(2) {
                    return; // a driver may drop what else came with the end
                }
            }
        }
    }

    fn deliver(&mut self, now: Time, id: StreamId, bytes: &[u8], truth: &mut Truth) {
        let Some(local) = self.locals.get_mut(&id) else {
            return self.session.consumed(now, id, bytes.len()); // reset here in mid-frame
        };
        let record = truth.record(local.key);
        let role = local.role.other();
        let right = truth::bytes(local.key, role, local.received).take(bytes.len());
        let right = right.eq(bytes.iter().copied());
        assert!(
            right || self.tainted,
            "stream {id} (key {}): wrong bytes from {} on",
            local.key,
            local.received
        );
        self.tally.wrong += u64::from(!right);
        local.held += bytes.len() as u64;
        local.received += bytes.len() as u64;
        assert!(local.received <= record.sent[role as usize] || self.tainted);
        assert!(!local.peer_finished, "data behind the end");
    }

    fn handle(&mut self, now: Time, event: Event, truth: &mut Truth) {
        match event {
            Event::Established(_) | Event::GoingAway { .. } => {}
            Event::RoundTrip(_) => self.answered = true,
            Event::Incompatible(_) => self.tally.incompatible += 1,
            Event::Asked { stream, service } => self.asked(now, stream, &service, truth),
            Event::Accepted(id) => {
                let local = self.local(id);
                assert_eq!(local.phase, Phase::Opening);
                local.phase = Phase::Open;
                self.session.set_readable(id);
            }
            Event::Refused { stream, .. } => {
                assert_eq!(self.local(stream).phase, Phase::Opening);
                self.locals.remove(&stream);
                self.tally.refused += 1;
            }
            Event::Finished(id) => {
                let tainted = self.tainted;
                let local = self.local(id);
                let (key, role) = (local.key, local.role.other() as usize);
                local.peer_finished = true;
                let all = truth.record(key).sent[role] == local.received;
                assert!(
                    (all && truth.record(key).finished[role]) || tainted,
                    "stream {id} (key {key}) ended after {} bytes of {}",
                    local.received,
                    truth.record(key).sent[role]
                );
            }
            Event::Reset { stream, .. } => {
                self.local(stream);
                if let Some(local) = self.locals.remove(&stream) {
                    self.drop_held(now, stream, &local);
                }
                self.tally.reset += 1;
            }
            Event::Ended(end) => {
                let excused = match end {
                    SessionEnd::PeerRestarted | SessionEnd::PeerAborted(_) => true,
                    SessionEnd::Damaged => self.disturbed,
                    SessionEnd::Violation(_) => false,
                };
                assert!(excused || self.tainted, "a sound peer was blamed: {end}");
                self.tally.damaged += u64::from(end == SessionEnd::Damaged);
                self.last_end = Some(end);
            }
        }
    }

    /// The local side an event is about.
    fn local(&mut self, id: StreamId) -> &mut Local {
        let local = self.locals.get_mut(&id);
        local.unwrap_or_else(|| panic!("an event for stream {id}, which is not there"))
    }

    fn asked(&mut self, now: Time, id: StreamId, service: &str, truth: &mut Truth) {
        let known = truth::key(service).filter(|key| truth.records.contains_key(key));
        let Some(key) = known else {
            assert!(self.tainted, "asked for {service:?}, which nobody opened");
            return self.session.refuse(id, Reason::NoSuchService, "");
        };
        let peer = self.session.peer().map(|peer| peer.epoch);
        let record = truth.record(key);
        let sound = !record.asked && record.opener != self.side && Some(record.epoch) == peer;
        if !sound {
            assert!(self.tainted, "key {key}: a stale or repeated OPEN");
            return self.session.refuse(id, Reason::NoSuchService, "");
        }
        record.asked = true;
        self.tally.asked += 1;
        let local = Local::new(key, Role::Acceptor, &record.plan, now);
        let previous = self.locals.insert(id, local);
        assert!(previous.is_none(), "stream {id} twice");
    }

    /// Lets the local sides do what they do of their own accord; returns whether any did.
    pub(crate) fn act(&mut self, now: Time) -> bool {
        let ids: Vec<_> = self.locals.keys().copied().collect();
        let mut acted = false;
        for id in ids {
            acted |= self.act_one(now, id);
        }
        acted
    }

    fn act_one(&mut self, now: Time, id: StreamId) -> bool {
        let Some(local) = self.locals.get_mut(&id) else {
            return false;
        };
        if core::mem::take(&mut local.napping) {
            self.session.set_readable(id);
            return true;
        }
        if local.is_done() {
            self.locals.remove(&id);
            self.tally.finished += 1;
            return true;
        }
        if local.phase == Phase::Asked && local.answer.1 <= now {
            let accept = match local.answer.0 {
                Answer::Accept | Answer::AcceptLater => true,
                Answer::Refuse | Answer::RefuseLater => false,
                Answer::Hang => return false,
            };
            self.answer(id, accept);
            return true;
        }
        let n = match local.reading {
            Reading::Fast => local.held,
            Reading::Slow if local.next_read <= now => local.held.min(SLOW_BYTES),
            Reading::Slow | Reading::Never => 0,
        };
        if n == 0 {
            return false;
        }
        local.next_read = now + SLOW_PAUSE;
        local.held -= n;
        let n = usize::try_from(n).unwrap_or(usize::MAX);
        self.session.consumed(now, id, n);
        true
    }

    /// Sends a few frames; returns whether there was anything to do.
    pub(crate) fn transmit(
        &mut self,
        now: Time,
        pipe: &mut Pipe,
        truth: &mut Truth,
        rng: &mut Rng,
    ) -> bool {
        let mut buf = [0; MAX_CONTROL_FRAME];
        let mut busy = false;
        for _ in 0..=rng.below(BURST) {
            let transmit = self.session.poll_transmit(now, pipe.room(now), &mut buf);
            match transmit {
                None => break,
                Some(Transmit::Control(len)) => pipe.push(now, &buf[..len]),
                Some(Transmit::Data { stream, max }) => {
                    self.send(now, stream, max, pipe, truth, rng);
                }
            }
            busy = true;
        }
        busy
    }

    fn send(
        &mut self,
        now: Time,
        id: StreamId,
        max: usize,
        pipe: &mut Pipe,
        truth: &mut Truth,
        rng: &mut Rng,
    ) {
        assert!(max > 0, "a turn to send nothing");
        let Some(local) = self.locals.get_mut(&id) else {
            panic!("a turn for stream {id}, which is not there");
        };
        assert!(local.phase == Phase::Open && !local.finished);
        let record = truth.record(local.key);
        if local.to_send == 0 {
            if local.ends {
                local.finished = true;
                record.finished[local.role as usize] = true;
                return self.session.finish(id);
            }
            return self.session.blocked(id);
        }
        if rng.one_in(16) {
            local.napping = true;
            return self.session.blocked(id);
        }
        let available = usize::try_from(local.to_send).unwrap_or(usize::MAX);
        let mut n = available.min(max);
        if rng.one_in(4) {
            n = 1 + rng.index(n);
        }
        let bytes: Vec<u8> = truth::bytes(local.key, local.role, local.sent)
            .take(n)
            .collect();
        local.sent += n as u64;
        local.to_send -= n as u64;
        record.sent[local.role as usize] = local.sent;
        let envelope = self.session.sent(id, n);
        pipe.push(now, &envelope.around(&bytes));
    }

    /// When a local side will do something of its own accord.
    pub(crate) fn next_time(&self) -> Option<Time> {
        self.locals.values().filter_map(Local::next_time).min()
    }

    /// Checks what must hold after every step.
    pub(crate) fn check(&self) {
        self.session.check_invariants();
        let held: u64 = self.locals.values().map(|local| local.held).sum();
        assert!(
            held <= self.session.committed(),
            "the local sides hold {held} bytes, {} were granted",
            self.session.committed()
        );
        let streams = 2 * self.config.max_streams as usize;
        assert!(
            self.session.backlog() <= 3 * (2 * streams + 65) + MAX_CONTROL_FRAME + 2,
            "a line without bound: {} entries",
            self.session.backlog()
        );
        let tally = &self.tally;
        let over = tally.finished
            + tally.refused
            + tally.refused_here
            + tally.reset
            + tally.reset_here
            + tally.session_ended;
        assert_eq!(
            tally.opened + tally.asked,
            over + self.locals.len() as u64,
            "every stream that is over has a reason"
        );
    }
}
