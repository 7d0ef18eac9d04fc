//! The daemon as the demonstration starts and ends it, with its log in a file.

use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use virtproxy_lab::spawn;

/// How long the daemon may take to make its socket, and to end.
const LIMIT: Duration = Duration::from_secs(5);

/// A running daemon.
pub(crate) struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command` and waits until it listens on `socket`.
    pub(crate) fn start(mut command: Command, socket: &Path, log: PathBuf) -> Result<Self> {
        let file = File::create(&log).context("cannot create the daemon's log")?;
        let file_too = file.try_clone().context("cannot share the daemon's log")?;
        command.stdin(Stdio::null()).stdout(file).stderr(file_too);
        let child = spawn::spawn(command).context("cannot start the daemon")?;
        let mut daemon = Self { child, log };
        let deadline = Instant::now() + LIMIT;
        while !socket.exists() {
            daemon.look().context("the daemon did not start")?;
            if Instant::now() >= deadline {
                bail!(
                    "the daemon made no socket {} within {LIMIT:?}\n{}",
                    socket.display(),
                    daemon.log()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(daemon)
    }

    /// An error when it has ended.
    pub(crate) fn look(&mut self) -> Result<()> {
        if let Some(status) = self
            .child
            .try_wait()
            .context("cannot wait for the daemon")?
        {
            bail!("the daemon has ended: {status}\n{}", self.log());
        }
        Ok(())
    }

    /// Asks it to end, and kills it when it does not.
    pub(crate) fn end(&mut self) -> Result<()> {
        spawn::signal(&self.child, libc::SIGTERM);
        let deadline = Instant::now() + LIMIT;
        while self
            .child
            .try_wait()
            .context("cannot wait for the daemon")?
            .is_none()
        {
            if Instant::now() >= deadline {
                self.child.kill().context("cannot kill the daemon")?;
                self.child.wait().context("cannot wait for the daemon")?;
                bail!(
                    "the daemon did not end within {LIMIT:?} of SIGTERM and was killed\n{}",
                    self.log()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// The end of its log.
    pub(crate) fn log(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let last = lines[lines.len().saturating_sub(20)..].join("\n");
        format!("--- the daemon's log:\n{last}")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Errors here mean that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
