//! From the start of QEMU to the guest's first answer, and what to tell when there is none.
//!
//! A guest can fail in many ways (an argument that QEMU does not know, a device whose daemon is not there, a kernel
//! that panics), and each shows only in a file: QEMU's errors or the guest's console. So while somebody waits, both
//! are looked at, and an error carries their ends.

use anyhow::{Context, Result, anyhow, bail};
use std::fs;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

/// QEMU before the guest has booted; it ends with this value unless it is taken out.
pub(crate) struct Starting<'a> {
    child: Option<Child>,
    folder: &'a Path,
}

impl<'a> Starting<'a> {
    pub(crate) fn new(child: Child, folder: &'a Path) -> Self {
        Self {
            child: Some(child),
            folder,
        }
    }

    /// The guest has booted: its QEMU lives on.
    pub(crate) fn finish(mut self) -> Result<Child> {
        self.child.take().context("QEMU was just there")
    }

    pub(crate) fn look(&mut self) -> Result<()> {
        self.child
            .as_mut()
            .map_or(Ok(()), |child| look(child, self.folder))
    }

    pub(crate) fn accept(
        &mut self,
        listener: &UnixListener,
        deadline: Instant,
    ) -> Result<UnixStream> {
        listener
            .set_nonblocking(true)
            .context("cannot wait for QEMU without blocking")?;
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream
                        .set_nonblocking(false)
                        .context("cannot use QEMU's connection")?;
                    return Ok(stream);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("cannot wait for QEMU"),
            }
            self.look()?;
            if Instant::now() >= deadline {
                bail!("QEMU did not connect in time");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A QEMU that is about to end closes its sockets first: its end is the better reason.
    pub(crate) fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
        let deadline = Instant::now() + Duration::from_millis(500);
        let mut error = error;
        while Instant::now() < deadline {
            if let Err(ended) = self.look() {
                error = ended;
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        explain(error, self.folder)
    }
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // Errors here mean that it has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// An error when QEMU has ended or the guest's kernel has panicked.
pub(crate) fn look(child: &mut Child, folder: &Path) -> Result<()> {
    if let Some(status) = child.try_wait().context("cannot wait for QEMU")? {
        bail!("QEMU has ended: {status}");
    }
    if text_of(&folder.join("console")).contains("Kernel panic") {
        bail!("the guest's kernel panicked");
    }
    Ok(())
}

/// The error with the end of the console and of QEMU's own errors.
pub(crate) fn explain(error: anyhow::Error, folder: &Path) -> anyhow::Error {
    let tail = |name: &str| {
        let text = crate::apt::last_lines(text_of(&folder.join(name)).as_bytes(), 20);
        if text.is_empty() {
            "(nothing)".to_owned()
        } else {
            text
        }
    };
    let told = format!(
        "{error:#}\n--- the guest's console:\n{}\n--- QEMU:\n{}",
        tail("console"),
        tail("stderr")
    );
    anyhow!(told)
}

pub(crate) fn text_of(file: &Path) -> String {
    fs::read(file)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}
