//! Made-up results for the tests, with all that can be missing: ways that cannot, rounds that failed, figures of no use.

use crate::results::{CaseInfo, Cell, Kind, Outcome, Results, WayInfo};

/// A run of nothing.
pub(crate) fn empty() -> Results {
    Results {
        begun: "2026-01-31T12:00Z".to_owned(),
        version: "1234567".to_owned(),
        machine: vec!["A <processor> & 2 cores".to_owned()],
        quick: false,
        ways: Vec::new(),
        cases: Vec::new(),
        cells: Vec::new(),
    }
}

/// The ways: key, title, kind, and how fast each is beside the first.
const WAYS: &[(&str, &str, Kind, f64)] = &[
    ("virtproxy", "virtproxy (vhost-user)", Kind::Ours, 1.0),
    (
        "virtproxy-chardev",
        "virtproxy (virtserialport, chardev socket)",
        Kind::Ours,
        0.46,
    ),
    ("relay", "bare relay (vhost-user)", Kind::Floor, 1.15),
    (
        "relay-chardev",
        "bare relay (virtserialport, chardev socket)",
        Kind::Floor,
        0.5,
    ),
    ("passt", "passt 2025_05_03 (vhost-user)", Kind::Peer, 0.62),
    (
        "slirp",
        "slirp 4.8.0 (QEMU's user network)",
        Kind::Peer,
        0.17,
    ),
    (
        "vsock",
        "vhost-device-vsock 0.2.0 & socat <1.8>",
        Kind::Peer,
        0.12,
    ),
    ("ssh", "OpenSSH 10.0 -L, over virtproxy", Kind::Peer, 0.1),
    (
        "yamux",
        "yamux 0.13 (virtserialport, chardev socket)",
        Kind::Peer,
        0.3,
    ),
];

/// The cases: key, title, unit, whether more is better, and what the first way has in it.
const CASES: &[(&str, &str, &str, bool, f64)] = &[
    (
        "to-guest-1",
        "bulk to the guest, 1 stream",
        "MB/s",
        true,
        910.0,
    ),
    (
        "to-guest-8",
        "bulk to the guest, 8 streams",
        "MB/s",
        true,
        840.0,
    ),
    (
        "to-guest-64",
        "bulk to the guest, 64 streams",
        "MB/s",
        true,
        700.0,
    ),
    (
        "from-guest-1",
        "bulk from the guest, 1 stream",
        "MB/s",
        true,
        1220.0,
    ),
    (
        "from-guest-8",
        "bulk from the guest, 8 streams",
        "MB/s",
        true,
        1190.0,
    ),
    (
        "from-guest-64",
        "bulk from the guest, 64 streams",
        "MB/s",
        true,
        980.0,
    ),
    (
        "both-ways-1",
        "bulk both ways at once, 1 stream",
        "MB/s",
        true,
        1050.0,
    ),
    (
        "both-ways-8",
        "bulk both ways at once, 8 streams",
        "MB/s",
        true,
        990.0,
    ),
    (
        "both-ways-64",
        "bulk both ways at once, 64 streams",
        "MB/s",
        true,
        820.0,
    ),
    (
        "call-p50-idle",
        "small request, p50, idle",
        "us",
        false,
        240.0,
    ),
    (
        "call-p99-idle",
        "small request, p99, idle",
        "us",
        false,
        420.0,
    ),
    (
        "call-p999-idle",
        "small request, p99.9, idle",
        "us",
        false,
        900.0,
    ),
    (
        "call-p50-bulk",
        "small request, p50, under bulk",
        "us",
        false,
        700.0,
    ),
    (
        "call-p99-bulk",
        "small request, p99, under bulk",
        "us",
        false,
        1700.0,
    ),
    (
        "call-p999-bulk",
        "small request, p99.9, under bulk",
        "us",
        false,
        4100.0,
    ),
    (
        "connections",
        "new connections, one after the other",
        "1/s",
        true,
        1480.0,
    ),
    (
        "connections-8",
        "new connections, 8 clients",
        "1/s",
        true,
        2610.0,
    ),
    (
        "host-cpu-to",
        "host CPU, bulk to the guest",
        "s/GB",
        false,
        0.52,
    ),
    (
        "host-cpu-from",
        "host CPU, bulk from the guest",
        "s/GB",
        false,
        0.44,
    ),
    (
        "guest-cpu-to",
        "guest CPU, bulk to the guest",
        "s/GB",
        false,
        1.02,
    ),
    (
        "guest-cpu-from",
        "guest CPU, bulk from the guest",
        "s/GB",
        false,
        0.71,
    ),
    (
        "memory-host-0",
        "host memory, no streams",
        "KiB",
        false,
        5400.0,
    ),
    (
        "memory-host-100",
        "host memory, 100 idle streams",
        "KiB",
        false,
        5480.0,
    ),
    (
        "memory-host-10000",
        "host memory, 10,000 idle streams",
        "KiB",
        false,
        13_900.0,
    ),
    (
        "memory-guest-0",
        "guest memory, no streams",
        "KiB",
        false,
        2100.0,
    ),
    (
        "memory-guest-100",
        "guest memory, 100 idle streams",
        "KiB",
        false,
        2190.0,
    ),
    (
        "memory-guest-10000",
        "guest memory, 10,000 idle streams",
        "KiB",
        false,
        9900.0,
    ),
];

/// A full run.
pub(crate) fn results() -> Results {
    let mut results = empty();
    results.ways = (WAYS.iter())
        .map(|(key, title, kind, _)| WayInfo {
            key: (*key).to_owned(),
            title: (*title).to_owned(),
            kind: *kind,
        })
        .collect();
    results.cases = (CASES.iter())
        .map(|(key, title, unit, more_is_better, _)| CaseInfo {
            key: (*key).to_owned(),
            title: (*title).to_owned(),
            unit: (*unit).to_owned(),
            more_is_better: *more_is_better,
        })
        .collect();
    for (way, _, kind, speed) in WAYS {
        for (case, _, _, more_is_better, figure) in CASES {
            let outcome = match (*kind, *way, *case) {
                (Kind::Floor, _, case)
                    if case.ends_with("-8") || case.ends_with("-64") || case.contains("-bulk") =>
                {
                    Outcome::Cannot("it has one connection at a time".to_owned())
                }
                (Kind::Floor, _, case) if case.ends_with("-100") || case.ends_with("-10000") => {
                    Outcome::Cannot("it has one connection at a time".to_owned())
                }
                (_, "vsock", case) if case.contains("-cpu-") => {
                    Outcome::Cannot("it stalls | beyond 1 MiB\nat times".to_owned())
                }
                (_, "vsock", "memory-guest-10000" | "memory-host-10000") => {
                    Outcome::Cannot("10,000 processes <socat> do not fit into the guest".to_owned())
                }
                (_, "slirp", case) if case.starts_with("memory-guest") => figures(&[0.0; 7]),
                _ => {
                    let middle = if *more_is_better {
                        figure * speed
                    } else {
                        figure / speed
                    };
                    // The rounds are a little off, for each way at another time.
                    let mut sway = [0.0, 0.04, -0.03, 0.01, -0.05, 0.02, 0.06];
                    sway.rotate_left(way.len() % 7);
                    let wide = if *way == "slirp" { 3.0 } else { 1.0 };
                    figures(&sway.map(|off| middle * (1.0 + off * wide)))
                }
            };
            results.cells.push(Cell {
                way: (*way).to_owned(),
                case: (*case).to_owned(),
                outcome,
            });
        }
    }
    set(
        &mut results,
        "vsock",
        "to-guest-1",
        &[
            None,
            Some(108.0),
            None,
            Some(109.0),
            Some(100.0),
            Some(f64::NAN),
            None,
        ],
    );
    set(&mut results, "vsock", "from-guest-1", &[None, None]);
    set(&mut results, "ssh", "both-ways-64", &[Some(f64::INFINITY)]);
    results
}

/// Gives a way other figures in a case.
pub(crate) fn set(results: &mut Results, way: &str, case: &str, rounds: &[Option<f64>]) {
    results
        .cells
        .retain(|cell| cell.way != way || cell.case != case);
    let failures = rounds
        .iter()
        .filter(|round| round.is_none())
        .map(|_| "it stalled".to_owned())
        .collect();
    let outcome = Outcome::Figures {
        figures: rounds.to_vec(),
        failures,
    };
    results.cells.push(Cell {
        way: way.to_owned(),
        case: case.to_owned(),
        outcome,
    });
}

fn figures(rounds: &[f64]) -> Outcome {
    Outcome::Figures {
        figures: rounds.iter().copied().map(Some).collect(),
        failures: Vec::new(),
    }
}
