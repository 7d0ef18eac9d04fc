//! The test service, for the guest.
//!
//! * `peer serve ADDRESS`: serves, see `virtproxy_tests::peer`.
//! * `peer download|upload|echo ADDRESS BYTES SEED`: a checked transfer.
//! * `peer stall ADDRESS SECONDS`: asks for a flood and reads nothing.
//! * `peer full ADDRESS`: listens and accepts nobody, with a queue that is full: connecting to it hangs.
//! * `peer hold PORT-DEVICE SECONDS`: opens the port, says so, and does nothing with it.
//! * `peer ticks`: prints each time when this process could not run, or its clock stood still, for longer than ever before,
//!   in microseconds.
//! * `peer line DEVICE SECONDS in|out|both`: reads from a serial line in raw mode, writes to it, or both, and prints how many
//!   bytes came in, and in how many microseconds.
//! * `peer other-version PORT-DEVICE`: opens the port and greets with protocol version 9 only.
//! * `peer tap-vsock FAULTS LISTEN CONNECT`: stands between two vsock ports of this machine, see `virtproxy_tests::tap`.
//! * `peer tap-before FAULTS COMMAND...`: stands before a command's standard input and output.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use virtproxy_mux::Hello;
use virtproxy_tests::peer;
use virtproxy_tests::tap::{self, Faults};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["serve", address] => {
            peer::serve(&TcpListener::bind(address)?);
            Ok(())
        }
        ["download", address, n, seed] => peer::download(address, n.parse()?, seed.parse()?),
        ["upload", address, n, seed] => peer::upload(address, n.parse()?, seed.parse()?),
        ["echo", address, n, seed] => peer::echo(address, n.parse()?, seed.parse()?),
        ["stall", address, seconds] => {
            let _stream = peer::request(address, "FLOOD 1")?;
            std::thread::sleep(Duration::from_secs(seconds.parse()?));
            Ok(())
        }
        ["connects", address, seconds] => {
            let many = peer::connects(address, Duration::from_secs(seconds.parse()?))?;
            println!("{many:.0}");
            Ok(())
        }
        ["full", address] => full(address),
        ["hold", device, seconds] => {
            let _port = open_port(device)?;
            println!("held");
            std::thread::sleep(Duration::from_secs(seconds.parse()?));
            Ok(())
        }
        ["ticks"] => ticks(),
        ["line", device, seconds, way] => line(device, Duration::from_secs(seconds.parse()?), way),
        ["other-version", device] => other_version(device),
        ["tap-vsock", faults, listen, connect] => {
            tap::run_between_vsock(listen.parse()?, connect.parse()?, Faults(faults.into()))
        }
        ["tap-before", faults, ref command @ ..] => tap::run_before(command, Faults(faults.into())),
        _ => bail!(
            "usage: peer serve|download|upload|echo|stall|connects|full|hold|ticks|line|other-version|tap-... ..."
        ),
    }
}

/// A listener whose queue stays full.
fn full(address: &str) -> Result<()> {
    let listener = TcpListener::bind(address)?;
    // SAFETY: `listen` on a descriptor that is open; it only makes the queue shorter.
    if unsafe { libc::listen(listener.as_raw_fd(), 0) } != 0 {
        return Err(std::io::Error::last_os_error()).context("listen");
    }
    let target = listener.local_addr()?;
    let mut queued = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&target, Duration::from_millis(300)) {
        queued.push(stream);
    }
    println!("full after {}", queued.len());
    loop {
        std::thread::park();
    }
}

fn ticks() -> ! {
    const TICK: Duration = Duration::from_millis(5);
    let mut longest = Duration::ZERO;
    loop {
        let begun = Instant::now();
        std::thread::sleep(TICK);
        let gap = begun.elapsed();
        if gap > longest {
            longest = gap;
            println!("{}", gap.as_micros());
        }
    }
}

fn open_port(device: &str) -> std::io::Result<std::fs::File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(device)
}

/// The bare line, as fast as it goes.
fn line(device: &str, time: Duration, way: &str) -> Result<()> {
    let open = || OpenOptions::new().read(true).write(true).open(device);
    let (mut reader, mut writer) = (open()?, open()?);
    let end = Instant::now() + time;
    if way != "in" {
        std::thread::spawn(move || while writer.write_all(&[b'o'; 4096]).is_ok() {});
    }
    let (mut buf, mut count, mut first) = ([0; 4096], 0, None);
    while way != "out" && Instant::now() < end {
        let n = reader.read(&mut buf)?;
        match first {
            None => first = Some(Instant::now()),
            Some(_) => count += n,
        }
    }
    std::thread::sleep(end.saturating_duration_since(Instant::now()));
    let elapsed = first.map_or(time, |first| first.elapsed());
    println!("{count} {}", elapsed.as_micros());
    // The writer hangs in a write; the process takes it along.
    Ok(())
}

fn other_version(device: &str) -> Result<()> {
    let mut port = open_port(device)?;
    let hello = Hello {
        min_version: 9,
        max_version: 9,
        epoch: 99,
        ack: 0,
        features: 0,
        max_frame: 65536,
        session_window: 65536,
        max_streams: 1,
        product: "from-the-future 9.0".into(),
    };
    let mut sent = false;
    loop {
        sent = sent || port.write_all(&hello.encode()).is_ok();
        let _ = port.read(&mut [0; 4096]);
        std::thread::sleep(Duration::from_millis(50));
    }
}
