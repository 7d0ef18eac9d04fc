//! The channels that either end can have; each is a small file here. What belongs to one end alone (the device of the
//! host, the virtio port of the guest) is with that end.

mod exec;
mod hvsock;
mod retrying;
mod sockets;
mod stdio;
mod tcp;
mod tcp_link;
mod tls;
mod tls_link;
mod unix;
mod vsock;

use std::io;
use std::os::fd::OwnedFd;

use crate::channel::{Channel, Link};
use crate::fd_link::FdLink;
use crate::program::Options;
use crate::spec::{ChannelSpec, Method};
use retrying::{Attempt, Obstacle};

/// The channel that `spec` names, if its method is not one of the other program's own; `hint` then says what to use
/// here. Within a tokio runtime.
pub fn make(spec: &ChannelSpec, options: &Options, hint: &str) -> io::Result<Box<dyn Channel>> {
    match spec.method {
        Method::UnixConnect => unix::connect(spec),
        Method::UnixListen => unix::listen(spec),
        Method::TcpConnect => tcp::connect(spec, options),
        Method::TcpListen => tcp::listen(spec, options),
        Method::VsockConnect => vsock::connect(spec),
        Method::VsockListen => vsock::listen(spec),
        Method::HvsockConnect => hvsock::connect(spec),
        Method::Stdio => stdio::open(spec),
        Method::Exec => exec::open(spec),
        Method::IsaSerialOpen | Method::VhostUser | Method::VirtserialOpen => {
            Err(io::Error::new(io::ErrorKind::Unsupported, hint))
        }
    }
}

/// A link over `fd` that knows nothing of the other side's comings and goings: frames are sealed.
fn bare_link(fd: impl Into<OwnedFd>) -> Attempt {
    match FdLink::new(fd.into()) {
        Ok(link) => Ok(Box::new(link.sealed()) as Box<dyn Link>),
        Err(error) => Err(Obstacle::Passing(format!("cannot use it: {error}"))),
    }
}

fn boxed(channel: impl Channel + 'static) -> io::Result<Box<dyn Channel>> {
    Ok(Box::new(channel))
}
