//! What each channel must stand.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use virtproxy_tests::peer::{self, Caller};
use virtproxy_tests::scene::{SOON, wait_for, wait_works};
use virtproxy_tests::tap::Fault;

use crate::bench::{Bench, End};
use crate::rows::{Row, Tap};

/// One column of the table.
pub(crate) struct Cell {
    /// As the table has it.
    pub(crate) name: &'static str,
    run: fn(&Bench, &mut Row) -> Result<Duration>,
    /// Why a channel cannot have it.
    cannot_be: fn(&Row) -> Option<&'static str>,
}

const fn cell(name: &'static str, run: fn(&Bench, &mut Row) -> Result<Duration>) -> Cell {
    Cell {
        name,
        run,
        cannot_be: |_| None,
    }
}

/// All of them.
pub(crate) const CELLS: [Cell; 7] = [
    cell("bulk both ways", bulk),
    cell("64 streams", crowd),
    cell("half-close", half_close),
    Cell {
        cannot_be: |row| {
            matches!(row.near, End::Device)
                .then_some("the daemon is the device, and QEMU connects to a device once only")
        },
        ..cell("near end killed", near_killed)
    },
    cell("far end killed", far_killed),
    cell("garbage before", garbage_before),
    Cell {
        cannot_be: |row| {
            matches!(row.tap, Tap::PortOnly)
                .then_some("nobody else can write: the agent has the port alone, and there is no socket in between")
        },
        ..cell("garbage inside", garbage_inside)
    },
];

/// What a cell of the table says.
pub(crate) enum Verdict {
    /// It passed; the time is that of what the cell is about.
    Passed(Duration),
    /// There is no such thing on this channel.
    CannotBe(&'static str),
    /// It failed.
    Failed(anyhow::Error),
}

/// Runs every cell of a row. After a failure both ends start anew; when they cannot, the rest of the row has failed.
pub(crate) fn run_all(bench: &Bench, row: &mut Row) -> Vec<Verdict> {
    let mut works = row.start(bench);
    let mut verdicts = Vec::new();
    for cell in &CELLS {
        let verdict = match ((cell.cannot_be)(row), &works) {
            (Some(reason), _) => Verdict::CannotBe(reason),
            (None, Err(error)) => Verdict::Failed(anyhow!("{error:#}")),
            (None, Ok(())) => match (cell.run)(bench, row) {
                Ok(time) => Verdict::Passed(time),
                Err(error) => {
                    let error = error.context(row.logs(bench));
                    works = row.stop(bench).and_then(|()| row.start(bench));
                    Verdict::Failed(error)
                }
            },
        };
        verdicts.push(verdict);
    }
    verdicts
}

fn seed() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(5000);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Whole transfers, each way and both ways at once.
fn transfers(row: &Row, len: u64) -> Result<()> {
    peer::upload(&row.address, len, seed()).context("there")?;
    peer::download(&row.address, len, seed()).context("back")?;
    peer::echo(&row.address, len, seed()).context("both ways at once")
}

fn bulk(_: &Bench, row: &mut Row) -> Result<Duration> {
    let begun = Instant::now();
    transfers(row, row.bulk)?;
    Ok(begun.elapsed())
}

fn crowd(_: &Bench, row: &mut Row) -> Result<Duration> {
    let begun = Instant::now();
    let (address, len) = (&row.address, row.bulk / 128);
    std::thread::scope(|threads| {
        let streams = [(); 64].map(|()| threads.spawn(move || peer::echo(address, len, seed())));
        streams
            .into_iter()
            .try_for_each(|stream| stream.join().expect("no panic"))
    })?;
    Ok(begun.elapsed())
}

fn half_close(bench: &Bench, row: &mut Row) -> Result<Duration> {
    let begun = Instant::now();
    peer::half_close(&row.address, 5000)?;
    let word = seed().to_string();
    peer::last_word(&row.address, &word, 5000)?;
    let told = format!("grep -q 'LAST {word} 5000' /tmp/peer.log");
    wait_for(SOON, || bench.guest.check(&told).is_ok())
        .context("what came after the other side had closed was lost")?;
    Ok(begun.elapsed())
}

/// Streams with a known pattern, one each way, to be cut off at any byte.
struct Traffic {
    done: Arc<AtomicBool>,
    streams: [JoinHandle<Result<u64>>; 2],
}

impl Traffic {
    fn start(row: &Row) -> Result<Self> {
        let done = Arc::new(AtomicBool::new(false));
        let streams = [peer::watch, peer::feed].map(|stream| {
            let (address, done) = (row.address.clone(), done.clone());
            std::thread::spawn(move || stream(&address, seed(), &done))
        });
        // It is under way when another connection has been served beside it.
        wait_works(&row.address)?;
        Ok(Traffic { done, streams })
    }

    /// It ends by itself.
    fn must_be_cut_off(self) -> Result<()> {
        wait_for(SOON, || self.streams.iter().all(JoinHandle::is_finished))
            .context("an old stream goes on")?;
        self.must_be_right()
    }

    /// What came was sent.
    fn must_be_right(self) -> Result<()> {
        self.done.store(true, Ordering::Relaxed);
        for stream in self.streams {
            stream.join().expect("no panic")?;
        }
        Ok(())
    }
}

/// How long the channel takes to work again, and that it then carries whole transfers.
fn works_again(row: &Row, since: Instant) -> Result<Duration> {
    wait_works(&row.address)?;
    let time = since.elapsed();
    transfers(row, row.bulk / 16)?;
    Ok(time)
}

fn near_killed(bench: &Bench, row: &mut Row) -> Result<Duration> {
    let (traffic, old) = (Traffic::start(row)?, Caller::new(&row.address)?);
    row.near.kill(bench)?;
    old.wait_end(SOON)?;
    let killed = Instant::now();
    row.near.start(bench)?;
    let time = works_again(row, killed)?;
    traffic.must_be_cut_off()?;
    Ok(time)
}

fn far_killed(bench: &Bench, row: &mut Row) -> Result<Duration> {
    let (traffic, old) = (Traffic::start(row)?, Caller::new(&row.address)?);
    row.far.kill(bench)?;
    let killed = Instant::now();
    row.far.start(bench)?;
    let time = works_again(row, killed)?;
    old.wait_end(SOON)?;
    traffic.must_be_cut_off()?;
    Ok(time)
}

fn garbage_before(bench: &Bench, row: &mut Row) -> Result<Duration> {
    row.stop(bench)?;
    row.tap.strike(bench, Fault::First)?;
    let begun = Instant::now();
    row.start(bench)?;
    let time = works_again(row, begun)?;
    row.tap.has_struck(bench, Fault::First)?;
    Ok(time)
}

/// Each fault strikes traffic. A channel that repairs keeps its session; any other has a new one at once.
fn garbage_inside(bench: &Bench, row: &mut Row) -> Result<Duration> {
    let mut longest = Duration::ZERO;
    for fault in Fault::INSIDE {
        let traffic = Traffic::start(row)?;
        let sessions = row.sessions(bench);
        let begun = Instant::now();
        row.tap.strike(bench, fault)?;
        row.tap.has_struck(bench, fault)?;
        if !row.repairs {
            wait_for(SOON, || row.sessions(bench) > sessions)
                .with_context(|| format!("nobody noticed {fault:?}"))?;
        }
        let time = works_again(row, begun).with_context(|| format!("after {fault:?}"))?;
        longest = longest.max(time);
        traffic
            .must_be_right()
            .with_context(|| format!("{fault:?}"))?;
        if row.repairs {
            ensure!(row.sessions(bench) == sessions, "{fault:?} cost a session");
        }
    }
    Ok(longest)
}

impl Tap {
    /// Asks for a fault.
    fn strike(&self, bench: &Bench, fault: Fault) -> Result<()> {
        match self {
            Tap::InHost(faults) => {
                File::create(faults.file(fault))?;
            }
            Tap::InGuest(faults) => {
                let file = faults.file(fault);
                bench.guest.check(&format!("touch {}", file.display()))?;
            }
            Tap::PortOnly => {
                bench.guest.check(
                    "for p in /sys/class/virtio-ports/*; do\n\
                     [ $(cat $p/name) != org.virtproxy.0 ] || head -c 5000 /dev/urandom >/dev/${p##*/}\n\
                     done",
                )?;
            }
        }
        Ok(())
    }

    /// Waits until it has happened.
    fn has_struck(&self, bench: &Bench, fault: Fault) -> Result<()> {
        wait_for(SOON, || match self {
            Tap::InHost(faults) => !faults.file(fault).exists(),
            Tap::InGuest(faults) => {
                let file = faults.file(fault);
                let gone = bench.guest.check(&format!("[ ! -e {} ]", file.display()));
                gone.is_ok()
            }
            Tap::PortOnly => true,
        })
        .with_context(|| format!("{fault:?} did not strike"))
    }
}
