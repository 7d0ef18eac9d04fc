//! A timer of the kernel's own resolution: tokio's counts whole milliseconds.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A timer that is set for one moment at a time.
pub struct FineTimer(AsyncFd<OwnedFd>);

impl FineTimer {
    /// Not set yet. Panics outside a tokio runtime.
    pub fn new() -> io::Result<Self> {
        let flags = libc::TFD_NONBLOCK | libc::TFD_CLOEXEC;
        // SAFETY: takes plain integers.
        let fd = match unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) } {
            -1 => return Err(io::Error::last_os_error()),
            // SAFETY: the descriptor is new and nobody else's.
            fd => unsafe { OwnedFd::from_raw_fd(fd) },
        };
        // SAFETY: `OwnedFd` owns its descriptor, which is the same one for as long as it lives.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        Ok(FineTimer(fd.map_err(|error| error.into_parts().1)?))
    }

    /// Sets it to `after`, which is not zero and below a second, from now.
    pub fn set(&self, after: Duration) -> io::Result<()> {
        let time = libc::itimerspec {
            it_interval: libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: libc::timespec {
                tv_sec: 0,
                tv_nsec: after.subsec_nanos().into(),
            },
        };
        // SAFETY: `time` is valid, and the former setting is not asked for.
        match unsafe {
            let fd = self.0.as_raw_fd();
            libc::timerfd_settime(fd, 0, &raw const time, std::ptr::null_mut())
        } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    /// Ready once, when it has run out.
    pub fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        // An error: the runtime is shutting down.
        if let Ok(mut guard) = ready!(self.0.poll_read_ready(cx)) {
            guard.clear_ready();
        }
        Poll::Ready(())
    }
}
