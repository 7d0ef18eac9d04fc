//! `isa-serial-open:PATH:SPEED`: a serial line, such as a 16550 port of a guest.
//!
//! Such a line loses bytes without a word: the chip has 16 bytes of room, QEMU's model of it drops what the other side of
//! its chardev does not take, and the kernel may print its messages on the same line. So the link layer lies below the
//! session, always (see [`crate::lossy_link`]).

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use super::boxed;
use super::retrying::{Attempt, Obstacle, Retrying};
use crate::channel::Channel;
use crate::lossy_link::LossyLink;
use crate::sandbox;
use crate::spec::{ChannelSpec, SpecError};
use crate::tty::{TtyError, TtyLink};

/// The channel over the terminal at ADDR, at the speed that PORT says.
pub(super) fn open(spec: &ChannelSpec) -> io::Result<Box<dyn Channel>> {
    let no_speed = || io::Error::new(io::ErrorKind::InvalidInput, SpecError::NoSpeed);
    let speed = spec.port.filter(|speed| *speed > 0).ok_or_else(no_speed)?;
    let path = spec.addr.clone();
    boxed(Retrying::new(spec.to_string(), async move || {
        attempt(&path, speed)
    }))
}

fn attempt(path: &str, speed: u32) -> Attempt {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    // Neither wait for a carrier, nor become the terminal that the program belongs to.
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let line = options.open(path).map_err(TtyError::from);
    let line = line.and_then(|line| TtyLink::new(line.into(), Some(speed)));
    let line = line.map_err(|error| obstacle(path, error))?;
    match LossyLink::new(Box::new(line), Some(speed)) {
        Ok(link) => Ok(Box::new(link)),
        Err(error) => Err(Obstacle::Passing(format!("cannot use {path}: {error}"))),
    }
}

fn obstacle(path: &str, error: TtyError) -> Obstacle {
    let TtyError::Io(error) = error else {
        return match error {
            TtyError::Speed { .. } => Obstacle::never(format!("{path}: {error}")),
            _ => Obstacle::Passing(format!("{path}: {error}: end it, a getty for one")),
        };
    };
    match error.raw_os_error() {
        Some(libc::ENOENT) => Obstacle::Passing(format!("there is no {path} yet")),
        Some(libc::ENXIO | libc::ENODEV | libc::EIO) => {
            Obstacle::Passing(format!("there is no serial port behind {path}"))
        }
        Some(libc::EBUSY) => obstacle(path, TtyError::Busy),
        Some(libc::EACCES | libc::EPERM) => Obstacle::Passing(format!(
            "permission to open {path} denied: run as root, or as a member of its group (dialout){}",
            sandbox::hint(&error)
        )),
        Some(libc::ENOTTY | libc::EISDIR) => Obstacle::never(format!(
            "{path} is no serial line: name one, such as /dev/ttyS1"
        )),
        Some(libc::EINVAL) => Obstacle::never(format!(
            "{path} cannot run at the speed asked for: choose a standard one, such as 115200"
        )),
        _ => Obstacle::Passing(format!("cannot use {path}: {error}")),
    }
}
