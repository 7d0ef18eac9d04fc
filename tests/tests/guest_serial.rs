//! A 16550 serial line of a real guest: QEMU's model of the chip, its chardev socket, and the guest's own driver.
//!
//! The kernel's console is on the same line, so its messages come in between. Bare rounds (programs that read and write
//! the line as it is) and rounds through the programs alternate in one boot, on one port: their ratio is what is looked at.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use virtproxy_lab::{Guest, GuestFile, GuestOptions, Lab, isa_serial, temporary_folder};
use virtproxy_tests::measure::Latencies;
use virtproxy_tests::peer::{self, Caller, Pattern};
use virtproxy_tests::scene::{Daemon, GUEST_PEER, SOON, new_address, program};

/// How long each round is.
const ROUND: Duration = Duration::from_secs(3);
const ROUNDS: usize = 3;

/// The third serial port of the guest, and its end on the host.
const LINE: &str = "/dev/ttyS2";

struct Scene {
    guest: Guest,
    folder: PathBuf,
    socket: PathBuf,
    /// Where the guest's peer is reached on this host.
    peer: String,
    daemon: Option<Daemon>,
}

/// One guest serves all tests of this file.
fn scene() -> MutexGuard<'static, Scene> {
    static SCENE: OnceLock<Mutex<Scene>> = OnceLock::new();
    SCENE
        .get_or_init(|| Mutex::new(Scene::start().expect("the scene starts")))
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

impl Scene {
    fn start() -> Result<Self> {
        let folder = temporary_folder()?;
        let socket = folder.join("isa.sock");
        let guest = Lab::get()?.boot(
            GuestOptions {
                kernel_args: "console=ttyS2,115200".into(),
                ..GuestOptions::default()
            }
            .device(isa_serial(&socket))
            .agent(&program("virtproxy-agent"))
            .file(GuestFile::copy(program("peer"), "/usr/bin/peer")),
        )?;
        guest.check(&format!(
            "setsid peer serve {GUEST_PEER} >/tmp/peer.log 2>&1 &"
        ))?;
        Ok(Scene {
            guest,
            folder,
            socket,
            peer: new_address(),
            daemon: None,
        })
    }

    /// Starts both programs and waits for their session.
    fn connect(&mut self) -> Result<()> {
        self.start_agent()?;
        self.start_daemon()
    }

    fn start_agent(&self) -> Result<()> {
        self.guest.check(&format!(
            "setsid virtproxy-agent -v -c isa-serial-open:{LINE}:115200 -i peer:{GUEST_PEER} >>/tmp/agent.log 2>&1 &"
        ))?;
        Ok(())
    }

    fn start_daemon(&mut self) -> Result<()> {
        let daemon = Daemon::start(
            &self.folder,
            &[
                "-v".into(),
                "-c".into(),
                format!("unix-connect:{}:-", self.socket.display()),
                "-o".into(),
                format!("peer:{}", self.peer),
            ],
        )?;
        daemon.wait_log("session established", 1, 3 * SOON)?;
        self.daemon = Some(daemon);
        Caller::new(&self.peer)?.call(b"a new connection")
    }

    /// Ends both programs: the line is bare.
    fn disconnect(&mut self) -> Result<()> {
        self.daemon = None;
        self.guest
            .check("killall virtproxy-agent; while pidof virtproxy-agent; do sleep 0.1; done")?;
        Ok(())
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[derive(Clone, Copy, Debug)]
enum Way {
    ToHost,
    ToGuest,
    Both,
}

const WAYS: [Way; 3] = [Way::ToHost, Way::ToGuest, Way::Both];

#[allow(clippy::cast_precision_loss)]
fn rate(bytes: usize, elapsed: Duration) -> f64 {
    bytes as f64 / 1e3 / elapsed.as_secs_f64()
}

/// Counts what comes from `stream`, from its first bytes on, until `end`: kB/s. It goes on reading until `stop`.
fn count(mut stream: impl Read, end: Instant, stop: &AtomicBool) -> Result<f64> {
    let (mut buf, mut counted, mut start, mut figure) = (vec![0; 64 * 1024], 0, None, 0.0);
    while !stop.load(Ordering::Relaxed) {
        let n = match stream.read(&mut buf) {
            Ok(n) => n,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => 0,
            Err(error) => return Err(error.into()),
        };
        let now = Instant::now();
        if now < end {
            match start {
                None => start = Some(now),
                Some(start) => {
                    counted += n;
                    figure = rate(counted, now - start);
                }
            }
        }
    }
    Ok(figure)
}

/// kB/s of the bare line, to the host and to the guest.
fn bare(scene: &Scene, way: Way) -> Result<[f64; 2]> {
    let host = UnixStream::connect(&scene.socket)?;
    host.set_read_timeout(Some(Duration::from_millis(100)))?;
    let stop = Arc::new(AtomicBool::new(false));
    let end = Instant::now() + ROUND;
    let reader = {
        let (host, stop) = (host.try_clone()?, stop.clone());
        thread::spawn(move || count(host, end, &stop))
    };
    let mut writer = host.try_clone()?;
    if !matches!(way, Way::ToHost) {
        thread::spawn(move || while writer.write_all(&[b'i'; 4096]).is_ok() {});
    }
    let word = match way {
        Way::ToHost => "out",
        Way::ToGuest => "in",
        Way::Both => "both",
    };
    let told = scene.guest.check(&format!(
        "stty -F {LINE} raw -echo 115200 crtscts; peer line {LINE} {} {word}",
        ROUND.as_secs()
    ))?;
    stop.store(true, Ordering::Relaxed);
    let from_guest = reader.join().expect("no panic")?;
    let _ = host.shutdown(Shutdown::Both);
    let mut words = told.split_whitespace().map(str::parse::<u32>);
    let mut number = || {
        words
            .next()
            .context("two numbers")?
            .map_err(anyhow::Error::from)
    };
    let (bytes, micros) = (number()?, number()?);
    let to_guest = f64::from(bytes) / f64::from(micros) * 1e3;
    Ok([from_guest, to_guest])
}

/// kB/s that a client of the programs gets, of as many bytes as the bare line carries in a round.
fn through(scene: &Scene, [to_host, to_guest]: [f64; 2]) -> Result<f64> {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let amount = |rate: f64| (rate * ROUND.as_secs_f64()) as u64 * 1000;
    let down = || -> Result<()> {
        let bytes = amount(to_host);
        let mut stream = peer::request(&scene.peer, &format!("ZEROS {bytes}"))?;
        let (_, got) = peer::hash_all(&mut stream)?;
        ensure!(got == bytes, "not all bytes came");
        Ok(())
    };
    let up = || -> Result<()> {
        let bytes = amount(to_guest);
        let mut stream = peer::request(&scene.peer, "DISCARD")?;
        std::io::copy(&mut std::io::repeat(1).take(bytes), &mut stream)?;
        stream.shutdown(Shutdown::Write)?;
        let mut told = [0; 8];
        stream.read_exact(&mut told)?;
        ensure!(u64::from_le_bytes(told) == bytes, "not all bytes came");
        Ok(())
    };
    let timed = |bytes: f64, transfer: &dyn Fn() -> Result<()>| -> Result<f64> {
        let start = Instant::now();
        if amount(bytes) > 0 {
            transfer()?;
        }
        Ok(amount(bytes) as f64 / 1e3 / start.elapsed().as_secs_f64())
    };
    thread::scope(|scope| {
        let up = scope.spawn(|| timed(to_guest, &up));
        let down = timed(to_host, &down)?;
        up.join().expect("no panic").map(|up| up + down)
    })
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn goodput_is_a_share_of_the_bare_line() -> Result<()> {
    let mut scene = scene();
    for _ in 0..ROUNDS {
        for way in WAYS {
            let bare = bare(&scene, way)?;
            scene.connect()?;
            let link = through(&scene, bare)?;
            let all = bare[0] + bare[1];
            println!(
                "{way:?}: bare {bare:.0?} kB/s, link {link:.0} kB/s: {:.0} %",
                100.0 * link / all
            );
            scene.disconnect()?;
        }
    }
    println!("{}", scene.guest.check("cat /tmp/agent.log")?);
    Ok(())
}
