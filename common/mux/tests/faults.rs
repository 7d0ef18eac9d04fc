//! What a hostile, broken or unlucky peer does to one session: each fault that the first version or other multiplexers
//! had, by name.

mod support;

use support::{Bench, EPOCH, PEER, Sent, YOURS, acks, address, frame, hello, open, reason, word};
use virtproxy_mux::frame::kind;
use virtproxy_mux::session::MIN_WINDOW;
use virtproxy_mux::{Config, End, Event, OpenError, Reason, Transmit, Violation};

/// More than the lines of a session with a handful of streams may ever hold.
const BACKLOG: usize = 1024;

#[test]
fn an_address_that_is_reset_and_reopened_without_end_costs_no_memory() {
    let mut bench = Bench::new(Config::default());
    for _ in 0..100_000 {
        // The driver refuses, but the channel is full: the REFUSE stays unsent until the RESET makes it void.
        let id = bench.asked(address(0, 0), 1 << 20);
        bench.session.refuse(id, Reason::NoSuchService, "no");
        bench.feed(&reason(kind::RESET, address(0, 0), 8, ""));
        // The same with a stream that has something to send.
        let id = bench.asked(address(1, 0), 1 << 20);
        bench.session.accept(id);
        bench.session.set_readable(id);
        bench.feed(&reason(kind::RESET, address(1, 0), 8, ""));
        assert_eq!(bench.session.streams(), 0);
    }
    assert!(bench.session.backlog() < BACKLOG);
    assert_eq!(bench.session.committed(), 0);
}

#[test]
fn what_the_driver_says_of_an_old_stream_never_touches_a_new_one_at_its_address() {
    let mut bench = Bench::new(Config::default());
    let old = bench.accepted(address(5, 7), 1 << 20);
    bench.feed(&frame(kind::DATA, address(5, 7), &[1; 1000]));
    bench.feed(&reason(kind::RESET, address(5, 7), 8, ""));
    let new = bench.accepted(address(5, 7), 1 << 20);
    assert_ne!(old, new);
    bench.feed(&frame(kind::DATA, address(5, 7), &[2; 10]));
    let before = bench.session.stream_credit(new).unwrap();
    bench.session.consumed(bench.now, old, 1000);
    bench.session.reset(old, Reason::Cancelled, "");
    bench.session.finish(old);
    bench.session.set_readable(old);
    bench.session.check_invariants();
    assert_eq!(bench.session.stream_credit(new), Some(before));
    assert_eq!(bench.sent(), []);
}

/// Opens a stream and has it refused.
fn refused(bench: &mut Bench) -> u32 {
    bench.session.open("x").unwrap();
    let sent = bench.sent();
    let [Sent::Frame(kind::OPEN, address, _)] = sent[..] else {
        panic!("{sent:?}");
    };
    bench.feed(&reason(kind::REFUSE, address | YOURS, 1, ""));
    address
}

#[test]
fn an_address_comes_back_only_when_nothing_of_its_past_can_be_under_way() {
    let config = Config {
        max_streams: 1,
        ..Config::default()
    };
    let mut bench = Bench::new(config);
    for generation in 0..2048 {
        assert_eq!(refused(&mut bench), address(0, generation));
    }
    assert_eq!(bench.session.open("x"), Err(OpenError::Limit));
    let sent = bench.sent();
    let [Sent::Frame(kind::PING, 0, token)] = &sent[..] else {
        panic!("{sent:?}");
    };
    assert_eq!(bench.session.open("x"), Err(OpenError::Limit));
    bench.feed(&frame(kind::PONG, 0, token));
    assert_eq!(refused(&mut bench), address(0, 0));
}

#[test]
fn unread_bytes_of_ended_streams_count_against_the_memory() {
    let config = Config {
        max_streams: 4,
        memory: 0,
        initial_window: MIN_WINDOW,
        ..Config::default()
    };
    let mut bench = Bench::new(config);
    let mut unread = Vec::new();
    // The local side ends its half at once, and never reads what came.
    let refusal = loop {
        let id = bench.asked_or_refused(address(0, 0));
        let Some(id) = id else { break bench.sent() };
        bench.session.accept(id);
        bench.sent();
        bench.session.finish(id);
        bench.sent();
        bench.feed(&frame(kind::DATA, address(0, 0), &[0; MIN_WINDOW as usize]));
        bench.feed(&frame(kind::FIN, address(0, 0), &[]));
        unread.push(id);
        assert_eq!(bench.session.streams(), 0);
        assert!(unread.len() < 100, "memory has no bound");
    };
    assert_eq!(unread.len(), 8, "what was set aside for twice 4 streams");
    assert!(
        matches!(&refusal[..], [Sent::Frame(kind::REFUSE, _, why)] if why[0] == 5),
        "{refusal:?}"
    );
    assert_eq!(bench.session.open("x"), Err(OpenError::Limit));
    assert_eq!(bench.session.stats().memory_refused, 2);
    bench
        .session
        .consumed(bench.now, unread[0], MIN_WINDOW as usize);
    assert!(bench.session.open("x").is_ok());
}

#[test]
fn an_ended_session_has_nothing_to_send_but_its_farewell() {
    let mut bench = Bench::new(Config::default());
    let ids = [0, 1].map(|slot| bench.accepted(address(slot, 0), 1 << 20));
    bench.feed(&frame(kind::DATA, address(0, 0), &[0; 100]));
    bench.feed(&word(kind::PING, 0, 0));
    for id in ids {
        bench.session.reset(id, Reason::Cancelled, "");
        bench.session.consumed(bench.now, id, 100);
    }
    assert_eq!(bench.session.streams(), 0);
    assert_eq!(bench.session.committed(), 0);
    let farewell = bench.sent();
    assert!(
        matches!(farewell[..], [Sent::Frame(kind::GOAWAY, 0, _)]),
        "{farewell:?}"
    );
}

#[test]
fn silly_limits_are_made_sound() {
    let silly = Config {
        max_streams: 0,
        initial_window: u32::MAX,
        max_window: u32::MAX,
        session_window: 0,
        memory: 0,
        max_frame: 1,
        ..Config::default()
    };
    let mut bench = Bench::new(silly);
    bench.accepted(address(0, 0), 1 << 20);
    assert!(bench.session.open("x").is_ok());
    let mut fresh = Bench::seeking(Config {
        max_frame: 1,
        ..Config::default()
    });
    let sent = fresh.sent();
    let [Sent::Hello(hello)] = &sent[..] else {
        panic!("{sent:?}")
    };
    let mut other = Bench::seeking(Config::default());
    other.feed(hello);
    assert_eq!(
        other.session.stats().skipped,
        0,
        "the other end takes it for a handshake"
    );
}

#[test]
fn going_away_is_told_once() {
    let mut bench = Bench::new(Config::default());
    let goaway = reason(kind::GOAWAY, 0, 6, "bye");
    assert!(matches!(bench.feed(&goaway)[..], [Event::GoingAway { .. }]));
    assert_eq!(bench.feed(&goaway), []);
    assert_eq!(bench.session.open("x"), Err(OpenError::GoingAway));
}

#[test]
fn garbage_that_claims_to_be_a_handshake_hides_no_real_one() {
    let mut bench = Bench::seeking(Config::default());
    let mut bytes = hello(3, 0).encode();
    bytes.truncate(8);
    bytes.extend(400_u16.to_le_bytes());
    bytes.extend([0xd6, b'V', 0xd6]);
    bytes.extend(hello(PEER, EPOCH).encode());
    let events = bench.feed(&bytes);
    assert!(matches!(events[..], [Event::Established(_)]), "{events:?}");
    assert_eq!(bench.session.stats().skipped, 13);
}

#[test]
fn an_answer_to_our_predecessor_makes_us_known() {
    // If it counted for nothing, and took the place of the first HELLO of a session that could not send yet, both ends
    // might wait for ever.
    let mut bench = Bench::seeking(Config::default());
    bench.feed(&hello(99, 0).encode());
    bench.feed(&hello(PEER, 98).encode());
    assert_eq!(acks(&bench.sent()), [(EPOCH, 0), (EPOCH, 0)]);
    // What the peer does next, having heard of us.
    let events = bench.feed(&hello(PEER, EPOCH).encode());
    assert!(matches!(events[..], [Event::Established(_)]), "{events:?}");
    assert_eq!(acks(&bench.sent()), [(EPOCH, PEER)]);
}

#[test]
fn a_frame_cut_short_by_a_restart_is_filled_up() {
    let mut bench = Bench::new(Config::default());
    bench.accepted(address(0, 0), 1 << 20);
    let cut = frame(kind::DATA, address(0, 0), &[1; 60_000]);
    bench.feed(&cut[..30_000]);
    // The peer is dead; the next one says hello into the middle of the frame.
    let mut next = Bench::seeking(Config::default());
    next.session = virtproxy_mux::Session::new(Config::default(), 4711);
    for sent in next.sent() {
        bench.feed(&sent.bytes());
    }
    assert!(bench.session.is_established(), "nobody noticed");
    bench.session.ping();
    let pings = bench.sent();
    assert!(
        matches!(pings[..], [Sent::Frame(kind::PING, ..)]),
        "{pings:?}"
    );
    bench.session.ping();
    let question = bench.sent();
    assert_eq!(acks(&question), [(EPOCH, PEER)]);
    next.feed(&question[0].bytes());
    let answer: Vec<u8> = next.sent().iter().flat_map(Sent::bytes).collect();
    let events = bench.feed(&answer);
    assert_eq!(events, [Event::Ended(End::PeerRestarted)]);
}

#[test]
fn repeating_our_handshake_disturbs_no_living_peer() {
    let mut bench = Bench::new(Config::default());
    assert_eq!(bench.feed(&hello(PEER, EPOCH).encode()), []);
    assert!(bench.session.is_established());
    bench.session.ping();
    bench.sent();
    bench.session.ping();
    assert_eq!(bench.sent(), [], "between frames there is nothing to ask");
}

#[test]
fn an_unknown_service_is_refused_and_its_opener_told() {
    let mut bench = Bench::new(Config::default());
    let id = bench.asked(address(9, 0), 1 << 20);
    bench
        .session
        .refuse(id, Reason::NoSuchService, "no http here");
    let refusal = frame(kind::REFUSE, address(9, 0) | YOURS, b"\x01\0no http here");
    assert_eq!(bench.sent(), [Sent::new(&refusal)]);
    assert_eq!((bench.session.streams(), bench.session.committed()), (0, 0));

    let stream = bench.session.open("http").unwrap();
    bench.sent();
    let refusal = reason(kind::REFUSE, YOURS, 1, "no http here");
    let told = Event::Refused {
        stream,
        reason: Reason::NoSuchService,
        text: "no http here".into(),
    };
    assert_eq!(bench.feed(&refusal), [told]);
    assert_eq!((bench.session.streams(), bench.session.committed()), (0, 0));
}

#[test]
fn refusals_that_are_never_read_are_bounded_by_the_limit_of_streams() {
    let mut bench = Bench::new(Config {
        max_streams: 64,
        ..Config::default()
    });
    let text = "x".repeat(1000);
    for slot in 0..64 {
        let id = bench.asked(address(slot, 0), 1 << 20);
        bench.session.refuse(id, Reason::TargetRefused, &text);
    }
    // Nothing was sent, so the slots are not free again, and a peer that takes them is at fault.
    let events = bench.feed(&open(address(0, 1), 1 << 20, "x"));
    assert_eq!(events, [Event::Ended(End::Violation(Violation::BadOpen))]);
}

#[test]
fn open_and_reset_without_end_leave_nothing_behind() {
    let mut bench = Bench::new(Config {
        max_streams: 256,
        ..Config::default()
    });
    for n in 0..50_000 {
        let at = address(n % 256, n / 256);
        let id = bench.asked(at, 1 << 20);
        bench.session.accept(id);
        bench.session.set_readable(id);
        bench.feed(&reason(kind::RESET, at, 8, ""));
    }
    assert_eq!((bench.session.streams(), bench.session.committed()), (0, 0));
    assert!(bench.session.backlog() < BACKLOG);
    assert_eq!(
        bench.sent(),
        [],
        "streams that are gone have nothing to say"
    );
}

#[test]
fn frames_for_streams_that_never_were_touch_nothing() {
    let mut bench = Bench::new(Config::default());
    for at in [
        address(3, 0),
        address(1_048_575, 2047),
        address(3, 0) | YOURS,
    ] {
        let mut frames = frame(kind::DATA, at, &[7; 100]);
        frames.extend(frame(kind::FIN, at, &[]));
        frames.extend(word(kind::CREDIT, at, 1));
        frames.extend(word(kind::ACCEPT, at, 1));
        frames.extend(reason(kind::REFUSE, at, 1, ""));
        frames.extend(reason(kind::RESET, at, 1, ""));
        assert_eq!(bench.feed(&frames), []);
    }
    assert!(bench.data.iter().all(|(stream, _)| stream.is_none()));
    assert_eq!(bench.session.stats().late_frames, 18);
    assert_eq!(bench.session.committed(), 0);
}

#[test]
fn session_credit_comes_back_for_data_that_nobody_wants() {
    let config = Config {
        session_window: 65536,
        ..Config::default()
    };
    let mut bench = Bench::new(config);
    let mut returned = 0;
    for _ in 0..1000 {
        bench.feed(&frame(kind::DATA, address(77, 0), &[0; 1000]));
        for sent in bench.sent() {
            let Sent::Frame(kind::SESSION_CREDIT, 0, bytes) = &sent else {
                panic!("{sent:?}");
            };
            returned += u32::from_le_bytes(bytes[..].try_into().unwrap());
        }
    }
    assert!(returned > 1_000_000 - 65536);
}

#[test]
fn the_window_of_all_streams_together_is_enforced() {
    let config = Config {
        session_window: 65536,
        max_frame: 16384,
        ..Config::default()
    };
    let mut bench = Bench::new(config);
    for slot in 0..5 {
        bench.accepted(address(slot, 0), 1 << 20);
    }
    // No turn to send is given, so no credit goes back.
    for slot in 0..4 {
        let data = frame(kind::DATA, address(slot, 0), &[0; 16384]);
        assert_eq!(bench.feed(&data), []);
    }
    let events = bench.feed(&frame(kind::DATA, address(4, 0), &[0]));
    let overdrawn = End::Violation(Violation::CreditOverdrawn);
    assert_eq!(events, [Event::Ended(overdrawn)]);
}

#[test]
fn a_flood_of_pings_owes_one_pong() {
    let mut bench = Bench::new(Config::default());
    for token in 0..100_000_u64 {
        bench.feed(&frame(kind::PING, 0, &token.to_le_bytes()));
    }
    let last = 99_999_u64.to_le_bytes().to_vec();
    assert_eq!(bench.sent(), [Sent::Frame(kind::PONG, 0, last)]);
    assert!(bench.session.backlog() < 8);
}

#[test]
fn what_holds_for_whole_batches_holds_byte_by_byte() {
    for step in [1, 2, 7, 13] {
        let mut bench = Bench::new(Config::default());
        bench.step = step;
        let id = bench.accepted(address(0, 0), 1 << 20);
        let mut bytes = frame(kind::DATA, address(0, 0), b"one ");
        bytes.extend(frame(0x81, 0, b"skip me"));
        bytes.extend(frame(kind::DATA, address(0, 0), b"two"));
        bytes.extend(frame(kind::FIN, address(0, 0), &[]));
        assert_eq!(bench.feed(&bytes), [Event::Finished(id)]);
        let wanted = bench.data.iter().filter(|(stream, _)| *stream == Some(id));
        let data: Vec<u8> = wanted.flat_map(|(_, bytes)| bytes.clone()).collect();
        assert_eq!(data, b"one two");
    }
}

#[test]
fn the_end_of_one_direction_leaves_the_other() {
    let mut bench = Bench::new(Config::default());
    let id = bench.accepted(address(0, 0), 1 << 20);
    assert_eq!(
        bench.feed(&frame(kind::FIN, address(0, 0), &[])),
        [Event::Finished(id)]
    );
    bench.session.set_readable(id);
    let mut buf = [0; 512];
    let turn = bench.session.poll_transmit(bench.now, 8192, &mut buf);
    assert!(matches!(turn, Some(Transmit::Data { stream, .. }) if stream == id));
    bench.session.sent(id, 10);
    bench.session.finish(id);
    assert_eq!(bench.sent(), [Sent::Frame(kind::FIN, YOURS, vec![])]);
    assert_eq!((bench.session.streams(), bench.session.committed()), (0, 0));
}

#[test]
fn a_stream_without_credit_is_given_no_turn_and_the_others_are() {
    let mut bench = Bench::new(Config::default());
    let stuck = bench.accepted(address(0, 0), 0);
    let free = bench.accepted(address(1, 0), 100);
    bench.session.set_readable(stuck);
    bench.session.set_readable(free);
    let mut buf = [0; 512];
    let turn =
        |bench: &mut Bench, buf: &mut [u8]| bench.session.poll_transmit(bench.now, 8192, buf);
    let expected = Transmit::Data {
        stream: free,
        max: 100,
    };
    assert_eq!(turn(&mut bench, &mut buf), Some(expected));
    bench.session.sent(free, 100);
    assert_eq!(turn(&mut bench, &mut buf), None);
    bench.feed(&word(kind::CREDIT, address(0, 0), 7));
    let expected = Transmit::Data {
        stream: stuck,
        max: 7,
    };
    assert_eq!(turn(&mut bench, &mut buf), Some(expected));
}

#[test]
fn a_reset_takes_back_every_grant_and_keeps_what_is_held() {
    let mut bench = Bench::new(Config::default());
    let id = bench.accepted(address(0, 0), 1 << 20);
    bench.feed(&frame(kind::DATA, address(0, 0), &[0; 5000]));
    bench.session.consumed(bench.now, id, 1000);
    bench.session.reset(id, Reason::ConnectionBroken, "");
    assert_eq!(bench.session.committed(), 4000, "what the local side holds");
    bench.session.consumed(bench.now, id, 4000);
    assert_eq!(bench.session.committed(), 0);
}

#[test]
fn a_stream_reset_here_in_mid_frame_takes_no_more() {
    let mut bench = Bench::new(Config::default());
    let id = bench.accepted(address(0, 0), 1 << 20);
    let data = frame(kind::DATA, address(0, 0), &[0; 5000]);
    bench.feed(&data[..2008]);
    bench.session.reset(id, Reason::ConnectionBroken, "");
    bench.feed(&data[2008..]);
    // The driver has dropped it all, and says so.
    bench.session.consumed(bench.now, id, 5000);
    assert_eq!(bench.session.committed(), 0);
    bench.sent();
    assert_eq!(bench.session.streams(), 0);
}

#[test]
fn a_reset_that_crosses_the_last_fin_does_not_hold_the_slot() {
    let mut bench = Bench::new(Config::default());
    let id = bench.accepted(address(0, 0), 1 << 20);
    bench.session.finish(id);
    bench.sent();
    // Both ends are about to be done with it. We reset it, but the channel is full; the peer, which has our FIN, sends
    // its own and takes the slot again.
    bench.session.reset(id, Reason::ConnectionBroken, "");
    assert_eq!(bench.feed(&frame(kind::FIN, address(0, 0), &[])), []);
    bench.asked(address(0, 1), 1 << 20);
    assert_eq!(bench.sent(), []);

    // When our FIN was not sent either, the peer still waits for the RESET.
    let id = bench.accepted(address(1, 0), 1 << 20);
    bench.session.finish(id);
    bench.session.reset(id, Reason::ConnectionBroken, "");
    assert_eq!(bench.feed(&frame(kind::FIN, address(1, 0), &[])), []);
    let reset = reason(kind::RESET, address(1, 0) | YOURS, 7, "");
    assert_eq!(bench.sent(), [Sent::new(&reset)]);
}
