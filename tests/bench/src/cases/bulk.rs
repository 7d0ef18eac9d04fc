//! Bulk transfers, and what they cost in CPU time.
//!
//! A transfer is as many bytes as take a good half second, which is found out for each way the first time. They are shared
//! by the streams, and the time is from the first request until the last stream is done.

use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use virtproxy_tests::peer::{give, take};

use super::subject::{Subject, answer, request, within};

/// How long a transfer is to take.
const LENGTH: Duration = Duration::from_millis(600);

/// A transfer that is shorter tells nothing of how fast longer ones are.
const TELLING: Duration = Duration::from_millis(200);

/// How long one may take, which is many times what it should: one that stalls fails.
const LIMIT: Duration = Duration::from_secs(8);

/// The first transfer over a way.
const FIRST: u64 = 1 << 20;

/// Which way bytes go.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Direction {
    ToGuest,
    FromGuest,
    /// As many each way on the same stream, at once.
    Both,
}

impl Direction {
    fn transfer(self, stream: &TcpStream, bytes: u64) -> Result<()> {
        let (mut writer, mut reader, mut buf) = (stream, stream, Vec::new());
        match self {
            Direction::ToGuest => {
                request(writer, &format!("TAKE {bytes}"))?;
                give(&mut writer, bytes)?;
                answer(reader)
            }
            Direction::FromGuest => {
                request(writer, &format!("GIVE {bytes}"))?;
                take(&mut reader, bytes, &mut buf)
            }
            Direction::Both => {
                request(writer, &format!("SWAP {bytes}"))?;
                thread::scope(|scope| {
                    let giver = scope.spawn(|| give(&mut &*stream, bytes));
                    take(&mut reader, bytes, &mut buf)?;
                    giver.join().expect("the giver does not panic")
                })?;
                answer(reader)
            }
        }
    }
}

/// MB/s of a transfer over `streams` streams; both directions together when there are two.
pub(super) fn rate(way: &mut Subject, direction: Direction, streams: usize) -> Result<Vec<f64>> {
    let each = size(way, direction, streams)?;
    let time = transfer(way, direction, streams, each)?;
    Ok(vec![
        megabytes(direction, streams, each) / time.as_secs_f64(),
    ])
}

/// MB/s of a transfer over one stream, then the CPU seconds a GB that it took on the host and in the guest.
pub(super) fn rate_and_cpu(way: &mut Subject, direction: Direction) -> Result<Vec<f64>> {
    let bytes = size(way, direction, 1)?;
    let before = way.cpu()?;
    let time = transfer(way, direction, 1, bytes)?;
    let used = way.cpu()?.since(&before);
    let megabytes = megabytes(direction, 1, bytes);
    let mut figures = vec![megabytes / time.as_secs_f64()];
    figures.extend(used.map(|seconds| seconds * 1e3 / megabytes));
    Ok(figures)
}

fn megabytes(direction: Direction, streams: usize, each: u64) -> f64 {
    let directions = if direction == Direction::Both {
        2.0
    } else {
        1.0
    };
    directions * each as f64 * streams as f64 / 1e6
}

/// Moves `each` bytes over each of `streams` streams; how long that took.
fn transfer(
    way: &mut Subject,
    direction: Direction,
    streams: usize,
    each: u64,
) -> Result<Duration> {
    let streams = way.streams(streams)?;
    within(LIMIT, streams, || {
        let start = Instant::now();
        thread::scope(|scope| {
            let transfers: Vec<_> = streams
                .iter()
                .map(|stream| scope.spawn(move || direction.transfer(stream, each)))
                .collect();
            transfers
                .into_iter()
                .try_for_each(|one| one.join().expect("a transfer does not panic"))
        })?;
        Ok(start.elapsed())
    })
}

/// How many bytes to move over each of `streams` streams.
fn size(way: &mut Subject, direction: Direction, streams: usize) -> Result<u64> {
    if let Some(size) = way.sizes.get(&(direction, streams)) {
        return Ok(*size);
    }
    let mut each = FIRST / streams as u64;
    let size = loop {
        let time = transfer(way, direction, streams, each)?;
        if time >= TELLING {
            let bytes = each as f64 * LENGTH.as_secs_f64() / time.as_secs_f64();
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            break bytes as u64;
        }
        each *= 4;
    };
    way.sizes.insert((direction, streams), size);
    Ok(size)
}
