//! Raw bytes into one session: from the start, or behind a sound handshake with a few streams open.
//!
//! The first byte chooses the start and in what pieces the rest arrives. Whatever comes, the session must not panic, must keep its
//! invariants and must stay within its memory. If frames are sealed, the rest is cut into frames that each get their seal, but for
//! those whose payload ends in a byte that says otherwise.

#![no_main]

use libfuzzer_sys::fuzz_target;
use virtproxy_mux::frame::{HEADER_LEN, Header, MAX_CONTROL_FRAME, kind};
use virtproxy_mux::seal::{SEAL_LEN, Seals};
use virtproxy_mux::{Config, Event, Hello, Reason, Session, StreamId, Transmit};

const EPOCH: u64 = 0x1111_1111_1111_1111;
const PEER: u64 = 0x2222_2222_2222_2222;

struct Driver {
    session: Session,
    now: u64,
    streams: Vec<(StreamId, usize)>,
    /// Whether output is taken.
    drains: bool,
    /// The part that is here of a payload whose seal is not.
    staged: Vec<u8>,
    /// What the peer seals its frames with, if it does.
    seals: Option<Seals>,
}

impl Driver {
    fn feed(&mut self, bytes: &[u8], step: usize) {
        let mut rest = bytes;
        while !rest.is_empty() && !self.session.is_ended() {
            self.now += 50;
            let now = &rest[..rest.len().min(step)];
            let used = if let Some(len) = self.session.unverified() {
                let n = (len + SEAL_LEN - self.staged.len()).min(now.len());
                self.staged.extend(&now[..n]);
                if self.staged.len() == len + SEAL_LEN {
                    let staged = std::mem::take(&mut self.staged);
                    self.session.verify(*staged.last_chunk().expect("a seal"));
                    self.feed(&staged, step);
                }
                n
            } else if let Some(payload) = self.session.payload() {
                let n = payload.remaining.min(now.len());
                if let Some(id) = payload.stream {
                    self.hold(id, n);
                }
                self.session.payload_taken(n);
                n
            } else {
                self.session.handle_bytes(self.now, now)
            };
            rest = &rest[used..];
            let mut events = 0;
            while let Some(event) = self.session.poll_event() {
                events += 1;
                self.act(event);
            }
            assert!(used + events > 0, "input neither used nor answered");
            if self.drains {
                self.transmit();
            }
            self.check();
        }
        self.transmit();
        self.check();
    }

    /// Hands over the frames in `bytes`, each with its seal if the peer seals them.
    fn say(&mut self, bytes: &[u8], step: usize) {
        let mut rest = bytes;
        while self.seals.is_some() && !rest.is_empty() {
            let payload = match rest.first_chunk() {
                Some(head) if head[0] != kind::HELLO => Header::decode(*head).len as usize,
                _ => rest.len(),
            };
            let (frame, behind) = rest.split_at((HEADER_LEN + payload).min(rest.len()));
            self.feed(frame, step);
            if frame.last() != Some(&0xff)
                && let Some(seals) = &mut self.seals
            {
                let seal = seals.next_seal();
                self.feed(&seal, step);
            }
            rest = behind;
        }
        self.feed(rest, step);
    }

    fn hold(&mut self, id: StreamId, n: usize) {
        match self.streams.iter_mut().find(|(known, _)| *known == id) {
            Some((_, held)) => *held += n,
            None => self.session.consumed(self.now, id, n),
        }
    }

    fn forget(&mut self, id: StreamId) {
        if let Some(place) = self.streams.iter().position(|(known, _)| *known == id) {
            let (_, held) = self.streams.swap_remove(place);
            self.session.consumed(self.now, id, held);
        }
    }

    fn act(&mut self, event: Event) {
        match event {
            Event::Asked { stream, service } => match service.len() % 4 {
                0 => self.session.refuse(stream, Reason::NoSuchService, &service),
                1 => self.streams.push((stream, 0)),
                _ => {
                    self.session.accept(stream);
                    self.session.set_readable(stream);
                    self.streams.push((stream, 0));
                }
            },
            Event::Accepted(stream) => self.session.set_readable(stream),
            Event::Refused { stream, .. } | Event::Reset { stream, .. } => self.forget(stream),
            Event::Finished(stream) => {
                self.session.finish(stream);
                self.forget(stream);
            }
            Event::Ended(_) => self.streams.clear(),
            _ => {}
        }
    }

    fn transmit(&mut self) {
        let mut buf = [0; MAX_CONTROL_FRAME];
        for turn in 0..200 {
            match self.session.poll_transmit(self.now, 8192, &mut buf) {
                None => break,
                Some(Transmit::Control(len)) => assert!((1..=buf.len()).contains(&len)),
                Some(Transmit::Data { stream, max }) if turn < 100 => {
                    self.session.sent(stream, max.min(1000));
                }
                Some(Transmit::Data { stream, .. }) => self.session.blocked(stream),
            }
        }
    }

    fn check(&self) {
        self.session.check_invariants();
        assert!(self.session.backlog() < 4096, "a line without bound");
        let held: usize = self.streams.iter().map(|(_, held)| held).sum();
        assert!(held as u64 <= self.session.committed());
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((how, bytes)) = data.split_first() else {
        return;
    };
    let config = Config {
        max_streams: 16,
        initial_window: 8192,
        max_window: 65536,
        session_window: 65536,
        memory: 1 << 20,
        max_frame: 4096,
        seal: how & 32 != 0,
        ..Config::default()
    };
    let sealed = config.seal;
    let mut driver = Driver {
        session: Session::new(config, EPOCH),
        now: 1,
        streams: Vec::new(),
        drains: how & 2 != 0,
        staged: Vec::new(),
        seals: None,
    };
    let step = [1, 3, 7, usize::MAX][usize::from(how >> 6)];
    if how & 1 != 0 {
        let hello = Hello {
            min_version: 1,
            max_version: 1,
            epoch: PEER,
            ack: EPOCH,
            features: 0,
            max_frame: 65536,
            session_window: 65536,
            max_streams: 16,
            product: String::new(),
        };
        driver.feed(&hello.encode(), usize::MAX);
        assert!(driver.session.is_established());
        driver.seals = sealed.then(|| Seals::new(PEER, EPOCH));
        for number in 0..u32::from(how >> 2 & 7) {
            let Ok(id) = driver.session.open("fuzz") else {
                continue;
            };
            driver.streams.push((id, 0));
            driver.transmit();
            let accept = [kind::ACCEPT, 4, 0, 0, 0, 0, 0, 0x80, 0, 16, 0, 0];
            let mut accept = accept;
            accept[4] = number.to_le_bytes()[0];
            driver.say(&accept, usize::MAX);
        }
    }
    driver.say(bytes, step);
});
