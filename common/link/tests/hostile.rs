//! What a peer that breaks the rules can do: end the link, and nothing else.

use virtproxy_link::sim::{forge, hello};
use virtproxy_link::{Config, End, Endpoint, Hello, Violation};

const ID: u64 = 1;
const PEER: u64 = 2;
const HELLO: Hello = Hello {
    version: 1,
    open: true,
    id: PEER,
    ack: ID,
    speed: 0,
};

/// What an endpoint makes of frames, and why it is over.
struct Victim {
    endpoint: Endpoint,
    delivered: Vec<u8>,
}

impl Victim {
    fn open() -> Self {
        let mut victim = Victim {
            endpoint: Endpoint::new(Config {
                id: ID,
                speed: None,
            }),
            delivered: Vec::new(),
        };
        victim.hears(&hello(HELLO));
        assert!(victim.endpoint.is_open());
        victim
    }

    fn hears(&mut self, bytes: &[u8]) -> Option<End> {
        self.endpoint
            .handle_bytes(1_000, bytes, &mut self.delivered);
        self.endpoint.check_invariants();
        self.endpoint.end()
    }

    /// A sound frame: next, seen, seq and order, gaps, payload.
    fn frame(&mut self, fields: [u8; 4], gaps: u32, payload: &[u8]) -> Option<End> {
        self.hears(&forge([PEER, ID], fields, gaps, false, payload))
    }

    /// Everything it would send now.
    fn says(&mut self, now: u64) -> Vec<u8> {
        let mut line = Vec::new();
        while self.endpoint.poll_transmit(now, &mut line) {}
        line
    }
}

#[test]
fn a_frame_from_beyond_the_window_ends_the_link() {
    let mut victim = Victim::open();
    assert_eq!(victim.frame([0, 255, 31, 0], 0, b"early"), None);
    let end = victim.frame([0, 255, 32, 1], 0, b"too early");
    assert_eq!(end, Some(End::Violation(Violation::Ahead)));
    assert!(victim.delivered.is_empty());
    assert!(
        victim.says(u64::MAX / 2).is_empty(),
        "the dead do not speak"
    );
}

#[test]
fn an_acknowledgement_of_what_was_never_sent_ends_the_link() {
    for (fields, gaps) in [([1, 255, 0, 0], 0), ([0, 20, 0, 0], 0)] {
        let mut victim = Victim::open();
        let end = victim.frame(fields, gaps, b"");
        assert_eq!(
            end,
            Some(End::Violation(Violation::NeverSent)),
            "{fields:?}"
        );
    }
}

#[test]
fn gaps_beyond_what_was_sent_mean_nothing() {
    let mut victim = Victim::open();
    victim.endpoint.push(&[7; 300]);
    assert!(!victim.says(1_000).is_empty());
    assert_eq!(victim.frame([0, 0, 0, 0], u32::MAX, b""), None);
}

#[test]
fn another_incarnation_and_another_version_are_told_apart() {
    let other = Hello { id: 3, ..HELLO };
    assert_eq!(
        Victim::open().hears(&hello(other)),
        Some(End::PeerRestarted)
    );
    let later = Hello {
        version: 2,
        ..HELLO
    };
    assert_eq!(Victim::open().hears(&hello(later)), Some(End::Version(2)));
    let echo = Hello { id: ID, ..HELLO };
    assert_eq!(Victim::open().hears(&hello(echo)), None);
}

#[test]
fn frames_of_a_dead_incarnation_and_echoes_are_noise() {
    let mut victim = Victim::open();
    for pair in [[3, ID], [PEER, 3], [ID, PEER]] {
        let frame = forge(pair, [0, 255, 0, 0], 0, false, b"stale");
        assert_eq!(victim.hears(&frame), None);
    }
    assert!(victim.delivered.is_empty());
    assert_eq!(victim.endpoint.stats().noise, 3);
}

#[test]
fn noise_is_answered_once_a_second_and_never_forgotten() {
    let mut victim = Victim::open();
    victim.says(1_000);
    victim.hears(b"\0login: \0");
    assert!(!victim.says(1_000).is_empty());
    victim.hears(b"\0login: \0");
    assert!(victim.says(1_000).is_empty());
    let due = victim.endpoint.next_timeout().expect("it will be answered");
    assert!((900_000..=1_001_000).contains(&due), "{due}");
    assert!(!victim.says(due).is_empty());
}
