//! Two ends of a bad line in virtual time.
//!
//! # Theory of operation
//!
//! A [`Pair`] drives two [`Endpoint`]s as a real driver does, over two [`Line`]s. Nothing happens but through [`Op`]s and
//! the passing of virtual time, and every choice comes from the seed, so a run can be repeated to the byte.
//!
//! The pair knows the truth. What an incarnation says to another follows from both their numbers, and whoever
//! takes a byte checks it: one that is lost, doubled, damaged, out of place or of a dead incarnation is seen at once. An
//! end whose endpoint is over starts anew, as a driver does; so whatever happens, all that is to be sent must get through
//! in the end ([`Pair::settle`]).

mod line;
mod op;

pub use line::{Build, Faults, Line};
pub use op::{Op, Side};

use std::format;
use std::string::String;
use std::vec::Vec;

use virtproxy_mux::sim::Rng;

use crate::deframe::{MAX_STUFFED, stuff};
use crate::endpoint::{Config, End as Over, Endpoint, Time};
use crate::frame::{Ack, Data, MAX_FRAMES, MAX_PAYLOAD, Seal};

/// What an endpoint may keep: its window, what came early, and what it has just been given.
const MAX_HELD: usize = 2 * MAX_FRAMES * MAX_PAYLOAD + OFFER + MAX_PAYLOAD;
/// Data handed over at once, at most, in bytes.
const OFFER: usize = 2048;
/// The longest it may take until all has got through, in microseconds: a bad line is slow.
const PATIENCE: Time = 3_600_000_000;

/// How a pair starts.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// The line, each way.
    pub build: Build,
    /// What it does to bytes.
    pub faults: Faults,
    /// How long an end may take until it looks at the line again, in microseconds.
    pub lag: Time,
    /// How much longer it takes about three times a second.
    pub hiccup: Time,
    /// What the run follows from.
    pub seed: u64,
}

impl Setup {
    /// A 16550 whose reader is sometimes too slow, and nothing else.
    pub fn uart(seed: u64) -> Self {
        Setup {
            build: Build::UART,
            faults: Faults::default(),
            lag: 1_000,
            hiccup: 5_000,
            seed,
        }
    }
}

struct End {
    endpoint: Endpoint,
    id: u64,
    /// Bytes that it has yet to send, and has sent in this incarnation.
    to_send: u64,
    sent: u64,
    /// Bytes that it has taken, in this incarnation and ever.
    taken: u64,
    taken_ever: u64,
    /// When it looks at the line.
    wakes: Time,
    /// Why its last incarnation ended by itself, and how many did.
    over: Option<Over>,
    ends: u64,
}

/// See the [module](self).
pub struct Pair {
    setup: Setup,
    now: Time,
    rng: Rng,
    ends: [End; 2],
    /// From A, and from B.
    lines: [Line; 2],
}

const fn at(side: Side) -> usize {
    match side {
        Side::A => 0,
        Side::B => 1,
    }
}

/// What `from` says to `to` at a place.
fn truth(from: u64, to: u64, place: u64) -> u8 {
    let mixed = (from ^ to.rotate_left(17))
        .wrapping_add(place)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed.to_le_bytes()[7]
}

impl End {
    fn new(rng: &mut Rng, speed: Option<u32>) -> Self {
        let id = rng.number() | 1;
        End {
            endpoint: Endpoint::new(Config { id, speed }),
            id,
            to_send: 0,
            sent: 0,
            taken: 0,
            taken_ever: 0,
            wakes: 0,
            over: None,
            ends: 0,
        }
    }

    /// Another incarnation, which sends what is left.
    fn restart(&mut self, rng: &mut Rng, speed: Option<u32>) {
        let id = rng.number() | 1;
        self.endpoint = Endpoint::new(Config { id, speed });
        self.id = id;
        self.sent = 0;
        self.taken = 0;
    }

    fn receive(&mut self, now: Time, bytes: &[u8]) {
        let mut in_order = Vec::new();
        self.endpoint.handle_bytes(now, bytes, &mut in_order);
        let peer = self.endpoint.peer().unwrap_or(0);
        for byte in in_order {
            let right = truth(peer, self.id, self.taken);
            assert_eq!(byte, right, "wrong byte at {}", self.taken);
            self.taken += 1;
            self.taken_ever += 1;
        }
        self.endpoint.check_invariants();
        assert!(self.endpoint.held() <= MAX_HELD, "memory without bound");
    }

    fn send(&mut self, now: Time, line: &mut Line) {
        let mut frames = Vec::new();
        while line.room() > 2 * MAX_STUFFED {
            while self.to_send > 0 && self.endpoint.wants_data() {
                let peer = self.endpoint.peer().unwrap_or(0);
                let n = self.to_send.min(OFFER as u64);
                let bytes: Vec<u8> = (self.sent..self.sent + n)
                    .map(|place| truth(self.id, peer, place))
                    .collect();
                self.endpoint.push(&bytes);
                self.sent += n;
                self.to_send -= n;
            }
            frames.clear();
            if !self.endpoint.poll_transmit(now, &mut frames) {
                break;
            }
            line.write(now, &frames);
        }
        assert!(self.endpoint.held() <= MAX_HELD, "memory without bound");
    }
}

impl Pair {
    /// Two ends that have yet to hear each other; only A knows the line's speed.
    pub fn new(setup: Setup) -> Self {
        let mut rng = Rng::new(setup.seed);
        let ends = [speed(Side::A), speed(Side::B)].map(|speed| End::new(&mut rng, speed));
        let lines = [1, 2].map(|n| Line::new(setup.build, setup.faults, setup.seed ^ n << 32));
        Pair {
            setup,
            now: 1_000,
            rng,
            ends,
            lines,
        }
    }

    /// Virtual time, in microseconds.
    pub fn now(&self) -> Time {
        self.now
    }

    /// The endpoint of a side.
    pub fn endpoint(&self, side: Side) -> &Endpoint {
        &self.ends[at(side)].endpoint
    }

    /// The line from a side.
    pub fn line(&self, side: Side) -> &Line {
        &self.lines[at(side)]
    }

    /// Bytes that a side has ever taken.
    pub fn taken(&self, side: Side) -> u64 {
        self.ends[at(side)].taken_ever
    }

    /// How many incarnations of a side ended by themselves, and why the last one did.
    pub fn over(&self, side: Side) -> (u64, Option<Over>) {
        let end = &self.ends[at(side)];
        (end.ends, end.over)
    }

    /// Does one thing.
    pub fn apply(&mut self, op: Op) {
        match op {
            Op::Send(side, bytes) => self.ends[at(side)].to_send += u64::from(bytes),
            Op::Restart(side) => self.ends[at(side)].restart(&mut self.rng, speed(side)),
            Op::Stop(side, millis) => {
                let end = &mut self.ends[at(side)];
                end.wakes = end.wakes.max(self.now + Time::from(millis) * 1_000);
            }
            Op::KernelMessage(side) => {
                let text = format!("[{:12.6}] random: crng init done\r\n", self.now);
                self.intrude(side, text.as_bytes());
            }
            Op::Banner(side) => self.intrude(
                side,
                b"\r\nDebian GNU/Linux 13 guest ttyS1\r\n\r\nguest login: ",
            ),
            Op::Garbage(side, len) => {
                let bytes: Vec<u8> = (0..len)
                    .map(|_| self.rng.number().to_le_bytes()[0])
                    .collect();
                self.intrude(side, &bytes);
            }
            Op::Faults(in_a_million) => {
                for line in &mut self.lines {
                    line.faults = Faults::all(in_a_million.into());
                }
            }
            Op::Run(millis) => self.run(Time::from(millis) * 1_000),
        }
    }

    fn intrude(&mut self, from: Side, bytes: &[u8]) {
        self.lines[at(from)].intrude(self.now, bytes);
    }

    /// Lets time pass.
    pub fn run(&mut self, micros: Time) {
        let end = self.now + micros;
        while self.now < end {
            self.step(end);
        }
    }

    /// Lets time pass until all that is to be sent has been taken.
    ///
    /// # Panics
    /// If that takes for ever.
    pub fn settle(&mut self) {
        let end = self.now + PATIENCE;
        while !self.is_quiet() {
            self.step(end);
            assert!(self.now < end, "stuck: {}", self.describe());
        }
    }

    /// Whether both have heard each other and nothing is left to send or on its way.
    fn is_quiet(&self) -> bool {
        let [a, b] = &self.ends;
        let joined = a.endpoint.peer() == Some(b.id) && b.endpoint.peer() == Some(a.id);
        joined && a.to_send + b.to_send == 0 && a.sent == b.taken && b.sent == a.taken
    }

    /// What a failure shows.
    pub fn describe(&self) -> String {
        let end = |end: &End| {
            format!(
                "to send {} sent {} taken {} {:?}",
                end.to_send,
                end.sent,
                end.taken,
                end.endpoint.stats()
            )
        };
        format!(
            "seed {} at {} us: A {}; B {}",
            self.setup.seed,
            self.now,
            end(&self.ends[0]),
            end(&self.ends[1])
        )
    }

    /// Goes to the next moment at which something happens, `end` at the latest.
    fn step(&mut self, end: Time) {
        let wakes = self.ends.iter().map(|end| end.wakes);
        let bytes = self.lines.iter().filter_map(Line::next_time);
        self.now = wakes
            .chain(bytes)
            .chain([end])
            .min()
            .unwrap_or(end)
            .max(self.now);
        for line in &mut self.lines {
            line.advance(self.now);
        }
        for side in [Side::A, Side::B] {
            self.act(side);
        }
    }

    /// An end looks at the line, if it is time.
    fn act(&mut self, side: Side) {
        let now = self.now;
        let [a, b] = &mut self.lines;
        let (outward, inward) = match side {
            Side::A => (a, b),
            Side::B => (b, a),
        };
        let end = &mut self.ends[at(side)];
        if end.wakes > now {
            return;
        }
        end.receive(now, &inward.read(now));
        if let Some(over) = end.endpoint.end() {
            assert_eq!(over, Over::PeerRestarted, "a sound peer was blamed");
            end.over = Some(over);
            end.ends += 1;
            end.restart(&mut self.rng, speed(side));
        }
        end.send(now, outward);
        end.wakes = now + 50 + self.rng.below(self.setup.lag);
        if self.rng.below(300_000) < end.wakes - now {
            end.wakes += self.setup.hiccup;
        }
    }
}

fn speed(side: Side) -> Option<u32> {
    (side == Side::A).then_some(115_200)
}

/// A frame as it goes over the line, sound but with any contents; for tests of what a hostile peer can do.
pub fn forge(
    [sender, receiver]: [u64; 2],
    [next, seen, seq, order]: [u8; 4],
    gaps: u32,
    ask: bool,
    payload: &[u8],
) -> Vec<u8> {
    let data = Data {
        seq,
        order,
        ask,
        payload,
    };
    let (mut body, mut frame) = (Vec::new(), Vec::new());
    let data = (!payload.is_empty()).then_some(data);
    Seal::new(sender, receiver).encode(Ack { next, seen, gaps }, data, &mut body);
    stuff(&body, &mut frame);
    frame
}

/// A HELLO as it goes over the line.
pub fn hello(hello: crate::Hello) -> Vec<u8> {
    let mut frame = Vec::new();
    stuff(&hello.encode(), &mut frame);
    frame
}
