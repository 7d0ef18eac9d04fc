//! What a hostile, broken or unlucky peer does to one session: each fault that the first version or other multiplexers
//! had, by name.

mod support;

use support::{Bench, Sent, YOURS, address, frame, reason};
use virtproxy_mux::frame::kind;
use virtproxy_mux::{Config, OpenError, Reason};

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
