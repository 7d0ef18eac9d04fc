//! Terminals as plain byte pipes: raw mode, exclusive use, a line's speed.
//!
//! The mode of a terminal belongs to the device, not to the descriptor, and outlives it; so a [`Raw`] puts back on drop
//! what it found. The calls are of `termios2` (asm-generic/termbits.h), which takes any speed as a plain number.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// A terminal in raw mode; its former mode is restored when this is dropped.
#[derive(Debug)]
pub struct Raw {
    fd: OwnedFd,
    former: libc::termios2,
}

impl Raw {
    /// Puts the terminal at `fd` in raw mode: 8 bits, no echo, no signals, nothing translated, no modem control. With a
    /// `speed` in bits a second it is a serial line, whose hardware flow control is used where there is any.
    pub fn new(fd: BorrowedFd<'_>, speed: Option<u32>) -> io::Result<Self> {
        let fd = fd.try_clone_to_owned()?;
        let former = mode(&fd)?;
        let mut raw = former;
        raw.c_iflag = 0;
        raw.c_oflag &= !libc::OPOST;
        raw.c_lflag &= !(libc::ECHO | libc::ECHONL | libc::ICANON | libc::ISIG | libc::IEXTEN);
        raw.c_cflag &= !(libc::CSIZE | libc::PARENB | libc::CSTOPB | libc::HUPCL);
        raw.c_cflag |= libc::CS8 | libc::CREAD | libc::CLOCAL;
        raw.c_cc[libc::VMIN] = 1;
        raw.c_cc[libc::VTIME] = 0;
        if let Some(speed) = speed {
            raw.c_cflag &= !(libc::CBAUD | libc::CIBAUD);
            raw.c_cflag |= libc::BOTHER | libc::CRTSCTS;
            raw.c_ispeed = speed;
            raw.c_ospeed = speed;
        }
        let raw = Raw::set(fd, former, &raw)?;
        Ok(raw)
    }

    fn set(fd: OwnedFd, former: libc::termios2, mode: &libc::termios2) -> io::Result<Self> {
        set_mode(&fd, mode)?;
        Ok(Raw { fd, former })
    }

    /// The speed that the driver has set, in bits a second: the nearest it can.
    pub fn speed(&self) -> io::Result<u32> {
        Ok(mode(&self.fd)?.c_ospeed)
    }

    /// Throws away what came in and was not read.
    pub fn discard_input(&self) -> io::Result<()> {
        // SAFETY: TCFLSH takes a plain integer.
        done(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TCFLSH, libc::TCIFLUSH) })
    }

    /// Lets nobody else open it (but root): `TIOCEXCL`. Lasts until it is closed.
    pub fn exclude_others(&self) -> io::Result<()> {
        // SAFETY: TIOCEXCL takes no argument.
        done(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TIOCEXCL) })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // What nobody has taken must not delay the end, and a terminal that is gone has no mode. TIOCNXCL: others may
        // have it open, and so would keep it closed to everybody.
        // SAFETY: plain ioctls on an open descriptor.
        unsafe {
            libc::ioctl(self.fd.as_raw_fd(), libc::TCFLSH, libc::TCIOFLUSH);
            libc::ioctl(self.fd.as_raw_fd(), libc::TIOCNXCL);
        }
        let _ = set_mode(&self.fd, &self.former);
    }
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
