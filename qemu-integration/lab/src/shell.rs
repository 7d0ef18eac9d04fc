//! The host end of the guest's command shell (the guest end is `guest/shell`).
//!
//! A command goes out with its size, and its answer comes back with the sizes of both outputs, so any bytes may be in
//! them and a lost byte is noticed. The guest itself ends a command that takes too long; this end only gives up some
//! seconds later, for a guest that is stopped or dead. A READY in the middle of an answer means that the guest was
//! reset or restarted its shell.

use crate::qmp::is_pause;
use anyhow::{Context, Result, bail};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// What a command in the guest gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit status.
    pub status: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// True for status 0.
    pub fn success(&self) -> bool {
        self.status == 0
    }
}

/// How much longer than the guest this end waits.
const GRACE: Duration = Duration::from_secs(10);
const MARK: &str = "@lab ";

/// The socket that the guest's second serial port is connected to.
#[derive(Debug)]
pub(crate) struct Shell {
    stream: UnixStream,
    unread: Vec<u8>,
    last_id: u64,
}

/// Looks in while a wait lasts; an error ends the wait.
pub(crate) type Watch<'a> = &'a mut dyn FnMut() -> Result<()>;

impl Shell {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            unread: Vec::new(),
            last_id: 0,
        }
    }

    /// Waits until the guest's shell says that it is there.
    pub(crate) fn ready(&mut self, deadline: Instant, watch: Watch<'_>) -> Result<()> {
        while self.mark(deadline, watch)? != "READY" {}
        Ok(())
    }

    /// Runs a script in the guest.
    pub(crate) fn run(
        &mut self,
        script: &str,
        limit: Duration,
        watch: Watch<'_>,
    ) -> Result<Output> {
        self.last_id += 1;
        let id = self.last_id.to_string();
        let seconds = limit.as_secs().max(1);
        let script = format!("{script}\n");
        let request = format!("RUN {id} {} {seconds}\n{script}", script.len());
        self.stream
            .write_all(request.as_bytes())
            .context("the guest's shell is gone")?;
        let begun = Instant::now();
        let deadline = begun + limit + GRACE;
        let (status, out, err) = loop {
            let mark = self.mark(deadline, watch)?;
            let words: Vec<_> = mark.split(' ').collect();
            match words[..] {
                ["READY"] => bail!("the guest restarted before the command ended"),
                ["DONE", of, status, out, err] if of == id => {
                    let number = |text: &str| {
                        text.parse::<usize>()
                            .context("the guest's shell sent a bad size")
                    };
                    break (
                        status.parse::<i32>().context("bad status")?,
                        number(out)?,
                        number(err)?,
                    );
                }
                _ => {}
            }
        };
        let stdout = self.take(out, deadline, watch)?;
        let stderr = self.take(err, deadline, watch)?;
        let end = self.take(format!("\n{MARK}END {id}\n").len(), deadline, watch)?;
        if end != format!("\n{MARK}END {id}\n") {
            bail!(
                "the guest's serial port lost bytes of the output: print less, or copy it in another way"
            );
        }
        if status == 137 && begun.elapsed() >= limit {
            bail!("ended after {seconds} s; it had printed {stdout:?} {stderr:?}");
        }
        Ok(Output {
            status,
            stdout,
            stderr,
        })
    }

    /// The rest of the next line that starts with the mark.
    fn mark(&mut self, deadline: Instant, watch: Watch<'_>) -> Result<String> {
        loop {
            let end = self.unread.iter().position(|byte| *byte == b'\n');
            let Some(end) = end else {
                self.fill(deadline, watch)?;
                continue;
            };
            let line: Vec<u8> = self.unread.drain(..=end).collect();
            if let Some(rest) = String::from_utf8_lossy(&line).trim_end().strip_prefix(MARK) {
                return Ok(rest.to_owned());
            }
        }
    }

    fn take(&mut self, count: usize, deadline: Instant, watch: Watch<'_>) -> Result<String> {
        while self.unread.len() < count {
            self.fill(deadline, watch)?;
        }
        let bytes: Vec<u8> = self.unread.drain(..count).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn fill(&mut self, deadline: Instant, watch: Watch<'_>) -> Result<()> {
        watch()?;
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!(
                "the guest's shell gave no answer in time: the guest is stopped, hangs or has died"
            );
        }
        let pause = left.min(Duration::from_millis(200));
        self.stream
            .set_read_timeout(Some(pause))
            .context("cannot set a time limit")?;
        let mut buffer = [0; 16 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(0) => bail!("QEMU has closed the guest's serial port"),
            Ok(count) => self.unread.extend_from_slice(&buffer[..count]),
            Err(error) if is_pause(&error) => {}
            Err(error) => return Err(error).context("cannot read from the guest's serial port"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell_that_hears(text: &'static str) -> (Shell, std::thread::JoinHandle<String>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let guest = std::thread::spawn(move || {
            let mut request = [0; 64];
            let count = theirs.read(&mut request).unwrap();
            for byte in text.as_bytes() {
                theirs.write_all(&[*byte]).unwrap();
            }
            String::from_utf8_lossy(&request[..count]).into_owned()
        });
        (Shell::new(ours), guest)
    }

    #[test]
    fn outputs_may_hold_marks() {
        let (mut shell, guest) = shell_that_hears(
            "noise\n@lab DONE 0 0 0 0\n@lab DONE 1 3 11 2\n\n@lab END 1e!\n@lab END 1\n",
        );
        let output = shell
            .run("echo", Duration::from_secs(1), &mut || Ok(()))
            .unwrap();
        assert_eq!(
            output,
            Output {
                status: 3,
                stdout: "\n@lab END 1".to_owned(),
                stderr: "e!".to_owned()
            }
        );
        assert_eq!(guest.join().unwrap(), "RUN 1 5 1\necho\n");
    }

    #[test]
    fn a_lost_byte_and_a_restart_are_noticed() {
        let (mut shell, _guest) = shell_that_hears("@lab DONE 1 0 5 0\nhell\n@lab END 1\n\n");
        let error = shell
            .run("x", Duration::from_secs(1), &mut || Ok(()))
            .unwrap_err()
            .to_string();
        assert!(error.contains("lost"), "{error}");
        let (mut shell, _guest) = shell_that_hears("\n@lab READY\n");
        let error = shell
            .run("x", Duration::from_secs(1), &mut || Ok(()))
            .unwrap_err()
            .to_string();
        assert!(error.contains("restarted"), "{error}");
    }
}
