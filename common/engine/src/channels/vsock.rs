//! `vsock-connect:CID:PORT` and `vsock-listen:CID:PORT`: AF_VSOCK, between a guest and its host.
//!
//! A guest calls its host 2 (`host`), the host calls each guest by the number that its monitor was given, and `local`
//! is the machine itself. Who listens on `any` can be reached from everywhere: in a guest that is its host, but on a
//! host it is every guest.

use std::io;

use socket2::SockAddr;
use tracing::info;

use super::retrying::{Obstacle, Retrying};
use super::sockets::{self, Acceptor};
use super::{bare_link, boxed};
use crate::channel::Channel;
use crate::driver::bind_cure;
use crate::spec::{ChannelSpec, Cid};

fn parse(spec: &ChannelSpec) -> io::Result<(Cid, SockAddr)> {
    let cid: Cid = spec.addr.parse().map_err(io::Error::other)?;
    let port = spec.port.ok_or(io::ErrorKind::InvalidInput)?;
    Ok((cid, SockAddr::vsock(cid.0, port)))
}

/// The channel that connects to a port of CID, again and again.
pub(super) fn connect(spec: &ChannelSpec) -> io::Result<Box<dyn Channel>> {
    let (cid, address) = parse(spec)?;
    if cid == Cid::ANY {
        return Err(io::Error::other(
            "any is for vsock-listen: name the machine to connect to, as in host or 3",
        ));
    }
    boxed(Retrying::new(
        spec.to_string(),
        async move || match sockets::connect(&address).await {
            Ok(socket) => bare_link(socket),
            Err(error) => Err(Obstacle::Passing(refusal(&error))),
        },
    ))
}

fn refusal(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ECONNRESET | libc::ECONNREFUSED) => "nobody listens there".into(),
        Some(libc::EHOSTUNREACH) => "there is no such machine".into(),
        Some(libc::EAFNOSUPPORT | libc::ENODEV | libc::ENETUNREACH) => {
            format!("{error}: {DEVICE}")
        }
        _ => format!("cannot connect: {error}"),
    }
}

const DEVICE: &str = "a guest needs a vsock device and the module vmw_vsock_virtio_transport, a host vhost_vsock, and \
                      local vsock_loopback";

/// The channel that listens on a port, and serves one client after the other.
pub(super) fn listen(spec: &ChannelSpec) -> io::Result<Box<dyn Channel>> {
    let (_, address) = parse(spec)?;
    let name = spec.to_string();
    let bind =
        move |name: &str| Acceptor::bind(&address).inspect(|_| info!(channel = name, "listening"));
    // At once, as a port below 1024 may be out of reach later. If that fails, the first attempt tells why.
    let mut acceptor = bind(&name).ok();
    boxed(Retrying::new(name.clone(), async move || {
        let acceptor = match &mut acceptor {
            Some(acceptor) => acceptor,
            none => none.insert(bind(&name).map_err(|error| cannot_listen(&error))?),
        };
        let (client, _) = acceptor.accept().await?;
        bare_link(client)
    }))
}

fn cannot_listen(error: &io::Error) -> Obstacle {
    match error.raw_os_error() {
        // The device, and with it the number of this machine, may come later.
        Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT | libc::ENODEV) => {
            Obstacle::Passing(format!("cannot listen: {error}: {DEVICE}"))
        }
        _ => Obstacle::never(format!("cannot listen: {error}{}", bind_cure(error))),
    }
}
