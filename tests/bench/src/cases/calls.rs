//! Small calls, each when the one before was answered: alone, and beside bulk both ways on two other streams.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use virtproxy_tests::measure::Latencies;
use virtproxy_tests::peer::{give, take};

use super::subject::{Subject, answer, request, within};

/// Bytes of a call, and of its answer.
const SIZE: usize = 64;

/// How long calls go on.
const ALONE: Duration = Duration::from_millis(800);

/// The same beside bulk, where ways are that make but a few dozen in that time.
const BESIDE_BULK: Duration = Duration::from_secs(2);

/// How long the bulk goes on before the first call.
const LEAD: Duration = Duration::from_millis(300);

/// How long a measurement may take, which is many times what it should: one that stalls fails.
const LIMIT: Duration = Duration::from_secs(12);

/// Bytes of bulk that the service is told of at once.
const CHUNK: u64 = 512 << 10;

/// Chunks that are asked for before they are needed, so that the bulk never waits for a request.
const AHEAD: u64 = 4;

/// p50, p99 and p99.9 of calls over an idle way.
pub(super) fn idle(way: &mut Subject) -> Result<Vec<f64>> {
    let streams = way.streams(1)?;
    within(LIMIT, streams, || calls(&streams[0], ALONE))
}

/// p50, p99 and p99.9 of calls beside bulk.
pub(super) fn beside_bulk(way: &mut Subject) -> Result<Vec<f64>> {
    let streams = way.streams(3)?;
    let [caller, to_guest, from_guest] = streams else {
        unreachable!("three streams were asked for");
    };
    let bulk = Bulk::default();
    within(LIMIT, streams, || {
        thread::scope(|scope| {
            let sides = [
                scope.spawn(|| bulk.run_to_guest(to_guest)),
                scope.spawn(|| bulk.run_from_guest(from_guest)),
            ];
            thread::sleep(LEAD);
            let before = bulk.moved();
            let figures = calls(caller, BESIDE_BULK);
            let moved = bulk.moved();
            bulk.done.store(true, Ordering::Relaxed);
            for side in sides {
                side.join().expect("bulk does not panic")?;
            }
            ensure!(
                before[0] < moved[0] && before[1] < moved[1],
                "the bulk beside the calls stood still"
            );
            figures
        })
    })
}

/// Calls for `time`; p50, p99 and p99.9 in microseconds.
fn calls(stream: &TcpStream, time: Duration) -> Result<Vec<f64>> {
    request(stream, &format!("BOUNCE {SIZE}"))?;
    let call = |message: [u8; SIZE]| {
        let (mut writer, mut reader) = (stream, stream);
        writer.write_all(&message)?;
        Ok(reader.read_exact(&mut [0; SIZE])?)
    };
    let end = Instant::now() + time;
    let latencies = Latencies::of(|_| Instant::now() >= end, || call([1; SIZE]))?;
    // The last message.
    call([0; SIZE])?;
    let micros = |share| latencies.percentile(share).as_secs_f64() * 1e6;
    Ok([0.5, 0.99, 0.999].map(micros).to_vec())
}

/// Bulk both ways, until it is to be done.
#[derive(Default)]
struct Bulk {
    done: AtomicBool,
    to_guest: AtomicU64,
    from_guest: AtomicU64,
}

impl Bulk {
    /// How many chunks have gone each way.
    fn moved(&self) -> [u64; 2] {
        [&self.to_guest, &self.from_guest].map(|count| count.load(Ordering::Relaxed))
    }

    /// Counts a chunk; whether another one is wanted.
    fn counted(&self, count: &AtomicU64) -> bool {
        count.fetch_add(1, Ordering::Relaxed);
        !self.done.load(Ordering::Relaxed)
    }

    fn run_to_guest(&self, mut stream: &TcpStream) -> Result<()> {
        loop {
            request(stream, &format!("TAKE {CHUNK}"))?;
            give(&mut stream, CHUNK)?;
            if !self.counted(&self.to_guest) {
                break;
            }
        }
        (0..self.to_guest.load(Ordering::Relaxed)).try_for_each(|_| answer(stream))
    }

    fn run_from_guest(&self, stream: &TcpStream) -> Result<()> {
        let ask = || request(stream, &format!("GIVE {CHUNK}"));
        (0..AHEAD).try_for_each(|_| ask())?;
        let mut buf = Vec::new();
        loop {
            take(&mut &*stream, CHUNK, &mut buf)?;
            if !self.counted(&self.from_guest) {
                break;
            }
            ask()?;
        }
        take(&mut &*stream, (AHEAD - 1) * CHUNK, &mut buf)
    }
}
