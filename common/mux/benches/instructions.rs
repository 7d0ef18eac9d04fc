//! Scenarios whose instructions are counted: `cargo xtask instructions` runs this program under callgrind, for two counts of
//! each scenario, and divides the difference by the difference of the counts. So what comes before and after does not
//! count, and a figure is the cost of one operation in the mux alone: no payload is copied here.
//!
//! ```text
//! instructions              names the scenarios
//! instructions NAME COUNT   does the operation of one so many times
//! ```

use std::hint::black_box;

use virtproxy_mux::frame::{HEADER_LEN, Header, MAX_CONTROL_FRAME, kind};
use virtproxy_mux::{Config, Event, Session, StreamId, Transmit};

/// Payload of a bulk frame, in bytes.
const BULK: usize = 64 * 1024;
/// Half a stream's first window, in bytes.
const HALF_WINDOW: u32 = 32 * 1024;
/// Payload of a small frame, in bytes.
const SMALL: usize = 64;
/// The most frames of a scenario that receives them.
const MOST_FRAMES: usize = 4096;
/// Streams that are open and idle, where there are.
const IDLE: usize = 1_000;
/// A window that no scenario uses up, in bytes.
const ENDLESS: u32 = 1 << 30;

/// What is done, so many times.
type Scenario = fn(usize);

const SCENARIOS: [(&str, Scenario); 11] = [
    ("bulk-frame-out", |count| frames_out(count, BULK, false)),
    ("bulk-frame-in", |count| frames_in(count, BULK, false)),
    ("small-frame-out", |count| frames_out(count, SMALL, false)),
    ("small-frame-in", |count| frames_in(count, SMALL, false)),
    ("sealed-small-frame-out", |count| {
        frames_out(count, SMALL, true)
    }),
    ("sealed-small-frame-in", |count| {
        frames_in(count, SMALL, true)
    }),
    ("credit-in", credit_in),
    ("half-window-in-credit-out", half_windows),
    ("open-accept-close", opens),
    ("call", |count| calls(count, 0)),
    ("call-among-1000-idle-streams", |count| calls(count, IDLE)),
];

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (name, count) = (
        words.first(),
        words.get(1).and_then(|word| word.parse().ok()),
    );
    let named = |scenario: &&(&str, Scenario)| name.is_some_and(|name| name == scenario.0);
    if let (Some((_, run)), Some(count)) = (SCENARIOS.iter().find(named), count) {
        return run(count);
    }
    // Whatever words `cargo bench` adds.
    for (name, run) in SCENARIOS {
        run(1);
        println!("{name}");
    }
    eprintln!("`cargo xtask instructions` counts what these take");
}

/// Data frames that one end sends.
fn frames_out(count: usize, len: usize, seal: bool) {
    let mut pair = Pair::new(endless(seal));
    let stream = pair.open();
    pair.ends[NEAR].set_readable(stream);
    let mut control = [0; MAX_CONTROL_FRAME];
    for _ in 0..count {
        let room = HEADER_LEN + BULK + MAX_CONTROL_FRAME;
        match pair.ends[NEAR].poll_transmit(0, room, &mut control) {
            Some(Transmit::Data { stream, max }) => {
                black_box(pair.ends[NEAR].sent(stream, len.min(max)));
            }
            other => panic!("no data: {other:?}"),
        }
    }
}

/// Data frames that one end receives, and whose payload is taken at once.
fn frames_in(count: usize, len: usize, seal: bool) {
    let mut pair = Pair::new(endless(seal));
    let stream = pair.open();
    pair.ends[NEAR].set_readable(stream);
    let header = Header {
        kind: kind::DATA,
        len: u32::try_from(len).expect("a length"),
        stream: 0,
    };
    // The same for every frame but for its seal; as many seals for every count, so that they do not count.
    assert!(count <= MOST_FRAMES, "more frames than seals");
    let seals: Vec<_> = (0..MOST_FRAMES)
        .map(|_| pair.ends[NEAR].sent(stream, len).seal.unwrap_or_default())
        .collect();
    for frame_seal in &seals[..count] {
        let header = black_box(header.encode());
        assert_eq!(pair.ends[FAR].handle_bytes(0, &header), HEADER_LEN);
        if seal {
            pair.ends[FAR].verify(*frame_seal);
        }
        take_payload(&mut pair.ends[FAR]);
        if seal {
            pair.ends[FAR].payload_taken(frame_seal.len());
        }
    }
}

/// CREDIT frames that one end receives.
fn credit_in(count: usize) {
    let mut pair = Pair::new(Config::default());
    pair.open();
    let header = Header {
        kind: kind::CREDIT,
        len: 4,
        stream: virtproxy_mux::frame::PEER_OPENED,
    };
    let frame = [&header.encode()[..], &1_u32.to_le_bytes()].concat();
    for _ in 0..count {
        let frame = black_box(&frame[..]);
        let mut used = 0;
        while used < frame.len() {
            used += pair.ends[NEAR].handle_bytes(0, &frame[used..]);
        }
    }
}

/// Half a window of data that one end receives and passes on, and the CREDIT that it sends for it.
fn half_windows(count: usize) {
    let mut pair = Pair::new(Config {
        max_window: HALF_WINDOW * 2,
        session_window: ENDLESS,
        ..Config::default()
    });
    pair.open();
    let header = Header {
        kind: kind::DATA,
        len: HALF_WINDOW,
        stream: 0,
    };
    let mut control = [0; MAX_CONTROL_FRAME];
    for _ in 0..count {
        let header = black_box(header.encode());
        assert_eq!(pair.ends[FAR].handle_bytes(0, &header), HEADER_LEN);
        take_payload(&mut pair.ends[FAR]);
        let credit = pair.ends[FAR].poll_transmit(0, BULK, &mut control);
        assert!(matches!(black_box(credit), Some(Transmit::Control(_))));
    }
}

/// Streams, one after the other, at both ends: opened, accepted, a byte sent, closed both ways.
fn opens(count: usize) {
    let mut pair = Pair::new(Config::default());
    for _ in 0..count {
        let stream = pair.open();
        pair.send(NEAR, stream, 1);
        pair.ends[NEAR].finish(stream);
        pair.settle();
        let far = pair.finished.pop().expect("a stream that ends");
        pair.ends[FAR].finish(far);
        pair.settle();
        pair.finished.pop().expect("a stream that ended");
    }
    assert_eq!(pair.ends[NEAR].streams() + pair.ends[FAR].streams(), 0);
}

/// A small frame there and one back, at both ends, with `idle` streams open beside.
fn calls(count: usize, idle: usize) {
    let mut pair = Pair::new(Config::default());
    for _ in 0..idle {
        pair.open();
    }
    let stream = pair.open();
    let answers = pair.asked.pop().expect("it was asked for");
    for _ in 0..count {
        pair.send(NEAR, stream, SMALL);
        pair.send(FAR, answers, SMALL);
    }
}

fn endless(seal: bool) -> Config {
    Config {
        initial_window: ENDLESS,
        max_window: ENDLESS,
        session_window: ENDLESS,
        memory: 1 << 40,
        seal,
        ..Config::default()
    }
}

/// Passes on the payload that comes next.
fn take_payload(session: &mut Session) {
    let payload = session.payload().expect("data comes next");
    let stream = payload.stream.expect("somebody's");
    let n = payload.remaining;
    session.payload_taken(n);
    session.consumed(0, stream, n);
}

/// The end that opens streams, and the other.
const NEAR: usize = 0;
const FAR: usize = 1;

/// Two sessions, and what happened to their streams.
struct Pair {
    ends: [Session; 2],
    /// Streams at the far end that were asked for, and streams at either end that the other has finished.
    asked: Vec<StreamId>,
    finished: Vec<StreamId>,
    wire: Vec<u8>,
    control: [u8; MAX_CONTROL_FRAME],
}

impl Pair {
    fn new(config: Config) -> Self {
        let mut pair = Pair {
            ends: [Session::new(config.clone(), 1), Session::new(config, 2)],
            asked: Vec::new(),
            finished: Vec::new(),
            wire: Vec::with_capacity(2 * BULK),
            control: [0; MAX_CONTROL_FRAME],
        };
        pair.settle();
        assert!(pair.ends[NEAR].is_established() && pair.ends[FAR].is_established());
        pair
    }

    /// A stream from the near end to the far one, accepted.
    fn open(&mut self) -> StreamId {
        let stream = self.ends[NEAR].open("user").expect("a stream");
        self.settle();
        stream
    }

    /// Sends a frame of `len` bytes from one end to the other.
    fn send(&mut self, from: usize, stream: StreamId, len: usize) {
        let session = &mut self.ends[from];
        session.set_readable(stream);
        let transmit = session.poll_transmit(0, BULK, &mut self.control);
        assert!(matches!(transmit, Some(Transmit::Data { .. })));
        let header = session.sent(stream, len).header;
        session.blocked(stream);
        let to = &mut self.ends[1 - from];
        to.handle_bytes(0, &header);
        take_payload(to);
        self.settle();
    }

    /// Moves control frames both ways until there are none.
    fn settle(&mut self) {
        while self.pass_control(NEAR) | self.pass_control(FAR) {}
    }

    /// Moves the control frames that one end has to send; whether there were any.
    fn pass_control(&mut self, from: usize) -> bool {
        self.wire.clear();
        while let Some(transmit) = self.ends[from].poll_transmit(0, BULK, &mut self.control) {
            match transmit {
                Transmit::Control(len) => self.wire.extend_from_slice(&self.control[..len]),
                Transmit::Data { .. } => panic!("nobody is readable"),
            }
        }
        let mut rest = &self.wire[..];
        let to = &mut self.ends[1 - from];
        while !rest.is_empty() {
            let used = to.handle_bytes(0, rest);
            rest = &rest[used..];
            while let Some(event) = to.poll_event() {
                match event {
                    Event::Asked { stream, .. } => {
                        to.accept(stream);
                        self.asked.push(stream);
                    }
                    Event::Finished(stream) => self.finished.push(stream),
                    Event::Established(_) | Event::Accepted(_) | Event::RoundTrip(_) => {}
                    other => panic!("unexpected: {other:?}"),
                }
            }
        }
        !self.wire.is_empty()
    }
}
