//! `hvsock-connect:PATH:PORT`: a vsock port of a guest, through the UNIX socket that its monitor has for it.
//!
//! Firecracker, Cloud Hypervisor and vhost-device-vsock need no vsock on the host. They listen on a UNIX socket, and who
//! connects says which port of the guest it wants:
//!
//! ```text
//! CONNECT 9000\n   -->
//!                  <--  OK 1073741824\n      and from here on the connection is the guest's
//! ```
//!
//! Where nobody listens in the guest (yet), they hang up instead. The answer is read byte by byte, as what comes
//! after it belongs to the link already.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use socket2::{SockAddr, Socket};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::retrying::{Obstacle, Retrying};
use super::{bare_link, boxed, sockets, unix};
use crate::channel::Channel;
use crate::spec::ChannelSpec;

/// How long the monitor may take to answer: it waits for the guest. A busy guest takes milliseconds; but
/// vhost-device-vsock 0.3.0 now and then loses a request, and the next one gets through.
const ANSWER: Duration = Duration::from_secs(2);
/// The longest answer that is listened to; `OK 4294967295` is the longest sound one.
const MAX_ANSWER: usize = 32;

/// The channel that connects to a guest's PORT through the socket at ADDR, again and again.
pub(super) fn connect(spec: &ChannelSpec) -> io::Result<Box<dyn Channel>> {
    let path = spec.addr.clone();
    let address = SockAddr::unix(&path)?;
    let port = spec.port.ok_or(io::ErrorKind::InvalidInput)?;
    boxed(Retrying::new(spec.to_string(), async move || {
        let socket = sockets::connect(&address)
            .await
            .map_err(|error| unix::refusal(&path, &error))?;
        match timeout(ANSWER, ask(socket, port)).await {
            Ok(Ok(connection)) => bare_link(connection),
            Ok(Err(error)) => Err(Obstacle::Passing(refusal(port, &error))),
            Err(_) => Err(Obstacle::Passing(format!(
                "the monitor has not answered within {ANSWER:?}"
            ))),
        }
    }))
}

async fn ask(socket: Socket, port: u32) -> io::Result<OwnedFd> {
    let stream = UnixStream::from_std(OwnedFd::from(socket).into())?;
    stream.writable().await?;
    let request = format!("CONNECT {port}\n");
    // An unused socket takes a few bytes whole, or is of no use.
    if stream.try_write(request.as_bytes())? < request.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    let mut answer = Vec::new();
    while answer.len() < MAX_ANSWER && answer.last() != Some(&b'\n') {
        stream.readable().await?;
        let mut byte = [0];
        match stream.try_read(&mut byte) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => answer.extend(byte),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    if answer.starts_with(b"OK ") && answer.ends_with(b"\n") {
        return Ok(OwnedFd::from(stream.into_std()?));
    }
    Err(io::Error::other(format!(
        "the monitor answered {:?} instead of OK: is it its vsock socket?",
        String::from_utf8_lossy(&answer)
    )))
}

fn refusal(port: u32, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe => {
            format!("the monitor hung up: nobody listens on vsock port {port} of the guest")
        }
        _ => error.to_string(),
    }
}
