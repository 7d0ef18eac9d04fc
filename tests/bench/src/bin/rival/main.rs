//! What a user would write who has no virtproxy: programs of ways into the guest that other projects make no program for.
//!
//! * `rival yamux host SOCKET ADDRESS`: the socket of a QEMU chardev as a yamux connection; who connects to ADDRESS gets a stream.
//! * `rival yamux guest PORT-DEVICE ADDRESS`: its other end; each stream leads to a connection to ADDRESS.
//! * `rival vsock SOCKET PORT ADDRESS`: who connects to ADDRESS gets a connection to the guest's PORT by the vsock device on SOCKET.
//!
//! Both are written with tokio as it is made to be used: a task for each connection, which copies both ways. One thread has
//! them all: with the guest, its device and the client of the measurement beside it, more threads only wait for each other.

mod vsock;
mod yamux;

use std::io;

use anyhow::{Result, bail};
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::TcpStream;

/// What is copied in one go; tokio's own 8 KiB would cost more system calls.
const BUFFER: usize = 64 * 1024;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["yamux", "host", socket, address] => yamux::host(socket, address).await,
        ["yamux", "guest", device, address] => yamux::guest(device, address).await,
        ["vsock", socket, port, address] => vsock::host(socket, port, address).await,
        _ => bail!("usage: rival yamux|vsock ..."),
    }
}

/// Copies both ways until both sides have ended.
async fn join(
    mut client: TcpStream,
    mut other: impl AsyncRead + AsyncWrite + Unpin,
) -> io::Result<()> {
    client.set_nodelay(true)?;
    copy_bidirectional_with_sizes(&mut client, &mut other, BUFFER, BUFFER).await?;
    Ok(())
}

/// A connection that went wrong is told, and no other suffers.
fn tell(ended: Result<()>) {
    if let Err(error) = ended {
        eprintln!("rival: {error:#}");
    }
}
