//! The failure of the first version on ISA serial, made again: what a mux does to a 16550 when nothing lies in between.
//!
//! Two sessions of the real mux send bulk to each other over the simulated line. Without the link layer, bytes that the
//! chip dropped are missed by nobody but the session, which breaks. With hardware flow control and ends that read
//! nothing while they wait to write, as the first version did, both wait for each other for ever. With the link layer, and
//! ends that always drain the line, the same traffic passes.

use std::collections::HashMap;

use virtproxy_link::sim::{Build, Faults, Line};
use virtproxy_link::{Config, Endpoint, Time};
use virtproxy_mux::frame::MAX_CONTROL_FRAME;
use virtproxy_mux::{Config as MuxConfig, Event, Session, StreamId, Transmit};

/// Bytes each way.
const BULK: usize = 40_000;
/// Ten times as long as it takes.
const PATIENCE: Time = 60_000_000;
/// Bytes asked of the session at once.
const ROOM: usize = 2_048;

/// What lies between session and line.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Between {
    Nothing,
    LinkLayer,
}

struct End {
    session: Session,
    link: Option<Endpoint>,
    /// Reads nothing while it waits to write.
    blocks: bool,
    blocked: bool,
    /// Bytes of the line that wait to be written.
    pending: Vec<u8>,
    ours: Option<StreamId>,
    sent: usize,
    taken: HashMap<StreamId, usize>,
    broken: Option<String>,
}

fn pattern(place: usize) -> u8 {
    place.wrapping_mul(31).to_le_bytes()[0] ^ place.to_le_bytes()[1]
}

impl End {
    fn new(id: u64, between: Between, blocks: bool) -> Self {
        let config = MuxConfig {
            turn: 2_048,
            ..MuxConfig::default()
        };
        End {
            session: Session::new(config, id),
            link: (between == Between::LinkLayer).then(|| {
                Endpoint::new(Config {
                    id,
                    speed: Some(115_200),
                })
            }),
            blocks,
            blocked: false,
            pending: Vec::new(),
            ours: None,
            sent: 0,
            taken: HashMap::new(),
            broken: None,
        }
    }

    fn taken(&self) -> usize {
        self.taken.values().sum()
    }

    fn act(&mut self, now: Time, inward: &mut Line, outward: &mut Line) {
        if !(self.blocks && self.blocked) {
            let bytes = inward.read(now);
            let mut plain = Vec::new();
            match &mut self.link {
                Some(link) => link.handle_bytes(now, &bytes, &mut plain),
                None => plain = bytes,
            }
            self.receive(now, &plain);
        }
        self.write(now, outward);
    }

    fn write(&mut self, now: Time, line: &mut Line) {
        loop {
            let n = self.pending.len().min(line.room());
            line.write(now, &self.pending[..n]);
            self.pending.drain(..n);
            self.blocked = !self.pending.is_empty();
            if self.blocked {
                return;
            }
            self.pending = match self.link.take() {
                None => self.frames(now),
                Some(mut link) => {
                    while link.wants_data() {
                        let frames = self.frames(now);
                        if frames.is_empty() {
                            break;
                        }
                        link.push(&frames);
                    }
                    let mut out = Vec::new();
                    link.poll_transmit(now, &mut out);
                    self.link = Some(link);
                    out
                }
            };
            if self.pending.is_empty() {
                return;
            }
        }
    }

    /// Frames of the session.
    fn frames(&mut self, now: Time) -> Vec<u8> {
        let mut out = Vec::new();
        let mut buf = [0; MAX_CONTROL_FRAME];
        while let Some(transmit) = self.session.poll_transmit(now, ROOM - out.len(), &mut buf) {
            match transmit {
                Transmit::Control(len) => out.extend(&buf[..len]),
                Transmit::Data { stream, max } => {
                    let n = max.min(BULK - self.sent);
                    if n == 0 || Some(stream) != self.ours {
                        self.session.blocked(stream);
                        continue;
                    }
                    let envelope = self.session.sent(stream, n);
                    out.extend(envelope.header);
                    out.extend((self.sent..self.sent + n).map(pattern));
                    self.sent += n;
                }
            }
        }
        out
    }

    fn receive(&mut self, now: Time, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.broken.is_none() {
            let used = match self.session.payload() {
                None => self.session.handle_bytes(now, bytes),
                Some(payload) => {
                    let n = payload.remaining.min(bytes.len());
                    if let Some(stream) = payload.stream {
                        self.take(stream, &bytes[..n]);
                        self.session.consumed(now, stream, n);
                    }
                    self.session.payload_taken(n);
                    n
                }
            };
            bytes = &bytes[used..];
            while let Some(event) = self.session.poll_event() {
                match event {
                    Event::Established(_) => self.ours = self.session.open("bulk").ok(),
                    Event::Asked { stream, .. } => self.session.accept(stream),
                    Event::Accepted(stream) => self.session.set_readable(stream),
                    Event::Ended(end) => self.broken = Some(end.to_string()),
                    _ => {}
                }
            }
        }
    }

    fn take(&mut self, stream: StreamId, bytes: &[u8]) {
        let taken = self.taken.entry(stream).or_default();
        for byte in bytes {
            if *byte != pattern(*taken) {
                self.broken = Some(format!("a wrong byte at {taken}"));
            }
            *taken += 1;
        }
    }
}

/// How the traffic ended.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// All bytes came, both ways.
    Passed,
    /// A session broke, or a stream got a wrong byte.
    Broken(String),
    /// Both ends wait to write and read nothing.
    Deadlock,
    /// Something is missing and nobody does anything about it.
    Stuck,
}

fn traffic(build: Build, between: Between, blocks: bool) -> (Outcome, u64) {
    let mut lines = [1, 2].map(|seed| Line::new(build, Faults::default(), seed));
    let mut ends = [1, 2].map(|id| End::new(id, between, blocks));
    for tick in 0..PATIENCE / 50 {
        let now = 1_000 + tick * 50;
        for line in &mut lines {
            line.advance(now);
        }
        // The reader of the one end looks often enough, but for 3 ms in every 100.
        let lags = now % 100_000 < 3_000;
        let [a, b] = &mut lines;
        if !lags {
            ends[0].act(now, b, a);
        }
        ends[1].act(now, a, b);
        if let Some(why) = ends.iter().find_map(|end| end.broken.clone()) {
            return (Outcome::Broken(why), overruns(&lines));
        }
        if ends.iter().all(|end| end.taken() == BULK) {
            return (Outcome::Passed, overruns(&lines));
        }
    }
    let outcome = match ends.iter().all(|end| end.blocks && end.blocked) {
        true => Outcome::Deadlock,
        false => Outcome::Stuck,
    };
    (outcome, overruns(&lines))
}

fn overruns(lines: &[Line; 2]) -> u64 {
    lines.iter().map(|line| line.overruns).sum()
}

const WITH_HARDWARE_FLOW: Build = Build {
    hardware_flow: true,
    ..Build::UART
};

#[test]
fn without_flow_control_the_chip_loses_bytes_and_the_session_breaks() {
    let (outcome, overruns) = traffic(Build::UART, Between::Nothing, false);
    println!("{outcome:?} after {overruns} lost bytes");
    assert!(overruns > 0);
    assert!(
        matches!(outcome, Outcome::Broken(_) | Outcome::Stuck),
        "{outcome:?}"
    );
}

#[test]
fn ends_that_read_nothing_while_they_write_wait_for_each_other_for_ever() {
    let (outcome, _) = traffic(WITH_HARDWARE_FLOW, Between::Nothing, true);
    assert_eq!(outcome, Outcome::Deadlock);
}

#[test]
fn with_the_link_layer_the_same_traffic_passes() {
    for build in [Build::UART, WITH_HARDWARE_FLOW] {
        let (outcome, overruns) = traffic(build, Between::LinkLayer, false);
        println!("{outcome:?} with {overruns} lost bytes");
        assert_eq!(outcome, Outcome::Passed);
        assert!(
            overruns > 0 || build.hardware_flow,
            "nothing was lost: the test tests nothing"
        );
    }
}
