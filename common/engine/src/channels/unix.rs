//! `unix-connect:PATH:-` and `unix-listen:PATH:-`: a UNIX socket, such as that of a QEMU chardev, either way round.
//!
//! QEMU with `server=on` serves one client at a time; with `server=off,reconnect-ms=...` it is the client. Either end
//! may restart at any time and is waited for. Who connects while another is served waits in the socket's queue.

use std::io;
use std::path::Path;

use socket2::{SockAddr, Socket};
use tracing::info;

use super::retrying::{Obstacle, Retrying};
use super::sockets::{self, Acceptor, BACKLOG};
use super::{bare_link, boxed};
use crate::channel::Channel;
use crate::sandbox;
use crate::spec::ChannelSpec;
use crate::unix_socket;

/// The channel that connects to the socket at ADDR, again and again.
pub(super) fn connect(spec: &ChannelSpec) -> io::Result<Box<dyn Channel>> {
    let path = spec.addr.clone();
    let address = SockAddr::unix(&path)?;
    boxed(Retrying::new(
        spec.to_string(),
        async move || match sockets::connect(&address).await {
            Ok(socket) => bare_link(socket),
            Err(error) => Err(refusal(&path, &error)),
        },
    ))
}

/// Why nobody answers at `path`.
pub(super) fn refusal(path: &str, error: &io::Error) -> Obstacle {
    let why = match error.raw_os_error() {
        Some(libc::ENOENT) => format!("there is no socket {path} yet"),
        Some(libc::ECONNREFUSED) => format!("nobody listens on {path}"),
        Some(libc::EAGAIN) => format!("{path} serves another, and its queue is full"),
        Some(libc::EACCES) => {
            let hint = sandbox::hint(error);
            format!("permission to connect to {path} denied: run as the user that owns it{hint}")
        }
        Some(libc::EPROTOTYPE) => {
            return Obstacle::never(format!("{path} is no stream socket: name one"));
        }
        _ => format!("cannot connect to {path}: {error}"),
    };
    Obstacle::Passing(why)
}

/// The channel that listens on the socket at ADDR, and serves one client after the other.
pub(super) fn listen(spec: &ChannelSpec) -> io::Result<Box<dyn Channel>> {
    let name = spec.to_string();
    let (listener, file) =
        unix_socket::listen(Path::new(&spec.addr), BACKLOG).map_err(io::Error::other)?;
    let acceptor = Acceptor::new(Socket::from(listener))?;
    info!(channel = name, "listening");
    boxed(Retrying::new(name, async move || {
        let _kept = &file;
        let (client, _) = acceptor.accept().await?;
        bare_link(client)
    }))
}
