//! Two ends of a bad line: what is searched in every test run, and what is not searched to its end yet.

use virtproxy_model::link::{Allowed, Bounds, Link};
use virtproxy_model::world::search;

const NONE: Allowed = Allowed {
    faults: 0,
    late: 0,
    restarts: 0,
    parts: 0,
};

/// Searches; what is found is a failure.
fn holds(what: &str, before: u8, messages: [u8; 2], allowed: Allowed) {
    let bounds = Bounds {
        messages,
        before,
        capacity: 2,
        allowed,
        reader_waits_for_writer: false,
        no_timers: false,
    };
    match search(Link(bounds)) {
        Ok(extent) => println!("{what:40} {extent}"),
        Err(finding) => panic!("{what}: {finding}"),
    }
}

#[test]
fn a_sound_line_that_stalls() {
    holds(
        "link, a late arrival",
        1,
        [3, 2],
        Allowed { late: 1, ..NONE },
    );
}

#[test]
fn two_faults() {
    holds("link, two faults", 1, [2, 1], Allowed { faults: 2, ..NONE });
}

#[test]
fn two_faults_while_the_ends_meet() {
    let allowed = Allowed { faults: 2, ..NONE };
    holds("link, handshake, two faults", 0, [1, 1], allowed);
}

#[test]
fn numbers_start_over() {
    let allowed = Allowed { faults: 1, ..NONE };
    holds("link, numbers start over, a fault", 250, [8, 2], allowed);
}

#[test]
fn a_fault_a_stall_and_a_frame_in_parts() {
    let allowed = Allowed {
        faults: 1,
        late: 1,
        parts: 1,
        ..NONE
    };
    holds("link, a fault, a stall, in parts", 1, [2, 1], allowed);
}

#[test]
#[ignore = "does not come to an end within a minute: see the description of the package"]
fn an_end_restarts() {
    let allowed = Allowed {
        restarts: 1,
        ..NONE
    };
    holds("link, handshake, a restart", 0, [1, 0], allowed);
}
