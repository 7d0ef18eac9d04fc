//! Two sessions: what is searched in every test run, and what when asked for.
//!
//! `cargo test -p virtproxy-model -- --nocapture` prints how far each search goes; `--ignored figures` searches further.

use virtproxy_model::mux::{Allowed, Bounds, Mux, Reads, Stream};
use virtproxy_model::world::search;
use virtproxy_mux::sim::Side::{A, B};

const NONE: Allowed = Allowed {
    parts: 0,
    naps: 0,
    refusals: 0,
    resets: 0,
    restarts: 0,
    faults: 0,
};

/// Searches; what is found is a failure.
fn holds(what: &str, bounds: Bounds) {
    match search(Mux(bounds)) {
        Ok(extent) => println!("{what:40} {extent}"),
        Err(finding) => panic!("{what}: {finding}"),
    }
}

fn with(streams: &[Stream], allowed: Allowed) -> Bounds {
    Bounds {
        allowed,
        ..Bounds::of(streams)
    }
}

#[test]
fn bulk_both_ways() {
    let stream = Stream::new(A, [3, 3]).read(Reads::AnyTime);
    holds("bulk both ways", Bounds::of(&[stream]));
}

#[test]
fn streams_starve_each_other_of_nothing() {
    let streams = [
        Stream::new(A, [3, 0]),
        Stream::new(A, [2, 0]).read(Reads::AnyTime),
    ];
    holds("two streams, one session's credit", Bounds::of(&streams));
}

#[test]
fn who_does_not_read_stops_its_own_stream() {
    let streams = [
        Stream::new(A, [3, 0]).read(Reads::Never),
        Stream::new(A, [2, 1]),
    ];
    holds("one client does not read", Bounds::of(&streams));
}

#[test]
fn windows_grow() {
    let stream = Stream::new(A, [4, 0]).read(Reads::AnyTime);
    let bounds = Bounds {
        window: [2, 4],
        ..Bounds::of(&[stream])
    };
    holds("windows grow", bounds);
}

#[test]
fn frames_arrive_in_parts() {
    let allowed = Allowed { parts: 2, ..NONE };
    holds("in parts", with(&[Stream::new(A, [2, 1])], allowed));
}

#[test]
fn local_sides_pause() {
    let allowed = Allowed { naps: 2, ..NONE };
    holds("pauses", with(&[Stream::new(A, [2, 2])], allowed));
}

#[test]
fn streams_are_refused_and_reset() {
    let allowed = Allowed {
        resets: 2,
        refusals: 1,
        ..NONE
    };
    let stream = Stream::new(A, [2, 1]).hesitating();
    holds("refused, reset", with(&[stream], allowed));
}

#[test]
fn a_slot_is_used_again() {
    let allowed = Allowed {
        resets: 1,
        refusals: 1,
        ..NONE
    };
    let bounds = Bounds {
        at_once: 1,
        ..with(&[Stream::new(A, [1, 0]), Stream::new(A, [1, 0])], allowed)
    };
    holds("a slot is used again", bounds);
}

#[test]
fn ends_restart() {
    let bounds = Bounds {
        from_nothing: true,
        ..with(
            &[Stream::new(A, [1, 0])],
            Allowed {
                restarts: 2,
                ..NONE
            },
        )
    };
    holds("handshake, two restarts", bounds);
}

#[test]
fn a_sealed_channel_does_what_it_likes() {
    let bounds = Bounds {
        sealed: true,
        ..with(&[Stream::new(A, [2, 1])], Allowed { faults: 1, ..NONE })
    };
    holds("sealed, a fault", bounds);
}

#[test]
fn a_sealed_handshake_survives_a_fault() {
    let bounds = Bounds {
        sealed: true,
        from_nothing: true,
        ..with(&[Stream::new(A, [1, 0])], Allowed { faults: 1, ..NONE })
    };
    holds("sealed, handshake, a fault", bounds);
}

/// Where only one end asks for seals, the other one's next session has not heard of it yet: if its own HELLO is lost, it does not say it
/// again, and it is the first end that must.
#[test]
fn a_second_fault_may_swallow_the_hello_behind_the_first() {
    let bounds = Bounds {
        sealed: true,
        ..with(&[Stream::new(A, [1, 0])], Allowed { faults: 2, ..NONE })
    };
    holds("sealed, two faults", bounds);
}

#[test]
#[ignore = "takes a minute; asked for by name"]
fn figures() {
    let two = [Stream::new(A, [2, 1]), Stream::new(B, [2, 1])];
    holds("two streams, opened from both ends", Bounds::of(&two));
    let three = [
        Stream::new(A, [1, 0]),
        Stream::new(A, [1, 0]),
        Stream::new(B, [1, 0]),
    ];
    holds("three streams", Bounds::of(&three));
    let sealed = Bounds {
        sealed: true,
        from_nothing: true,
        ..with(
            &[Stream::new(A, [1, 0])],
            Allowed {
                restarts: 1,
                ..NONE
            },
        )
    };
    holds("sealed, handshake, a restart", sealed);
}
