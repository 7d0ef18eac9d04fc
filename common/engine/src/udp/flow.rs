//! One flow: a pipe to the driver, and who is at the other side of it.

use std::fmt::Display;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::event::Source;
use mio::net::UdpSocket;
use mio::{Interest, Registry, Token};
use tracing::debug;

use super::clients::{Client, ClientSocket};
use super::pipe::Pipe;
use crate::log_limit::LogLimit;

/// Datagrams that a flow moves in one turn, each way.
pub(super) const BATCH: usize = 32;

/// How long no flow of a forward is begun after one was refused; and how long after its begin one may be.
pub(super) const RETRY: Duration = Duration::from_secs(1);

/// Who datagrams come from and go to.
pub(super) enum Remote {
    /// A client of `-o`, reached through the socket that all of them share; what it sends does not come through here.
    Client(Arc<ClientSocket>, Client),
    /// The target of `-i`, through a socket of the flow's own that is connected to it.
    Target(UdpSocket),
}

impl Remote {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Remote::Client(..) => Err(io::ErrorKind::WouldBlock.into()),
            Remote::Target(socket) => socket.recv(buffer),
        }
    }

    fn send(&self, datagram: &[u8]) -> io::Result<()> {
        match self {
            Remote::Client(socket, client) => socket.send(client, datagram),
            Remote::Target(socket) => socket.send(datagram).map(drop),
        }
    }
}

/// See the [module](self).
pub(super) struct Flow {
    pipe: Pipe,
    pub(super) remote: Remote,
    started: Instant,
    /// Whether the driver has given it a datagram.
    heard: bool,
    /// When it last carried a datagram.
    pub(super) used: Instant,
    /// Whether it stands in the bridge's queue.
    pub(super) queued: bool,
}

impl Flow {
    pub(super) fn new(pipe: Pipe, remote: Remote) -> Self {
        let now = Instant::now();
        Flow {
            pipe,
            remote,
            started: now,
            heard: false,
            used: now,
            queued: false,
        }
    }

    /// Its events, edge-triggered, under `token`.
    pub(super) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        self.pipe.register(registry, token)?;
        match &mut self.remote {
            Remote::Client(..) => Ok(()),
            Remote::Target(socket) => socket.register(registry, token, Interest::READABLE),
        }
    }

    /// Sends one datagram of the remote's to the driver. An error ends the flow.
    pub(super) fn put(&mut self, datagram: &[u8], losses: &mut Losses) -> io::Result<()> {
        if self.pipe.put(datagram)? {
            self.used = Instant::now();
        } else {
            losses.note("its stream is backed up");
        }
        Ok(())
    }

    /// One turn: a batch each way; whether there may be more. An error ends the flow.
    pub(super) fn turn(&mut self, buffer: &mut [u8], losses: &mut Losses) -> io::Result<bool> {
        self.pipe.flush()?;
        let mut more = true;
        for _ in 0..BATCH {
            match self.remote.receive(buffer) {
                Ok(n) => {
                    self.put(&buffer[..n], losses)?;
                    more = true;
                }
                Err(error) => {
                    more = false;
                    if error.kind() == io::ErrorKind::WouldBlock {
                        break;
                    }
                    // The system's word on an earlier datagram; others may be waiting behind it.
                    losses.note(&error);
                }
            }
        }
        let (remote, heard, mut carried) = (&self.remote, &mut self.heard, false);
        more |= self.pipe.take(buffer, BATCH, |datagram| {
            *heard = true;
            match remote.send(datagram) {
                Ok(()) => carried = true,
                Err(error) => losses.note(&error),
            }
        })?;
        if carried {
            self.used = Instant::now();
        }
        Ok(more)
    }

    /// Whether, now that its stream has ended, it was most likely refused: that is so soon, and nothing came.
    pub(super) fn was_refused(&self) -> bool {
        !self.heard && self.started.elapsed() < RETRY
    }
}

/// Tells of the datagrams that a forward loses.
pub(super) struct Losses {
    service: String,
    limit: LogLimit,
}

impl Losses {
    pub(super) fn new(service: &str) -> Self {
        Losses {
            service: service.into(),
            limit: LogLimit::default(),
        }
    }

    /// One more was lost.
    pub(super) fn note(&mut self, why: impl Display) {
        if let Some(more) = self.limit.pass(Instant::now()) {
            debug!("{}: a datagram is lost: {why}{more}", self.service);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn the_rest_of_a_datagram_follows_without_another_one() {
        let socket = UdpSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let (pipe, driver) = Pipe::pair().unwrap();
        let mut flow = Flow::new(pipe, Remote::Target(socket));
        let mut losses = Losses::new("x/udp");
        for _ in 0..100 {
            flow.put(&[7; 40_000], &mut losses).unwrap();
        }
        let (mut bytes, mut buf) = (0, vec![0; 1000]);
        let mut buffer = vec![0; 1 << 16];
        while let Ok(n) = (&driver).read(&mut buf) {
            bytes += n;
            flow.turn(&mut buffer, &mut losses).unwrap();
        }
        assert!((1..10).contains(&(bytes / 40_002)), "{bytes} bytes");
        assert_eq!(bytes % 40_002, 0, "a datagram is cut off");
    }
}
