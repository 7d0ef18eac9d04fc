//! Local sockets: what a stream is joined to, and where clients come in.
//!
//! TCP and UNIX stream sockets behind one face, all non-blocking. A socket that is given up before its stream
//! ended in order is closed with a reset where the kind has one, so that the other side cannot take a cut-off
//! transfer for a whole one. That must hold even if this process is killed and the kernel closes its sockets: so each
//! TCP socket is to be reset when it is closed (`SO_LINGER` of no time) until [`Socket::end`] says otherwise. A UNIX socket
//! has no reset; its other side sees an end of file. Behind the UNIX socket of a UDP forward there is a bridge
//! ([`crate::udp`]).

use std::fmt;
use std::io;
use std::net::{Shutdown, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::Duration;

use mio::event::Source;
use mio::{Interest, Registry, Token};

use crate::spec::{Endpoint, ForwardSpec, Host};
use crate::udp;
use crate::unix_socket::{self, SocketFile};

/// How long to wait before a UNIX socket whose queue of connections is full is tried again.
const UNIX_RETRY: Duration = Duration::from_millis(5);

/// Clients of a UNIX socket that wait to be accepted; more are told to try again.
const UNIX_BACKLOG: i32 = 1024;

/// A connected stream socket.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(mio::net::TcpStream),
    Unix(mio::net::UnixStream),
}

impl Socket {
    fn tcp(stream: mio::net::TcpStream) -> Self {
        // Only a socket that is already broken refuses this; reading it will tell.
        let _ = stream.set_nodelay(true);
        Socket::Tcp(stream)
    }

    /// No more bytes will be written.
    pub(crate) fn finish(&self) {
        // A socket that is not connected any more needs no half-close.
        let _ = match self {
            Socket::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Socket::Unix(stream) => stream.shutdown(Shutdown::Write),
        };
    }

    /// Closes the socket, whose both directions have ended in order: what was written last still arrives. One that is only
    /// dropped is cut off.
    pub(crate) fn end(self) {
        if let Socket::Tcp(stream) = &self {
            let _ = socket2::SockRef::from(stream).set_linger(None);
        }
    }

    /// Its events, edge-triggered, under `token`.
    pub(crate) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        let both = Interest::READABLE | Interest::WRITABLE;
        match self {
            Socket::Tcp(stream) => stream.register(registry, token, both),
            Socket::Unix(stream) => stream.register(registry, token, both),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Tcp(stream) => stream.as_fd(),
            Socket::Unix(stream) => stream.as_fd(),
        }
    }
}

/// What streams of a service of `-i` are joined to.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    Tcp {
        host: Host,
        port: u16,
    },
    Unix(PathBuf),
    /// A name stands for its first address: nothing tells which of them answers.
    Udp {
        host: Host,
        port: u16,
        flows: udp::Flows,
    },
}

impl Target {
    /// That of `forward`, whose flows end when they were idle for `udp_timeout`, if it is one for UDP.
    pub(crate) fn new(forward: &ForwardSpec, udp_timeout: Duration) -> io::Result<Self> {
        Ok(match &forward.endpoint {
            Endpoint::Tcp { host, port } => Target::Tcp {
                host: host.clone(),
                port: *port,
            },
            Endpoint::Unix(path) => Target::Unix(path.clone()),
            Endpoint::Udp { host, port } => Target::Udp {
                host: host.clone(),
                port: *port,
                flows: udp::Flows::new(forward.service.as_str(), udp_timeout)?,
            },
        })
    }

    /// Connects to it: looks its name up if there is one, and tries each of its addresses.
    pub(crate) async fn connect(&self) -> io::Result<Socket> {
        match self {
            Target::Tcp { host, port } => {
                let stream = match host {
                    Host::Ip(ip) => connect(SocketAddr::new(*ip, *port)).await?,
                    Host::Name(name) => {
                        let address = (name.as_str(), *port);
                        let stream = tokio::net::TcpStream::connect(address).await?;
                        mio::net::TcpStream::from_std(stream.into_std()?)
                    }
                };
                cut_off_when_closed(&stream)?;
                Ok(Socket::tcp(stream))
            }
            Target::Unix(path) => loop {
                match mio::net::UnixStream::connect(path) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        tokio::time::sleep(UNIX_RETRY).await;
                    }
                    result => return result.map(Socket::Unix),
                }
            },
            Target::Udp { host, port, flows } => {
                let address = look_up(host, *port).await?;
                flows.begin(address).await.map(Socket::Unix)
            }
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Tcp { host, port } | Target::Udp { host, port, .. } => {
                write!(f, "{host}:{port}")
            }
            Target::Unix(path) => path.display().fmt(f),
        }
    }
}

/// A listening socket; a UNIX socket's file goes with it.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(mio::net::TcpListener),
    Unix(SocketFile, mio::net::UnixListener),
    Udp(udp::Listener),
}

impl Listener {
    /// Listens where `forward` says; its flows end when they were idle for `udp_timeout`, if it is one for UDP.
    pub(crate) fn bind(forward: &ForwardSpec, udp_timeout: Duration) -> io::Result<Self> {
        match &forward.endpoint {
            Endpoint::Tcp { host, port } => {
                let address = look_up_here(host, *port)?;
                let listener = mio::net::TcpListener::bind(address)?;
                // Its clients have this from it.
                cut_off_when_closed(&listener)?;
                Ok(Listener::Tcp(listener))
            }
            Endpoint::Udp { host, port } => {
                let address = look_up_here(host, *port)?;
                let service = forward.service.as_str();
                udp::Listener::bind(address, service, udp_timeout).map(Listener::Udp)
            }
            Endpoint::Unix(path) => {
                let (listener, file) = unix_socket::listen(path, UNIX_BACKLOG)?;
                listener.set_nonblocking(true)?;
                let listener = mio::net::UnixListener::from_std(listener);
                Ok(Listener::Unix(file, listener))
            }
        }
    }

    /// The next client, or `WouldBlock`.
    pub(crate) fn accept(&mut self) -> io::Result<Socket> {
        match self {
            Listener::Tcp(listener) => Ok(Socket::tcp(listener.accept()?.0)),
            Listener::Unix(_, listener) => Ok(Socket::Unix(listener.accept()?.0)),
            Listener::Udp(listener) => listener.accept().map(Socket::Unix),
        }
    }

    /// Where it listens; tells the port that the kernel chose.
    pub(crate) fn local_name(&self) -> String {
        match self {
            Listener::Tcp(listener) => match listener.local_addr() {
                Ok(address) => address.to_string(),
                Err(error) => error.to_string(),
            },
            Listener::Unix(file, _) => file.path().display().to_string(),
            Listener::Udp(listener) => listener.local_addr().to_string(),
        }
    }

    /// Its events, edge-triggered, under `token`.
    pub(crate) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        match self {
            Listener::Tcp(listener) => listener.register(registry, token, Interest::READABLE),
            Listener::Unix(_, listener) => listener.register(registry, token, Interest::READABLE),
            Listener::Udp(listener) => listener.register(registry, token),
        }
    }
}

/// Has the kernel close a socket with a reset, whoever has it closed.
fn cut_off_when_closed(socket: &impl AsFd) -> io::Result<()> {
    socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO))
}

/// Connects to `address`: without waiting if that is on this machine, where the system call that begins it sees its end
/// too, though it does not say so.
async fn connect(address: SocketAddr) -> io::Result<mio::net::TcpStream> {
    let stream = mio::net::TcpStream::connect(address)?;
    if stream.peer_addr().is_ok() {
        return Ok(stream);
    }
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    let stream = tokio::net::TcpStream::from_std(stream.into())?;
    stream.writable().await?;
    match stream.take_error()? {
        Some(error) => Err(error),
        None => Ok(mio::net::TcpStream::from_std(stream.into_std()?)),
    }
}

/// The address of `host`; the first one, if it is a name.
async fn look_up(host: &Host, port: u16) -> io::Result<SocketAddr> {
    match host {
        Host::Ip(ip) => Ok(SocketAddr::new(*ip, port)),
        Host::Name(name) => tokio::net::lookup_host((name.as_str(), port))
            .await?
            .next()
            .ok_or(io::ErrorKind::AddrNotAvailable.into()),
    }
}

/// The same on this thread, for the start: there is nothing yet to hold up, and no other thread is wanted yet.
pub(crate) fn look_up_here(host: &Host, port: u16) -> io::Result<SocketAddr> {
    match host {
        Host::Ip(ip) => Ok(SocketAddr::new(*ip, port)),
        Host::Name(name) => (name.as_str(), port)
            .to_socket_addrs()?
            .next()
            .ok_or(io::ErrorKind::AddrNotAvailable.into()),
    }
}
