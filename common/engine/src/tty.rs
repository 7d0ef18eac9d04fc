//! Terminals as plain byte pipes: raw mode, exclusive use, a line's speed.
//!
//! The mode of a terminal belongs to the device, not to the descriptor, and outlives it; so a [`TtyLink`] puts back on drop
//! what it found. The calls are of `termios2` (asm-generic/termbits.h), which takes any speed as a plain number.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::task::{Context, Poll};
use std::time::Duration;

use crate::channel::{Link, Needs, Progress, Sink, Source};
use crate::fd_link::FdLink;

/// The receiver of a serial line copes with a speed that is off by less than one in so many.
const TOLERANCE: u32 = 33;

/// A link over a terminal that is in raw mode for as long as the link lasts.
pub struct TtyLink {
    link: FdLink,
    _mode: Raw,
}

/// Why a terminal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TtyError {
    /// Another program said that it is its own.
    #[error("another program uses it")]
    Busy,
    /// The line cannot run at the speed asked for.
    #[error(
        "it cannot run at {asked} bits a second (but at {got}): choose a standard speed, such as 115200"
    )]
    Speed {
        /// What was asked for.
        asked: u32,
        /// What the driver made of it.
        got: u32,
    },
    /// What the system says.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl TtyLink {
    /// Takes the terminal at `fd` for this program alone and puts it in raw mode. With a `speed` in bits a second it is a
    /// serial line, whose hardware flow control is used where there is any.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O enabled.
    pub fn new(fd: OwnedFd, speed: Option<u32>) -> Result<Self, TtyError> {
        let mode = Raw::new(fd.try_clone()?, speed)?;
        Ok(TtyLink {
            link: FdLink::new(fd)?,
            _mode: mode,
        })
    }
}

impl Link for TtyLink {
    fn needs(&self) -> Needs {
        self.link.needs()
    }

    fn min_room(&self) -> usize {
        self.link.min_room()
    }

    fn set_pace(&mut self, pause: Duration) {
        self.link.set_pace(pause);
    }

    fn receive(&mut self, sink: &mut Sink<'_>) -> io::Result<Progress> {
        self.link.receive(sink)
    }

    fn send(&mut self, source: &mut Source<'_>) -> io::Result<Progress> {
        self.link.send(source)
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.link.poll_ready(cx)
    }
}

/// A terminal in raw mode, with its former mode.
struct Raw {
    fd: OwnedFd,
    former: libc::termios2,
}

impl Raw {
    fn new(fd: OwnedFd, speed: Option<u32>) -> Result<Self, TtyError> {
        let former = mode(&fd)?;
        exclude_others(&fd)?;
        // From here on, dropping it puts everything back.
        let raw = Raw { fd, former };
        set_mode(&raw.fd, &raw_mode(former, speed))?;
        if let Some(asked) = speed {
            let got = mode(&raw.fd)?.c_ospeed;
            if got.abs_diff(asked) > asked / TOLERANCE {
                return Err(TtyError::Speed { asked, got });
            }
        }
        Ok(raw)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // What nobody has taken must not delay the end: the kernel would wait for half a minute.
        // SAFETY: ioctls with plain integers or none, on an open descriptor.
        unsafe {
            libc::ioctl(self.fd.as_raw_fd(), libc::TCFLSH, libc::TCIOFLUSH);
            libc::ioctl(self.fd.as_raw_fd(), libc::TIOCNXCL);
        }
        // A terminal that is gone has no mode.
        let _ = set_mode(&self.fd, &self.former);
    }
}

/// 8 bits, no echo, no signals, nothing translated, no modem control.
fn raw_mode(former: libc::termios2, speed: Option<u32>) -> libc::termios2 {
    let mut mode = former;
    mode.c_iflag = 0;
    mode.c_oflag &= !libc::OPOST;
    mode.c_lflag &= !(libc::ECHO | libc::ECHONL | libc::ICANON | libc::ISIG | libc::IEXTEN);
    mode.c_cflag &= !(libc::CSIZE | libc::PARENB | libc::CSTOPB | libc::HUPCL);
    mode.c_cflag |= libc::CS8 | libc::CREAD | libc::CLOCAL;
    mode.c_cc[libc::VMIN] = 1;
    mode.c_cc[libc::VTIME] = 0;
    if let Some(speed) = speed {
        mode.c_cflag &= !(libc::CBAUD | libc::CIBAUD);
        mode.c_cflag |= libc::BOTHER | libc::CRTSCTS;
        mode.c_ispeed = speed;
        mode.c_ospeed = speed;
    }
    mode
}

/// `TIOCEXCL` keeps others but root from opening it, the lock keeps another of us away.
fn exclude_others(fd: &OwnedFd) -> Result<(), TtyError> {
    // SAFETY: plain calls on an open descriptor.
    if unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
        let error = io::Error::last_os_error();
        return Err(match error.kind() {
            io::ErrorKind::WouldBlock => TtyError::Busy,
            _ => error.into(),
        });
    }
    // SAFETY: TIOCEXCL takes no argument.
    Ok(done(unsafe {
        libc::ioctl(fd.as_raw_fd(), libc::TIOCEXCL)
    })?)
}

fn mode(fd: &OwnedFd) -> io::Result<libc::termios2> {
    // SAFETY: `termios2` is plain integers, for which zero is a value.
    let mut mode: libc::termios2 = unsafe { std::mem::zeroed() };
    // SAFETY: TCGETS2 fills a `termios2`.
    done(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TCGETS2, &raw mut mode) })?;
    Ok(mode)
}

fn set_mode(fd: &OwnedFd, mode: &libc::termios2) -> io::Result<()> {
    // SAFETY: TCSETS2 reads a `termios2`.
    done(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TCSETS2, std::ptr::from_ref(mode)) })
}

fn done(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
