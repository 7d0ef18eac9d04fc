//! Drivers that break their contract: a search that does not find their deadlock would show nothing.

use virtproxy_model::link::{self, Link};
use virtproxy_model::mux::{Bounds, Flaw, Mux, Reads, Stream};
use virtproxy_model::world::{Extent, Finding, PROGRESS, search};
use virtproxy_mux::sim::Side::A;

/// The search must come to a deadlock, and show the way.
fn deadlocks(what: &str, found: Result<Extent, Finding>) {
    match found {
        Err(Finding::Broken(PROGRESS, way)) => println!("{what}, as it must:\n{way}"),
        found => panic!("{what}: {found:?}"),
    }
}

fn flawed(flaw: Flaw) -> Mux {
    let stream = Stream::new(A, [3, 3]).read(Reads::AnyTime);
    Mux(Bounds {
        flaw: Some(flaw),
        ..Bounds::of(&[stream])
    })
}

#[test]
fn without_credit_a_stream_stops() {
    deadlocks("no credit: a deadlock", search(flawed(Flaw::NoCredit)));
}

#[test]
fn a_reader_that_waits_for_its_writer_stops_all() {
    let flawed = flawed(Flaw::ReaderWaitsForWriter);
    deadlocks("no reading while writing: a deadlock", search(flawed));
}

#[test]
fn lost_credit_is_missed() {
    let found = search(flawed(Flaw::CreditLost));
    assert!(matches!(found, Err(Finding::Broken(..))), "{found:?}");
}

#[test]
fn without_timers_a_lost_frame_stops_the_link() {
    let bounds = link::Bounds {
        messages: [2, 1],
        before: 1,
        capacity: 2,
        allowed: link::Allowed {
            faults: 1,
            ..link::Allowed::default()
        },
        reader_waits_for_writer: false,
        no_timers: true,
    };
    deadlocks("no timers: a deadlock", search(Link(bounds)));
}
