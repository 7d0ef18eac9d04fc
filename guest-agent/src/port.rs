//! The guest's virtio port as a channel: `virtserial-open:PATH_OR_NAME:-`.
//!
//! # Theory of operation
//!
//! A port is not a connection. It may not be there yet, belong to somebody else, have no host behind it, be
//! unplugged and come back. [`PortChannel::open`] sits all of that out, and gives a link when both ends are there:
//!
//! ```text
//!            .-------------------- pause: 50 ms, doubling to 1 s -------------------.
//!            v                                                                      |
//!  find the node --> open it --> wait until the host is connected --> [link] --> it ended
//!            |             |                     |
//!            '- Absent     '- Busy, Denied       '- Unplugged            each is logged once, then retried
//! ```
//!
//! A link that ends is closed, and only a new `open` gives the next one. That is the handshake with the
//! host's device: on close the driver throws away what was not read and tells the host so
//! (`PORT_OPEN(0)`), on open it says `PORT_OPEN(1)`. So nothing of an old session is ever read in a new one.
//!
//! **Waiting for the host.** While the host end is not connected the driver says `POLLHUP`, and when it connects
//! it wakes whoever waits for the port to be writable. The link's own epoll turns that into one wake-up
//! (see [`virtproxy_engine::fd_link`]); a slow second look covers a driver that forgot to wake us.
//!
//! **A console** (`/dev/hvcN`: QEMU's `virtconsole`) is a terminal and not a port. It is put in raw mode. It says nothing of
//! the host's comings and goings, so it is not waited for; and what QEMU's chardev does not take at once is dropped
//! (`flush_buf` of hw/char/virtio-console.c), so it is used as a serial line is, with the link layer below the session.
//!
//! **Pauses** between attempts are those of [`virtproxy_engine::pauses`].

use std::fmt::Display;
use std::fs::{self, OpenOptions};
use std::future::poll_fn;
use std::io::{self, IsTerminal};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Instant, timeout};
use tracing::{info, warn};
use virtproxy_engine::channel::{BoxFuture, Channel, Link};
use virtproxy_engine::fd_link::FdLink;
use virtproxy_engine::lossy_link::LossyLink;
use virtproxy_engine::pauses::Pauses;
use virtproxy_engine::spec::ChannelSpec;
use virtproxy_engine::tty::{TtyError, TtyLink};

mod find;

pub use find::Roots;
use find::{NotFound, find, holder};

/// How long a port may refuse us before that is final: udev sets a new node's mode a moment after it is made.
const DENIED_GRACE: Duration = Duration::from_secs(2);

/// How often we look again whether the host is there, should a wake-up be missing.
const SECOND_LOOK: Duration = Duration::from_secs(2);

/// A virtio port, opened again and again.
pub struct PortChannel {
    name: String,
    addr: String,
    roots: Roots,
    pauses: Pauses,
    /// Since when the port (or, with its host there, the link) has been open.
    opened: Option<Instant>,
    /// What was last logged to stand in the way.
    reported: Option<Obstacle>,
    denied_since: Option<Instant>,
}

impl PortChannel {
    /// The port that `spec`, a `virtserial-open`, names in ADDR: by its path, or by its bare name.
    pub fn new(spec: &ChannelSpec) -> Self {
        Self::with_roots(spec, Roots::default())
    }

    /// The same, with `/dev` and `/sys` elsewhere.
    pub fn with_roots(spec: &ChannelSpec, roots: Roots) -> Self {
        PortChannel {
            name: spec.to_string(),
            addr: spec.addr.clone(),
            roots,
            pauses: Pauses::default(),
            opened: None,
            reported: None,
            denied_since: None,
        }
    }

    async fn open_link(&mut self) -> io::Result<Box<dyn Link>> {
        loop {
            if let Some(opened) = self.opened.take() {
                self.pauses.ended(opened);
            }
            self.pauses.pass().await;
            match self.attempt().await {
                Ok(link) => return Ok(link),
                Err(obstacle) => self.report(obstacle)?,
            }
            if self.opened.is_none() {
                self.pauses.lengthen();
            }
        }
    }

    async fn attempt(&mut self) -> Result<Box<dyn Link>, Obstacle> {
        let node = find(&self.roots, &self.addr)?;
        let port = open_node(&node)?;
        if port.is_terminal() {
            let line =
                TtyLink::new(port, None).map_err(|error| Obstacle::from_terminal(&node, error))?;
            let line = LossyLink::new(Box::new(line), None)
                .map_err(|error| Obstacle::from_open(&node, &error))?;
            self.has_opened(&node);
            return Ok(Box::new(line));
        }
        let mut link = FdLink::new(port)
            .map_err(|error| Obstacle::from_watch(&node, &error))?
            .with_long_frames();
        self.has_opened(&node);
        self.wait_for_host(&mut link, &node).await?;
        self.opened = Some(Instant::now());
        Ok(Box::new(link))
    }

    fn has_opened(&mut self, node: &Path) {
        self.opened = Some(Instant::now());
        self.reported = None;
        self.denied_since = None;
        info!(channel = %self.name, node = %node.display(), "port opened");
    }

    async fn wait_for_host(&self, link: &mut FdLink, node: &Path) -> Result<(), Obstacle> {
        let mut told = false;
        loop {
            let revents = link
                .revents()
                .map_err(|error| Obstacle::from_open(node, &error))?;
            match Host::of(revents) {
                Host::Connected => return Ok(()),
                Host::Unplugged => return Err(Obstacle::Unplugged(node.into())),
                Host::Away if !told => {
                    info!(channel = %self.name, "waiting for the host to connect its end of the port");
                    told = true;
                }
                Host::Away => {}
            }
            // Ready or not, the next look at `revents` tells.
            let _ = timeout(SECOND_LOOK, poll_fn(|cx| link.poll_ready(cx))).await;
        }
    }

    /// Logs what stands in the way, once; an error if it will never go away.
    fn report(&mut self, obstacle: Obstacle) -> io::Result<()> {
        match &obstacle {
            Obstacle::NotAPort(_) => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, obstacle));
            }
            Obstacle::Denied(_) => {
                let since = *self.denied_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= DENIED_GRACE {
                    return Err(io::Error::new(io::ErrorKind::PermissionDenied, obstacle));
                }
                return Ok(());
            }
            _ => self.denied_since = None,
        }
        if self.reported.as_ref() != Some(&obstacle) {
            let channel: &dyn Display = &self.name;
            match &obstacle {
                Obstacle::NotFound(NotFound::Absent { .. }) => {
                    info!(%channel, "waiting: {obstacle}")
                }
                Obstacle::Busy(node) => {
                    let holder = holder(node).unwrap_or_else(|| "another program".into());
                    warn!(%channel, "waiting: {obstacle}: it is held by {holder}");
                }
                _ => warn!(%channel, "waiting: {obstacle}"),
            }
            self.reported = Some(obstacle);
        }
        Ok(())
    }
}

impl Channel for PortChannel {
    fn open(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Link>>> {
        Box::pin(self.open_link())
    }

    fn carried(&mut self) {
        self.pauses.worked();
    }

    fn name(&self) -> &str {
        &self.name
    }
}

fn open_node(node: &Path) -> Result<OwnedFd, Obstacle> {
    let failed = |error: io::Error| Obstacle::from_open(node, &error);
    if !fs::metadata(node)
        .map_err(failed)?
        .file_type()
        .is_char_device()
    {
        return Err(Obstacle::NotAPort(node.into()));
    }
    // Close-on-exec is the standard library's default. NOCTTY: should it be a terminal, it is not to be ours.
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    Ok(options.open(node).map_err(failed)?.into())
}

/// Why there is no link yet.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Obstacle {
    #[error(transparent)]
    NotFound(#[from] NotFound),
    #[error("{} is not a port: name a virtio port, as in /dev/virtio-ports/NAME", .0.display())]
    NotAPort(PathBuf),
    #[error("{} is in use, and only one program can have it open", .0.display())]
    Busy(PathBuf),
    #[error(
        "permission to open {} denied: run the agent as root, or give the port to its group with a \
         udev rule like SUBSYSTEM==\"virtio-ports\", GROUP=\"virtproxy\", MODE=\"0660\"",
        .0.display()
    )]
    Denied(PathBuf),
    #[error("{} was unplugged", .0.display())]
    Unplugged(PathBuf),
    /// `ENXIO` alone does not tell which of the two.
    #[error(
        "{} has no port behind it: it was unplugged, or it is a console: name /dev/hvcN instead",
        .0.display()
    )]
    Hollow(PathBuf),
    #[error("cannot open {}: {error}", node.display())]
    Other { node: PathBuf, error: String },
}

impl Obstacle {
    fn from_open(node: &Path, error: &io::Error) -> Self {
        let node = node.into();
        match error.raw_os_error() {
            Some(libc::EBUSY) => Obstacle::Busy(node),
            Some(libc::EACCES | libc::EPERM) => Obstacle::Denied(node),
            Some(libc::ENODEV | libc::ENOENT) => Obstacle::Unplugged(node),
            Some(libc::ENXIO) => Obstacle::Hollow(node),
            _ => Obstacle::Other {
                node,
                error: error.to_string(),
            },
        }
    }

    fn from_terminal(node: &Path, error: TtyError) -> Self {
        match error {
            TtyError::Io(error) => Self::from_watch(node, &error),
            TtyError::Busy => Obstacle::Busy(node.into()),
            TtyError::Speed { .. } => Self::from_open(node, &io::Error::other(error)),
        }
    }

    /// `EPERM` of epoll: nothing that one can wait for (`/dev/null`, for one).
    fn from_watch(node: &Path, error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM) => Obstacle::NotAPort(node.into()),
            _ => Self::from_open(node, error),
        }
    }
}

/// What the driver says of the other end.
#[derive(Debug, PartialEq, Eq)]
enum Host {
    Connected,
    Away,
    Unplugged,
}

impl Host {
    /// A port without its host is "readable" (the read gives 0); one that was unplugged is not even that.
    fn of(revents: libc::c_short) -> Self {
        match (revents & libc::POLLHUP != 0, revents & libc::POLLIN != 0) {
            (false, _) => Host::Connected,
            (true, true) => Host::Away,
            (true, false) => Host::Unplugged,
        }
    }
}

#[cfg(test)]
mod tests;
