//! Runs `vectors.txt` against a session, through nothing but its public interface.

mod support;

use std::collections::VecDeque;

use support::{Bench, EPOCH, PEER, Sealer, frame, hello};
use virtproxy_mux::frame::{MAX_CONTROL_FRAME, kind};
use virtproxy_mux::hello::SEAL;
use virtproxy_mux::seal::Seals;
use virtproxy_mux::{Config, End, Event, Reason, StreamId, Transmit};

const VECTORS: &str = include_str!("../vectors.txt");

/// One script under way.
struct Script {
    name: &'static str,
    bench: Bench,
    /// The stream it is about: the last one asked for.
    stream: Option<StreamId>,
    to_send: Vec<u8>,
    events: VecDeque<String>,
    ended: Option<String>,
}

/// Runs all scripts, handing over `step` bytes at a time; returns how many there are.
fn run(step: usize) -> usize {
    let mut scripts = Vec::new();
    for line in VECTORS.lines() {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match (word, scripts.last_mut()) {
            ("" | "#", _) => {}
            ("vector", _) => scripts.push(Script::new(rest.trim(), step)),
            (word, Some(script)) => script.line(word, rest.trim()),
            (word, None) => panic!("{word} before the first vector"),
        }
    }
    for script in &scripts {
        assert!(
            script.events.is_empty() && script.ended.is_none(),
            "{}: left over: {:?} {:?}",
            script.name,
            script.events,
            script.ended
        );
    }
    scripts.len()
}

#[test]
fn every_vector_holds() {
    assert!(run(usize::MAX) > 60, "vectors are missing");
}

#[test]
fn seals_are_those_of_the_protocol() {
    let (mut written, mut made) = (Sealer::new(EPOCH, PEER), Seals::new(EPOCH, PEER));
    let first: Vec<_> = (0..3).map(|_| written.next()).collect();
    let numbers = [0x60f8_88f3_u32, 0xf758_69fb, 0xf068_7d26];
    assert_eq!(first, numbers.map(u32::to_le_bytes));
    assert_eq!(first, [(); 3].map(|()| made.next_seal()));
    assert_ne!(first[0], Seals::new(PEER, EPOCH).next_seal());
}

#[test]
fn every_vector_holds_byte_by_byte() {
    run(1);
}

impl Script {
    fn new(name: &'static str, step: usize) -> Self {
        let mut bench = Bench::seeking(Config::default());
        bench.step = step;
        Script {
            name,
            bench,
            stream: None,
            to_send: Vec::new(),
            events: VecDeque::new(),
            ended: None,
        }
    }

    fn line(&mut self, word: &str, rest: &str) {
        let name = self.name;
        match word {
            "given" => self.given(rest),
            "gets" => self.gets(&bytes(rest)),
            "event" => assert_eq!(self.events.pop_front().as_deref(), Some(rest), "{name}"),
            "do" => self.command(rest),
            "sends" => assert_eq!(hex(&self.sends()), hex(&bytes(rest)), "{name}"),
            "silent" => assert_eq!(hex(&self.sends()), "", "{name}"),
            "ends" => assert_eq!(self.ended.take().as_deref(), Some(rest), "{name}"),
            other => panic!("{name}: what is {other:?}?"),
        }
    }

    fn given(&mut self, state: &str) {
        if state == "seeking" {
            return;
        }
        let (sealed, state) = match state.strip_prefix("sealed ") {
            Some(state) => (true, state),
            None => (false, state),
        };
        let mut hello = hello(PEER, EPOCH);
        if sealed {
            hello.features = SEAL;
            self.bench.sealers = Some([Sealer::new(PEER, EPOCH), Sealer::new(EPOCH, PEER)]);
        }
        self.sends();
        self.gets(&hello.encode());
        self.sends();
        let ping = self.sends();
        let pong = self.bench.seal(&frame(kind::PONG, 0, &ping[8..16]));
        self.gets(&pong);
        match state {
            "joined" => {}
            "opening" => {
                self.command("open http");
                self.sends();
            }
            "asked" | "open" => {
                let open = self.bench.seal(&support::open(0, 65536, "http"));
                self.gets(&open);
                if state == "open" {
                    self.command("accept");
                    self.sends();
                }
            }
            other => panic!("{}: no state {other:?}", self.name),
        }
        self.events.clear();
    }

    fn gets(&mut self, bytes: &[u8]) {
        let events = self.bench.feed(bytes);
        let data = std::mem::take(&mut self.bench.data);
        let data: Vec<u8> = data
            .into_iter()
            .filter(|(stream, _)| stream.is_some())
            .flat_map(|(_, bytes)| bytes)
            .collect();
        if data.len() > 100 {
            self.events.push_back(format!("data {} bytes", data.len()));
        } else if !data.is_empty() {
            let text = String::from_utf8_lossy(&data);
            self.events.push_back(format!("data {text}"));
        }
        for event in events {
            self.event(event);
        }
    }

    fn event(&mut self, event: Event) {
        let with = |what: &str, reason: Reason, text: &str| {
            format!("{what} {} {text}", reason.code())
                .trim()
                .to_string()
        };
        let text = match event {
            Event::Established(peer) => format!("established {}", peer.product),
            Event::Incompatible(peer) => {
                format!("incompatible {} {}", peer.min_version, peer.max_version)
            }
            Event::Asked { stream, service } => {
                self.stream = Some(stream);
                format!("asked {service}")
            }
            Event::Accepted(_) => "accepted".into(),
            Event::Finished(_) => "finished".into(),
            Event::RoundTrip(_) => "round trip".into(),
            Event::Refused { reason, text, .. } => with("refused", reason, &text),
            Event::Reset { reason, text, .. } => with("reset", reason, &text),
            Event::GoingAway { reason, text } => with("going away", reason, &text),
            Event::Ended(end) => {
                self.ended = Some(match end {
                    End::PeerRestarted => "restarted".into(),
                    End::PeerAborted(reason) => format!("aborted {}", reason.code()),
                    End::Damaged => "damaged".into(),
                    End::Violation(violation) => format!("violation {violation:?}"),
                });
                return;
            }
        };
        self.events.push_back(text);
    }

    fn command(&mut self, command: &str) {
        let (word, rest) = command.split_once(' ').unwrap_or((command, ""));
        let (code, text) = rest.split_once(' ').unwrap_or((rest, ""));
        let reason = || Reason::from_code(code.parse().unwrap());
        let session = &mut self.bench.session;
        match (word, self.stream) {
            ("open", _) => self.stream = Some(session.open(rest).unwrap()),
            ("ping", _) => session.ping(),
            ("goaway", _) => session.go_away(reason(), text),
            ("accept", Some(id)) => session.accept(id),
            ("refuse", Some(id)) => session.refuse(id, reason(), text),
            ("reset", Some(id)) => session.reset(id, reason(), text),
            ("finish", Some(id)) => session.finish(id),
            ("consume", Some(id)) => session.consumed(self.bench.now, id, rest.parse().unwrap()),
            ("send", Some(id)) => {
                self.to_send = rest.as_bytes().to_vec();
                session.set_readable(id);
            }
            other => panic!("{}: cannot {other:?}", self.name),
        }
    }

    /// The next frame it sends; nothing if there is none.
    fn sends(&mut self) -> Vec<u8> {
        let mut buf = [0; MAX_CONTROL_FRAME];
        let session = &mut self.bench.session;
        loop {
            match session.poll_transmit(self.bench.now, 1 << 20, &mut buf) {
                None => return Vec::new(),
                Some(Transmit::Control(len)) => return buf[..len].to_vec(),
                Some(Transmit::Data { stream, .. }) if self.to_send.is_empty() => {
                    session.blocked(stream);
                }
                Some(Transmit::Data { stream, max }) => {
                    assert!(self.to_send.len() <= max);
                    let data = std::mem::take(&mut self.to_send);
                    return session.sent(stream, data.len()).around(&data);
                }
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    let digits: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    digits.join(" ")
}

/// The bytes of hexadecimal text, where `XX*N` is N times a byte.
fn bytes(text: &str) -> Vec<u8> {
    let one = |item: &str| {
        let (digits, count) = item.split_once('*').unwrap_or((item, "1"));
        let byte = u8::from_str_radix(digits, 16).expect("hexadecimal");
        vec![byte; count.parse().expect("a count")]
    };
    text.split_whitespace().flat_map(one).collect()
}
