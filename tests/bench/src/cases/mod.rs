//! What is measured of a way, and how.
//!
//! The same client does it to all ways: blocking sockets of the standard library with large buffers, so that the client
//! takes little of the machine and of no way more than of another. What is asked of the service at the other end is in
//! `virtproxy_tests::peer`.
//!
//! A measurement gives the figures of one or more cases: what belongs together is measured together.

mod bulk;
mod calls;
mod connections;
mod memory;
mod subject;

use anyhow::Result;

use crate::results::CaseInfo;
use bulk::Direction::{Both, FromGuest, ToGuest};
pub(crate) use subject::Subject;

const RATE: &str = "MB/s";
const LATENCY: &str = "us";
const EACH_SECOND: &str = "1/s";
const CPU: &str = "s/GB";
const MEMORY: &str = "KiB";

/// All cases, in the order of the report: key, title, unit.
const CASES: &[(&str, &str, &str)] = &[
    ("to-guest-1", "bulk to the guest, 1 stream", RATE),
    ("to-guest-8", "bulk to the guest, 8 streams", RATE),
    ("to-guest-64", "bulk to the guest, 64 streams", RATE),
    ("from-guest-1", "bulk from the guest, 1 stream", RATE),
    ("from-guest-8", "bulk from the guest, 8 streams", RATE),
    ("from-guest-64", "bulk from the guest, 64 streams", RATE),
    ("both-ways-1", "bulk both ways at once, 1 stream", RATE),
    ("both-ways-8", "bulk both ways at once, 8 streams", RATE),
    ("both-ways-64", "bulk both ways at once, 64 streams", RATE),
    ("call-p50-idle", "64-byte call, p50", LATENCY),
    ("call-p99-idle", "64-byte call, p99", LATENCY),
    ("call-p999-idle", "64-byte call, p99.9", LATENCY),
    ("call-p50-bulk", "64-byte call beside bulk, p50", LATENCY),
    ("call-p99-bulk", "64-byte call beside bulk, p99", LATENCY),
    ("call-p999-bulk", "64-byte call beside bulk, p99.9", LATENCY),
    (
        "connections",
        "new connections, one after the other",
        EACH_SECOND,
    ),
    (
        "connections-8",
        "new connections, 8 clients at once",
        EACH_SECOND,
    ),
    ("host-cpu-to", "host CPU, bulk to the guest", CPU),
    ("host-cpu-from", "host CPU, bulk from the guest", CPU),
    ("guest-cpu-to", "guest CPU, bulk to the guest", CPU),
    ("guest-cpu-from", "guest CPU, bulk from the guest", CPU),
    ("memory-host-0", "host memory, no connection", MEMORY),
    ("memory-host-100", "host memory, 100 idle", MEMORY),
    ("memory-host-10000", "host memory, 10,000 idle", MEMORY),
    ("memory-guest-0", "guest memory, no connection", MEMORY),
    ("memory-guest-100", "guest memory, 100 idle", MEMORY),
    ("memory-guest-10000", "guest memory, 10,000 idle", MEMORY),
];

/// The keys of all cases.
pub(crate) fn keys() -> impl Iterator<Item = &'static str> {
    CASES.iter().map(|(key, _, _)| *key)
}

/// All cases, in the order of the report.
pub(crate) fn all() -> Vec<CaseInfo> {
    CASES
        .iter()
        .map(|(key, title, unit)| CaseInfo {
            key: (*key).to_owned(),
            title: (*title).to_owned(),
            unit: (*unit).to_owned(),
            more_is_better: [RATE, EACH_SECOND].contains(unit),
        })
        .collect()
}

/// What is measured in one go.
pub(crate) struct Measurement {
    /// The cases it gives figures of, in the order that it gives them in.
    pub(crate) cases: &'static [&'static str],
    /// How many connections the way must be able to have at once.
    pub(crate) connections: usize,
    /// What it is measured of.
    pub(crate) state: State,
    /// What it roughly takes, in seconds, to tell how long the whole run will.
    pub(crate) seconds: u32,
    /// Measures it once.
    pub(crate) measure: fn(&mut Subject) -> Result<Vec<f64>>,
}

/// In which state of its programs a way is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// As the measurement before has left them: rounds over all ways.
    Used,
    /// Just started, so that no memory is counted or reused that an earlier measurement took: once, one way at a time.
    Fresh,
}

/// A [`Measurement`] of a bulk transfer.
const fn bulk(
    cases: &'static [&'static str],
    connections: usize,
    measure: fn(&mut Subject) -> Result<Vec<f64>>,
) -> Measurement {
    Measurement {
        cases,
        connections,
        state: State::Used,
        seconds: 1,
        measure,
    }
}

/// A [`Measurement`] of the memory that idle connections take.
const fn memory(
    cases: &'static [&'static str],
    connections: usize,
    seconds: u32,
    measure: fn(&mut Subject) -> Result<Vec<f64>>,
) -> Measurement {
    Measurement {
        cases,
        connections,
        state: State::Fresh,
        seconds,
        measure,
    }
}

/// All measurements, in the order they are made in.
pub(crate) const MEASUREMENTS: &[Measurement] = &[
    bulk(&["to-guest-1", "host-cpu-to", "guest-cpu-to"], 1, |way| {
        bulk::rate_and_cpu(way, ToGuest)
    }),
    bulk(
        &["from-guest-1", "host-cpu-from", "guest-cpu-from"],
        1,
        |way| bulk::rate_and_cpu(way, FromGuest),
    ),
    bulk(&["both-ways-1"], 1, |way| bulk::rate(way, Both, 1)),
    Measurement {
        cases: &["call-p50-idle", "call-p99-idle", "call-p999-idle"],
        connections: 1,
        state: State::Used,
        seconds: 1,
        measure: calls::idle,
    },
    bulk(&["to-guest-8"], 8, |way| bulk::rate(way, ToGuest, 8)),
    bulk(&["from-guest-8"], 8, |way| bulk::rate(way, FromGuest, 8)),
    bulk(&["both-ways-8"], 8, |way| bulk::rate(way, Both, 8)),
    bulk(&["to-guest-64"], 64, |way| bulk::rate(way, ToGuest, 64)),
    bulk(&["from-guest-64"], 64, |way| bulk::rate(way, FromGuest, 64)),
    bulk(&["both-ways-64"], 64, |way| bulk::rate(way, Both, 64)),
    Measurement {
        cases: &["call-p50-bulk", "call-p99-bulk", "call-p999-bulk"],
        connections: 3,
        state: State::Used,
        seconds: 3,
        measure: calls::beside_bulk,
    },
    Measurement {
        cases: &["connections"],
        // One that is being closed may still be there when the next is made.
        connections: 2,
        state: State::Used,
        seconds: 1,
        measure: |way| connections::rate(way, 1),
    },
    Measurement {
        cases: &["connections-8"],
        connections: 16,
        state: State::Used,
        seconds: 1,
        measure: |way| connections::rate(way, 8),
    },
    memory(&["memory-host-0", "memory-guest-0"], 0, 1, |way| {
        memory::held(way, 0)
    }),
    memory(&["memory-host-100", "memory-guest-100"], 100, 2, |way| {
        memory::held(way, 100)
    }),
    memory(
        &["memory-host-10000", "memory-guest-10000"],
        10_000,
        20,
        |way| memory::held(way, 10_000),
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_measured_once() {
        let mut measured: Vec<_> = MEASUREMENTS.iter().flat_map(|one| one.cases).collect();
        let mut cases: Vec<_> = CASES.iter().map(|(key, _, _)| key).collect();
        measured.sort();
        cases.sort();
        assert_eq!(measured, cases);
    }
}
