//! The bare relay (`virtproxy_tests::relay`): one port, one socket.
//!
//! * `relay guest PORT-DEVICE ADDRESS`: joins the port to a connection to ADDRESS, again and again.
//! * `relay device SOCKET ADDRESS`: is the vhost-user console on SOCKET; joins its port to who connects to ADDRESS.
//! * `relay chardev SOCKET ADDRESS`: the same over the socket of a QEMU chardev.

use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Result, bail};
use tokio::net::{TcpListener, TcpStream};
use virtproxy_engine::channel::{Channel, Link};
use virtproxy_engine::fd_link::FdLink;
use virtproxy_host::device::{Device, PortSpec};
use virtproxy_tests::relay::relay;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(run(&words))
}

async fn run(words: &[&str]) -> Result<()> {
    match words {
        ["guest", device, address] => {
            let port = std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(device)?;
            let mut link = FdLink::new(port.into())?;
            let socket = TcpStream::connect(address).await?;
            socket.set_nodelay(true)?;
            relay(&mut link, &socket).await?;
        }
        ["device", path, address] => {
            let listener = TcpListener::bind(address).await?;
            let (_device, mut ports) = Device::start(path, vec![PortSpec::generic("relay")], 1)?;
            let mut link = ports[0].open().await?;
            serve(&mut *link, &listener).await?;
        }
        ["chardev", path, address] => {
            let listener = TcpListener::bind(address).await?;
            let socket = std::os::unix::net::UnixStream::connect(path)?;
            let mut link = FdLink::new(socket.into())?;
            serve(&mut link, &listener).await?;
        }
        _ => bail!("usage: relay guest|device|chardev ..."),
    }
    Ok(())
}

async fn serve(link: &mut dyn Link, listener: &TcpListener) -> Result<()> {
    loop {
        let (socket, _) = listener.accept().await?;
        socket.set_nodelay(true)?;
        relay(link, &socket).await?;
    }
}
