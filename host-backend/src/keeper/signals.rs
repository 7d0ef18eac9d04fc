//! The keeper's signals, as a descriptor to be polled.

use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// Those that mean something to a keeper; they are not delivered otherwise any more. (Programs that the standard
/// library starts begin with none blocked.)
const SIGNALS: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

pub(super) struct Signals(OwnedFd);

impl Signals {
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: `set` is initialised before it is used, and stays valid for all calls; the descriptor is new.
        unsafe {
            let mut set = MaybeUninit::uninit();
            libc::sigemptyset(set.as_mut_ptr());
            for signal in SIGNALS {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            if libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            match libc::signalfd(-1, set.as_ptr(), libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) {
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
        let read = unsafe {
            let fd = std::os::fd::AsRawFd::as_raw_fd(&self.0);
            libc::read(fd, (&raw mut info).cast(), len)
        };
        (usize::try_from(read) == Ok(len)).then_some(info.ssi_signo.cast_signed())
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
