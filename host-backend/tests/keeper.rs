//! The keeper: workers of the real program are killed and replaced under a guest that must not notice more than a hang-up.

mod frontend;

use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use frontend::guest::{DEVICE_REMOVE, PORT_OPEN};
use frontend::ring::PATIENCE;
use frontend::{Guest, Pattern, Setup, socket_path};

const PROGRAM: &str = env!("CARGO_BIN_EXE_virtproxy");

/// A worker that lasted this long is followed at once.
const LASTS: Duration = Duration::from_millis(250);

/// A running keeper; ended when dropped, whatever happened.
struct Program {
    child: Child,
    sockets: Vec<PathBuf>,
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Program {
    /// With `devices` devices; the flags are for the first.
    fn start(path: &Path, devices: usize, flags: &[String]) -> Self {
        let sockets: Vec<_> = (0..devices).map(|_| socket_path()).collect();
        let mut command = Command::new(path);
        for socket in &sockets {
            command.args(["-c", &format!("vhost-user:{}:-", socket.display())]);
        }
        let command = command.args(flags).stdin(Stdio::null());
        let program = Program {
            child: command.spawn().unwrap(),
            sockets,
        };
        wait("the sockets are there", || {
            program.sockets.iter().all(|socket| socket.exists())
        });
        program
    }

    fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// The worker, if there is one now and but one.
    fn worker(&self) -> Option<i32> {
        let pid = self.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        children.trim().parse().ok()
    }

    fn signal_worker(&self, signal: i32) -> i32 {
        let mut worker = None;
        wait("there is a worker", || {
            worker = self.worker();
            worker.is_some()
        });
        let worker = worker.unwrap();
        kill(worker, signal);
        worker
    }

    /// Waits for another worker.
    fn wait_next(&self, old: i32) {
        wait("there is another worker", || {
            self.worker().is_some_and(|worker| worker != old)
        });
    }
}

fn kill(pid: i32, signal: i32) {
    // SAFETY: a system call without pointers.
    unsafe { libc::kill(pid, signal) };
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "it never happened that {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Connects to the place of a port, as soon as somebody serves it.
fn client(place: &Path) -> UnixStream {
    let mut stream = None;
    wait("the port's place can be connected to", || {
        stream = UnixStream::connect(place).ok();
        stream.is_some()
    });
    let stream = stream.unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// One device with a port, number 1, that a client finds at the path.
fn with_port() -> (Program, PathBuf, Guest) {
    with_port_at(socket_path())
}

fn with_port_at(place: PathBuf) -> (Program, PathBuf, Guest) {
    let flag = format!("--port=org.example.0=unix-listen:{}", place.display());
    let program = Program::start(Path::new(PROGRAM), 1, &[flag]);
    let setup = Setup {
        ports: 2,
        ..Setup::default()
    };
    let guest = Guest::boot(&program.sockets[0], setup);
    (program, place, guest)
}

/// What a guest that floods writes before it sees that our side is closed, at most.
const STALE: usize = 64 * 1024;

/// Bytes both ways, all of which arrive.
fn check(guest: &mut Guest, place: &Path, seed: u64) {
    check_behind(guest, place, seed, 0);
}

/// The same, but before them the client may get so much that the guest wrote to another one: see "Known to be missing" in
/// ARCHITECTURE.md.
fn check_behind(guest: &mut Guest, place: &Path, seed: u64, most: usize) {
    guest.open(1);
    let mut client = client(place);
    guest.wait_host_connected(1, true);
    let bytes = Pattern::new(seed).take(100_000);
    let expected = bytes.clone();
    thread::scope(|scope| {
        let other = scope.spawn(move || {
            client.write_all(&expected).unwrap();
            let mut received = vec![0; expected.len()];
            client.read_exact(&mut received).unwrap();
            let start = received.windows(16).position(|few| *few == expected[..16]);
            let stale = start.expect("other bytes came from the guest");
            assert!(stale <= most, "{stale} bytes came before those for us");
            received.drain(..stale);
            received.resize(expected.len(), 0);
            let (_, rest) = received.split_at_mut(expected.len() - stale);
            client.read_exact(rest).unwrap();
            assert!(received == expected, "other bytes came from the guest");
        });
        assert!(guest.read(1, bytes.len()) == bytes, "other bytes came");
        guest.write_all(1, &bytes);
        other.join().unwrap();
    });
    // Or the next client would be taken for this one, and miss what is written meanwhile.
    guest.wait_host_connected(1, false);
}

/// The guest hears of the end, and does what a program there does.
fn hung_up(guest: &mut Guest) {
    guest.wait_host_connected(1, false);
    guest.close(1);
}

/// How often the guest was told that the port is closed on our side.
fn hang_ups(guest: &Guest, port: u32) -> usize {
    let closed = (port, PORT_OPEN, 0);
    let heard = guest.heard.iter();
    heard
        .filter(|said| (said.id, said.event, said.value) == closed)
        .count()
}

/// Floods both ways until the worker is gone; what arrives is right as far as it goes.
fn flood(guest: &mut Guest, place: &Path, seed: u64, end: impl FnOnce()) {
    guest.open(1);
    let mut client = client(place);
    guest.wait_host_connected(1, true);
    let mut to_guest = client.try_clone().unwrap();
    let writer = thread::spawn(move || {
        let mut pattern = Pattern::new(seed);
        while to_guest.write_all(&pattern.take(10_000)).is_ok() {}
    });
    let reader = thread::spawn(move || {
        let (mut pattern, mut buffer, mut total) = (Pattern::new(!seed), vec![0; 100_000], 0);
        loop {
            match client.read(&mut buffer) {
                Ok(0) => return total,
                Ok(len) => pattern.expect(&buffer[..len]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return total,
                Err(error) => panic!("{error}"),
            }
            total += 1;
        }
    });
    let (mut out, mut expected, mut chunk) = (Pattern::new(!seed), Pattern::new(seed), Vec::new());
    let (begun, mut end) = (Instant::now(), Some(end));
    let lasts = Duration::from_micros(seed * 7919 % 20_000);
    while guest.ports[1].host_connected {
        if chunk.is_empty() {
            chunk = out.take(10_000);
        }
        let written = guest.write(1, &chunk);
        chunk.drain(..written);
        expected.expect(&guest.take(1, 100_000));
        if begun.elapsed() > lasts
            && let Some(end) = end.take()
        {
            end();
        }
        assert!(begun.elapsed() < PATIENCE, "the guest was not hung up on");
    }
    guest.close(1);
    writer.join().unwrap();
    reader.join().unwrap();
}

#[test]
fn a_worker_killed_under_a_flood_is_followed_by_another() {
    let (program, place, mut guest) = with_port();
    for round in 0..30 {
        flood(&mut guest, &place, round, || {
            program.signal_worker(libc::SIGKILL);
        });
        check_behind(&mut guest, &place, 1000 + round, STALE);
        guest.close(1);
        thread::sleep(LASTS);
    }
    assert!(guest.heard.iter().all(|said| said.event != DEVICE_REMOVE));
}

#[test]
fn sighup_replaces_the_worker_and_takes_no_port_from_the_guest() {
    let (program, place, mut guest) = with_port();
    for round in 0..20 {
        let mut old = 0;
        flood(&mut guest, &place, round, || {
            old = program.worker().unwrap();
            kill(program.pid(), libc::SIGHUP);
        });
        program.wait_next(old);
        check_behind(&mut guest, &place, 1000 + round, STALE);
        guest.close(1);
    }
    assert!(guest.heard.iter().all(|said| said.event != DEVICE_REMOVE));
}

#[test]
fn a_ring_goes_on_where_it_was_beyond_its_end_and_after_a_stop() {
    let (program, place, mut guest) = with_port();
    for round in 0..5 {
        check(&mut guest, &place, round);
        // More than 65,536 chains have gone through no ring yet; 256 fit in.
        guest.pause_and_resume(|_| {
            let old = program.signal_worker(libc::SIGKILL);
            program.wait_next(old);
        });
        hung_up(&mut guest);
    }
}

/// A port that the guest closed with its ring full, as its client, which this returns, does not read.
fn fill(guest: &mut Guest, place: &Path) -> UnixStream {
    guest.open(1);
    let peer = client(place);
    guest.wait_host_connected(1, true);
    while guest.write(1, &[7; 32_768]) > 0 {
        thread::sleep(Duration::from_micros(100));
    }
    guest.close(1);
    peer
}

#[test]
fn what_lies_in_the_ring_of_a_closed_port_is_not_the_next_sessions() {
    let (program, place, mut guest) = with_port();
    let peer = fill(&mut guest, &place);
    let old = program.signal_worker(libc::SIGKILL);
    program.wait_next(old);
    drop(peer);
    check(&mut guest, &place, 1);
}

#[test]
fn nor_is_it_if_the_machine_is_stopped_meanwhile() {
    let (program, place, mut guest) = with_port();
    for round in 0..5 {
        let peer = fill(&mut guest, &place);
        guest.pause_and_resume(|_| {
            let old = program.signal_worker(libc::SIGKILL);
            program.wait_next(old);
        });
        drop(peer);
        check(&mut guest, &place, round);
        guest.close(1);
    }
}

#[test]
fn a_guest_that_never_closes_its_port_is_served_by_each_worker() {
    let (program, place, mut guest) = with_port();
    // As programs do that open their port and wait.
    guest.open(1);
    for round in 0..10 {
        let bytes = Pattern::new(round).take(5000);
        for _ in 0..2 {
            let old = program.signal_worker(libc::SIGKILL);
            program.wait_next(old);
            let mut client = client(&place);
            guest.wait_host_connected(1, true);
            client.write_all(&bytes).unwrap();
            assert!(guest.read(1, bytes.len()) == bytes);
            guest.write_all(1, &bytes);
            let mut received = vec![0; bytes.len()];
            client.read_exact(&mut received).unwrap();
            assert!(received == bytes, "round {round}");
            // To nobody, or to a client that dies with the worker.
            drop(client);
            guest.wait_host_connected(1, false);
        }
        guest.write(1, b"what the next client must not see");
    }
}

#[test]
fn a_client_of_a_worker_that_is_killed_sees_a_reset_and_no_end_of_file() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let program = Program::start(Path::new(PROGRAM), 1, &[format!("-oecho:{address}")]);
    // Nobody in the guest answers: it waits.
    let mut client = TcpStream::connect(address).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    program.signal_worker(libc::SIGKILL);
    let end = client.read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(end, Err(ErrorKind::ConnectionReset));
}

#[test]
fn a_console_sees_nothing() {
    let place = socket_path();
    let flag = format!("--console=unix-listen:{}", place.display());
    let program = Program::start(Path::new(PROGRAM), 1, &[flag]);
    let setup = Setup {
        ports: 2,
        ..Setup::default()
    };
    let mut guest = Guest::boot(&program.sockets[0], setup);
    guest.open(1);
    for round in 0..20 {
        let mut peer = client(&place);
        peer.write_all(b"typed").unwrap();
        assert_eq!(guest.read(1, 5), b"typed");
        guest.write_all(1, b"printed");
        let mut printed = [0; 7];
        peer.read_exact(&mut printed).unwrap();
        assert_eq!(&printed, b"printed");
        let old = program.signal_worker(libc::SIGKILL);
        // It may have died before the guest was told that this was printed: then it is printed again.
        let mut again = Vec::new();
        let _ = peer.read_to_end(&mut again);
        let twice = again == b"printed";
        assert!(again.is_empty() || twice, "round {round}: {again:?}");
        program.wait_next(old);
    }
    guest.handle_control();
    assert_eq!(hang_ups(&guest, 1), 0);
}

#[test]
fn a_request_that_a_worker_did_not_answer_is_answered_by_the_next() {
    let (program, _, mut guest) = with_port();
    for _ in 0..20 {
        let old = program.signal_worker(libc::SIGSTOP);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(5));
                kill(old, libc::SIGKILL);
            });
            assert_eq!(guest.config(4, 4), 2u32.to_le_bytes());
        });
    }
    for _ in 0..20 {
        let old = program.signal_worker(libc::SIGSTOP);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(5));
                kill(old, libc::SIGKILL);
            });
            guest.reboot();
        });
    }
}

#[test]
fn a_driver_starts_whenever_its_worker_is_killed() {
    let (program, place, mut guest) = with_port();
    for round in 0..12 {
        thread::sleep(LASTS);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_micros(round * 487));
                program.signal_worker(libc::SIGKILL);
            });
            guest.reboot();
        });
    }
    check(&mut guest, &place, 1);
}

#[test]
fn another_qemu_comes_after_one_whose_worker_is_dead() {
    let (program, place, guest) = with_port();
    let setup = guest.setup;
    program.signal_worker(libc::SIGKILL);
    drop(guest);
    let mut guest = Guest::boot(&program.sockets[0], setup);
    let old = program.signal_worker(libc::SIGKILL);
    program.wait_next(old);
    check(&mut guest, &place, 1);
}

#[test]
fn two_devices_are_kept() {
    let program = Program::start(Path::new(PROGRAM), 2, &[]);
    let boot = |socket: &PathBuf| Guest::boot(socket, Setup::default());
    let mut guests: Vec<_> = program.sockets.iter().map(boot).collect();
    for _ in 0..10 {
        for guest in &mut guests {
            guest.wait_host_connected(0, true);
            guest.open(0);
        }
        program.signal_worker(libc::SIGKILL);
        for guest in &mut guests {
            let told = hang_ups(guest, 0);
            guest.wait_control("it is hung up on", |guest| hang_ups(guest, 0) > told);
            guest.close(0);
        }
    }
    for mut guest in guests {
        guest.reboot();
    }
}

#[test]
fn ports_added_and_removed_while_it_runs_are_so_with_the_next_worker() {
    let (gone, place, admin) = (socket_path(), socket_path(), socket_path());
    let flags = [
        format!("--port=org.example.gone=unix-listen:{}", gone.display()),
        format!("--admin={}", admin.display()),
        "--max-ports=3".to_owned(),
    ];
    let program = Program::start(Path::new(PROGRAM), 1, &flags);
    let setup = Setup {
        ports: 2,
        spare: 1,
        ..Setup::default()
    };
    let mut guest = Guest::boot(&program.sockets[0], setup);
    let ask = |words: &[&str]| {
        wait("there is an admin socket", || {
            UnixStream::connect(&admin).is_ok()
        });
        let mut command = Command::new(PROGRAM);
        let output = command
            .args(words)
            .arg("--admin")
            .arg(&admin)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    thread::scope(|scope| {
        scope.spawn(|| ask(&["port", "remove", "org.example.gone"]));
        guest.wait_control("the port went", |guest| !guest.ports[1].added);
    });
    let added = format!("org.example.added=unix-listen:{}", place.display());
    ask(&["port", "add", &added]);
    let name = Some(&b"org.example.added"[..]);
    guest.wait_control("the port came", |guest| {
        guest.ports[1].name.as_deref() == name
    });
    let old = program.signal_worker(libc::SIGKILL);
    program.wait_next(old);
    check(&mut guest, &place, 1);
    let list = ask(&["port", "list"]);
    assert!(list.starts_with("org.example.added\t"), "{list}");
    assert_eq!(list.lines().count(), 1, "{list}");
    assert_eq!(died(&admin), 1, "it is told of the worker before it");
}

/// What the admin socket says of workers that died.
fn died(admin: &Path) -> u64 {
    let mut socket = UnixStream::connect(admin).unwrap();
    writeln!(socket, r#"{{"version":1,"request":"counters"}}"#).unwrap();
    let mut line = String::new();
    BufReader::new(socket).read_line(&mut line).unwrap();
    let answer: Value = serde_json::from_str(&line).unwrap();
    answer["ok"]["workers"]["died"].as_u64().unwrap()
}

#[test]
fn a_file_that_cannot_take_over_changes_nothing_and_one_that_can_does() -> io::Result<()> {
    let path = socket_path();
    fs::copy(PROGRAM, &path)?;
    let replace = |bytes: &[u8]| {
        let new = path.with_extension("new");
        fs::write(&new, bytes).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(&new, &path).unwrap();
    };
    let program = Program::start(&path, 1, &[]);
    let mut guest = Guest::boot(&program.sockets[0], Setup::default());
    let old = program.worker().unwrap();
    for bad in ["no program", "#!/bin/sh\nexit 1\n"] {
        replace(bad.as_bytes());
        kill(program.pid(), libc::SIGHUP);
        thread::sleep(Duration::from_millis(200));
        assert_eq!(program.worker(), Some(old), "{bad}");
        guest.open(0);
        guest.close(0);
    }
    replace(&fs::read(PROGRAM)?);
    kill(program.pid(), libc::SIGHUP);
    program.wait_next(old);
    guest.open(0);
    guest.wait_host_connected(0, true);
    fs::remove_file(path)
}

#[test]
fn a_worker_does_not_outlive_its_keeper() {
    // The worker may not be root any more when it tidies up.
    let folder = socket_path();
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    let (mut program, place, guest) = with_port_at(folder.join("place"));
    let worker = program.worker().unwrap();
    program.child.kill().unwrap();
    program.child.wait().unwrap();
    wait("the worker ended", || {
        !Path::new(&format!("/proc/{worker}")).exists()
    });
    assert!(!place.exists(), "it ended in order");
    fs::remove_dir(folder).unwrap();
    drop(guest);
}

#[test]
fn a_worker_that_is_denied_a_system_call_is_followed_by_another() {
    let (program, place, mut guest) = with_port();
    let old = program.signal_worker(libc::SIGSYS);
    program.wait_next(old);
    check(&mut guest, &place, 1);
}

#[test]
fn the_exit_code_is_the_workers() {
    let (mut program, _, mut guest) = with_port();
    kill(program.pid(), libc::SIGTERM);
    guest.wait_control("the ports went", |guest| {
        guest.ports.iter().all(|port| !port.added)
    });
    assert_eq!(program.child.wait().unwrap().code(), Some(0));
    assert!(!program.sockets[0].exists());
}
