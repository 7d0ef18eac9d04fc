//! `exec:COMMAND:-`: the standard input and output of a command, such as `ssh box virtproxy-agent -c stdio:-:- ...`.
//!
//! The command is run by `/bin/sh -c`, in a process group of its own, with one end of a socket pair as its input and
//! output; what it says on standard error goes to ours. When it ends it is started again, after a pause; when the
//! link or the program ends first, so does the command:
//!
//! ```text
//! link over --> it may end by itself --> SIGTERM to the group --> SIGKILL to the group --> it is reaped
//!                     200 ms                      1 s
//! ```
//!
//! Its shell is reaped last, so that the group's number cannot have become another's before.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use super::retrying::{Attempt, Obstacle, Retrying};
use super::{bare_link, boxed};
use crate::channel::Channel;
use crate::spec::ChannelSpec;

/// How long a command whose link is over may take to end by itself.
const BY_ITSELF: Duration = Duration::from_millis(200);
/// How long it may take after SIGTERM.
const TERMINATION: Duration = Duration::from_secs(1);
/// How often it is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(10);

/// The channel that runs ADDR, again and again.
pub(super) fn open(spec: &ChannelSpec) -> io::Result<Box<dyn Channel>> {
    let command = spec.addr.clone();
    let mut running = None;
    boxed(Retrying::new(spec.to_string(), async move || {
        if let Some(last) = running.take() {
            let status = Running::end(last).await;
            return Err(Obstacle::Passing(format!("the command ended: {status}")));
        }
        let (link, started) = start(&command)?;
        running = Some(started);
        link
    }))
}

fn start(command: &str) -> Result<(Attempt, Running), Obstacle> {
    let spawn = || {
        let (ours, theirs) = UnixStream::pair()?;
        let shell = Command::new("/bin/sh")
            .args(["-c", command])
            .stdin(OwnedFd::from(theirs.try_clone()?))
            .stdout(OwnedFd::from(theirs))
            .process_group(0)
            .spawn()?;
        let reaped = false;
        Ok((bare_link(ours), Running { shell, reaped }))
    };
    spawn().map_err(|error: io::Error| Obstacle::Passing(format!("cannot run /bin/sh: {error}")))
}

/// A command under way; dropped, it is ended.
struct Running {
    shell: Child,
    reaped: bool,
}

impl Running {
    /// Ends it, in bounded time.
    async fn end(mut self) -> String {
        let mut deadline = Instant::now() + BY_ITSELF;
        let mut told = false;
        while !self.has_ended() {
            if Instant::now() >= deadline {
                if told {
                    break;
                }
                self.signal(libc::SIGTERM);
                told = true;
                deadline += TERMINATION;
            }
            tokio::time::sleep(LOOK).await;
        }
        match self.reap() {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        }
    }

    /// Whether the shell has ended; it is left to be reaped.
    fn has_ended(&self) -> bool {
        // SAFETY: all zeros is a valid `siginfo_t`, and `waitid` fills it; the call does not block.
        unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
            libc::waitid(libc::P_PID, self.shell.id(), &raw mut info, flags) != 0
                || info.si_pid() != 0
        }
    }

    fn signal(&self, signal: libc::c_int) {
        let group = i32::try_from(self.shell.id()).expect("the kernel's pids are positive");
        // SAFETY: signals a process group of ours: its leader is not reaped yet.
        unsafe { libc::kill(-group, signal) };
    }

    /// Kills what is left of the group, and reaps the shell.
    fn reap(&mut self) -> io::Result<ExitStatus> {
        self.signal(libc::SIGKILL);
        self.reaped = true;
        self.shell.wait()
    }
}

impl Drop for Running {
    /// The program is ending, and the command must not outlive it.
    fn drop(&mut self) {
        if self.reaped {
            return;
        }
        self.signal(libc::SIGTERM);
        let deadline = Instant::now() + TERMINATION;
        while !self.has_ended() && Instant::now() < deadline {
            thread::sleep(LOOK);
        }
        let _ = self.reap();
    }
}
