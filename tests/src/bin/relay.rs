//! The bare relay (`virtproxy_tests::relay`): one port, one socket, one conversation after the other.
//!
//! * `relay guest PORT-DEVICE ADDRESS`: joins the port to a connection to ADDRESS, anew each time the host's end has come back.
//! * `relay device SOCKET ADDRESS`: is the vhost-user console on SOCKET; joins its port to who connects to ADDRESS.
//! * `relay chardev SOCKET ADDRESS`: the same over the socket of a QEMU chardev.
//!
//! A conversation is one run of the link: nothing in the bytes says where one ends, so both ends drop the link with their
//! socket, and the guest sees its port hang up.

use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Result, bail};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;
use virtproxy_engine::channel::{Channel, Link};
use virtproxy_engine::fd_link::FdLink;
use virtproxy_host::device::{Device, PortSpec};
use virtproxy_tests::relay::relay;

/// How often the guest looks whether the host's end is there.
const LOOK: Duration = Duration::from_millis(10);

/// How long a chardev stays without a client between two of them, lest the guest miss that the first one is gone.
const GONE: Duration = Duration::from_millis(200);

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
        ["guest", device, address] => loop {
            let mut link = open(device).await?;
            let service = TcpStream::connect(address).await?;
            converse(&mut link, &service).await;
        },
        ["device", path, address] => {
            let listener = TcpListener::bind(address).await?;
            let (_device, mut ports) = Device::start(path, vec![PortSpec::generic("relay")], 1)?;
            loop {
                let (client, _) = listener.accept().await?;
                let mut link = ports[0].open().await?;
                converse(&mut *link, &client).await;
            }
        }
        ["chardev", path, address] => {
            let listener = TcpListener::bind(address).await?;
            loop {
                let (client, _) = listener.accept().await?;
                let mut link = FdLink::new(UnixStream::connect(path)?.into())?;
                converse(&mut link, &client).await;
                drop(link);
                sleep(GONE).await;
            }
        }
        _ => bail!("usage: relay guest|device|chardev ..."),
    }
}

/// The guest's port, once the host's end is there.
async fn open(device: &str) -> Result<FdLink> {
    let port = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(device)?;
    let link = FdLink::new(port.into())?;
    while link.revents()? & libc::POLLHUP != 0 {
        sleep(LOOK).await;
    }
    Ok(link)
}

/// Relays until either side ends, which is the end of this conversation alone.
async fn converse(link: &mut dyn Link, socket: &TcpStream) {
    let ended = match socket.set_nodelay(true) {
        Ok(()) => relay(link, socket).await,
        Err(error) => Err(error),
    };
    if let Err(error) = ended {
        eprintln!("relay: {error}");
    }
}
