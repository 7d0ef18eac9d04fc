//! What the device and the mux cost, beside a plain copy of the same bytes: `cargo bench -p virtproxy-host`.
//!
//! # Theory of operation
//!
//! The real device serves the frontend of the tests, which behaves like QEMU with Linux's driver behind it. The guest is
//! a thread (`guest`); it leaves payloads where they lie, and writes and reads only what surrounds them, so what it costs
//! is small beside what is measured. The table shows how small: the share of the time in which it had something to do.
//!
//! | way | the host's end |
//! | --- | --- |
//! | `memcpy` | none: the guest's buffers and the memory below, copied from one to the other in a loop |
//! | `device` | its link alone, into (out of) memory, which is a copy of each byte |
//! | `device and mux` | the link and a session, into memory; a frame's payload is copied once |
//! | `UNIX socket` | none: a socket pair, one thread writes from memory, another one reads |
//! | `device, mux, socket` | the whole driver, which connects to the socket of a thread like those; once more with `--busy-poll` |
//!
//! Memory is 64 MiB walked through from end to end, and all buffers of a ring are used in turn (32 MiB from the guest, 4 MiB
//! to it), for the copy as for the device: neither gains from a cache that the other one lacks. The goals are measured
//! against that copy; one that stays in the cache is shown for comparison.
//!
//! Into memory the guest polls its rings, on one processor, while the device has the other one. Where a socket's far end
//! needs a processor too, the guest waits for interrupts as Linux does.
//!
//! All ways have a round each, in turn, and ratios are taken within a round: a drift of the machine hits all alike.
//! At the end come small calls, from a socket to who answers them and back. Words on the command line choose ways by a part of
//! their name. Nothing is asserted of figures. Without `--bench` (`cargo test --benches`) it runs once, with little.

mod ends;
#[path = "../../tests/frontend/mod.rs"]
mod frontend;
mod guest;
mod plain;
mod ways;

use std::time::Duration;

use tokio::task::LocalSet;

use plain::{Copier, Pair};
use ways::{Memory, Sockets};

const MIB: usize = 1 << 20;
/// Of the way that polls.
const BUSY_POLL: Duration = Duration::from_micros(50);

/// How much is measured.
struct Extent {
    rounds: usize,
    bytes: usize,
    calls: usize,
    rows: Vec<Row>,
}

/// What is measured, in the order of a round.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Row {
    Copy,
    CachedCopy,
    Socket(usize),
    Device,
    Mux,
    Whole,
    Eager,
}

impl Row {
    const ALL: [Row; 8] = [
        Row::Copy,
        Row::CachedCopy,
        Row::Device,
        Row::Mux,
        Row::Socket(64 * 1024),
        Row::Socket(256 * 1024),
        Row::Whole,
        Row::Eager,
    ];

    fn name(self) -> String {
        match self {
            Row::Copy => "memcpy".to_owned(),
            Row::CachedCopy => "memcpy, in the cache".to_owned(),
            Row::Socket(len) => format!("UNIX socket, writes of {} KiB", len / 1024),
            Row::Device => "device".to_owned(),
            Row::Mux => "device and mux".to_owned(),
            Row::Whole => "device, mux, socket".to_owned(),
            Row::Eager => "device, mux, socket, busy poll".to_owned(),
        }
    }
}

/// One direction's figures: of each round, of each row, how long it took and how long the guest worked meanwhile.
type Figures = Vec<Vec<(Duration, Duration)>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    FromGuest,
    ToGuest,
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (flags, chosen): (Vec<_>, Vec<_>) = words.iter().partition(|word| word.starts_with("--"));
    let is_chosen = |row: &Row| {
        chosen.is_empty() || chosen.iter().any(|word| row.name().contains(word.as_str()))
    };
    let rows = Row::ALL.into_iter().filter(is_chosen).collect();
    let extent = match flags.iter().any(|flag| *flag == "--bench") {
        true => Extent {
            rounds: 9,
            bytes: 512 * MIB,
            calls: 5000,
            rows,
        },
        false => Extent {
            rounds: 1,
            bytes: 8 * MIB,
            calls: 50,
            rows,
        },
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, measure(&extent));
}

async fn measure(extent: &Extent) {
    let mut device = Memory::device().await;
    let mut mux = Memory::mux().await;
    let mut whole = Sockets::start(Duration::ZERO).await;
    let mut eager = Sockets::start(BUSY_POLL).await;
    let mut pair = Pair::new();
    let bytes = extent.bytes;
    for way in [Way::FromGuest, Way::ToGuest] {
        let mut copier = Copier::new(device.buffers(way));
        let mut figures = Figures::new();
        // The first round warms up.
        for round in 0..=extent.rounds {
            let mut row_figures = Vec::new();
            for row in &extent.rows {
                row_figures.push(match row {
                    Row::Copy => (copier.copy(bytes), Duration::ZERO),
                    Row::CachedCopy => (copier.copy_cached(bytes), Duration::ZERO),
                    Row::Socket(len) => (pair.carry(bytes, *len).await, Duration::ZERO),
                    Row::Device => device.carry(way, bytes).await,
                    Row::Mux => mux.carry(way, bytes).await,
                    Row::Whole => whole.carry(way, bytes).await,
                    Row::Eager => eager.carry(way, bytes).await,
                });
            }
            if round > 0 {
                figures.push(row_figures);
            }
        }
        print(way, extent, &figures);
    }
    let mut calls = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..extent.rounds {
        calls[0].push(middle(pair.call(extent.calls).await));
        calls[1].push(middle(whole.call(extent.calls).await));
        calls[2].push(middle(eager.call(extent.calls).await));
    }
    let [pair, whole, eager] = calls.map(spread);
    println!(
        "\n| 64-byte call | median, us |\n| --- | --- |\n| UNIX socket | {pair} |\n\
         | device, mux, socket | {whole} |\n| device, mux, socket, busy poll | {eager} |"
    );
}

/// The median of some calls, in microseconds.
fn middle(mut calls: Vec<Duration>) -> f64 {
    calls.sort();
    calls[calls.len() / 2].as_secs_f64() * 1e6
}

fn print(way: Way, extent: &Extent, figures: &Figures) {
    let Extent { bytes, rows, .. } = extent;
    let seconds = |round: usize, row: usize| figures[round][row].0.as_secs_f64();
    let fastest = |round: usize, of: &dyn Fn(Row) -> bool| {
        let like = (0..rows.len()).filter(|row| of(rows[*row]));
        like.map(|row| seconds(round, row)).fold(f64::MAX, f64::min)
    };
    let each = |figure: &dyn Fn(usize) -> f64| spread((0..figures.len()).map(figure).collect());
    println!(
        "\n{way:?}, {} MiB a round, {} rounds: median (least to most)\n\n\
         | way | GB/s | x memcpy | x UNIX socket (the faster) | guest at work, % |\n\
         | --- | --- | --- | --- | --- |",
        bytes / MIB,
        figures.len()
    );
    for (at, row) in rows.iter().enumerate() {
        let rate = each(&|round| *bytes as f64 / 1e9 / seconds(round, at));
        let times = |of: &dyn Fn(Row) -> bool| match rows.iter().any(|row| of(*row)) {
            true => each(&|round| fastest(round, of) / seconds(round, at)),
            false => "-".to_owned(),
        };
        let copy = times(&|row| row == Row::Copy);
        let socket = times(&|row| matches!(row, Row::Socket(_)));
        let guest = match row {
            Row::Device | Row::Mux | Row::Whole | Row::Eager => each(&|round| {
                let (all, guest) = figures[round][at];
                100.0 * guest.as_secs_f64() / all.as_secs_f64()
            }),
            _ => "-".to_owned(),
        };
        println!("| {} | {rate} | {copy} | {socket} | {guest} |", row.name());
    }
}

/// Middle, smallest and largest.
fn spread(mut figures: Vec<f64>) -> String {
    figures.sort_by(f64::total_cmp);
    let (first, last) = (figures[0], figures[figures.len() - 1]);
    let middle = figures[figures.len() / 2];
    let digits = if last < 10.0 { 2 } else { 0 };
    format!("{middle:.digits$} ({first:.digits$} to {last:.digits$})")
}
