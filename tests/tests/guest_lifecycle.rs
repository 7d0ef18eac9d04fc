//! Either end dies, restarts, pauses; the device is unbound and bound; QEMU ends and another one comes.
//!
//! What must hold each time: old streams end, with a reason in the log; a new connection works within a second of the
//! agent's handshake; and nothing stale reaches a new stream (every transfer is hashed, with a pattern of its own).

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use virtproxy_tests::peer::{self, Caller};
use virtproxy_tests::scene::{SOON, Scene};

const MIB: u64 = 1 << 20;
/// How soon after the handshake a new connection must work.
const NEW_CONNECTION: Duration = Duration::from_secs(1);

fn seed() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1000);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Bulk both ways over several streams, to be cut off at any byte.
fn start_traffic(scene: &Scene) -> Vec<JoinHandle<Result<()>>> {
    let mut transfers = Vec::new();
    for _ in 0..3 {
        for transfer in [peer::upload, peer::download, peer::echo] {
            let address = scene.peer.clone();
            transfers.push(std::thread::spawn(move || {
                transfer(&address, 1 << 40, seed())
            }));
        }
    }
    std::thread::sleep(Duration::from_millis(500));
    transfers
}

/// Every stream of `traffic` was cut off; none ended as if it were whole.
fn all_cut_off(traffic: Vec<JoinHandle<Result<()>>>) -> Result<()> {
    for transfer in traffic {
        let result = transfer.join().expect("no panic");
        ensure!(result.is_err(), "a transfer of a TiB was taken for whole");
    }
    Ok(())
}

/// New streams work, and carry nothing but their own bytes.
fn check_new_streams(scene: &Scene, first: Duration, event: &str) -> Result<()> {
    ensure!(
        first <= NEW_CONNECTION,
        "after {event} a new connection took {first:?}"
    );
    for transfer in [peer::upload, peer::download, peer::echo] {
        transfer(&scene.peer, 8 * MIB, seed()).with_context(|| format!("after {event}"))?;
    }
    println!("after {event}: a new connection worked {first:?} after the handshake, hashes equal");
    Ok(())
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn streams_survive_a_pause_and_end_with_whatever_else_happens() -> Result<()> {
    let mut scene = Scene::start()?;
    pause(&scene)?;
    main_loop_busy(&scene)?;
    agent_killed(&scene)?;
    agent_terminated(&scene)?;
    port_busy(&scene)?;
    driver_unbound(&scene)?;
    guest_suspended(&scene)?;
    guest_reset(&scene)?;
    qemu_replaced(&mut scene)?;
    daemon_terminated(&mut scene)
}

/// Transfers that all arrive whole, whatever `event` does meanwhile.
fn transfers_survive(scene: &Scene, len: u64, event: impl FnOnce() -> Result<()>) -> Result<()> {
    let sessions = scene.sessions();
    let mut caller = Caller::new(&scene.peer)?;
    caller.call(b"before")?;
    let address = &scene.peer;
    let transfers: Vec<_> = [peer::upload, peer::download, peer::echo]
        .into_iter()
        .map(|transfer| {
            let address = address.clone();
            std::thread::spawn(move || transfer(&address, len, seed()))
        })
        .collect();
    std::thread::sleep(Duration::from_millis(500));
    ensure!(
        transfers.iter().all(|transfer| !transfer.is_finished()),
        "the event came too late to be in mid-traffic"
    );
    event()?;
    for transfer in transfers {
        transfer.join().expect("no panic")?;
    }
    caller.call(b"after")?;
    ensure!(scene.sessions() == sessions, "it cost a session");
    Ok(())
}

/// QMP `stop` for 20 s in mid-traffic, then `cont`: nothing is lost at all.
fn pause(scene: &Scene) -> Result<()> {
    const PAUSE: Duration = Duration::from_secs(20);
    transfers_survive(scene, 64 * MIB, || {
        scene.guest.stop()?;
        std::thread::sleep(PAUSE);
        scene.guest.cont()
    })?;
    println!("after stop and cont: three transfers of 64 MiB under way, all hashes equal");
    Ok(())
}

/// QEMU writes the guest's memory to a file, again and again, and does nothing else meanwhile.
fn main_loop_busy(scene: &Scene) -> Result<()> {
    const TIMES: u32 = 20;
    let file = scene.folder.join("memory");
    let mut busy = Duration::ZERO;
    transfers_survive(scene, 64 * MIB, || {
        for _ in 0..TIMES {
            let begin = Instant::now();
            let arguments = json!({"val": 0, "size": 128 * MIB, "filename": file});
            scene.guest.qmp("pmemsave", arguments)?;
            busy += begin.elapsed();
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    })?;
    std::fs::remove_file(&file)?;
    println!("QEMU's main loop was busy {TIMES} times, {busy:?} in all: all hashes equal");
    Ok(())
}

fn agent_killed(scene: &Scene) -> Result<()> {
    let (traffic, old) = (start_traffic(scene), Caller::new(&scene.peer)?);
    let sessions = scene.sessions();
    scene.guest.check("kill -9 $(pidof virtproxy-agent)")?;
    let killed = Instant::now();
    old.wait_end(SOON)?;
    println!(
        "after kill -9 of the agent: an old stream ended in {:?}",
        killed.elapsed()
    );
    all_cut_off(traffic)?;
    scene.daemon.wait_log("streams cut off", 1, SOON)?;
    let first = scene.start_agent(sessions + 1)?;
    check_new_streams(scene, first, "kill -9 of the agent")
}

fn agent_terminated(scene: &Scene) -> Result<()> {
    let (traffic, old) = (start_traffic(scene), Caller::new(&scene.peer)?);
    let sessions = scene.sessions();
    scene.guest.check(
        "p=$(pidof virtproxy-agent); kill $p; n=0; while [ -d /proc/$p ]; do sleep 0.1; n=$((n+1)); [ $n -lt 100 ]; done",
    )?;
    old.wait_end(SOON)?;
    all_cut_off(traffic)?;
    let first = scene.start_agent(sessions + 1)?;
    check_new_streams(scene, first, "SIGTERM of the agent")
}

/// Another program holds the port: the agent says so, waits without spinning, and takes it when it is free.
fn port_busy(scene: &Scene) -> Result<()> {
    let sessions = scene.sessions();
    scene.guest.check(
        "kill $(pidof virtproxy-agent); while pidof virtproxy-agent >/dev/null; do sleep 0.1; done\n\
         setsid peer hold /dev/vport*p* 8 >/tmp/hold.log 2>&1 &\n\
         until grep -q held /tmp/hold.log; do sleep 0.1; done",
    )?;
    let agent = std::thread::scope(|threads| -> Result<_> {
        let starting = threads.spawn(|| scene.start_agent(sessions + 1));
        std::thread::sleep(Duration::from_secs(1));
        let before = scene.agent_usage()?;
        std::thread::sleep(Duration::from_secs(4));
        let after = scene.agent_usage()?;
        let first = starting.join().expect("no panic")?;
        Ok((after.cpu.checked_sub(before.cpu).unwrap_or_default(), first))
    });
    let (cpu, first) = agent?;
    let log = scene.agent_log();
    ensure!(log.contains("held by peer"), "the agent says: {log}");
    println!("while the port was busy for 4 s the agent used {cpu:?} of CPU time");
    ensure!(cpu < Duration::from_millis(200), "the agent spins: {cpu:?}");
    check_new_streams(scene, first, "waiting for a busy port")
}

fn driver_unbound(scene: &Scene) -> Result<()> {
    let (traffic, old) = (start_traffic(scene), Caller::new(&scene.peer)?);
    let sessions = scene.sessions();
    let device = scene.guest.check(
        "cd /sys/bus/virtio/drivers/virtio_console; for d in virtio*; do echo $d > unbind; echo $d; done",
    )?;
    std::thread::sleep(Duration::from_millis(300));
    scene.guest.check(&format!(
        "echo {device} > /sys/bus/virtio/drivers/virtio_console/bind"
    ))?;
    let first = scene.wait_session(sessions + 1)?;
    old.wait_end(SOON)?;
    all_cut_off(traffic)?;
    check_new_streams(scene, first, "unbind and bind of the driver")
}

/// Suspends to memory (S3) and wakes up: the driver comes back with new rings and opens what was open.
fn guest_suspended(scene: &Scene) -> Result<()> {
    if !scene.guest.check("cat /sys/power/state")?.contains("mem")
        || !scene
            .guest
            .check("cat /sys/power/mem_sleep")?
            .contains("deep")
    {
        println!("NOT TESTED: this guest cannot suspend to memory");
        return Ok(());
    }
    let (traffic, old) = (start_traffic(scene), Caller::new(&scene.peer)?);
    let sessions = scene.sessions();
    scene
        .guest
        .check("echo deep >/sys/power/mem_sleep; (sleep 0.3; echo mem >/sys/power/state) >/dev/null 2>&1 &")?;
    scene.guest.event("SUSPEND", 3 * SOON)?;
    std::thread::sleep(Duration::from_millis(500));
    scene.guest.qmp("system_wakeup", json!({}))?;
    scene.guest.event("WAKEUP", SOON)?;
    let first = scene.wait_session(sessions + 1)?;
    old.wait_end(SOON)?;
    all_cut_off(traffic)?;
    check_new_streams(scene, first, "suspension to memory")
}

fn guest_reset(scene: &Scene) -> Result<()> {
    let (traffic, old) = (start_traffic(scene), Caller::new(&scene.peer)?);
    let sessions = scene.sessions();
    scene.guest.reset()?;
    old.wait_end(SOON)?;
    all_cut_off(traffic)?;
    scene.prepare_guest()?;
    let first = scene.start_agent(sessions + 1)?;
    check_new_streams(scene, first, "system_reset")
}

fn qemu_replaced(scene: &mut Scene) -> Result<()> {
    let (traffic, old) = (start_traffic(scene), Caller::new(&scene.peer)?);
    let sessions = scene.sessions();
    scene.replace_guest()?;
    old.wait_end(SOON)?;
    all_cut_off(traffic)?;
    let first = scene.start_agent(sessions + 1)?;
    check_new_streams(scene, first, "a new QEMU")
}

/// The daemon ends in order and removes its socket.
fn daemon_terminated(scene: &mut Scene) -> Result<()> {
    let (traffic, old) = (start_traffic(scene), Caller::new(&scene.peer)?);
    let status = scene.daemon.terminate()?;
    old.wait_end(SOON)?;
    all_cut_off(traffic)?;
    ensure!(status.code() == Some(0), "the daemon ended with {status}");
    ensure!(
        !scene.folder.join("vp.sock").exists(),
        "the device's socket is still there"
    );
    println!("after SIGTERM of the daemon: exit code 0, its socket removed");
    Ok(())
}
