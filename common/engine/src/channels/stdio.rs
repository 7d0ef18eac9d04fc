//! `stdio:-:-`: this program's own standard input and output, as when the other end started it (see
//! [`super::exec`]).
//!
//! They are taken once: `/dev/null` stands in their place, so that nothing else in the program writes in between, and
//! their end is ours to tell. They cannot be opened a second time, so with the link the channel has ended too.
//!
//! A link's descriptors must not block, but that is a property of the *open file*, which a shell or `ssh` may share
//! with us and does not expect to change. So a pipe is opened anew, through `/proc`. A socket cannot be; it is as good
//! as always ours alone, made by whoever started us.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::channel::{BoxFuture, Channel, Link};
use crate::fd_link::FdLink;
use crate::spec::ChannelSpec;

struct Stdio {
    name: String,
    link: Option<FdLink>,
}

/// The channel over standard input and output; there can be one.
pub(super) fn open(spec: &ChannelSpec) -> io::Result<Box<dyn Channel>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Err(io::Error::other(
            "another -c has the program's standard input and output: leave one out",
        ));
    }
    let input = take(libc::STDIN_FILENO, "input")?;
    let output = take(libc::STDOUT_FILENO, "output")?;
    let link = FdLink::pair(input, output).map_err(|error| match error.raw_os_error() {
        // What epoll says to a descriptor that nobody can wait for.
        Some(libc::EPERM) => unsuitable("input or output"),
        _ => error,
    })?;
    Ok(Box::new(Stdio {
        name: spec.to_string(),
        link: Some(link.sealed()),
    }))
}

impl Channel for Stdio {
    fn open(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Link>>> {
        let link = self.link.take();
        Box::pin(async {
            match link {
                Some(link) => Ok(Box::new(link) as Box<dyn Link>),
                None => Err(io::ErrorKind::UnexpectedEof.into()),
            }
        })
    }

    fn name(&self) -> &str {
        &self.name
    }
}

/// Takes a standard descriptor; `/dev/null` is in its place from now on.
fn take(fd: RawFd, what: &str) -> io::Result<OwnedFd> {
    // SAFETY: it is not closed here; if it is not open, the calls on it fail.
    let standard = ManuallyDrop::new(unsafe { File::from_raw_fd(fd) });
    let kind = standard.metadata()?.file_type();
    if kind.is_file() || kind.is_dir() {
        return Err(unsuitable(what));
    }
    if standard.is_terminal() {
        return Err(io::Error::other(format!(
            "standard {what} is a terminal, which changes what passes through it: connect a pipe or a socket to it (ssh \
             without -t)"
        )));
    }
    let reopened = kind.is_fifo().then(|| {
        let mut options = OpenOptions::new();
        match fd {
            libc::STDIN_FILENO => options.read(true),
            _ => options.write(true),
        };
        options.custom_flags(libc::O_NONBLOCK);
        options.open(format!("/proc/self/fd/{fd}"))
    });
    let taken = match reopened {
        Some(Ok(file)) => file.into(),
        // A socket; or a pipe of another user, or there is no /proc: shared it is.
        _ => standard.as_fd().try_clone_to_owned()?,
    };
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    // SAFETY: both are open descriptors.
    match unsafe { libc::dup2(null.as_raw_fd(), fd) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(taken),
    }
}

fn unsuitable(what: &str) -> io::Error {
    io::Error::other(format!(
        "standard {what} is a file, over which nobody answers: connect a pipe or a socket to it"
    ))
}
