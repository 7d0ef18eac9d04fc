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
        let (start, mut count) = (Instant::now(), 0);
        while start.elapsed() < Duration::from_secs(3) {
            Caller::new(&scene.peer)?.call(b"hello")?;
            count += 1;
        }
        connections.push(f64::from(count) / start.elapsed().as_secs_f64());
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
