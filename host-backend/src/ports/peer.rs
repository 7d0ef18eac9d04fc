//! Who is at the host's end of a port: a client of a UNIX socket, a terminal, a file.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Token};
use tokio::net::UnixListener;
use tokio::time::{Instant, Interval, sleep};
use tracing::{info, warn};
use virtproxy_engine::edges::Edges;
use virtproxy_engine::log_limit::LogLimit;
use virtproxy_engine::pauses::Pauses;
use virtproxy_engine::sandbox;
use virtproxy_engine::segment::{Segment, readv, writev};
use virtproxy_engine::unix_socket::{self, SocketFile};

use super::place::Place;
use super::terminal::{self, Mode, Pty, Signals, looks};

/// Clients of a UNIX socket that wait until it is their turn.
const BACKLOG: i32 = 16;

/// How long to wait when whoever comes cannot be served.
const PAUSE: Duration = Duration::from_secs(1);

/// A place, open for whoever comes.
pub(super) enum Door {
    Listen {
        /// Dropped before its socket.
        _file: SocketFile,
        listener: UnixListener,
    },
    Connect {
        path: PathBuf,
        pauses: Pauses,
        /// The user knows that nobody is there.
        said: bool,
        opened: Option<Instant>,
    },
    Pty {
        pty: Pty,
        looks: Interval,
    },
    /// One peer, who is there from the start and never comes again.
    Once(Option<Peer>),
}

impl Door {
    /// Opens the place. An error names what stands in the way.
    pub(super) fn open(place: &Place) -> io::Result<Self> {
        match place {
            Place::Listen(path) => {
                let (listener, file) =
                    unix_socket::listen(path, BACKLOG).map_err(io::Error::other)?;
                listener.set_nonblocking(true)?;
                Ok(Door::Listen {
                    _file: file,
                    listener: UnixListener::from_std(listener)?,
                })
            }
            Place::Connect(path) => Ok(Door::Connect {
                path: path.clone(),
                pauses: Pauses::default(),
                said: false,
                opened: None,
            }),
            Place::File(path) => Ok(Door::Once(Some(Peer::file(path)?))),
            Place::Pty(link) => Ok(Door::Pty {
                pty: Pty::open(link.as_deref())?,
                looks: looks(),
            }),
            Place::Stdio => Ok(Door::Once(Some(Peer::stdio()?))),
        }
    }

    /// Where others find it, if that is not what the user wrote.
    pub(super) fn address(&self) -> Option<&Path> {
        match self {
            Door::Pty { pty, .. } => Some(pty.slave()),
            _ => None,
        }
    }

    /// Waits for the next peer. Cancel-safe.
    pub(super) async fn next(&mut self, port: &str, complaints: &mut LogLimit) -> Peer {
        loop {
            match self.attempt(port).await {
                Ok(peer) => return peer,
                // Out of descriptors, for instance; it may pass.
                Err(error) => {
                    if let Some(held_back) = complaints.pass(std::time::Instant::now()) {
                        warn!(port, "cannot serve anybody: {error}{held_back}");
                    }
                    sleep(PAUSE).await;
                }
            }
        }
    }

    async fn attempt(&mut self, port: &str) -> io::Result<Peer> {
        match self {
            Door::Listen { listener, .. } => Peer::socket(listener.accept().await?.0.into_std()?),
            Door::Connect {
                path,
                pauses,
                said,
                opened,
            } => {
                if let Some(opened) = opened.take() {
                    pauses.ended(opened);
                }
                loop {
                    pauses.pass().await;
                    match connect(path) {
                        Ok(stream) => {
                            *said = false;
                            *opened = Some(Instant::now());
                            return Peer::socket(stream);
                        }
                        Err(error) => {
                            pauses.lengthen();
                            if !std::mem::replace(said, true) {
                                let path = path.display();
                                let hint = sandbox::hint(&error);
                                info!(
                                    port,
                                    "cannot connect to {path} yet, trying on: {error}{hint}"
                                );
                            }
                        }
                    }
                }
            }
            Door::Pty { pty, looks } => loop {
                looks.tick().await;
                if !terminal::is_hung_up(pty.master.as_fd()) {
                    let (input, output) = (pty.master.try_clone()?, pty.master.try_clone()?);
                    return Peer::new(Some(input), output);
                }
            },
            Door::Once(peer) => match peer.take() {
                Some(peer) => Ok(peer),
                None => std::future::pending().await,
            },
        }
    }
}

/// Connects without ever blocking: a listener whose queue is full is as good as none.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = socket2::Socket::new(
        socket2::Domain::UNIX,
        socket2::Type::STREAM.nonblocking(),
        None,
    )?;
    socket.connect(&socket2::SockAddr::unix(path)?)?;
    Ok(OwnedFd::from(socket).into())
}

/// One peer, until it goes.
pub(super) struct Peer {
    edges: Edges,
    events: Events,
    /// `None`: nothing (more) comes from it.
    input: Option<OwnedFd>,
    output: OwnedFd,
    _mode: Option<Mode>,
}

impl Peer {
    fn new(input: Option<OwnedFd>, output: OwnedFd) -> io::Result<Self> {
        let edges = Edges::new()?;
        let watch = |fd: &OwnedFd, token, interest| match edges.registry().register(
            &mut SourceFd(&fd.as_raw_fd()),
            Token(token),
            interest,
        ) {
            // What cannot be waited for, an ordinary file, is always ready.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(()),
            result => result,
        };
        if let Some(input) = &input {
            watch(input, 0, Interest::READABLE)?;
        }
        watch(&output, 1, Interest::WRITABLE)?;
        Ok(Peer {
            edges,
            events: Events::with_capacity(2),
            input,
            output,
            _mode: None,
        })
    }

    fn socket(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let output = stream.try_clone()?;
        Self::new(Some(stream.into()), output.into())
    }

    fn file(path: &Path) -> io::Result<Self> {
        let file = File::options()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(|error| {
                io::Error::new(
                    error.kind(),
                    format!("cannot append to {}: {error}", path.display()),
                )
            })?;
        Self::new(None, file.into())
    }

    /// Both are opened anew, as other programs that have them would not expect them to be non-blocking.
    fn stdio() -> io::Result<Self> {
        let (stdin, stdout) = (io::stdin(), io::stdout());
        let input = reopen(stdin.as_fd(), File::options().read(true))?;
        let output = reopen(stdout.as_fd(), File::options().write(true))?;
        let mode = stdin
            .is_terminal()
            .then(|| Mode::raw(input.as_fd(), Signals::On))
            .transpose()?;
        let mut peer = Self::new(Some(input), output)?;
        peer._mode = mode;
        Ok(peer)
    }

    /// Whether there may be something to read.
    pub(super) fn speaks(&self) -> bool {
        self.input.is_some()
    }

    /// Reads into `segments`; 0 if there is nothing now.
    pub(super) fn read(&mut self, segments: &[Segment<'_>]) -> usize {
        let Some(input) = &self.input else {
            return 0;
        };
        match readv(input.as_fd(), segments) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            // The end, whichever way it is said; a master says EIO.
            Ok(0) | Err(_) => {
                self.input = None;
                0
            }
            Ok(n) => n,
        }
    }

    /// Writes some of `segments`.
    pub(super) fn write(&self, segments: &[Segment<'_>]) -> io::Result<usize> {
        writev(self.output.as_fd(), segments)
    }

    /// Whether it has gone. There may still be something to read.
    pub(super) fn is_gone(&self) -> bool {
        terminal::is_hung_up(self.output.as_fd())
    }

    /// Whether it is a terminal, which has a size.
    pub(super) fn is_terminal(&self) -> bool {
        self.output.is_terminal()
    }

    /// The size of the terminal, if it is one.
    pub(super) fn size(&self) -> Option<(u16, u16)> {
        terminal::size(self.output.as_fd())
    }

    /// Ready when more can be read or written than when that was last tried, or the peer has gone.
    pub(super) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.edges.poll_ready(cx));
            if self.edges.take(&mut self.events).is_err() || !self.events.is_empty() {
                return Poll::Ready(());
            }
        }
    }
}

/// The same file behind a descriptor of its own. A socket cannot be opened: then it is shared.
fn reopen(fd: BorrowedFd<'_>, options: &mut std::fs::OpenOptions) -> io::Result<OwnedFd> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    match options.custom_flags(flags).open(path) {
        Ok(file) => Ok(file.into()),
        Err(_) => {
            let socket = fd.try_clone_to_owned()?;
            socket2::SockRef::from(&socket).set_nonblocking(true)?;
            Ok(socket)
        }
    }
}
