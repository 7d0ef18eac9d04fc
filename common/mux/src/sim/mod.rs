//! Two sessions in virtual time, joined by a channel that delays, splits, stalls, breaks and, if asked to, lies.
//!
//! # Theory of operation
//!
//! A [`Pair`] drives two [`Session`]s as a real driver does, and everything around them: the pipes between them and
//! the local side of every stream. Nothing happens but through [`Op`]s and the passing of virtual time; every choice comes
//! from the seed, so a run can be repeated to the byte.
//!
//! The pair knows the truth that the ends do not. Each stream's bytes follow from a key that no other stream ever
//! has, sent along as its service's name; whoever takes a byte checks it. So a byte that is lost, doubled, stale or another
//! stream's is seen at once, and so is a frame of a dead session.
//!
//! After every step: the invariants of both sessions, a bound on their memory, and a reason for each stream that is
//! over. When all is quiet ([`Pair::settle`]): credit is conserved from end to end, both ends know the same streams, and
//! whoever still has something to send waits for a reader that does not read.
//!
//! Damage ([`Op::Corrupt`], [`Op::Fault`], and the lost tail of [`Op::Restart`]) taints the session that reads it: its streams
//! may carry wrong bytes until it ends, and nothing else may go wrong. The next session is clean. Where frames are sealed,
//! all but [`Op::Corrupt`] only disturb it: it may end, but no stream may ever get a wrong byte.

mod end;
mod op;
mod pipe;
mod rng;
mod truth;

use std::vec;
use std::vec::Vec;

pub use op::{Answer, Garbage, Op, Plan, Reading, Side};
pub use pipe::{Fault, Split};
pub use rng::Rng;

use crate::hello::{Hello, MAGIC};
use crate::reason::End as SessionEnd;
use crate::session::{Config, Session, Time};
use crate::stream::StreamId;
use end::{End, Phase};
use pipe::Pipe;
use truth::Truth;

/// The longest it may take until all is quiet, in microseconds.
const QUIET: Time = 3_600_000_000;
/// How often a driver asks a silent peer for a sign of life, in microseconds.
const KEEPALIVE: Time = 1_000_000;
/// Signs of life asked for until the ends must have found each other.
const PATIENCE: u32 = 8;

/// How a pair starts.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Of each end.
    pub configs: [Config; 2],
    /// Bytes in flight from each end; at least 2048.
    pub capacities: [usize; 2],
    /// What the run follows from.
    pub seed: u64,
}

impl Setup {
    /// Small windows and few streams: whatever can run out, does.
    pub fn tight(seed: u64) -> Self {
        let config = Config {
            max_streams: 6,
            initial_window: 8 * 1024,
            max_window: 64 * 1024,
            session_window: 16 * 1024,
            memory: 256 * 1024,
            max_frame: 4096,
            ..Config::default()
        };
        Setup {
            configs: [config.clone(), config],
            capacities: [8 * 1024; 2],
            seed,
        }
    }

    /// The same with sealed frames; which end asks for them follows from the seed.
    #[must_use]
    pub fn sealed(mut self) -> Self {
        let [a, b] = &mut self.configs;
        (a.seal, b.seal) =
            [(true, false), (false, true), (true, true)][Rng::new(self.seed).index(3)];
        self
    }

    /// Any limits.
    pub fn random(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut size = |least: u32, doublings: u64| least << rng.below(doublings);
        let mut config = || Config {
            max_streams: size(1, 7),
            initial_window: size(4096, 5),
            max_window: size(4096, 8),
            session_window: size(4096, 8),
            memory: u64::from(size(4096, 12)),
            max_frame: size(4096, 6),
            ..Config::default()
        };
        let configs = [config(), config()];
        Setup {
            configs,
            capacities: [size(2048, 8) as usize, size(2048, 8) as usize],
            seed,
        }
    }
}

/// What became of the streams of one end, over all its sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Opened here.
    pub opened: u64,
    /// Opened by the peer.
    pub asked: u64,
    /// Ended both ways, all bytes read.
    pub finished: u64,
    /// Refused by the peer.
    pub refused: u64,
    /// Refused here.
    pub refused_here: u64,
    /// Reset by the peer.
    pub reset: u64,
    /// Reset here.
    pub reset_here: u64,
    /// Over because their session was.
    pub session_ended: u64,
    /// Peers of another version seen.
    pub incompatible: u64,
    /// Sessions this end has had before the present one.
    pub sessions: u64,
    /// Those of them that ended because a seal was not there.
    pub damaged: u64,
    /// Times that its streams got wrong bytes.
    pub wrong: u64,
}

/// See the [module](self).
pub struct Pair {
    seed: u64,
    ops: u64,
    now: Time,
    ends: [End; 2],
    /// From A, and from B.
    pipes: [Pipe; 2],
    truth: Truth,
    rng: Rng,
}

/// The place of an end, and of the pipe from it.
const fn at(side: Side) -> usize {
    match side {
        Side::A => 0,
        Side::B => 1,
    }
}

impl Pair {
    /// Two ends that have yet to shake hands.
    pub fn new(setup: Setup) -> Self {
        let mut rng = Rng::new(setup.seed);
        let [a, b] = setup.configs;
        Pair {
            seed: setup.seed,
            ops: 0,
            now: 1_000,
            ends: [
                End::new(Side::A, a, &mut rng),
                End::new(Side::B, b, &mut rng),
            ],
            pipes: setup.capacities.map(|bytes| Pipe::new(bytes.max(2048))),
            truth: Truth::default(),
            rng,
        }
    }

    /// Virtual time, in microseconds.
    pub fn now(&self) -> Time {
        self.now
    }

    /// The session of an end.
    pub fn session(&self, side: Side) -> &Session {
        &self.ends[at(side)].session
    }

    /// The streams of an end, in order.
    pub fn streams(&self, side: Side) -> Vec<StreamId> {
        self.ends[at(side)].locals.keys().copied().collect()
    }

    /// What became of an end's streams.
    pub fn tally(&self, side: Side) -> Tally {
        self.ends[at(side)].tally
    }

    /// Why the last session of an end ended, if it did not restart itself.
    pub fn last_end(&self, side: Side) -> Option<&SessionEnd> {
        self.ends[at(side)].last_end.as_ref()
    }

    /// Sets how long bytes from `side` take, in microseconds.
    pub fn set_latency(&mut self, side: Side, latency: Time) {
        self.pipes[at(side)].latency = latency;
    }

    /// Lets nothing from `side` arrive for so many microseconds.
    pub fn stall(&mut self, side: Side, micros: Time) {
        self.pipes[at(side)].stalled_until = self.now + micros;
    }

    /// Changes what an end allows, from its next session on.
    pub fn set_config(&mut self, side: Side, config: Config) {
        self.ends[at(side)].set_config(config);
    }

    /// Whether both ends are in one and the same session.
    pub fn is_joined(&self) -> bool {
        let [a, b] = &self.ends;
        let knows =
            |one: &End, other: &End| one.session.peer().map(|peer| peer.epoch) == Some(other.epoch);
        knows(a, b) && knows(b, a)
    }

    /// Does one thing.
    pub fn apply(&mut self, op: Op) {
        self.ops += 1;
        let now = self.now;
        match op {
            Op::Open(side, plan) => {
                self.open(side, plan);
            }
            Op::Read(side, which, reading) => {
                if let Some(id) = self.pick(side, which)
                    && let Some(local) = self.ends[at(side)].locals.get_mut(&id)
                {
                    local.reading = reading;
                }
            }
            Op::Write(side, which, units) => self.more(side, which, u64::from(units) * 16, false),
            Op::Finish(side, which) => self.more(side, which, 0, true),
            Op::Reset(side, which) => {
                if let Some(id) = self.pick(side, which) {
                    self.ends[at(side)].reset(now, id);
                }
            }
            Op::Answer(side, which, accept) => {
                if let Some(id) = self.pick(side, which) {
                    self.ends[at(side)].answer(id, accept);
                }
            }
            Op::Ping(side) => self.ends[at(side)].session.ping(),
            Op::GoAway(side) => {
                let reason = crate::Reason::ShuttingDown;
                self.ends[at(side)].session.go_away(reason, "");
            }
            Op::Stall(side, micros) => {
                self.stall(side, Time::from(micros));
                self.pipes[at(side)].blocked = micros % 2 == 1;
            }
            Op::Deliver(side, split, latency) => {
                let pipe = &mut self.pipes[at(side)];
                (pipe.split, pipe.latency) = (split, Time::from(latency));
            }
            Op::Restart(side, cut) => {
                self.ends[at(side)].renew(&mut self.rng);
                if self.pipes[at(side)].cut(usize::from(cut)) {
                    let sealed = self.is_sealed();
                    let reader = &mut self.ends[at(side.other())];
                    reader.disturbed |= sealed;
                    reader.tainted |= !sealed;
                }
            }
            Op::LinkDown(to_a, to_b) => self.link_down([to_a, to_b]),
            Op::Corrupt(side, place, mask) => {
                if self.pipes[at(side)].flip(usize::from(place), mask) {
                    // Both: whom a damaged grant deceives, the other end will blame.
                    self.ends.iter_mut().for_each(|end| end.tainted = true);
                }
            }
            Op::Fault(side, place, fault) => self.fault(side, usize::from(place), fault),
            Op::Run(units) => self.run(Time::from(units) * 10),
            Op::Settle => self.settle(),
        }
        self.check();
    }

    /// Whether frames are sealed.
    fn is_sealed(&self) -> bool {
        self.ends.iter().any(End::asks_for_seals)
    }

    fn fault(&mut self, side: Side, place: usize, fault: Fault) {
        if self.ends[at(side.other())].disturbed {
            return;
        }
        if !self.pipes[at(side)].suffer(place, fault, &mut self.rng) {
            return;
        }
        if self.is_sealed() {
            self.ends[at(side.other())].disturbed = true;
        } else {
            self.ends.iter_mut().for_each(|end| end.tainted = true);
        }
    }

    /// Opens a stream, if it can be opened now.
    pub fn open(&mut self, side: Side, plan: Plan) -> Option<StreamId> {
        self.ends[at(side)].open(self.now, plan, &mut self.truth)
    }

    fn pick(&self, side: Side, which: u8) -> Option<StreamId> {
        let locals = &self.ends[at(side)].locals;
        let n = usize::from(which) % locals.len().max(1);
        locals.keys().nth(n).copied()
    }

    fn more(&mut self, side: Side, which: u8, bytes: u64, ends: bool) {
        let Some(id) = self.pick(side, which) else {
            return;
        };
        let end = &mut self.ends[at(side)];
        if let Some(local) = end.locals.get_mut(&id).filter(|local| !local.finished) {
            local.to_send += bytes;
            local.ends |= ends;
            end.session.set_readable(id);
        }
    }

    fn link_down(&mut self, garbage: [Garbage; 2]) {
        for end in &mut self.ends {
            end.renew(&mut self.rng);
        }
        for (reader, garbage) in garbage.into_iter().enumerate() {
            let bytes = self.garbage(reader, garbage);
            let pipe = &mut self.pipes[1 - reader];
            pipe.cut(usize::MAX);
            pipe.push(self.now, &bytes);
        }
        self.truth.records.clear();
    }

    fn garbage(&mut self, reader: usize, garbage: Garbage) -> Vec<u8> {
        match garbage {
            Garbage::None => Vec::new(),
            Garbage::Random(len) => {
                let noise = (0..len).map(|_| self.rng.number().to_le_bytes()[0]);
                noise.collect()
            }
            Garbage::FalseStart(len) => {
                let mut bytes = MAGIC.to_vec();
                bytes.extend([len, 1]);
                bytes.extend(vec![MAGIC[0]; usize::from(len)]);
                bytes
            }
            Garbage::Stale(answers) => {
                let ack = if answers { self.rng.number() | 1 } else { 0 };
                let gone = Hello {
                    epoch: self.rng.number() | 1,
                    ack,
                    ..self.ends[1 - reader].hello()
                };
                gone.encode()
            }
            Garbage::Echo => self.ends[reader].hello().encode(),
        }
    }

    /// Lets time pass.
    pub fn run(&mut self, micros: Time) {
        let until = self.now + micros;
        self.drive();
        while let Some(next) = self.next_time().filter(|next| *next <= until) {
            self.now = next.max(self.now);
            self.drive();
        }
        self.now = until;
    }

    /// Lets time pass until nothing more happens, and checks that this is how it should be.
    ///
    /// # Panics
    /// If it takes too long, the ends do not find each other, or anything got lost or stuck.
    pub fn settle(&mut self) {
        let tainted = |pair: &Self| pair.ends.iter().any(|end| end.tainted);
        let mut patience = PATIENCE;
        self.quiet();
        while !self.is_joined() || self.ends.iter().any(|end| end.disturbed) {
            if patience == 0 && tainted(self) {
                break;
            }
            assert!(patience > 0, "the ends do not find each other");
            patience -= 1;
            self.now += KEEPALIVE;
            for end in &mut self.ends {
                end.answered = false;
                end.session.ping();
            }
            self.quiet();
            // Nothing was under way when the question was asked: whoever has its answer has got all that came before.
            for end in &mut self.ends {
                end.disturbed &= !end.answered;
            }
        }
        if !tainted(self) {
            self.check_quiet();
        }
    }

    /// Lets time pass until nothing more happens.
    ///
    /// # Panics
    /// If that takes too long.
    pub fn quiet(&mut self) {
        let deadline = self.now + QUIET;
        self.drive();
        while let Some(next) = self.next_time() {
            self.now = next.max(self.now);
            assert!(self.now < deadline, "it never ends");
            self.drive();
        }
    }

    /// When something will happen next.
    fn next_time(&self) -> Option<Time> {
        let arrivals = self
            .pipes
            .iter()
            .filter_map(|pipe| pipe.next_time(self.now));
        let locals = self.ends.iter().filter_map(End::next_time);
        arrivals.chain(locals).min()
    }

    /// Does all that can be done now.
    fn drive(&mut self) {
        loop {
            let mut busy = false;
            for side in [Side::A, Side::B] {
                let bytes = self.pipes[at(side.other())].take(self.now, &mut self.rng);
                let end = &mut self.ends[at(side)];
                if !bytes.is_empty() {
                    busy = true;
                    end.receive(self.now, &bytes, &mut self.truth, &mut self.rng);
                    end.check();
                }
                busy |= end.act(self.now);
                let pipe = &mut self.pipes[at(side)];
                busy |= end.transmit(self.now, pipe, &mut self.truth, &mut self.rng);
                end.check();
            }
            if !busy {
                return;
            }
        }
    }

    fn check(&self) {
        for end in &self.ends {
            end.check();
        }
    }

    /// Nothing is under way: checks that credit is conserved from end to end, that both ends know the same streams, and
    /// that nobody waits in vain.
    fn check_quiet(&mut self) {
        let [a, b] = &self.ends;
        for (one, other) in [(a, b), (b, a)] {
            let (mine, theirs) = (one.session.session_credit(), other.session.session_credit());
            assert_eq!(mine.send, theirs.granted, "the session's credit leaks");
            let window = one.session.peer().map(|peer| peer.session_window);
            assert_eq!(
                Some(mine.send + theirs.returnable),
                window,
                "the session's window shrinks"
            );
            for (id, local) in &one.locals {
                let Some(mine) = one.session.stream_credit(*id) else {
                    let drained = local.finished && local.peer_finished;
                    assert!(drained, "stream {id} was lost without a word");
                    continue;
                };
                let key = local.key;
                let matching = |(_, there): &(&StreamId, &end::Local)| there.key == key;
                let Some((far, there)) = other.locals.iter().find(matching) else {
                    panic!("key {key}: only one end knows the stream");
                };
                let Some(theirs) = other.session.stream_credit(*far) else {
                    panic!("key {key}: only one session knows the stream");
                };
                if local.phase != Phase::Open || there.phase != Phase::Open {
                    let hangs = [local, there]
                        .iter()
                        .any(|local| local.phase == Phase::Asked && local.answer.0 == Answer::Hang);
                    assert!(hangs, "key {key}: an answer was lost");
                    continue;
                }
                assert!(there.received == local.sent, "key {key}: bytes got lost");
                assert_eq!(
                    there.peer_finished, local.finished,
                    "key {key}: an end got lost"
                );
                if !local.finished {
                    assert_eq!(mine.send, theirs.granted, "key {key}: credit leaks");
                }
                if local.wants_to_send() {
                    assert!(
                        mine.send == 0 && there.held > 0 && there.reading == Reading::Never,
                        "key {key}: stuck, with credit {mine:?} against {theirs:?}"
                    );
                }
            }
        }
        let known: Vec<u64> = self
            .ends
            .iter()
            .flat_map(|end| end.locals.values().map(|local| local.key))
            .collect();
        self.truth.records.retain(|key, _| known.contains(key));
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::eprintln!(
                "simulation failed: seed {}, operation {}, {} us; to run it again: \
                 MUX_SIM_SEED={} cargo test -p virtproxy-mux --test sim random_runs",
                self.seed,
                self.ops,
                self.now,
                self.seed
            );
        }
    }
}
