//! The figures of the README's table, from one run: what a user gets through a real, emulated guest.
//!
//! They depend on the machine and on what else it does, so nothing is asserted of them but that the transfers are whole.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use virtproxy_tests::measure::{Latencies, spread};
use virtproxy_tests::peer::{self, Caller};
use virtproxy_tests::scene::Scene;

const BULK: u64 = 512 << 20;
const ROUNDS: usize = 3;
const PERIOD: Duration = Duration::from_secs(3);

/// What the guest's two processors have done (`/proc/stat`), and its agent and its service, in ticks.
const TICKS: &str = "head -n 1 /proc/stat; set -- $(ps | grep '[p]eer serve'); \
    for p in $(pidof virtproxy-agent) $1; do cut -d' ' -f14,15 /proc/$p/stat; done";

/// MB/s of one transfer, without hashing: the emulated guest's arithmetic is not what is measured.
fn rate(transfer: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    transfer()?;
    Ok(BULK as f64 / 1e6 / start.elapsed().as_secs_f64())
}

fn to_guest(address: &str) -> Result<()> {
    let mut stream = peer::request(address, "DISCARD")?;
    let chunk = vec![1; 256 * 1024];
    for _ in 0..BULK / chunk.len() as u64 {
        stream.write_all(&chunk)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut told = [0; 8];
    stream.read_exact(&mut told)?;
    ensure!(u64::from_le_bytes(told) == BULK, "not all bytes came");
    Ok(())
}

fn from_guest(address: &str) -> Result<()> {
    let mut stream = peer::request(address, &format!("ZEROS {BULK}"))?;
    let (mut buf, mut len) = (vec![0; 256 * 1024], 0);
    while let n @ 1.. = stream.read(&mut buf)? {
        len += n as u64;
    }
    ensure!(len == BULK, "not all bytes came");
    Ok(())
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn figures_for_the_readme() -> Result<()> {
    let scene = Scene::start()?;
    let (mut up, mut down, mut p50, mut p99, mut connections) =
        (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        down.push(rate(|| from_guest(&scene.peer))?);
        up.push(rate(|| to_guest(&scene.peer))?);
        let mut caller = Caller::new(&scene.peer)?;
        let calls = Latencies::of(|calls| calls >= 3000, || caller.call(&[1; 64]))?;
        #[allow(clippy::cast_precision_loss)]
        let micros = |share| calls.percentile(share).as_micros() as f64;
        p50.push(micros(0.5));
        p99.push(micros(0.99));
        connections.push(peer::connects(&scene.peer, PERIOD)?);
    }
    println!("\n| what | median of {ROUNDS} (smallest to largest) |\n| --- | --- |");
    println!(
        "| bulk, guest to host, one stream | {} MB/s |",
        spread(down)
    );
    println!("| bulk, host to guest, one stream | {} MB/s |", spread(up));
    println!("| 64-byte request and answer, p50 | {} us |", spread(p50));
    println!("| the same, p99 | {} us |", spread(p99));
    println!(
        "| new connections, one after another | {} a second |\n",
        spread(connections)
    );
    Ok(())
}

/// What holds new connections: how many the guest makes to its own service, with no way into it at all, and who is at work
/// there while they come from the host.
#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn figures_of_a_connection() -> Result<()> {
    let scene = Scene::start()?;
    for _ in 0..ROUNDS {
        let within = scene.guest.check("peer connects 127.0.0.1:7000 3")?;
        let before = ticks(&scene)?;
        let through = peer::connects(&scene.peer, PERIOD)?;
        let after = ticks(&scene)?;
        let of: Vec<_> = std::iter::zip(&after, &before)
            .map(|(a, b)| a - b)
            .collect();
        let all: u64 = of[..7].iter().sum();
        #[allow(clippy::cast_precision_loss)]
        let share = |ticks: u64| 100.0 * ticks as f64 / all as f64;
        let [user, nice, system, idle, _, irq, soft] = of[..7] else {
            unreachable!("seven of them")
        };
        println!(
            "{} connections a second within the guest, {through:.0} from the host; meanwhile its processors: {:.0} % user, \
             {:.0} % system, {:.0} % interrupts, {:.0} % idle; {:.0} % in the agent, {:.0} % in the service",
            within.trim(),
            share(user + nice),
            share(system),
            share(irq + soft),
            share(idle),
            share(of[10] + of[11]),
            share(of[12] + of[13]),
        );
    }
    Ok(())
}

fn ticks(scene: &Scene) -> Result<Vec<u64>> {
    let text = scene.guest.check(TICKS)?;
    let numbers = text.split_whitespace().filter_map(|word| word.parse().ok());
    let numbers: Vec<u64> = numbers.collect();
    ensure!(numbers.len() >= 14, "not what was asked for: {text}");
    Ok(numbers)
}
