//! The keeper's signals, as a descriptor to be polled.

use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Those that mean something to a keeper; they are blocked, so that they are not delivered otherwise any more.
const SIGNALS: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

pub(super) struct Signals(OwnedFd);

impl Signals {
    pub(super) fn new() -> io::Result<Self> {
        let set = mask(libc::SIG_BLOCK)?;
        // SAFETY: `set` is valid, and the descriptor is new.
        unsafe {
            match libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(Signals(OwnedFd::from_raw_fd(fd))),
            }
        }
    }

    /// The next one that came, if any.
    pub(super) fn next(&self) -> Option<i32> {
        // SAFETY: all its fields are numbers.
        let mut info: libc::signalfd_siginfo = unsafe { zeroed() };
        let len = size_of_val(&info);
        // SAFETY: `info` has room for `len` bytes and is valid whatever they are.
        let read = unsafe { libc::read(self.0.as_raw_fd(), (&raw mut info).cast(), len) };
        (usize::try_from(read) == Ok(len)).then_some(info.ssi_signo.cast_signed())
    }
}

/// Delivers the signals as usual again: for a process that is about to run another program.
pub(super) fn deliver() -> io::Result<()> {
    mask(libc::SIG_UNBLOCK).map(drop)
}

fn mask(how: i32) -> io::Result<libc::sigset_t> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: the first call initialises `set`, which stays valid for the others.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in SIGNALS {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        match libc::sigprocmask(how, set.as_ptr(), std::ptr::null_mut()) {
            0 => Ok(set.assume_init()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
