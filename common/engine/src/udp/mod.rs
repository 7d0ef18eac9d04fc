//! UDP forwards: datagrams over streams.
//!
//! # Theory of operation
//!
//! The session knows nothing of datagrams. A *flow* is one client address at the `-o` end, and is one stream; on it
//! each datagram is its length, a little-endian `u16`, and its bytes. So a flow is opened, refused, given credit and
//! ended as a TCP connection is, and at both ends the driver sees but one more UNIX socket:
//!
//! ```text
//!             ,---- bridge of the -o ----.                                  ,---- bridge of the -i ----.
//!  clients ==UDP==> a flow for each client =pipe= driver ~channel~ driver =pipe= a socket for each flow ==UDP==> target
//! ```
//!
//! A *bridge* is one task for each forward, at either end. It is no part of the driver: a flood of datagrams costs the
//! driver no more than the bytes that its streams may send.
//!
//! **Datagrams are dropped, never kept waiting.** What has no room in the flow's pipe ([`pipe`]) is lost, as on any
//! network that is too slow. The pipe is short, so what gets through is fresh; and a stream that is backed up, refused
//! or not there stops nobody. For the same reason a flow does not wait for the other end to appear, as a TCP client does.
//!
//! **Flows end** when nothing was carried for `--udp-timeout` at either end; when their stream does (refused, reset, a new
//! session); when another needs the place; and when the stream carries what cannot be a datagram. The client is not
//! told, as UDP has no way to: its next datagram begins a new flow. A stream that ended soon after it was opened, before
//! anything came, was most likely refused; the forward then begins no flow for [`flow::RETRY`].
//!
//! **When there are too many flows** the one that was idle for longest makes room, at either end. A DNS client takes a new
//! port for each question and never says that it is done, so refusing new flows would stop the service for the
//! time-out once as many questions were asked.
//!
//! **An unreachable target** (an ICMP error, seen as `ECONNREFUSED`) is no end: the flow goes on, and works once the target
//! is there.

mod bridge;
mod clients;
mod flow;
mod pipe;

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use mio::net::{UdpSocket, UnixStream};
use mio::unix::pipe as bell;
use mio::{Interest, Registry, Token};
use tokio::sync::mpsc;
use tracing::warn;

use bridge::{Bridge, Door};
use clients::ClientSocket;
use pipe::Pipe;

/// New flows on their way between a bridge and its driver, which is more than one of them begins before the other has its
/// turn. A datagram that would begin one more is dropped at the `-o` end, and the connect waits at the `-i` end.
const MAX_UNTAKEN: usize = 256;

/// Where clients of `-o` send their datagrams; gives the driver a socket for each flow.
#[derive(Debug)]
pub(crate) struct Listener {
    address: SocketAddr,
    flows: mpsc::Receiver<UnixStream>,
    /// Has a byte for each flow that `flows` got: what the driver's epoll can watch.
    bell: bell::Receiver,
}

impl Listener {
    /// Listens on `address`; the bridge goes on for as long as the listener is there.
    pub(crate) fn bind(address: SocketAddr, service: &str, timeout: Duration) -> io::Result<Self> {
        let socket = ClientSocket::bind(address)?;
        let address = socket.local_addr()?;
        let (ringing, bell) = bell::new()?;
        let (sender, flows) = mpsc::channel(MAX_UNTAKEN);
        let handle = Handle {
            flows: sender,
            bell: ringing,
        };
        start(Door::for_clients(socket, handle), service, timeout)?;
        Ok(Listener {
            address,
            flows,
            bell,
        })
    }

    /// The next flow, or `WouldBlock`.
    pub(crate) fn accept(&mut self) -> io::Result<UnixStream> {
        match self.flows.try_recv() {
            Ok(flow) => Ok(flow),
            Err(_) => {
                // All is taken: silence the bell, so that it rings anew.
                while self.bell.read(&mut [0; MAX_UNTAKEN]).is_ok_and(|n| n > 0) {}
                Err(io::ErrorKind::WouldBlock.into())
            }
        }
    }

    /// Where it listens.
    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Its events, edge-triggered, under `token`.
    pub(crate) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        registry.register(&mut self.bell, token, Interest::READABLE)
    }
}

/// The bridge's side of a [`Listener`].
#[derive(Debug)]
struct Handle {
    flows: mpsc::Sender<UnixStream>,
    bell: bell::Sender,
}

impl Handle {
    /// Hands the driver its end of a flow.
    fn give(&mut self, flow: UnixStream) -> io::Result<()> {
        self.flows
            .try_send(flow)
            .map_err(|_| io::Error::other("the driver has too many new flows to take"))?;
        // A bell that takes no more rings already.
        let _ = self.bell.write(&[0]);
        Ok(())
    }
}

/// The flows of a service of `-i`; its bridge goes on for as long as there is a clone of this.
#[derive(Clone, Debug)]
pub(crate) struct Flows(mpsc::Sender<(Pipe, UdpSocket)>);

impl Flows {
    /// Those of `service`; there are none yet.
    pub(crate) fn new(service: &str, timeout: Duration) -> io::Result<Self> {
        let (sender, streams) = mpsc::channel(MAX_UNTAKEN);
        start(Door::Streams(streams), service, timeout)?;
        Ok(Flows(sender))
    }

    /// Begins a flow to `target`; the driver's end of it.
    pub(crate) async fn begin(&self, target: SocketAddr) -> io::Result<UnixStream> {
        let any: IpAddr = match target {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0).into())?;
        socket.connect(target)?;
        let (pipe, driver) = Pipe::pair()?;
        self.0
            .send((pipe, socket))
            .await
            .map_err(|_| io::Error::other("this UDP forward has ended"))?;
        Ok(driver)
    }
}

/// Starts the bridge of a forward.
fn start(door: Door, service: &str, timeout: Duration) -> io::Result<()> {
    let bridge = Bridge::new(door, service, timeout)?;
    let service = service.to_owned();
    tokio::spawn(async move {
        if let Err(error) = bridge.run().await {
            warn!("{service}: this UDP forward has ended: {error}");
        }
    });
    Ok(())
}
