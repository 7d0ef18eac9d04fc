//! TCP to a guest's vsock port, by the UNIX socket of a vsock device.
//!
//! socat can join the two, but not say the device's `CONNECT PORT` first, nor swallow its `OK` without a script for each
//! connection; this is cheaper.

use anyhow::{Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};

use crate::{join, tell};

pub(crate) async fn host(socket: &str, port: &str, address: &str) -> Result<()> {
    let listener = TcpListener::bind(address).await?;
    loop {
        let (client, _) = listener.accept().await?;
        let (socket, port) = (socket.to_owned(), port.to_owned());
        tokio::spawn(async move { tell(forward(client, &socket, &port).await) });
    }
}

async fn forward(client: TcpStream, socket: &str, port: &str) -> Result<()> {
    let mut guest = UnixStream::connect(socket).await?;
    guest
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await?;
    // Not a byte more than the line: what follows is the guest's.
    let mut answer = Vec::new();
    while !answer.ends_with(b"\n") {
        answer.push(guest.read_u8().await?);
        ensure!(answer.len() < 32, "the vsock device answered no line");
    }
    ensure!(
        answer.starts_with(b"OK "),
        "the vsock device answered {answer:?}"
    );
    Ok(join(client, guest).await?)
}
