//! The sandbox of `virtproxy`: it is what it says, every kind of forward and channel works in it, and what is not allowed
//! does not happen and is told.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;

use anyhow::{Context, Result, ensure};
use virtproxy_tests::scene::{Daemon, SOON, new_address, program, wait_works};
use virtproxy_tests::{creds, peer};

/// `nobody`, by Linux's custom.
const NOBODY: u32 = 65534;
/// What a keeper's capabilities may be: those to start workers with.
const STARTING: u64 = 0x5ee;
/// How the program exits when a system call is not allowed.
const DENIED: i32 = 5;
const MIB: u64 = 1 << 20;

/// A folder of one test, with everything in it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        Ok(Folder(virtproxy_lab::temporary_folder()?))
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn flags(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// Starts `virtproxy`; it is in its sandbox then.
fn start(folder: &Folder, words: &[&str]) -> Result<Daemon> {
    let daemon = Daemon::start(&folder.0, &flags(words))?;
    daemon.wait_log("sandbox: ", 1, SOON)?;
    Ok(daemon)
}

/// A service that sends back what comes, and its address.
fn tcp_peer(address: &str) -> Result<String> {
    let listener = TcpListener::bind(address)?;
    let address = listener.local_addr()?.to_string();
    thread::spawn(move || peer::serve(&listener));
    Ok(address)
}

/// The same at a UNIX socket.
fn unix_echo(path: &str) -> Result<()> {
    let listener = UnixListener::bind(path)?;
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            thread::spawn(move || io::copy(&mut &client, &mut &client));
        }
    });
    Ok(())
}

/// The same for datagrams, at the first address of `host`.
fn udp_echo(host: &str) -> Result<u16> {
    let socket = UdpSocket::bind((host, 0))?;
    let port = socket.local_addr()?.port();
    thread::spawn(move || {
        let mut datagram = [0; 2048];
        while let Ok((len, client)) = socket.recv_from(&mut datagram) {
            let _ = socket.send_to(&datagram[..len], client);
        }
    });
    Ok(port)
}

fn port_of(address: &str) -> &str {
    address.rsplit_once(':').map_or("", |(_, port)| port)
}

/// So many bytes go there and back, and both programs end in order.
fn works(address: &str, bytes: u64, ends: [Daemon; 2]) -> Result<()> {
    let logs = || format!("{}\n{}", ends[0].log(), ends[1].log());
    wait_works(address, 3 * SOON).with_context(logs)?;
    peer::echo(address, bytes, 7).with_context(logs)?;
    for mut end in ends {
        let status = end.terminate()?;
        ensure!(status.success(), "{status}:\n{}", end.log());
    }
    Ok(())
}

#[test]
fn every_kind_of_forward_works() -> Result<()> {
    let folder = Folder::new()?;
    let (a, b, c) = (new_address(), new_address(), new_address());
    let (address, named) = (tcp_peer(&new_address())?, tcp_peer("127.0.0.1:0")?);
    let (front, back) = (folder.path("front"), folder.path("back"));
    unix_echo(&back)?;
    let (udp, named_udp) = (udp_echo("127.0.0.1")?, udp_echo("localhost")?);
    let channel = folder.path("channel");
    let near = start(
        &folder,
        &[
            &format!("-cunix-listen:{channel}:-"),
            &format!("-oaddress:{a}"),
            &format!("-oname:{b}"),
            &format!("-ounix:{front}:-"),
            &format!("-oaddress/udp:{a}"),
            &format!("-oname/udp:{c}"),
        ],
    )?;
    let far = start(
        &folder,
        &[
            &format!("-cunix-connect:{channel}:-"),
            &format!("-iaddress:{address}"),
            &format!("-iname:localhost:{}", port_of(&named)),
            &format!("-iunix:{back}:-"),
            &format!("-iaddress/udp:127.0.0.1:{udp}"),
            &format!("-iname/udp:localhost:{named_udp}"),
        ],
    )?;
    let logs = || format!("{}\n{}", near.log(), far.log());
    wait_works(&a, SOON).with_context(logs)?;
    wait_works(&b, SOON).with_context(logs)?;
    let mut client = UnixStream::connect(&front)?;
    client.set_read_timeout(Some(SOON))?;
    client.write_all(b"there and back")?;
    let mut answer = [0; 14];
    client.read_exact(&mut answer).with_context(logs)?;
    ensure!(&answer == b"there and back");
    for to in [&a, &c] {
        let client = UdpSocket::bind("127.0.0.1:0")?;
        client.set_read_timeout(Some(SOON))?;
        client.send_to(b"datagram", to)?;
        let (len, _) = client.recv_from(&mut answer).with_context(logs)?;
        ensure!(&answer[..len] == b"datagram");
    }
    works(&a, MIB, [near, far])
}

/// Joins two ends, of which the first is started first, and has so many bytes carried.
fn joined(folder: &Folder, first: &[&str], second: &[&str], bytes: u64) -> Result<()> {
    let address = new_address();
    let target = tcp_peer(&new_address())?;
    let (out, serve) = (format!("-opeer:{address}"), format!("-ipeer:{target}"));
    let near = start(folder, &[first, &[&out]].concat())?;
    let far = start(folder, &[second, &[&serve]].concat())?;
    works(&address, bytes, [near, far]).with_context(|| format!("{first:?} <-> {second:?}"))
}

#[test]
fn channels_over_tcp_and_tls_work() -> Result<()> {
    let folder = Folder::new()?;
    let tcp = new_address();
    let (listen, connect) = (
        format!("-ctcp-listen:{tcp}"),
        format!("-ctcp-connect:{tcp}"),
    );
    joined(&folder, &[&listen], &[&connect], MIB)?;
    let port = TcpListener::bind("localhost:0")?.local_addr()?.port();
    let (listen, connect) = (
        format!("-ctcp-listen:localhost:{port}"),
        format!("-ctcp-connect:localhost:{port}"),
    );
    joined(&folder, &[&listen], &[&connect], MIB)?;
    let tls = new_address();
    let host = tls.split_once(':').context("it has a port")?.0;
    creds::make(&folder.0.join("tls"), host)?;
    let creds = format!("--tls-creds={}", folder.path("tls"));
    let (listen, connect) = (
        format!("-ctcp-listen:{tls}"),
        format!("-ctcp-connect:{tls}"),
    );
    joined(&folder, &[&listen, &creds], &[&connect, &creds], MIB)
}

#[test]
fn channels_over_a_monitor_a_serial_line_and_standard_input_work() -> Result<()> {
    let folder = Folder::new()?;
    let (path, guest) = (folder.path("monitor"), folder.path("guest"));
    monitor(&path, &guest)?;
    joined(
        &folder,
        &[&format!("-cunix-listen:{guest}:-")],
        &[&format!("-chvsock-connect:{path}:9000")],
        MIB,
    )?;
    let [first, second] = serial_line()?;
    joined(
        &folder,
        &[&format!("-cisa-serial-open:{first}:921600")],
        &[&format!("-cisa-serial-open:{second}:921600")],
        32 << 10,
    )?;
    let address = new_address();
    let target = tcp_peer(&new_address())?;
    let pipes = [folder.path("there"), folder.path("back")];
    for pipe in &pipes {
        ensure!(Command::new("mkfifo").arg(pipe).status()?.success());
    }
    let end = |streams: &str, forward: &str| {
        let mut shell = Command::new("sh");
        let virtproxy = program("virtproxy").display().to_string();
        shell.args([
            "-c",
            &format!("exec {virtproxy} -cstdio:-:- {forward} {streams}"),
        ]);
        Daemon::run(&folder.0, shell)
    };
    let [there, back] = &pipes;
    let near = end(&format!("<{there} >{back}"), &format!("-opeer:{address}"))?;
    let far = end(&format!(">{there} <{back}"), &format!("-ipeer:{target}"))?;
    works(&address, MIB, [near, far])
}

/// There is no machine behind it here; but nothing that it tries is denied.
#[test]
fn vsock_is_tried() -> Result<()> {
    let folder = Folder::new()?;
    for (channel, said) in [
        ("vsock-listen:any:9005", "listen"),
        ("vsock-connect:local:9006", "waiting: "),
    ] {
        let mut daemon = start(&folder, &["-c", channel])?;
        daemon.wait_log(said, 1, SOON)?;
        let status = daemon.terminate()?;
        ensure!(status.success(), "{channel}: {status}:\n{}", daemon.log());
    }
    Ok(())
}

/// A machine's monitor, whose guest listens on every port at the UNIX socket `guest`.
fn monitor(path: &str, guest: &str) -> Result<()> {
    let listener = UnixListener::bind(path)?;
    let guest = guest.to_owned();
    thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let mut byte = [0];
            while client.read_exact(&mut byte).is_ok() && &byte != b"\n" {}
            if let Ok(inner) = UnixStream::connect(&guest)
                && client.write_all(b"OK 1073741824\n").is_ok()
            {
                both_ways(client.into(), inner.into());
            }
        }
    });
    Ok(())
}

/// The two ends of a serial line, as paths.
fn serial_line() -> Result<[String; 2]> {
    let (first, second) = (terminal()?, terminal()?);
    both_ways(first.0, second.0);
    Ok([first.1, second.1])
}

/// A pseudo-terminal: its master, and the path of its slave, which stays open.
fn terminal() -> Result<(OwnedFd, String)> {
    let (mut master, mut slave) = (0, 0);
    // SAFETY: two valid places for descriptors; no name, mode or size is given.
    let made = unsafe {
        let mut mode: libc::termios = std::mem::zeroed();
        libc::cfmakeraw(&raw mut mode);
        libc::openpty(
            &raw mut master,
            &raw mut slave,
            std::ptr::null_mut(),
            &raw const mode,
            std::ptr::null(),
        )
    };
    ensure!(made == 0, "{}", io::Error::last_os_error());
    // SAFETY: both are new and nobody else's.
    let (master, slave) = unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
    let path = fs::read_link(format!("/proc/self/fd/{}", slave.as_raw_fd()))?;
    std::mem::forget(slave);
    Ok((master, path.display().to_string()))
}

/// Carries bytes until either side ends.
fn both_ways(one: OwnedFd, other: OwnedFd) {
    let (one, other) = (File::from(one), File::from(other));
    let (from, to) = (one.try_clone(), other.try_clone());
    thread::spawn(move || io::copy(&mut &one, &mut &other));
    if let (Ok(from), Ok(to)) = (from, to) {
        thread::spawn(move || io::copy(&mut &to, &mut &from));
    }
}

/// The value of a line in `/proc/PID/status`.
fn status(process: u32, key: &str) -> Result<String> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let value = line.with_context(|| format!("no {key} in {status}"))?;
    Ok(value.trim().to_owned())
}

fn is_root() -> bool {
    // SAFETY: it takes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

#[test]
fn every_right_is_gone() -> Result<()> {
    let folder = Folder::new()?;
    let listen = format!("-cunix-listen:{}:-", folder.path("socket"));
    let reach = format!("-iunix:{}:-", folder.path("target"));
    let daemon = |words: &[&str]| start(&folder, words);
    let mut cases = vec![(vec![&*listen], NOBODY), (vec![&*listen, &*reach], 0)];
    if is_root() {
        cases.push((vec![&*listen, &*reach, "--user=nobody"], NOBODY));
    } else {
        println!("SKIPPED: which user is left, as only root can become another");
    }
    for (words, user) in cases {
        let daemon = daemon(&words)?;
        let pid = daemon.pid();
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            let left = status(pid, set)?;
            ensure!(left == "0000000000000000", "{words:?}: {set} {left}");
        }
        ensure!(status(pid, "NoNewPrivs:")? == "1");
        ensure!(status(pid, "Seccomp:")? == "2");
        if is_root() {
            ensure!(status(pid, "CapBnd:")? == "0000000000000000");
            let users = status(pid, "Uid:")?;
            let all = [&*user.to_string(); 4].join("\t");
            ensure!(users == all, "{words:?}: {users}");
            let stays = daemon.log().contains("has to stay root's, as ");
            ensure!(stays == (user == 0), "{}", daemon.log());
        }
    }
    let open = Daemon::start(&folder.0, &flags(&[&listen, "--no-sandbox"]))?;
    open.wait_log("WARN no sandbox: ", 1, SOON)?;
    ensure!(status(open.pid(), "Seccomp:")? == "0" && status(open.pid(), "NoNewPrivs:")? == "0");
    let command = Daemon::start(&folder.0, &flags(&["-cexec:sleep 9:-"]))?;
    command.wait_log(
        "WARN no sandbox, as the command of -c exec:sleep 9:-",
        1,
        SOON,
    )
}

#[test]
fn a_keeper_starts_every_worker_with_what_the_first_had() -> Result<()> {
    let folder = Folder::new()?;
    let address = match is_root() {
        true => new_address().replace(":7000", ":80"),
        false => new_address(),
    };
    let [device, front, port, file] = ["vp.sock", "front", "port", "file"].map(|n| folder.path(n));
    let mut keeper = start(
        &folder,
        &[
            &format!("-cvhost-user:{device}:-"),
            &format!("-otcp:{address}"),
            &format!("-ounix:{front}:-"),
            &format!("--port=a=unix-listen:{port}"),
            &format!("--port=b=file:{file}"),
        ],
    )?;
    let pid = keeper.pid().cast_signed();
    for n in 1.. {
        keeper.wait_log("sandbox: ", n, SOON)?;
        let &[worker] = &*keeper.children() else {
            anyhow::bail!("there is another number of workers:\n{}", keeper.log());
        };
        let users = [keeper.pid(), worker].map(|process| status(process, "Uid:"));
        let users = users.into_iter().collect::<Result<Vec<_>>>()?;
        ensure!(!is_root() || users == [["0"; 4].join("\t"), [&*NOBODY.to_string(); 4].join("\t")]);
        ensure!(
            status(worker, "CapPrm:")? == "0000000000000000" && status(worker, "Seccomp:")? == "2"
        );
        ensure!(status(keeper.pid(), "NoNewPrivs:")? == "1");
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            let left = u64::from_str_radix(&status(keeper.pid(), set)?, 16)?;
            ensure!(left & !STARTING == 0, "{set} {left:x}");
        }
        TcpStream::connect(&address)?;
        for socket in [&front, &port] {
            UnixStream::connect(socket).with_context(|| format!("worker {n}: {socket}"))?;
        }
        fs::remove_file(&file).with_context(|| format!("worker {n}"))?;
        match n {
            1 => kill(worker.cast_signed(), libc::SIGKILL),
            2 => kill(pid, libc::SIGHUP),
            _ => break,
        }
    }
    ensure!(keeper.terminate()?.success(), "{}", keeper.log());
    ensure!(!Path::new(&device).exists(), "the socket was left behind");
    Ok(())
}

fn kill(process: i32, signal: i32) {
    // SAFETY: plain integers.
    unsafe { libc::kill(process, signal) };
}

#[test]
fn a_keeper_that_is_taken_over_can_start_programs_but_reaches_no_other_process() -> Result<()> {
    let device = "-cvhost-user:/nonexistent/vp.sock:-";
    is_allowed(&[device, "--keeper", "run", "/bin/true"])?;
    let other = std::process::id().to_string();
    let output = planted(&[device, "--keeper", "signal", &other])?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(said.contains("not permitted"), "{output:?}");
    Ok(())
}

#[test]
fn an_ordinary_user_can_run_it() -> Result<()> {
    if !is_root() {
        println!("SKIPPED: an ordinary user runs everything here already");
        return Ok(());
    }
    let folder = Folder::new()?;
    chown(&folder.0, Some(NOBODY), Some(NOBODY))?;
    // The folders of the program may be closed to that user.
    let own = folder.path("virtproxy");
    fs::copy(program("virtproxy"), &own)?;
    let device = folder.path("vp.sock");
    let mut command = Command::new(own);
    command
        .args([&format!("-cvhost-user:{device}:-"), "--console=pty"])
        .args([&format!("--port=a=unix-listen:{}", folder.path("a"))])
        .args([&format!("--admin={}", folder.path("admin"))])
        .uid(NOBODY)
        .gid(NOBODY);
    // SAFETY: `umask` may be called between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::umask(0);
            Ok(())
        });
    }
    let mut daemon = Daemon::run(&folder.0, command)?;
    daemon.wait_log("waiting for QEMU", 1, SOON)?;
    ensure!(daemon.log().contains("sandbox: "), "{}", daemon.log());
    for socket in [&device, &folder.path("a"), &folder.path("admin")] {
        let mode = fs::metadata(socket)?.permissions().mode() & 0o777;
        ensure!(mode == 0o600, "{socket} has the mode {mode:o}");
    }
    ensure!(daemon.terminate()?.success(), "{}", daemon.log());
    ensure!(!Path::new(&device).exists(), "the socket was left behind");
    Ok(())
}

#[test]
fn a_device_in_a_folder_open_to_everybody_is_refused() -> Result<()> {
    let folder = Folder::new()?;
    fs::set_permissions(&folder.0, Permissions::from_mode(0o777))?;
    let device = format!("-cvhost-user:{}:-", folder.path("vp.sock"));
    let output = Command::new(program("virtproxy")).arg(&device).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(4), "{said}");
    for part in [
        "-c vhost-user:",
        "every user of this machine may write",
        "chmod o-w",
    ] {
        ensure!(said.contains(part), "no {part:?} in {said}");
    }
    Ok(())
}

/// Runs the program that was taken over.
fn planted(words: &[&str]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_planted"));
    Ok(command.args(words).stdin(Stdio::null()).output()?)
}

/// It is ended at once, and the call is told.
fn is_denied(words: &[&str], call: libc::c_long) -> Result<()> {
    let output = planted(words)?;
    let said = String::from_utf8_lossy(&output.stderr);
    let message = format!("the sandbox does not allow system call {call}, so the program ends");
    ensure!(
        output.status.code() == Some(DENIED) && said.contains(&message),
        "{words:?}: {output:?}"
    );
    Ok(())
}

/// It goes on, with an error that may be shown.
fn fails(words: &[&str]) -> Result<()> {
    let output = planted(words)?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() && said.contains("Permission denied") && said.contains("sandbox"),
        "{words:?}: {output:?}"
    );
    Ok(())
}

/// It is done.
fn is_allowed(words: &[&str]) -> Result<()> {
    let output = planted(words)?;
    ensure!(output.stdout == b"done\n", "{words:?}: {output:?}");
    Ok(())
}

#[test]
fn a_system_call_that_is_not_needed_ends_the_program_and_is_told() -> Result<()> {
    // A device whose forwards need nothing; and one with a target.
    let bare = "-cvhost-user:/nonexistent/vp.sock:-";
    let target = "-itarget:127.0.0.1:9";
    is_allowed(&[bare, "nothing"])?;
    for call in [
        libc::SYS_ptrace,
        libc::SYS_execve,
        libc::SYS_kill,
        libc::SYS_mount,
        libc::SYS_unshare,
        libc::SYS_bpf,
        libc::SYS_io_uring_setup,
        libc::SYS_process_vm_writev,
        libc::SYS_memfd_create,
        libc::SYS_fchmodat,
        libc::SYS_setuid,
        libc::SYS_bind,
        libc::SYS_listen,
    ] {
        is_denied(&[bare, "call", &call.to_string()], call)?;
    }
    let [inet, unix, packet] =
        [libc::AF_INET, libc::AF_UNIX, libc::AF_PACKET].map(|n| n.to_string());
    let stream = libc::SOCK_STREAM.to_string();
    for (flags, family, allowed) in [
        (&[bare][..], &inet, false),
        (&[bare], &unix, false),
        (&[bare], &packet, false),
        (&[bare, target], &inet, true),
        (&[bare, target], &unix, false),
        (&[bare, "-itarget:/nonexistent:-"], &unix, true),
    ] {
        let words = [flags, &["socket", family, &stream]].concat();
        match allowed {
            true => is_allowed(&words)?,
            false => is_denied(&words, libc::SYS_socket)?,
        }
    }
    // The library blocks signals meanwhile: then nobody can tell, and the kernel ends the program.
    let run = planted(&[bare, "run", "/bin/true"])?;
    ensure!(run.status.signal() == Some(libc::SIGSYS), "{run:?}");
    is_denied(&[bare, "push"], libc::SYS_ioctl)?;
    is_denied(&[bare, "code"], libc::SYS_mmap)
}

#[test]
fn a_path_or_port_that_is_not_needed_cannot_be_had_and_is_told() -> Result<()> {
    let folder = Folder::new()?;
    let elsewhere = Folder::new()?;
    // Whoever it runs as may use them.
    for folder in [&folder, &elsewhere] {
        fs::set_permissions(&folder.0, Permissions::from_mode(0o1777))?;
        fs::write(folder.0.join("file"), "precious")?;
        fs::set_permissions(folder.0.join("file"), Permissions::from_mode(0o666))?;
        if is_root() {
            chown(folder.0.join("file"), Some(NOBODY), Some(NOBODY))?;
        }
    }
    let device = format!("-cvhost-user:{}:-", folder.path("vp.sock"));
    for deed in ["read", "write"] {
        fails(&[&device, deed, &folder.path("file")])?;
        fails(&[&device, deed, "/etc/passwd"])?;
    }
    fails(&[&device, "remove", &elsewhere.path("file")])?;
    // As its own sockets are, at the end.
    let front = format!("-ofront:{}:-", folder.path("front"));
    is_allowed(&[&device, &front, "remove", &folder.path("file")])?;
    let (target, other) = (tcp_peer(&new_address())?, tcp_peer("127.0.0.1:0")?);
    let serve = format!("-itarget:{target}");
    is_allowed(&[&device, &serve, "tcp", &target])?;
    fails(&[&device, &serve, "tcp", &other])?;
    // Names can be looked up where there are some.
    is_allowed(&[&device, "-itarget:localhost:9", "read", "/etc/hosts"])
}
