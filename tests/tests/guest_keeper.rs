//! The daemon's worker is killed, or replaced, at random moments under bulk both ways.
//!
//! What must hold each time: QEMU lives, the guest goes on, a new connection works soon, and every transfer that ended as if
//! it were whole was whole. `VIRTPROXY_ROUNDS` says how many times (10).

use std::env;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use virtproxy_tests::measure::Latencies;
use virtproxy_tests::peer::Caller;
use virtproxy_tests::scene::{SOON, Scene};
use virtproxy_tests::traffic::{Random, Traffic, signal};

/// Bytes of each transfer: short enough for many to be whole between two ends.
const BYTES: u64 = 2 << 20;

/// Moments between two ends, in milliseconds.
const LEAST: u64 = 100;
const RANGE: u64 = 900;

/// Ticks in the guest, one process on each processor.
const TICKS: &str =
    "for cpu in 0 1; do setsid taskset $((cpu+1)) peer ticks >/tmp/ticks.$cpu 2>&1 & done";
const NO_TICKS: &str =
    "for p in $(pidof peer); do if grep -q ticks /proc/$p/cmdline; then kill $p; fi; done";
const LONGEST: &str = "tail -qn 1 /tmp/ticks.*";

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_guest_outlives_workers_that_are_killed_or_replaced() -> Result<()> {
    let scene = Scene::start()?;
    let rounds = env::var("VIRTPROXY_ROUNDS").ok();
    let rounds = rounds.map_or(Ok(10), |rounds| rounds.parse())?;
    end_workers(&scene, "SIGKILL", rounds, || {
        signal(scene.worker()?, libc::SIGKILL);
        Ok(())
    })?;
    end_workers(&scene, "SIGHUP", rounds, || {
        signal(scene.daemon.pid(), libc::SIGHUP);
        Ok(())
    })
}

fn end_workers(
    scene: &Scene,
    how: &str,
    rounds: usize,
    end: impl Fn() -> Result<()>,
) -> Result<()> {
    let traffic = Traffic::default();
    let mut random = Random::from_environment("VIRTPROXY_SEED")?;
    scene.guest.check(TICKS)?;
    let recovery = thread::scope(|threads| {
        let transfers = traffic.start(threads, &scene.peer, BYTES);
        let recovery = Latencies::timed(rounds, || {
            thread::sleep(Duration::from_millis(LEAST + random.below(RANGE)));
            let old = scene.worker()?;
            let begun = Instant::now();
            end()?;
            let call = || {
                ensure!(scene.worker()? != old, "the worker is still there");
                Caller::within(&scene.peer, SOON)?.call(b"again")
            };
            while let Err(error) = call() {
                let patient = begun.elapsed() < SOON;
                ensure!(patient, "nothing works after {how}: {error:#}");
                thread::sleep(Duration::from_millis(2));
            }
            Ok(begun.elapsed())
        });
        traffic.end();
        for transfer in transfers {
            transfer.join().expect("no panic")?;
        }
        recovery
    })?;
    ensure!(scene.guest.is_running(), "QEMU is gone");
    let gaps = scene.guest.check(LONGEST)?;
    let gap = gaps.lines().flat_map(str::parse::<u64>).max();
    let gap = Duration::from_micros(gap.context("the guest did not tick")?);
    let (whole, cut, silent) = (traffic.whole(), traffic.cut(), traffic.silent());
    println!(
        "{how}, {rounds} times: a new connection works after p50 {:.0?}, p99 {:.0?}, max {:.0?}; the guest's longest gap \
         {gap:.0?}; {whole} transfers whole, all hashes equal, {cut} cut off, and {silent} as if they were over",
        recovery.percentile(0.5),
        recovery.percentile(0.99),
        recovery.percentile(1.0),
    );
    ensure!(whole > 0, "no transfer was whole");
    ensure!(gap < SOON, "the guest stood still for {gap:?}");
    scene.guest.check(NO_TICKS)?;
    Ok(())
}
