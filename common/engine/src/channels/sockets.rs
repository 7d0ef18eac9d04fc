//! Stream sockets of any family, as channels need them: one connect, one accept.
//!
//! What these give is not registered with tokio any more, so that a link can watch it in its own way.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use super::retrying::Obstacle;

/// Clients that wait until the present link has ended; the kernel turns more away.
pub(super) const BACKLOG: i32 = 16;

/// How long a connect may take: the kernel's own limit for TCP is two minutes.
const CONNECT: Duration = Duration::from_secs(10);

/// Connects to `address`, in bounded time.
pub(super) async fn connect(address: &SockAddr) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::from(i32::from(address.family())),
        Type::STREAM.nonblocking(),
        None,
    )?;
    match socket.connect(address) {
        Ok(()) => return Ok(socket),
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(error) => return Err(error),
    }
    let socket = watch(socket, Interest::WRITABLE)?;
    let connected = timeout(CONNECT, socket.writable()).await;
    connected
        .map_err(|_| {
            let why = format!("no answer within {CONNECT:?}");
            io::Error::new(io::ErrorKind::TimedOut, why)
        })??
        .retain_ready();
    match socket.get_ref().take_error()? {
        None => Ok(socket.into_inner()),
        Some(error) => Err(error),
    }
}

fn watch(socket: Socket, interest: Interest) -> io::Result<AsyncFd<Socket>> {
    // SAFETY: `Socket` owns its descriptor, which is the same one for as long as it lives.
    let watched = unsafe { AsyncFd::register_with_interest(socket, interest) };
    watched.map_err(|error| error.into_parts().1)
}

/// A listening socket.
pub(super) struct Acceptor(AsyncFd<Socket>);

impl Acceptor {
    /// Listens on `address`.
    pub(super) fn bind(address: &SockAddr) -> io::Result<Self> {
        let socket = Socket::new(
            Domain::from(i32::from(address.family())),
            Type::STREAM,
            None,
        )?;
        if address.is_ipv4() || address.is_ipv6() {
            socket.set_reuse_address(true)?;
        }
        socket.bind(address)?;
        socket.listen(BACKLOG)?;
        Self::new(socket)
    }

    /// Accepts from a socket that listens already.
    pub(super) fn new(socket: Socket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        watch(socket, Interest::READABLE).map(Acceptor)
    }

    /// Where it listens.
    pub(super) fn local_addr(&self) -> io::Result<SockAddr> {
        self.0.get_ref().local_addr()
    }

    /// The next client that is still there. Those that came and went while another was served are passed over.
    pub(super) async fn accept(&self) -> Result<(Socket, SockAddr), Obstacle> {
        loop {
            let accepted = self
                .0
                .async_io(Interest::READABLE, |socket| socket.accept())
                .await;
            match accepted {
                Ok((client, from)) if !is_gone(&client) => {
                    return match client.set_nonblocking(true) {
                        Ok(()) => Ok((client, from)),
                        Err(error) => Err(cannot_accept(&error)),
                    };
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => return Err(cannot_accept(&error)),
            }
        }
    }
}

fn cannot_accept(error: &io::Error) -> Obstacle {
    Obstacle::Passing(format!("cannot accept: {error}"))
}

/// Whether the other side has closed, in one direction at least: no session can be had with it.
fn is_gone(socket: &Socket) -> bool {
    let mut poll = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one valid `pollfd`; the call does not block.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}
