//! One session and a peer made by hand, which may say whatever it likes.

#![allow(dead_code)] // each test binary uses its part

use virtproxy_mux::frame::{HEADER_LEN, Header, MAX_CONTROL_FRAME, kind};
use virtproxy_mux::seal::SEAL_LEN;
use virtproxy_mux::{Config, Event, Hello, Session, StreamId, Transmit};

/// Epoch of the session under test.
pub(crate) const EPOCH: u64 = 0x1111_2222_3333_4444;
/// Epoch of the peer.
pub(crate) const PEER: u64 = 0x5555_6666_7777_8888;
/// The stream field of what the receiver of the frame opened.
pub(crate) const YOURS: u32 = 1 << 31;

/// The seals of one direction, made anew from `PROTOCOL.md`.
pub(crate) struct Sealer {
    seed: u64,
    count: u64,
}

impl Sealer {
    pub(crate) fn new(sender: u64, receiver: u64) -> Self {
        Sealer {
            seed: Self::mix(sender).wrapping_add(receiver),
            count: 0,
        }
    }

    pub(crate) fn mix(mut z: u64) -> u64 {
        z = (z ^ z >> 30).wrapping_mul(0xbf58476d1ce4e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d049bb133111eb);
        z ^ z >> 31
    }

    pub(crate) fn next(&mut self) -> [u8; SEAL_LEN] {
        self.count += 1;
        let step = self.count.wrapping_mul(0x9e3779b97f4a7c15);
        let number = Self::mix(self.seed.wrapping_add(step));
        u32::try_from(number >> 32).unwrap().to_le_bytes()
    }

    /// The next frame with its seal.
    pub(crate) fn seal(&mut self, frame: &[u8]) -> Vec<u8> {
        [frame, &self.next()].concat()
    }
}

/// A session, and all that came out of it.
pub(crate) struct Bench {
    pub(crate) session: Session,
    pub(crate) config: Config,
    pub(crate) now: u64,
    /// Data that arrived, in order.
    pub(crate) data: Vec<(Option<StreamId>, Vec<u8>)>,
    /// How many bytes are handed over at a time.
    pub(crate) step: usize,
    /// Of what the peer says, and of what it hears, if frames are sealed.
    pub(crate) sealers: Option<[Sealer; 2]>,
    /// A payload whose seal is not here yet.
    staged: Vec<u8>,
}

/// A frame as the session under test sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    Hello(Vec<u8>),
    Filler(usize),
    Frame(u8, u32, Vec<u8>),
}

impl Bench {
    /// A session that has shaken hands; its first PING is answered.
    pub(crate) fn new(config: Config) -> Self {
        let seal = config.seal;
        let mut bench = Self::seeking(config);
        bench.sent();
        let events = bench.feed(&hello(PEER, EPOCH).encode());
        assert!(matches!(events[..], [Event::Established(_)]), "{events:?}");
        if seal {
            bench.sealers = Some([Sealer::new(PEER, EPOCH), Sealer::new(EPOCH, PEER)]);
        }
        for sent in bench.sent() {
            if let Sent::Frame(kind::PING, 0, token) = sent {
                bench.say(&frame(kind::PONG, 0, &token));
            }
        }
        bench
    }

    /// A session that has shaken hands, with sealed frames.
    pub(crate) fn sealed() -> Self {
        Self::new(Config {
            seal: true,
            ..Config::default()
        })
    }

    /// A session that has heard nothing yet.
    pub(crate) fn seeking(config: Config) -> Self {
        Bench {
            session: Session::new(config.clone(), EPOCH),
            config,
            now: 1_000_000,
            data: Vec::new(),
            step: usize::MAX,
            sealers: None,
            staged: Vec::new(),
        }
    }

    /// Hands over a frame, with its seal if frames are sealed.
    pub(crate) fn say(&mut self, frame: &[u8]) -> Vec<Event> {
        let frame = self.seal(frame);
        self.feed(&frame)
    }

    /// What the peer sends next if it sends this frame.
    pub(crate) fn seal(&mut self, frame: &[u8]) -> Vec<u8> {
        match &mut self.sealers {
            Some([says, _]) => says.seal(frame),
            None => frame.to_vec(),
        }
    }

    /// Hands bytes over as a driver does; returns the events.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() && !self.session.is_ended() {
            let now = &rest[..rest.len().min(self.step)];
            let before = events.len();
            let used = match (self.session.unverified(), self.session.payload()) {
                (Some(len), _) => {
                    let n = (len + SEAL_LEN - self.staged.len()).min(now.len());
                    self.staged.extend(&now[..n]);
                    if self.staged.len() == len + SEAL_LEN {
                        let frame = std::mem::take(&mut self.staged);
                        self.session.verify(*frame.last_chunk().unwrap());
                        events.extend(self.feed(&frame));
                    }
                    n
                }
                (None, Some(payload)) => {
                    let n = payload.remaining.min(now.len());
                    self.data.push((payload.stream, now[..n].to_vec()));
                    self.session.payload_taken(n);
                    n
                }
                (None, None) => self.session.handle_bytes(self.now, now),
            };
            events.extend(std::iter::from_fn(|| self.session.poll_event()));
            self.session.check_invariants();
            assert!(
                used > 0 || events.len() > before,
                "the session takes nothing and says nothing"
            );
            rest = &rest[used..];
        }
        events
    }

    /// Every control frame the session has to send; each stream's data turn is answered with "nothing to read".
    pub(crate) fn sent(&mut self) -> Vec<Sent> {
        let mut out = Vec::new();
        let mut buf = [0; MAX_CONTROL_FRAME];
        while let Some(transmit) = self.session.poll_transmit(self.now, 1 << 20, &mut buf) {
            self.session.check_invariants();
            match transmit {
                Transmit::Control(len) => out.push(Sent::new(self.unseal(&buf[..len]))),
                Transmit::Data { stream, .. } => self.session.blocked(stream),
            }
        }
        out
    }

    /// A frame that was sent, without its seal, which must be right.
    fn unseal<'a>(&mut self, sent: &'a [u8]) -> &'a [u8] {
        match &mut self.sealers {
            Some([_, hears]) if sent[0] != kind::HELLO && sent[0] != kind::FILLER => {
                let (frame, seal) = sent.split_at(sent.len() - SEAL_LEN);
                assert_eq!(seal, hears.next(), "a wrong seal");
                frame
            }
            _ => sent,
        }
    }

    /// A stream opened by the peer and accepted here.
    pub(crate) fn accepted(&mut self, address: u32, window: u32) -> StreamId {
        let id = self.asked(address, window);
        self.session.accept(id);
        self.sent();
        id
    }

    /// A stream the peer asked for.
    pub(crate) fn asked(&mut self, address: u32, window: u32) -> StreamId {
        match &self.say(&open(address, window, "echo"))[..] {
            [Event::Asked { stream, .. }] => *stream,
            other => panic!("{other:?}"),
        }
    }

    /// The same; `None` if the session refused it by itself.
    pub(crate) fn asked_or_refused(&mut self, address: u32) -> Option<StreamId> {
        match &self.feed(&open(address, 1 << 20, "echo"))[..] {
            [Event::Asked { stream, .. }] => Some(*stream),
            [] => None,
            other => panic!("{other:?}"),
        }
    }
}

impl Sent {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        match self {
            Sent::Hello(bytes) => bytes.clone(),
            Sent::Filler(len) => vec![0; *len],
            Sent::Frame(kind, stream, payload) => frame(*kind, *stream, payload),
        }
    }

    pub(crate) fn new(bytes: &[u8]) -> Self {
        if bytes[0] == kind::HELLO {
            return Sent::Hello(bytes.to_vec());
        }
        if bytes.iter().all(|byte| *byte == 0) {
            return Sent::Filler(bytes.len());
        }
        let (head, payload) = bytes.split_first_chunk::<HEADER_LEN>().unwrap();
        let header = Header::decode(*head);
        assert_eq!(header.len as usize, payload.len());
        Sent::Frame(header.kind, header.stream, payload.to_vec())
    }
}

/// A sound HELLO.
pub(crate) fn hello(epoch: u64, ack: u64) -> Hello {
    Hello {
        min_version: 1,
        max_version: 1,
        epoch,
        ack,
        features: 0,
        max_frame: 65536,
        session_window: 1 << 20,
        max_streams: 1024,
        product: "peer 1".to_string(),
    }
}

/// A frame of any kind.
pub(crate) fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let header = Header {
        kind,
        len: u32::try_from(payload.len()).unwrap(),
        stream,
    };
    [&header.encode()[..], payload].concat()
}

pub(crate) fn open(stream: u32, window: u32, service: &str) -> Vec<u8> {
    let payload = [&window.to_le_bytes()[..], service.as_bytes()].concat();
    frame(kind::OPEN, stream, &payload)
}

pub(crate) fn word(kind: u8, stream: u32, word: u32) -> Vec<u8> {
    frame(kind, stream, &word.to_le_bytes())
}

pub(crate) fn reason(kind: u8, stream: u32, code: u16, text: &str) -> Vec<u8> {
    frame(
        kind,
        stream,
        &[&code.to_le_bytes()[..], text.as_bytes()].concat(),
    )
}

/// The address of slot `slot` in generation `generation`, as its opener writes it.
pub(crate) fn address(slot: u32, generation: u32) -> u32 {
    generation << 20 | slot
}

/// The frames with their HELLOs decoded to epoch and ack.
pub(crate) fn acks(sent: &[Sent]) -> Vec<(u64, u64)> {
    let word = |bytes: &[u8], at| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let hellos = sent.iter().filter_map(|sent| match sent {
        Sent::Hello(bytes) => Some((word(bytes, 12), word(bytes, 20))),
        _ => None,
    });
    hellos.collect()
}
