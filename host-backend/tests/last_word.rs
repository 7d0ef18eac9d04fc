//! What a worker makes of the last word of the one before it: that may have been an attacker's by then, who had no rights,
//! while a worker that starts has them all.

mod frontend;

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use frontend::socket_path;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};

/// A worker whose keeper is the test.
struct Worker {
    child: Child,
    leash: OwnedFd,
}

impl Worker {
    fn start(flags: &[&str], last_word: &[u8]) -> Self {
        let kind = (AddressFamily::UNIX, SocketType::SEQPACKET);
        let (leash, other) = socketpair(kind.0, kind.1, SocketFlags::CLOEXEC, None).unwrap();
        let door = UnixListener::bind(socket_path()).unwrap();
        let inherited = [other.as_raw_fd(), door.as_raw_fd()];
        let mut command = Command::new(env!("CARGO_BIN_EXE_virtproxy"));
        command
            .args([
                "--kept",
                &inherited.map(|fd: RawFd| fd.to_string()).join(","),
            ])
            .args(["-c", "vhost-user:/nonexistent/vp.sock:-", "--max-ports=2"])
            .args(flags)
            .stdin(Stdio::null());
        // SAFETY: `fcntl` may be called between fork and exec.
        unsafe {
            command.pre_exec(move || {
                for fd in inherited {
                    libc::fcntl(fd, libc::F_SETFD, 0);
                }
                Ok(())
            });
        }
        let worker = Worker {
            child: command.spawn().unwrap(),
            leash,
        };
        assert_eq!(worker.hears(), [0], "it is there");
        let begin = [&b"{\"resumed\":false}\n"[..], last_word].concat();
        send(&worker.leash, &begin, SendFlags::empty()).unwrap();
        worker
    }

    fn hears(&self) -> Vec<u8> {
        let mut word = vec![0; 65536];
        let (_, len) = recv(&self.leash, &mut *word, RecvFlags::empty()).unwrap();
        word.truncate(len);
        word
    }

    /// What it says of its device once it has begun.
    fn word(&self) -> Vec<u8> {
        let word = self.hears();
        assert_eq!(word[..2], [1, 0], "the state of the device");
        word[2..].to_vec()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port's place, and the flag that has it there.
fn port() -> (PathBuf, String) {
    let place = socket_path();
    let flag = format!("--port=a=file:{}", place.display());
    (place, flag)
}

#[test]
fn a_place_that_only_the_last_worker_named_is_opened_without_rights() {
    let (place, flag) = port();
    let word = Worker::start(&[&flag], b"").word();
    fs::remove_file(&place).unwrap();
    let next = Worker::start(&[], &word).word();
    assert!(!place.exists(), "an attacker could have named any file");
    assert_eq!(next, word, "the guest has the port nevertheless");
    // Without a sandbox there is nothing to be gained.
    Worker::start(&["--no-sandbox"], &word).word();
    fs::remove_file(&place).unwrap();
}

#[test]
fn a_link_that_the_last_worker_put_at_a_place_is_not_followed_with_rights() {
    let (folder, precious) = (socket_path(), socket_path());
    fs::create_dir(&folder).unwrap();
    let (place, admin) = (folder.join("place"), folder.join("admin"));
    let flags = [
        format!("--port=a=file:{}", place.display()),
        format!("--admin={}", admin.display()),
    ];
    let flags = [&*flags[0], &*flags[1]];
    let word = Worker::start(&flags, b"").word();
    fs::remove_file(&place).unwrap();
    symlink(&precious, &place).unwrap();
    Worker::start(&flags, &word).word();
    assert!(
        !precious.exists(),
        "an attacker could have linked to any file"
    );
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_place_that_the_flags_name_too_is_opened_as_at_the_start() {
    let (place, flag) = port();
    let word = Worker::start(&[&flag], b"").word();
    fs::remove_file(&place).unwrap();
    Worker::start(&[&flag], &word).word();
    fs::remove_file(&place).unwrap();
}
