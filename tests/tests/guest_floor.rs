//! How far the mux is from the floor: a bare relay over the same device, and one over QEMU's own, in the same guest.
//!
//! Rounds of all three are interleaved, so that a drift of the machine hits them alike; the ratios are what counts. They
//! depend on the machine, so nothing is asserted of them but that all bytes came.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use virtproxy_lab::{
    DeviceOptions, Guest, GuestFile, GuestOptions, Lab, vhost_user_console, virtserialport,
};
use virtproxy_tests::measure::{Latencies, spread};
use virtproxy_tests::scene::{Daemon, GUEST_PEER, SOON, new_address, program, wait_for};

const BULK: usize = 256 << 20;
const CALLS: usize = 2000;
const ROUNDS: usize = 6;

/// One way into the guest: one connection to the peer there.
struct Way {
    name: &'static str,
    stream: TcpStream,
    /// What each round gave: MB/s to and from the guest, microseconds of a small call (p50, p99).
    figures: [Vec<f64>; 4],
}

impl Way {
    fn new(name: &'static str, address: &str) -> Result<Self> {
        let stream = TcpStream::connect(address).context(address.to_owned())?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(6 * SOON))?;
        Ok(Way {
            name,
            stream,
            figures: Default::default(),
        })
    }

    fn round(&mut self) -> Result<()> {
        let mut chunk = vec![0; 256 * 1024];
        let rate = |start: Instant| BULK as f64 / 1e6 / start.elapsed().as_secs_f64();

        let start = Instant::now();
        writeln!(self.stream, "TAKE {BULK}")?;
        for _ in 0..BULK / chunk.len() {
            self.stream.write_all(&chunk)?;
        }
        self.stream.read_exact(&mut [0])?;
        let up = rate(start);

        let start = Instant::now();
        writeln!(self.stream, "GIVE {BULK}")?;
        let mut left = BULK;
        while left > 0 {
            let most = chunk.len().min(left);
            let n = self.stream.read(&mut chunk[..most])?;
            ensure!(n > 0, "cut off");
            left -= n;
        }
        let down = rate(start);

        writeln!(self.stream, "BOUNCE 64")?;
        let mut call = |message: [u8; 64]| {
            self.stream.write_all(&message)?;
            Ok(self.stream.read_exact(&mut [0; 64])?)
        };
        let calls = Latencies::of(|calls| calls >= CALLS, || call([1; 64]))?;
        call([0; 64])?;
        let micros = |share| calls.percentile(share).as_secs_f64() * 1e6;
        for (list, figure) in self
            .figures
            .iter_mut()
            .zip([up, down, micros(0.5), micros(0.99)])
        {
            list.push(figure);
        }
        Ok(())
    }
}

/// A bare relay on this host, ended when dropped.
struct Relay(Child);

impl Relay {
    fn start(kind: &str, socket: &Path, address: &str) -> Result<Self> {
        let mut command = Command::new(program("relay"));
        command
            .arg(kind)
            .arg(socket)
            .arg(address)
            .stdin(Stdio::null());
        let child = virtproxy_lab::spawn::spawn(command).context("cannot start the relay")?;
        Ok(Relay(child))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The node of the port called `name`.
fn node(guest: &Guest, name: &str) -> Result<String> {
    guest.check(&format!(
        "for p in /sys/class/virtio-ports/*; do [ $(cat $p/name) != {name} ] || echo /dev/${{p##*/}}; done"
    ))
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn figures_beside_the_bare_relay() -> Result<()> {
    let folder = virtproxy_lab::temporary_folder()?;
    let [mux, device, chardev] = ["mux", "device", "chardev"].map(|name| folder.join(name));
    let addresses = [new_address(), new_address(), new_address()];
    let flags = [
        "-c".to_owned(),
        format!("vhost-user:{}:-", mux.display()),
        "-o".to_owned(),
        format!("peer:{}", addresses[1]),
    ];
    let _daemon = Daemon::start(&folder, &flags)?;
    let _device = Relay::start("device", &device, &addresses[0])?;
    wait_for(SOON, || mux.exists() && device.exists())?;
    let second = DeviceOptions {
        id: "vp2".to_owned(),
        ..DeviceOptions::default()
    };
    let guest = Lab::get()?.boot(
        GuestOptions::default()
            .device(vhost_user_console(&mux, &DeviceOptions::default()))
            .device(vhost_user_console(&device, &second))
            .device(virtserialport(&chardev, "chardev"))
            .agent(&program("virtproxy-agent"))
            .file(GuestFile::copy(program("peer"), "/usr/bin/peer"))
            .file(GuestFile::copy(program("relay"), "/usr/bin/relay")),
    )?;
    let _chardev = Relay::start("chardev", &chardev, &addresses[2])?;
    guest.check(&format!(
        "setsid peer serve {GUEST_PEER} >/tmp/peer.log 2>&1 &\n\
         until nc {} </dev/null; do sleep 0.1; done\n\
         setsid virtproxy-agent -c virtserial-open:org.virtproxy.0:- -i peer:{GUEST_PEER} >/tmp/agent.log 2>&1 &\n\
         for port in {} {}; do setsid relay guest $port {GUEST_PEER} >/tmp/relay.log 2>&1 & done",
        GUEST_PEER.replace(':', " "),
        node(&guest, "relay")?,
        node(&guest, "chardev")?,
    ))?;
    std::thread::sleep(Duration::from_secs(1));
    let mut ways = [
        Way::new("bare relay, vhost-user", &addresses[0])?,
        Way::new("virtproxy, vhost-user", &addresses[1])?,
        Way::new("bare relay, virtserialport", &addresses[2])?,
    ];
    for _ in 0..ROUNDS {
        for way in &mut ways {
            way.round()?;
        }
    }
    println!("\n| way | to guest MB/s | from guest MB/s | call p50 us | call p99 us |");
    println!("| --- | --- | --- | --- | --- |");
    for way in &ways {
        let cells = way.figures.clone().map(spread);
        println!("| {} | {} |", way.name, cells.join(" | "));
    }
    for floor in [0, 2] {
        let ratios = [0, 1, 2, 3].map(|at| {
            let pairs = ways[1].figures[at].iter().zip(&ways[floor].figures[at]);
            spread(pairs.map(|(ours, floor)| 100.0 * ours / floor).collect())
        });
        println!(
            "| % of {}, round by round | {} |",
            ways[floor].name,
            ratios.join(" | ")
        );
    }
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}
