//! `tcp-connect:HOST:PORT` and `tcp-listen:HOST:PORT`: a network between the two ends.
//!
//! With `--tls-creds` every connection is mutual TLS 1.3 (see [`super::tls`]). Without, whoever is on the way can read
//! and change everything, and whoever can connect is the other end; so only loopback addresses are taken, unless the
//! user says otherwise. What counts is the address itself: after a name was resolved, before anything is sent.
//!
//! One link at a time: who connects meanwhile waits in the kernel's queue. A peer that vanished without a word is
//! noticed (see [`super::tcp_link`]), so that its successor is let in.

use std::io;
use std::net::{IpAddr, SocketAddr};

use socket2::{SockAddr, Socket};
use tracing::{info, warn};

use super::retrying::{Attempt, Obstacle, Retrying};
use super::sockets::{self, Acceptor};
use super::tcp_link::TcpLink;
use super::{boxed, tls};
use crate::channel::Channel;
use crate::driver::bind_cure;
use crate::program::{Options, Plaintext};
use crate::sandbox;
use crate::socket::look_up_here;
use crate::spec::{ChannelSpec, Host};

/// Where to connect to or to listen.
struct Target {
    host: Host,
    port: u16,
    /// What may be done without TLS, where there is none.
    plaintext: Option<Plaintext>,
}

impl Target {
    fn new(spec: &ChannelSpec, options: &Options) -> io::Result<Self> {
        let target = Target {
            host: spec.addr.parse().map_err(io::Error::other)?,
            port: spec
                .port
                .and_then(|port| u16::try_from(port).ok())
                .ok_or(io::ErrorKind::InvalidInput)?,
            plaintext: options.tls_creds.is_none().then(|| options.plaintext()),
        };
        let mut local = false;
        if let Host::Ip(ip) = target.host {
            target.check(ip)?;
            local = ip.to_canonical().is_loopback();
        }
        if target.plaintext == Some(Plaintext::Implied) && !local {
            warn!(channel = %spec, "not encrypted: whoever is on the way can read and change it (see --tls-creds)");
        }
        Ok(target)
    }

    /// Whether `ip` may be talked to as things are.
    fn check(&self, ip: IpAddr) -> io::Result<()> {
        if self.plaintext != Some(Plaintext::Loopback) || ip.to_canonical().is_loopback() {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "{ip} is no loopback address, and without TLS whoever is on the way could read and change everything: \
                 give --tls-creds DIR, or --insecure-plaintext if that is wanted"
            ),
        ))
    }

    /// Its addresses, all of which may be talked to.
    async fn resolve(&self) -> Result<Vec<SockAddr>, Obstacle> {
        let addresses: Vec<SocketAddr> = match &self.host {
            Host::Ip(ip) => vec![SocketAddr::new(*ip, self.port)],
            Host::Name(name) => tokio::net::lookup_host((name.as_str(), self.port))
                .await
                .map_err(|error| Obstacle::Passing(format!("cannot look up {name}: {error}")))?
                .collect(),
        };
        for address in &addresses {
            self.check(address.ip()).map_err(Obstacle::Final)?;
        }
        Ok(addresses.into_iter().map(SockAddr::from).collect())
    }

    async fn connect(&self) -> Result<Socket, Obstacle> {
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in self.resolve().await? {
            match sockets::connect(&address).await {
                Ok(socket) => return Ok(socket),
                Err(error) => last = error,
            }
        }
        let Target { host, port, .. } = self;
        Err(Obstacle::Passing(format!(
            "cannot connect to {host}:{port}: {last}{}",
            sandbox::hint(&last)
        )))
    }

    /// Listens before the program may do less than now: a port below 1024 may be out of reach then. If it fails, the
    /// first attempt tells why.
    fn listen_early(&self, name: &str) -> Option<Acceptor> {
        let address = look_up_here(&self.host, self.port).ok()?;
        self.check(address.ip()).ok()?;
        self.bind(Some(address.into()), name).ok()
    }

    async fn listen(&self, name: &str) -> Result<Acceptor, Obstacle> {
        let address = self.resolve().await?.into_iter().next();
        self.bind(address, name)
    }

    fn bind(&self, address: Option<SockAddr>, name: &str) -> Result<Acceptor, Obstacle> {
        let Target { host, port, .. } = self;
        let bound = address
            .ok_or(io::ErrorKind::AddrNotAvailable.into())
            .and_then(|address| Acceptor::bind(&address));
        let failed = |error: io::Error| {
            let cure = bind_cure(&error);
            let why = format!("cannot listen on {host}:{port}: {error}{cure}");
            match error.kind() {
                // The network may not be up yet.
                io::ErrorKind::AddrNotAvailable => Obstacle::Passing(why),
                _ => Obstacle::never(why),
            }
        };
        let acceptor = bound.map_err(failed)?;
        let local = acceptor.local_addr().ok().and_then(|a| a.as_socket());
        if let Some(address) = local {
            info!(channel = name, %address, "listening");
        }
        Ok(acceptor)
    }
}

/// The link over `socket`, without TLS.
fn plain_link(socket: Socket) -> Attempt {
    match TcpLink::new(socket) {
        Ok(link) => Ok(Box::new(link)),
        Err(error) => Err(Obstacle::Passing(format!("the connection broke: {error}"))),
    }
}

/// The channel that connects to HOST:PORT, again and again.
pub(super) fn connect(spec: &ChannelSpec, options: &Options) -> io::Result<Box<dyn Channel>> {
    let target = Target::new(spec, options)?;
    let creds = options.tls_creds.as_deref();
    let tls = creds
        .map(|dir| tls::Connector::new(dir, &target.host))
        .transpose()?;
    boxed(Retrying::new(spec.to_string(), async move || {
        let socket = target.connect().await?;
        match &tls {
            Some(tls) => tls.link(socket).await,
            None => plain_link(socket),
        }
    }))
}

/// The channel that listens on HOST:PORT, and serves one client after the other.
pub(super) fn listen(spec: &ChannelSpec, options: &Options) -> io::Result<Box<dyn Channel>> {
    let target = Target::new(spec, options)?;
    let mut tls = options
        .tls_creds
        .as_deref()
        .map(tls::Listener::new)
        .transpose()?;
    let name = spec.to_string();
    let mut acceptor = target.listen_early(&name);
    boxed(Retrying::new(name.clone(), async move || {
        let acceptor = match &mut acceptor {
            Some(acceptor) => acceptor,
            none => none.insert(target.listen(&name).await?),
        };
        match &mut tls {
            Some(tls) => tls.link(acceptor).await,
            None => plain_link(acceptor.accept().await?.0),
        }
    }))
}
