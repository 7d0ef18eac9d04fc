//! The process that serves the devices: this program's file as it is now, with the same arguments.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf, absolute};
use std::process::{Child, Command, ExitStatus};
use std::time::Instant;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::confine::EXIT_CODE as DENIED;

use super::leash::{Inherited, Word, hear, leash};
use super::signals;

/// How a worker is started.
pub(super) struct Recipe {
    path: PathBuf,
    name: OsString,
    arguments: Vec<OsString>,
}

impl Recipe {
    /// As this process was.
    pub(super) fn new() -> io::Result<Self> {
        let mut arguments = env::args_os();
        let name = arguments.next().unwrap_or_default();
        Ok(Recipe {
            path: path(Path::new(&name))?,
            name,
            arguments: arguments.collect(),
        })
    }

    /// Starts a worker that will connect to `doors`.
    pub(super) fn start(&self, doors: &[BorrowedFd<'_>]) -> io::Result<Worker> {
        let (leash, other) = leash()?;
        let inherited: Vec<_> = [other.as_fd()].iter().chain(doors).copied().collect();
        let mut command = Command::new(&self.path);
        command
            .arg0(&self.name)
            .arg("--kept")
            .arg(Inherited::flag(&inherited))
            .args(&self.arguments);
        // SAFETY: it only makes system calls that are allowed between `fork` and `exec`.
        unsafe { command.pre_exec(signals::deliver) };
        // The keeper has one thread, so no other process is started meanwhile.
        for fd in &inherited {
            fcntl_setfd(fd, FdFlags::empty())?;
        }
        let child = command.spawn();
        for fd in doors {
            fcntl_setfd(fd, FdFlags::CLOEXEC)?;
        }
        let mut child = child?;
        let pid = Pid::from_child(&child);
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(error.into());
            }
        };
        Ok(Worker {
            child,
            pidfd,
            leash: Some(leash),
            since: Instant::now(),
            greeted: false,
            began: false,
        })
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

/// Where this program is, so that it is found there again when it was replaced. The name that it was started by comes
/// first: it may be a link that leads to another version by then.
fn path(name: &Path) -> io::Result<PathBuf> {
    let own = fs::metadata("/proc/self/exe")?;
    let is_own = |other: &fs::Metadata| (other.dev(), other.ino()) == (own.dev(), own.ino());
    let named = name.components().count() > 1;
    match named && fs::metadata(name).as_ref().is_ok_and(is_own) {
        true => absolute(name),
        false => env::current_exe(),
    }
}

pub(super) struct Worker {
    child: Child,
    pidfd: OwnedFd,
    /// `None`: it has let go.
    pub(super) leash: Option<OwnedFd>,
    pub(super) since: Instant,
    /// It has said that it can begin, and that it has begun.
    pub(super) greeted: bool,
    pub(super) began: bool,
}

impl Worker {
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal. It cannot fail but for a worker that has ended, which is about to be seen.
    pub(super) fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// What it said next, if anything.
    pub(super) fn hear(&mut self) -> Option<Word> {
        match hear(self.leash.as_ref()?) {
            Ok(word) => word,
            Err(error) => {
                if error.kind() != io::ErrorKind::UnexpectedEof {
                    self.signal(Signal::KILL);
                }
                self.leash = None;
                None
            }
        }
    }

    /// How it ended, if it has.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        // An error: nobody knows any more.
        let unknown = |_| Some(ExitStatus::from_raw(libc::SIGKILL));
        self.child.try_wait().unwrap_or_else(unknown)
    }

    /// Readable when it has ended.
    pub(super) fn end(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Worker {
    /// It must not outlive the keeper.
    fn drop(&mut self) {
        if self.ended().is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Whether a worker ended so because it made a system call that the sandbox does not allow.
pub(super) fn was_denied(status: ExitStatus) -> bool {
    status.code() == Some(DENIED.into()) || status.signal() == Some(libc::SIGSYS)
}
