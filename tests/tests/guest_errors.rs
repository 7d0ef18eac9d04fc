//! What goes wrong gets one clear message that names the flag or the cure, a fixed exit code or reason, and hangs nobody.

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use virtproxy_lab::DeviceOptions;
use virtproxy_tests::scene::{Daemon, SOON, Scene, boot, new_address, program};

/// A client of `address` is closed within `limit`, with nothing sent to it.
fn closed_within(address: &str, limit: Duration) -> Result<Duration> {
    let start = Instant::now();
    if let Ok(mut client) = TcpStream::connect(address) {
        client.set_read_timeout(Some(limit))?;
        match client.read(&mut [0; 1]) {
            Ok(0) => {}
            Ok(_) => anyhow::bail!("data came"),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            Err(error) => return Err(error).context("the client hangs"),
        }
    }
    Ok(start.elapsed())
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_service_that_cannot_be_had_is_refused_with_its_reason() -> Result<()> {
    let scene = Scene::start()?;
    let [nobody, closed, full] = &scene.unavailable;
    let cases = [
        (
            nobody,
            "no such service",
            "nobody: refused by the other end: no such service: no -i names it",
        ),
        (closed, "target refused the connection", "127.0.0.1:1: "),
        (full, "target did not answer in time", "127.0.0.1:7003: "),
    ];
    for (address, reason, text) in cases {
        let took = closed_within(address, SOON)?;
        scene.daemon.wait_log(reason, 1, SOON)?;
        scene.daemon.wait_log(text, 1, SOON)?;
        println!("{reason}: closed after {took:?}");
    }
    Ok(())
}

fn run(words: &[&str]) -> Result<(i32, String)> {
    let Output { status, stderr, .. } = Command::new(program("virtproxy")).args(words).output()?;
    let code = status.code().context("killed")?;
    Ok((code, String::from_utf8_lossy(&stderr).into_owned()))
}

#[test]
#[ignore = "needs the programs: cargo xtask test"]
fn wrong_flags_and_taken_places_have_fixed_exit_codes() -> Result<()> {
    let folder = virtproxy_lab::temporary_folder()?;
    let socket = folder.join("vp.sock");
    let channel = format!("vhost-user:{}:-", socket.display());
    let busy_listener = TcpListener::bind(new_address())?;
    let busy = format!("http:{}", busy_listener.local_addr()?);
    let not_a_socket = folder.join("file");
    std::fs::write(&not_a_socket, "precious")?;
    let file_channel = format!("vhost-user:{}:-", not_a_socket.display());
    let missing = format!("vhost-user:{}/no/such/vp.sock:-", folder.display());
    let holder = Daemon::start(&folder, &["-c".into(), channel.clone()])?;
    virtproxy_tests::scene::wait_for(SOON, || socket.exists())?;
    let free = format!("vhost-user:{}:-", folder.join("free.sock").display());
    let cases: [(&[&str], i32, &[&str]); 15] = [
        (&[], 2, &["--channel <METHOD:ADDR:PORT"]),
        (
            &["-c", "vhost-usr:/run/vp.sock:-"],
            2,
            &["vhost-usr", "vhost-user"],
        ),
        (&["-c", "vhost-user"], 2, &["ADDR"]),
        (
            &["-c", &free, "-o", "dns/udp:/run/dns.sock:-"],
            2,
            &["dns.sock", "/udp", "write a host and a port"],
        ),
        (
            &["-c", &free, "--udp-timeout=0"],
            2,
            &["--udp-timeout", "above 0"],
        ),
        (
            &["-c", &free, "-o", "http:127.0.0.1"],
            2,
            &["PORT", "SERVICE:ADDR:PORT"],
        ),
        (
            &["-c", &free, "-o", "http:127.0.0.1:99999"],
            2,
            &["99999", "65535"],
        ),
        (&["-c", &free, "-i", "http:127.0.0.1:0"], 2, &["PORT 0"]),
        (&["-c", &free, "-i", "ht tp:127.0.0.1:80"], 2, &["SERVICE"]),
        (
            &["-c", &free, "-o", "http:127.0.0.1:80:blue"],
            2,
            &["-o", "blue", "-c"],
        ),
        (
            &["-c", &free, "--wait-for-peer", "soon"],
            2,
            &["--wait-for-peer", "seconds"],
        ),
        (
            &["-c", &free, "-o", &busy],
            3,
            &["-o", &busy, "another program"],
        ),
        (&["-c", &channel], 4, &["-c", "another program listens"]),
        (&["-c", &file_channel], 4, &["is not a socket"]),
        (
            &["-c", &missing],
            4,
            &["no/such/vp.sock", "create the directory"],
        ),
    ];
    for (words, code, texts) in cases {
        let (got, stderr) = run(words)?;
        ensure!(
            got == code,
            "{words:?}: exit code {got}, not {code}: {stderr}"
        );
        for text in texts {
            ensure!(stderr.contains(text), "{words:?}: no {text:?} in: {stderr}");
        }
        println!("exit {code}: {}", stderr.lines().next().unwrap_or_default());
    }
    ensure!(std::fs::read(&not_a_socket)? == b"precious");
    drop(holder);
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}

/// What the daemon says of a QEMU line that is wrong.
fn wrong_device(device: &DeviceOptions, cure: &str) -> Result<()> {
    let folder = virtproxy_lab::temporary_folder()?;
    let channel = format!("vhost-user:{}:-", folder.join("vp.sock").display());
    let daemon = Daemon::start(&folder, &["-c".into(), channel])?;
    // QEMU itself may refuse; else the guest comes up without the port.
    let guest = boot(&folder, &daemon, device);
    let said = match &guest {
        Err(error) => format!("{error:#}\n{}", daemon.log()),
        Ok(_) => {
            // Where only the guest notices, the daemon waits until it should have booted.
            daemon.wait_log(cure, 1, 6 * SOON)?;
            daemon.log()
        }
    };
    ensure!(said.contains(cure), "no {cure:?} in: {said}");
    let line = said.lines().find(|line| line.contains(cure));
    println!("{device:?}: {}", line.unwrap_or_default());
    drop(guest);
    drop(daemon);
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}

#[test]
#[ignore = "boots guests: cargo xtask test"]
fn a_wrong_qemu_line_is_told_its_cure() -> Result<()> {
    let right = DeviceOptions::default();
    wrong_device(
        &DeviceOptions {
            num_vqs: 2,
            ..right.clone()
        },
        "has too few queues, its guest will not find the port: say num_vqs=4",
    )?;
    wrong_device(
        &DeviceOptions {
            config_size: 4,
            ..right.clone()
        },
        "config_size=12",
    )?;
    // Too many queues: QEMU refuses to start, and the daemon says how many there are.
    wrong_device(
        &DeviceOptions {
            num_vqs: 6,
            ..right
        },
        "has too many queues: say num_vqs=4",
    )
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn an_agent_of_another_version_is_named_and_its_clients_are_refused() -> Result<()> {
    let scene = Scene::start()?;
    scene
        .guest
        .check("kill $(pidof virtproxy-agent); sleep 0.5")?;
    scene
        .guest
        .check("setsid peer other-version /dev/vport*p* >/tmp/other.log 2>&1 &")?;
    let message = "(from-the-future 9.0) speaks protocol versions 9 to 9, this one 1 to 1";
    scene.daemon.wait_log(message, 1, SOON)?;
    let took = closed_within(&scene.peer, SOON)?;
    println!("{message}; a client was refused after {took:?}");
    scene
        .daemon
        .wait_log("speaks another protocol version", 1, SOON)?;
    // And when a fitting agent comes, all is well again.
    let sessions = scene.sessions();
    scene
        .guest
        .check("kill $(pidof peer | tr ' ' '\\n' | head -n1)")?;
    scene.start_agent(sessions + 1)?;
    Ok(())
}
