//! The memory that a way's programs hold while connections are open and idle, on the host and in the guest.
//!
//! The service in the guest and this client are not counted. Of a way that has no program on the host, since it is a
//! part of QEMU, what is counted is by how much QEMU has grown.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use virtproxy_tests::measure::memory_script;

use super::subject::{Subject, connect};

/// How many connections are being made at once, so that ten thousand are a matter of seconds.
const CLIENTS: usize = 8;

/// How long that may take all together, which is a few times what it should.
const LIMIT: Duration = Duration::from_secs(60);

/// How long the programs are left alone before their memory is read.
const SETTLE: Duration = Duration::from_secs(1);

/// The KiB held on the host, and in the guest, while `count` connections are open and idle.
pub(super) fn held(way: &mut Subject, count: usize) -> Result<Vec<f64>> {
    let qemu = way.running().guest().pid().to_string();
    let qemu_before = on_host(&qemu)?;
    let address = way.running().address();
    let begun = Instant::now();
    let open = || {
        ensure!(
            begun.elapsed() < LIMIT,
            "no {count} connections within {LIMIT:?}"
        );
        connect(address, "HOLD")
    };
    let client = |share: usize| -> Result<Vec<_>> { (0..share).map(|_| open()).collect() };
    let _open: Vec<_> = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|nth| scope.spawn(move || client((count + nth) / CLIENTS)))
            .collect();
        clients
            .into_iter()
            .map(|one| one.join().expect("a client does not panic"))
            .collect::<Result<Vec<_>>>()
    })?;
    thread::sleep(SETTLE);
    let processes: Vec<_> = way
        .running()
        .processes()
        .iter()
        .map(u32::to_string)
        .collect();
    let host = match processes.is_empty() {
        true => on_host(&qemu)? - qemu_before,
        false => on_host(&processes.join(" "))?,
    };
    let pids = way.running().guest_processes();
    let guest = kib(&way
        .running()
        .guest()
        .check(&memory_script(&format!("$({pids})")))?)?;
    Ok(vec![host, guest])
}

fn on_host(pids: &str) -> Result<f64> {
    let output = Command::new("sh")
        .args(["-c", &memory_script(pids)])
        .output()?;
    ensure!(
        output.status.success(),
        "cannot read what {pids} hold: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    kib(&String::from_utf8_lossy(&output.stdout))
}

fn kib(printed: &str) -> Result<f64> {
    let printed = printed.trim();
    printed
        .parse()
        .with_context(|| format!("not a number of KiB: {printed:?}"))
}
