//! Agent, QEMU, worker and keeper are killed in random order, with traffic both ways.
//!
//! What must hold each time: once what the user must start again is started again (a keeper with its QEMU, a QEMU; the agent
//! is started by the guest), a new connection works; every transfer was whole, or its client saw that it was cut off; and
//! at the end all that is there works. `VIRTPROXY_CHAOS` says for how many seconds (25), `VIRTPROXY_SEED` which choices.

use std::env;
use std::fmt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use virtproxy_tests::measure::Latencies;
use virtproxy_tests::peer::{self, Caller};
use virtproxy_tests::scene::{AGENT_FLAGS, HOST_PEER_IN_GUEST, SOON, Scene, wait_for};
use virtproxy_tests::traffic::{Random, Traffic, signal};

/// Bytes of each transfer: short enough for many to be whole between two kills.
const BYTES: u64 = 1 << 20;

/// The most milliseconds between a recovery and the next kill.
const CALM: u64 = 1500;

/// How long whatever should work may take to: what is longer hangs.
const LIVES: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Victim {
    Agent,
    Worker,
    Qemu,
    Keeper,
}

const VICTIMS: [Victim; 4] = [Victim::Agent, Victim::Worker, Victim::Qemu, Victim::Keeper];

/// How many of each are killed before the next order is chosen. After the last two a guest boots, which takes its time.
const TIMES: [usize; 4] = [4, 4, 1, 1];

#[test]
#[ignore = "boots guests: cargo xtask test"]
fn nothing_is_wedged_or_wrong_whoever_is_killed() -> Result<()> {
    let seconds = env::var("VIRTPROXY_CHAOS").map_or(Ok(25), |seconds| seconds.parse())?;
    let mut random = Random::from_environment("VIRTPROXY_SEED")?;
    let mut scene = Scene::start()?;
    prepare(&scene)?;
    let (traffic, address) = (Traffic::default(), scene.peer.clone());
    let mut guest = GuestTraffic::default();
    let mut recoveries = Vec::new();
    thread::scope(|threads| -> Result<()> {
        let transfers = traffic.start(threads, &address, BYTES);
        let survived = survive(
            &mut scene,
            Duration::from_secs(seconds),
            &mut random,
            &mut guest,
            &mut recoveries,
        );
        traffic.end();
        for transfer in transfers {
            transfer.join().expect("no panic")?;
        }
        survived
    })?;
    for transfer in [peer::upload, peer::download, peer::echo] {
        transfer(&scene.peer, BYTES, u64::MAX)?;
    }
    let before = guest.clone();
    wait_for(LIVES, || {
        guest.collect(&scene).is_ok() && guest.whole > before.whole
    })
    .context("nothing of the guest's arrives any more")?;
    println!(
        "from the host: {} transfers whole, all hashes equal, {} cut off, and {} as if they were over",
        traffic.whole(),
        traffic.cut(),
        traffic.silent()
    );
    println!("from the guest: {guest}");
    for victim in VICTIMS {
        report(victim, &recoveries)?;
    }
    ensure!(traffic.whole() > 0, "no transfer was whole");
    ensure!(
        traffic.silent() + guest.silent == 0,
        "a transfer was cut off, and its client saw an end of file"
    );
    Ok(())
}

/// Kills one after the other, each as often as it must be at least once; notes how long it took each time until a new
/// connection worked.
fn survive(
    scene: &mut Scene,
    time: Duration,
    random: &mut Random,
    guest: &mut GuestTraffic,
    recoveries: &mut Vec<(Victim, Duration)>,
) -> Result<()> {
    let end = Instant::now() + time;
    let each = VICTIMS.into_iter().zip(TIMES);
    let mut victims: Vec<_> = each
        .flat_map(|(victim, times)| [victim].repeat(times))
        .collect();
    while recoveries.len() < victims.len() || Instant::now() < end {
        let next = recoveries.len() % victims.len();
        if next == 0 {
            random.shuffle(&mut victims);
        }
        let victim = victims[next];
        thread::sleep(Duration::from_millis(random.below(CALM)));
        if matches!(victim, Victim::Qemu | Victim::Keeper) {
            guest.collect(scene)?;
        }
        let number = recoveries.len() + 1;
        let begun = Instant::now();
        kill(scene, victim).with_context(|| format!("kill {number}, {victim:?}"))?;
        wait_works(scene, begun)
            .with_context(|| format!("after kill {number}, {victim:?}: {}", scene.daemon.log()))?;
        recoveries.push((victim, begun.elapsed()));
        ensure!(scene.guest.is_running(), "after {victim:?} QEMU is gone");
    }
    Ok(())
}

fn kill(scene: &mut Scene, victim: Victim) -> Result<()> {
    match victim {
        Victim::Agent => {
            scene.guest.check("kill -9 $(pidof virtproxy-agent)")?;
        }
        Victim::Worker => {
            let old = scene.worker()?;
            signal(old, libc::SIGKILL);
            wait_for(SOON, || scene.worker().is_ok_and(|worker| worker != old))
                .context("there is no other worker")?;
        }
        Victim::Qemu => {
            scene.replace_guest()?;
            prepare(scene)?;
        }
        Victim::Keeper => {
            let worker = scene.worker()?;
            signal(scene.daemon.pid(), libc::SIGKILL);
            wait_for(SOON, || !Path::new(&format!("/proc/{worker}")).exists())
                .context("a worker outlives its keeper")?;
            scene.replace_daemon()?;
            prepare(scene)?;
        }
    }
    Ok(())
}

/// Has a freshly booted guest keep its agent alive, and begin transfers of its own.
fn prepare(scene: &Scene) -> Result<()> {
    scene.guest.check(&format!(
        "cat >/tmp/agents <<'END'\n\
         while :; do virtproxy-agent {AGENT_FLAGS} --connect-timeout=2 >>/tmp/agent.log 2>&1; sleep 0.1; done\n\
         END\n\
         cat >/tmp/transfers <<'END'\n\
         n=0; while :; do for how in upload download; do n=$((n+1))\n\
         peer $how {HOST_PEER_IN_GUEST} {BYTES} $n >/tmp/said 2>&1 && echo whole || {{ tail -n 1 /tmp/said; sleep 0.05; }}\n\
         done; done\n\
         END\n\
         kill -9 $(pidof virtproxy-agent) 2>/dev/null\n\
         setsid sh /tmp/agents >/dev/null 2>&1 &\n\
         setsid sh /tmp/transfers >/tmp/transfers.log 2>&1 &\n\
         true"
    ))?;
    Ok(())
}

/// Waits until a new connection works.
fn wait_works(scene: &Scene, begun: Instant) -> Result<()> {
    let call = || Caller::within(&scene.peer, SOON)?.call(b"again");
    while let Err(error) = call() {
        ensure!(begun.elapsed() < LIVES, "nothing works: {error:#}");
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// What became of the guest's own transfers, as far as there was a guest to ask.
#[derive(Clone, Default)]
struct GuestTraffic {
    whole: usize,
    cut: usize,
    silent: usize,
}

impl GuestTraffic {
    /// Adds what the guest knows.
    fn collect(&mut self, scene: &Scene) -> Result<()> {
        let log = scene
            .guest
            .check("cat /tmp/transfers.log; : >/tmp/transfers.log")?;
        for line in log.lines() {
            ensure!(!line.contains("differs"), "in the guest: {line}");
            match line {
                "whole" => self.whole += 1,
                _ if line.contains("bytes came") || line.contains("fill whole buffer") => {
                    self.silent += 1;
                }
                _ => self.cut += 1,
            }
        }
        Ok(())
    }
}

impl fmt::Display for GuestTraffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let GuestTraffic { whole, cut, silent } = self;
        write!(
            f,
            "{whole} transfers whole, all hashes equal, {cut} cut off, and {silent} as if they were over"
        )
    }
}

fn report(victim: Victim, recoveries: &[(Victim, Duration)]) -> Result<()> {
    let mut its = recoveries.iter().filter(|(other, _)| *other == victim);
    let count = its.clone().count();
    let all = Latencies::timed(count, || Ok(its.next().context("counted")?.1))?;
    println!(
        "{victim:?} killed {count} times: a new connection works after p50 {:.0?}, p99 {:.0?}, max {:.0?}",
        all.percentile(0.5),
        all.percentile(0.99),
        all.percentile(1.0)
    );
    Ok(())
}
