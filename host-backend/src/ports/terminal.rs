//! Terminals: a pseudo-terminal of our own, and the size and mode of any.
//!
//! A master is told neither that somebody has opened the slave nor that the slave's size has changed: Linux signals
//! only processes in the slave's session, and no event reaches a poll of the master. So both are looked at now and then.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior, interval};

/// How often a terminal is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// What ticks when a terminal is to be looked at.
pub(super) fn looks() -> Interval {
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    looks
}

/// A pseudo-terminal of ours, of which others open the slave.
pub(super) struct Pty {
    pub(super) master: OwnedFd,
    slave: PathBuf,
    _link: Option<Link>,
}

impl Pty {
    /// A new one, which passes bytes on as they are, with a symbolic link to it if that is wanted.
    pub(super) fn open(link: Option<&Path>) -> io::Result<Self> {
        // SAFETY: each call takes and gives plain integers; the descriptor is new and nobody else's.
        let master = unsafe {
            let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC;
            let fd = check(libc::posix_openpt(flags))?;
            let master = OwnedFd::from_raw_fd(fd);
            check(libc::grantpt(fd))?;
            check(libc::unlockpt(fd))?;
            master
        };
        let mut name = [0; 64];
        // SAFETY: the buffer has the length that is said; the call ends what it writes with a NUL.
        let failed = unsafe { libc::ptsname_r(master.as_raw_fd(), name.as_mut_ptr(), name.len()) };
        if failed != 0 {
            return Err(io::Error::from_raw_os_error(failed));
        }
        // SAFETY: it is NUL-terminated, as just said.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) };
        let slave = PathBuf::from(name.to_string_lossy().into_owned());
        // Opened and closed: only a master whose slave was open once shows that it is not any more.
        let opened = fs::File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(&slave)?;
        Mode::raw(opened.as_fd(), Signals::Off)?.keep();
        let link = link.map(|path| Link::make(path, &slave)).transpose()?;
        Ok(Pty {
            master,
            slave,
            _link: link,
        })
    }

    /// The path to open.
    pub(super) fn slave(&self) -> &Path {
        &self.slave
    }
}

/// A symbolic link of ours, removed when dropped unless it is another's by then.
struct Link {
    path: PathBuf,
    target: PathBuf,
}

impl Link {
    /// A link to a terminal that is no more, left behind by a crash, is replaced; nothing else is.
    fn make(path: &Path, target: &Path) -> io::Result<Self> {
        let stale = fs::read_link(path).is_ok_and(|old| old.starts_with("/dev/pts"));
        if stale {
            fs::remove_file(path)?;
        }
        let named = |error: io::Error| {
            let cure = match error.kind() {
                io::ErrorKind::AlreadyExists => ": remove it, or name another path",
                _ => "",
            };
            io::Error::new(
                error.kind(),
                format!("cannot make the link {}: {error}{cure}", path.display()),
            )
        };
        symlink(target, path).map_err(named)?;
        Ok(Link {
            path: path.to_owned(),
            target: target.to_owned(),
        })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if fs::read_link(&self.path).is_ok_and(|target| target == self.target) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether Ctrl-C and the like still end the program.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Signals {
    On,
    Off,
}

/// The mode that a terminal had, restored when this is dropped.
pub(super) struct Mode {
    terminal: OwnedFd,
    before: libc::termios,
}

impl Mode {
    /// Makes the terminal pass bytes on as they are.
    pub(super) fn raw(terminal: BorrowedFd<'_>, signals: Signals) -> io::Result<Self> {
        let mut before = MaybeUninit::uninit();
        // SAFETY: the call fills it, or fails.
        let before = unsafe {
            check(libc::tcgetattr(terminal.as_raw_fd(), before.as_mut_ptr()))?;
            before.assume_init()
        };
        let mut raw = before;
        // SAFETY: a valid `termios` for both calls.
        unsafe {
            libc::cfmakeraw(&raw mut raw);
            if signals == Signals::On {
                raw.c_lflag |= libc::ISIG;
            }
            check(libc::tcsetattr(
                terminal.as_raw_fd(),
                libc::TCSANOW,
                &raw const raw,
            ))?;
        }
        Ok(Mode {
            terminal: terminal.try_clone_to_owned()?,
            before,
        })
    }

    /// Leaves it so for good.
    fn keep(self) {
        let this = std::mem::ManuallyDrop::new(self);
        // SAFETY: read once, and never dropped where it was.
        drop(unsafe { std::ptr::read(&raw const this.terminal) });
    }
}

impl Drop for Mode {
    fn drop(&mut self) {
        // SAFETY: a valid `termios`. A terminal that is gone has no mode to restore.
        unsafe {
            libc::tcsetattr(
                self.terminal.as_raw_fd(),
                libc::TCSANOW,
                &raw const self.before,
            );
        }
    }
}

/// Columns and rows of a terminal; `None` if it has none, or is none.
pub(super) fn size(terminal: BorrowedFd<'_>) -> Option<(u16, u16)> {
    let mut size = MaybeUninit::<libc::winsize>::zeroed();
    // SAFETY: the call fills the `winsize`, which is valid as zeros too.
    let size = unsafe {
        check(libc::ioctl(
            terminal.as_raw_fd(),
            libc::TIOCGWINSZ,
            size.as_mut_ptr(),
        ))
        .ok()?;
        size.assume_init()
    };
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Whether the other side of the descriptor is gone. For a master: whether nobody has the slave open.
pub(super) fn is_hung_up(fd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    // SAFETY: one valid `pollfd`; the call does not block.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready == 1 && poll.revents & (libc::POLLHUP | libc::POLLERR) != 0
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}
