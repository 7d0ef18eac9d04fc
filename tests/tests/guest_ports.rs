//! Ports beside the mux in a real guest: QEMU's own guest agent, a login on the console, ports that come and go, and a
//! guest with one processor whose daemon ends.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use virtproxy_lab::{DeviceOptions, Guest, GuestFile, GuestOptions, Lab, vhost_user_console};
use virtproxy_tests::peer;
use virtproxy_tests::scene::{Daemon, SOON, new_address, program, wait_for};

const MIB: u64 = 1 << 20;
const QGA: &str = "org.qemu.guest_agent.0";
const HOT: &str = "org.example.hot";
/// The mux, the console, the agent's port, and three more.
const ROOM: u32 = 6;

/// A daemon with a console, a port for qemu-ga and an admin socket, and a guest on it.
struct Ports {
    guest: Guest,
    daemon: Daemon,
    folder: PathBuf,
    peer: String,
}

impl Ports {
    fn start(processors: u32) -> Result<Self> {
        let folder = virtproxy_lab::temporary_folder()?;
        let path = |name: &str| folder.join(name).display().to_string();
        let peer = new_address();
        let flags = [
            format!("-cvhost-user:{}:-", path("vp.sock")),
            format!("-opeer:{peer}"),
            format!("--port={QGA}=unix-listen:{}", path("qga.sock")),
            format!("--console=pty:{}", path("console")),
            format!("--max-ports={ROOM}"),
            format!("--admin={}", path("admin.sock")),
        ];
        let daemon = Daemon::start(&folder, &flags)?;
        let num_vqs = 2 * (ROOM + 1);
        daemon.wait_log(&format!("num_vqs={num_vqs}"), 1, SOON)?;
        let device = DeviceOptions {
            num_vqs,
            ..DeviceOptions::default()
        };
        let mut options = GuestOptions::default()
            .device(vhost_user_console(&folder.join("vp.sock"), &device))
            .agent(&program("virtproxy-agent"))
            .file(GuestFile::copy(program("peer"), "/usr/bin/peer"))
            .file(GuestFile::packaged("usr/sbin/qemu-ga"));
        options.smp = processors;
        let guest = Lab::get()?.boot(options)?;
        guest.check(&format!(
            "setsid peer serve 127.0.0.1:7000 >/tmp/peer.log 2>&1 &\n\
             setsid virtproxy-agent -c virtserial-open:/dev/virtio-ports/org.virtproxy.0:- \
             -i peer:127.0.0.1:7000 >/tmp/agent.log 2>&1 &\n\
             setsid qemu-ga -m virtio-serial -p {} -t /run >/tmp/qemu-ga.log 2>&1 &\n\
             setsid getty 0 hvc0 vt100 >/tmp/getty.log 2>&1 &",
            guest.virtio_port(QGA)?
        ))?;
        daemon.wait_log("session established", 1, 3 * SOON)?;
        Ok(Ports {
            guest,
            daemon,
            folder,
            peer,
        })
    }

    /// `virtproxy port ...`
    fn command(&self, words: &[&str]) -> Result<String> {
        let output = Command::new(program("virtproxy"))
            .args(["port"])
            .args(words)
            .args(["--admin".as_ref(), self.folder.join("admin.sock").as_path()])
            .output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        ensure!(
            output.status.success(),
            "port {words:?}: {}",
            text(&output.stderr)
        );
        Ok(text(&output.stdout))
    }
}

impl Drop for Ports {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.daemon.log());
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// What the guest agent answers to a line.
fn ask(agent: &mut BufReader<UnixStream>, line: &[u8]) -> Result<String> {
    agent.get_mut().write_all(line)?;
    let mut answer = Vec::new();
    agent.read_until(b'\n', &mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn qemu_ga(path: &Path) -> Result<String> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(3 * SOON))?;
    let mut agent = BufReader::new(stream);
    let sync =
        b"\xff{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":987654321}}\n".as_slice();
    agent.get_mut().write_all(sync)?;
    // Whatever an earlier client left behind ends at the delimiter.
    agent.read_until(0xff, &mut Vec::new())?;
    let synced = ask(&mut agent, b"")?;
    ensure!(synced.contains("987654321"), "{synced}");
    ask(&mut agent, b"{\"execute\":\"guest-info\"}\n")
}

/// Reads until `text` has come.
fn expect(terminal: &mut File, text: &str) -> Result<String> {
    let (mut said, mut chunk) = (String::new(), [0; 256]);
    let end = Instant::now() + 3 * SOON;
    while !said.contains(text) {
        let mut poll = libc::pollfd {
            fd: terminal.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid `pollfd`.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 100) };
        ensure!(Instant::now() < end, "no {text:?} in {said:?}");
        if ready == 1 {
            let n = terminal.read(&mut chunk)?;
            said.push_str(&String::from_utf8_lossy(&chunk[..n]));
        }
    }
    Ok(said)
}

fn open_terminal(path: &Path, columns: u16, rows: u16) -> Result<File> {
    let terminal = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    resize(&terminal, columns, rows)?;
    Ok(terminal)
}

fn resize(terminal: &File, columns: u16, rows: u16) -> Result<()> {
    let size = libc::winsize {
        ws_col: columns,
        ws_row: rows,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: a valid `winsize`.
    let done = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    ensure!(done == 0, "{}", std::io::Error::last_os_error());
    Ok(())
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn programs_that_know_nothing_of_virtproxy_have_ports_of_their_own() -> Result<()> {
    let ports = Ports::start(2)?;
    guest_agent_beside_bulk(&ports)?;
    login_on_the_console(&ports)?;
    ports_come_and_go(&ports)
}

/// An unmodified qemu-ga answers, client after client, while the mux port carries bulk.
fn guest_agent_beside_bulk(ports: &Ports) -> Result<()> {
    let (address, mut answers, mut slowest) = (ports.peer.clone(), 0, Duration::ZERO);
    let bulk = std::thread::spawn(move || {
        [peer::echo, peer::upload, peer::download]
            .into_iter()
            .enumerate()
            .try_for_each(|(n, transfer)| transfer(&address, 96 * MIB, 77 + n as u64))
    });
    loop {
        let last = bulk.is_finished();
        let start = Instant::now();
        let info = qemu_ga(&ports.folder.join("qga.sock"))?;
        ensure!(info.contains("guest-sync-delimited"), "{info}");
        (answers, slowest) = (answers + 1, slowest.max(start.elapsed()));
        if last {
            break;
        }
    }
    bulk.join().expect("no panic")?;
    ensure!(answers > 1, "the bulk was over before qemu-ga answered");
    println!(
        "beside 3 x 96 MiB over the mux (hashes equal): {answers} clients had guest-sync-delimited and guest-info \
         answered by qemu-ga, the slowest in {slowest:?}"
    );
    Ok(())
}

/// Somebody logs in on hvc0, through the terminal, and its size follows.
fn login_on_the_console(ports: &Ports) -> Result<()> {
    let mut terminal = open_terminal(&ports.folder.join("console"), 132, 43)?;
    // getty's prompt was for nobody; a line end asks for another.
    terminal.write_all(b"\r")?;
    expect(&mut terminal, "login: ")?;
    terminal.write_all(b"root\r")?;
    expect(&mut terminal, "Password: ")?;
    terminal.write_all(b"virtproxy\r")?;
    expect(&mut terminal, "guest# ")?;
    terminal.write_all(b"echo $((6 * 7)); tty\r")?;
    expect(&mut terminal, "42\r\n/dev/hvc0")?;
    for (columns, rows) in [(132, 43), (100, 30)] {
        resize(&terminal, columns, rows)?;
        let size = format!("{rows} {columns}");
        wait_for(SOON, || {
            ports
                .guest
                .check("stty -F /dev/hvc0 size")
                .is_ok_and(|said| said == size)
        })
        .with_context(|| {
            format!(
                "stty says {:?}",
                ports.guest.check("stty -F /dev/hvc0 size")
            )
        })?;
    }
    println!("a login on hvc0 through the terminal ran a command; stty followed its size twice");
    Ok(())
}

/// The guest sees ports that are added and removed while it runs, also when a program has one open.
fn ports_come_and_go(ports: &Ports) -> Result<()> {
    let names = || ports.guest.check("cat /sys/class/virtio-ports/*/name");
    let listed = ports.command(&["list"])?;
    ensure!(
        listed.contains(QGA) && listed.contains("console"),
        "{listed}"
    );
    for round in 0..5 {
        let added = ports.command(&["add", &format!("{HOT}=pty")])?;
        let terminal = added
            .trim_end()
            .rsplit_once(" at ")
            .context("no path in the answer")?
            .1
            .to_owned();
        wait_for(SOON, || names().is_ok_and(|names| names.contains(HOT)))?;
        let mut terminal = open_terminal(Path::new(&terminal), 80, 25)?;
        // Until the terminal has been noticed, a reader of the port sees its end.
        let noticed = |list: String| {
            let mut lines = list.lines();
            lines.any(|line| line.contains(HOT) && line.contains("\tconnected\t"))
        };
        wait_for(SOON, || ports.command(&["list"]).is_ok_and(noticed))?;
        terminal.write_all(b"from the host\n")?;
        // It reads a line, and is then left waiting for another one.
        ports.guest.check(&format!(
            "f={}; setsid sh -c \"exec 3<>$f; read line <&3; echo got \\$line >&3; read line <&3; echo gone\" \
             >/tmp/hot{round}.log 2>&1 &",
            ports.guest.virtio_port(HOT)?
        ))?;
        expect(&mut terminal, "got from the host")?;
        let removed = ports.command(&["remove", HOT])?;
        ensure!(removed == format!("removed {HOT}\n"), "{removed}");
        ensure!(!names()?.contains(HOT), "the guest still has the port");
        ports.guest.check(&format!(
            "until grep -q gone /tmp/hot{round}.log; do sleep 0.1; done"
        ))?;
    }
    println!("5 times a port was added, used, and removed while a program of the guest read it");
    let info = qemu_ga(&ports.folder.join("qga.sock"))?;
    ensure!(info.contains("guest-sync-delimited"), "{info}");
    peer::echo(&ports.peer, 8 * MIB, 91)
}

/// A guest with one processor goes on when its daemon ends in order: its kernel has no port left to speak of.
#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn one_processor_goes_on_when_the_daemon_ends() -> Result<()> {
    let mut ports = Ports::start(1)?;
    qemu_ga(&ports.folder.join("qga.sock"))?;
    peer::echo(&ports.peer, MIB, 5)?;
    let start = Instant::now();
    let status = ports.daemon.terminate()?;
    ensure!(status.code() == Some(0), "the daemon ended with {status}");
    let ended = start.elapsed();
    ensure!(
        !ports.daemon.log().contains("has not let go"),
        "{}",
        ports.daemon.log()
    );
    // Whoever had a port open closes it now, which is when the kernel would spin.
    ports.guest.check(
        "kill $(pidof virtproxy-agent) $(pidof qemu-ga); n=0; \
         while pidof virtproxy-agent qemu-ga; do sleep 0.1; n=$((n+1)); [ $n -lt 100 ] || exit 1; done",
    )?;
    let left = ports.guest.check("ls /sys/class/virtio-ports | wc -l")?;
    ensure!(left == "0", "{left} ports are left");
    println!("the daemon ended {ended:?} after SIGTERM; the guest's one processor goes on");
    Ok(())
}
