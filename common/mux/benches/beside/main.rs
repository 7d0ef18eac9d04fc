//! The mux beside the two yamux crates, over the same pipe in memory, in rounds: `cargo bench -p virtproxy-mux --bench beside`.
//!
//! # What is compared
//!
//! | name | what runs |
//! | --- | --- |
//! | `mux` | two [`Session`](virtproxy_mux::Session)s in the plainest loop over the pipe's read and write (`ours.rs`), as virtproxy's agent runs them over a descriptor |
//! | `mux lent` | the same over memory that the pipe lends, as virtproxy's device does with the guest's ring buffers |
//! | `yamux` | the crate `yamux` (libp2p's) |
//! | `tokio-yamux` | the crate `tokio-yamux` (nervos's) |
//! | `pipe` | the pipe alone, without streams: what the copies cost that nobody can do without |
//!
//! All run on one thread, in one single-threaded tokio runtime, over one kind of pipe (`pipe.rs`): 256 KiB each way, which
//! copies what is written into it, and what is read out of it. A user writes bulk in pieces of 64 KiB out of one buffer and
//! reads up to 64 KiB into another; so every byte of payload is copied
//!
//! * by `mux`, four times: the user's buffer, one of 32 KiB that is written to the pipe, the pipe, one of 64 KiB that
//!   is read from it, the user's buffer;
//! * by `mux lent`, twice: the user's buffer, the pipe, the user's buffer. What would have been copied between is what the
//!   design saves;
//! * by `pipe`, twice as well;
//! * by the yamux crates as they please: the user's buffer, a frame of their own, the pipe, a frame of their own, the
//!   user's buffer. A frame of `yamux` has 16 KiB.
//!
//! Between sockets the difference is larger than here: `mux` reads a socket where it copies the user's buffer, while a user
//! of yamux has to read one into its buffer first.
//!
//! The yamux crates have a task for each user of a stream and one for each connection, as they are made to be used. The mux
//! has a task for each end: that is how it is made to be used. A small message is one frame for all of them. What differs in
//! the protocols stays: a stream of virtproxy sends nothing before it is accepted, one of yamux does.
//!
//! Cases run with every crate's defaults, and again with large windows: 16 MiB where it can be set (`yamux` finds its
//! window itself and gets no limit), and frames of 64 KiB.
//!
//! # How to read it
//!
//! Rounds go A B C D A B C D, so that a drift of the machine hits all alike. A ratio is made within each round; its median
//! over the rounds is printed, with the least and the greatest beside it. Rates come last, and are only for this machine.

mod ours;
mod pipe;
mod theirs;
mod tokio_yamux;
mod yamux;

use std::time::Duration;

/// Bytes a user writes, or reads, at a time.
const PIECE: usize = 64 * 1024;
/// Bytes of a small message.
const MESSAGE: usize = 64;
/// What a window is in the rounds with large ones, in bytes.
const LARGE_WINDOW: u32 = 16 * 1024 * 1024;
const ROUNDS: usize = 11;

/// What two ends do; the time of it is taken from the first byte to the last, on a connection that stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    /// So many streams carry so many bytes each, one way.
    Bulk { streams: usize, bytes: usize },
    /// One stream carries so many messages, one way.
    Messages(usize),
    /// So many messages, each answered by another before the next.
    Calls(usize),
    /// So many streams, one after the other: opened, a byte sent, closed both ways.
    Opens(usize),
}

/// How large windows are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Windows {
    Default,
    Large,
}

/// Runs a case once; how long it took, if it can be done.
type Run = fn(Case, Windows) -> Option<Duration>;

const CONTESTANTS: [(&str, Run); 5] = [
    ("mux", ours::copying),
    ("mux lent", ours::lent),
    ("yamux", theirs::run::<yamux::Yamux>),
    ("tokio-yamux", theirs::run::<tokio_yamux::TokioYamux>),
    ("pipe", theirs::bare),
];
/// How many of them are the mux.
const OURS: usize = 2;

const CASES: [(&str, Case); 5] = [
    (
        "bulk, 1 stream",
        Case::Bulk {
            streams: 1,
            bytes: 256 << 20,
        },
    ),
    (
        "bulk, 64 streams",
        Case::Bulk {
            streams: 64,
            bytes: 4 << 20,
        },
    ),
    ("messages of 64 bytes", Case::Messages(400_000)),
    ("calls of 64 bytes", Case::Calls(40_000)),
    ("opens", Case::Opens(12_000)),
];

impl Case {
    /// What was done in `time`, a second, with its unit.
    fn rate(self, time: Duration) -> String {
        let per = |n: usize| n as f64 / time.as_secs_f64();
        match self {
            Case::Bulk { streams, bytes } => format!("{:.0} MB/s", per(streams * bytes) / 1e6),
            Case::Messages(n) | Case::Calls(n) | Case::Opens(n) => {
                format!("{:.0} k/s", per(n) / 1e3)
            }
        }
    }
}

fn main() {
    // `cargo bench WORD` runs the cases whose names contain it; cargo itself adds `--bench`.
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let filter = filter.unwrap_or_default();
    println!("{ROUNDS} rounds; median ratio (least to greatest)\n");
    for windows in [Windows::Default, Windows::Large] {
        for (name, case) in CASES.iter().filter(|(name, _)| name.contains(&filter)) {
            let rounds: Vec<_> = (0..ROUNDS)
                .map(|_| CONTESTANTS.map(|(_, run)| run(*case, windows)))
                .collect();
            print_case(name, *case, windows, &rounds);
        }
    }
}

fn print_case(
    name: &str,
    case: Case,
    windows: Windows,
    rounds: &[[Option<Duration>; CONTESTANTS.len()]],
) {
    println!("{name}, {windows:?} windows");
    let seconds = |at: usize| -> Option<Vec<f64>> {
        let times = rounds.iter().map(|round| Some(round[at]?.as_secs_f64()));
        times.collect()
    };
    let names = CONTESTANTS.map(|(name, _)| name);
    for ours in 0..OURS {
        for other in OURS..CONTESTANTS.len() {
            if let (Some(ours_took), Some(other_took)) = (seconds(ours), seconds(other)) {
                let ratios = other_took.iter().zip(&ours_took).map(|(a, b)| a / b);
                let [least, median, greatest] = spread(ratios.collect());
                let (ours, other) = (names[ours], names[other]);
                println!("  {ours:8} {median:6.2} x {other:12} ({least:.2} to {greatest:.2})");
            }
        }
    }
    let rates = (0..CONTESTANTS.len()).filter_map(|at| {
        let [_, median, _] = spread(seconds(at)?);
        let rate = case.rate(Duration::from_secs_f64(median));
        Some(format!("{} {rate}", names[at]))
    });
    println!("  {}\n", rates.collect::<Vec<_>>().join(" · "));
}

/// The least, the median and the greatest.
fn spread(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [
        values[0],
        values[values.len() / 2],
        values[values.len() - 1],
    ]
}
