//! A serial line between two drivers: a terminal for the guest's port, and what QEMU makes of it for the host, a socket.

mod support;

use std::fs::{self, File};
use std::future::Future;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use support::log;
use support::side::{Side, channel_error};
use support::{echo_server, echo_through, new_address, pattern};

fn run(test: impl Future<Output = ()>) {
    log::collect();
    support::run(test);
}

/// A terminal: our side of it, and its path.
fn terminal() -> (File, PathBuf) {
    let (mut master, mut slave) = (-1, -1);
    let none = null_mut();
    // SAFETY: the descriptors are valid places, and the rest may be null; the descriptors are new.
    let (master, slave) = unsafe {
        let opened = libc::openpty(
            &raw mut master,
            &raw mut slave,
            none,
            null_mut(),
            null_mut(),
        );
        assert_eq!(opened, 0);
        (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave))
    };
    let path = fs::read_link(format!("/proc/self/fd/{}", slave.as_raw_fd())).unwrap();
    (master, path)
}

/// A port of a machine: a terminal at one end and, as QEMU's chardev, a listening socket at the other. Of each byte it
/// damages one in so many; with nobody at the socket, what comes is lost.
struct Machine {
    port: PathBuf,
    socket: PathBuf,
}

impl Machine {
    fn start(damage: u32) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let socket =
            std::env::temp_dir().join(format!("virtproxy-serial-{}-{n}", std::process::id()));
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let (terminal, port) = terminal();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (reader, writer) = (client.try_clone().unwrap(), terminal.try_clone().unwrap());
                let to_guest = thread::spawn(move || carry(reader, writer, damage));
                from_guest(&terminal, client, damage);
                to_guest.join().unwrap();
            }
        });
        Machine { port, socket }
    }

    fn guest(&self) -> String {
        format!("isa-serial-open:{}:115200", self.port.display())
    }

    fn host(&self) -> String {
        format!("unix-connect:{}:-", self.socket.display())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.socket);
    }
}

/// Damages one in `damage` of `bytes`.
fn damaged(bytes: &mut [u8], damage: u32, count: &mut u32) {
    for byte in bytes {
        *count = count.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if (*count >> 8).checked_rem(damage) == Some(0) {
            *byte ^= 4;
        }
    }
}

/// From the host to the guest, until the host hangs up.
fn carry(mut from: UnixStream, mut to: File, damage: u32) {
    let (mut buf, mut count) = ([0; 1024], 1);
    while let Ok(n @ 1..) = from.read(&mut buf) {
        damaged(&mut buf[..n], damage, &mut count);
        if to.write_all(&buf[..n]).is_err() {
            return;
        }
    }
}

/// From the guest to the host, until the host hangs up. A terminal that nobody has open gives an error; a port does not.
fn from_guest(mut from: &File, mut to: UnixStream, damage: u32) {
    let (mut buf, mut count) = ([0; 1024], 2);
    to.set_nonblocking(false).unwrap();
    loop {
        let mut poll = [poll_for(from, libc::POLLIN), poll_for(&to, libc::POLLRDHUP)];
        // SAFETY: two valid entries.
        unsafe { libc::poll(poll.as_mut_ptr(), 2, 100) };
        if poll[1].revents != 0 {
            return;
        }
        match from.read(&mut buf) {
            Ok(n) => {
                damaged(&mut buf[..n], damage, &mut count);
                if to.write_all(&buf[..n]).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn poll_for(fd: &impl AsRawFd, events: libc::c_short) -> libc::pollfd {
    libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    }
}

/// Waits until there have been so many sessions; both ends say so.
async fn sessions(count: usize) {
    while log::count("session established") < 2 * count {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Bulk both ways, and again after either end was restarted. A line does not hang up: what is opened before the
/// newcomer was heard belongs to the old session.
async fn serves_and_survives(machine: &Machine) {
    let (echo, out) = (echo_server().await, new_address());
    let [serves, forwards] = [format!("echo:{echo}"), format!("echo:{out}")];
    let guest = async || Side::start(&machine.guest(), &["-i", &serves]).await;
    let host = async || Side::start(&machine.host(), &["-o", &forwards]).await;
    let bulk = async || {
        let transfers: Vec<_> = (0..4)
            .map(|i| tokio::task::spawn_local(echo_through(out.clone(), pattern(100_000 + i, i))))
            .collect();
        for transfer in transfers {
            transfer.await.unwrap();
        }
    };
    let (one, other) = (host().await, guest().await);
    sessions(1).await;
    bulk().await;
    other.kill().await;
    let _other = guest().await;
    sessions(2).await;
    bulk().await;
    one.kill().await;
    let _one = host().await;
    sessions(3).await;
    bulk().await;
}

#[test]
fn the_host_finds_the_line_and_both_ends_restart() {
    let machine = Machine::start(0);
    run(serves_and_survives(&machine));
    assert_eq!(log::count("a serial line: the link layer is used"), 3);
}

#[test]
fn a_line_that_damages_bytes_carries_them_right() {
    let machine = Machine::start(5_000);
    run(serves_and_survives(&machine));
}

#[test]
fn a_port_that_comes_later_is_used() {
    let link = std::env::temp_dir().join(format!("virtproxy-tty-{}", std::process::id()));
    let _ = fs::remove_file(&link);
    let machine = Machine::start(0);
    run(async {
        let (echo, out) = (echo_server().await, new_address());
        let channel = format!("isa-serial-open:{}:9600", link.display());
        let _guest = Side::start(&channel, &["-i", &format!("echo:{echo}")]).await;
        let _host = Side::start(&machine.host(), &["-o", &format!("echo:{out}")]).await;
        log::wait_for(&format!("there is no {} yet", link.display())).await;
        std::os::unix::fs::symlink(&machine.port, &link).unwrap();
        echo_through(out, pattern(10_000, 1)).await;
    });
    fs::remove_file(&link).unwrap();
}

/// The mode of a terminal, as `stty -g` prints it.
fn mode(path: &Path) -> Vec<u8> {
    let output = std::process::Command::new("stty")
        .arg("-F")
        .arg(path)
        .arg("-g")
        .output()
        .unwrap();
    assert!(output.status.success());
    output.stdout
}

#[test]
fn a_terminal_is_put_back_as_it_was_and_is_not_shared() {
    let (_master, port) = terminal();
    let keep = File::open(&port).unwrap();
    let before = mode(&port);
    run(async {
        let channel = format!("isa-serial-open:{}:115200", port.display());
        let one = Side::start(&channel, &[]).await;
        tokio::task::yield_now().await;
        while mode(&port) == before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let other = Side::start(&channel, &[]).await;
        log::wait_for("another program uses it").await;
        other.kill().await;
        one.kill().await;
    });
    assert_eq!(mode(&port), before);
    drop(keep);
}

#[test]
fn what_is_no_line_is_refused_at_once() {
    run(async {
        let error = channel_error("isa-serial-open:/dev/null:115200", &[]).await;
        assert_eq!(
            error.to_string(),
            "/dev/null is no serial line: name one, such as /dev/ttyS1"
        );
        let error = channel_error("isa-serial-open:/dev/ttyS1:0", &[]).await;
        assert!(
            error
                .to_string()
                .contains("PORT is missing the line's speed"),
            "{error}"
        );
    });
}
