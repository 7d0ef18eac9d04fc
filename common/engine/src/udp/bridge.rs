//! A forward's flows, in one task.
//!
//! Everything is watched by one edge-triggered epoll, as the driver's sockets are (see [`crate::edges`]). What is ready
//! stands in a queue and has its turn for [`BATCH`] datagrams; after a few turns the other tasks of the thread, the driver
//! first of all, have theirs. So no flow waits for the end of another one's flood, and no stream for any.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::net::UdpSocket;
use mio::{Events, Token};
use slab::Slab;
use tokio::sync::mpsc;
use tracing::debug;

use super::Handle;
use super::clients::{Client, ClientSocket};
use super::flow::{BATCH, Flow, Losses, RETRY, Remote};
use super::pipe::Pipe;
use crate::driver::sleep_until;
use crate::edges::Edges;

/// Flows of a forward; the one that was idle for longest makes room for another.
const MAX_FLOWS: usize = 1024;
/// Turns before the other tasks of the thread have theirs.
const TURNS: usize = 4;
/// Room for any datagram.
const BUFFER: usize = 1 << 16;
/// Readiness events taken in one system call.
const EVENTS: usize = 256;

/// The token of the socket that clients send to; those of flows are their keys.
const CLIENTS: Token = Token(MAX_FLOWS);

/// Where new flows come from.
pub(super) enum Door {
    /// `-o`: from clients.
    Clients(Clients),
    /// `-i`: from the driver, each with its socket to the target.
    Streams(mpsc::Receiver<(Pipe, UdpSocket)>),
}

/// The clients of `-o`.
pub(super) struct Clients {
    socket: Arc<ClientSocket>,
    driver: Handle,
    flows: HashMap<Client, usize>,
    /// No flow is begun before.
    held_until: Option<Instant>,
    /// Whether the socket stands in the bridge's queue.
    queued: bool,
}

impl Door {
    pub(super) fn for_clients(socket: ClientSocket, driver: Handle) -> Self {
        Door::Clients(Clients {
            socket: Arc::new(socket),
            driver,
            flows: HashMap::new(),
            held_until: None,
            queued: false,
        })
    }

    /// Waits for a flow that the driver asks for; `None`: the driver is gone.
    async fn next(&mut self) -> Option<Flow> {
        match self {
            Door::Clients(clients) => {
                clients.driver.flows.closed().await;
                None
            }
            Door::Streams(streams) => {
                let (pipe, socket) = streams.recv().await?;
                Some(Flow::new(pipe, Remote::Target(socket)))
            }
        }
    }
}

/// See the [module](self).
pub(super) struct Bridge {
    service: String,
    timeout: Duration,
    door: Door,
    edges: Edges,
    events: Events,
    flows: Slab<Flow>,
    /// What has something to do.
    ready: VecDeque<Token>,
    /// No flow has been idle for long enough before; none: there is no flow.
    next_expiry: Option<Instant>,
    buffer: Vec<u8>,
    losses: Losses,
}

impl Bridge {
    /// Panics outside a tokio runtime.
    pub(super) fn new(door: Door, service: &str, timeout: Duration) -> io::Result<Self> {
        let edges = Edges::new()?;
        if let Door::Clients(clients) = &door {
            clients.socket.register(edges.registry(), CLIENTS)?;
        }
        Ok(Bridge {
            service: service.into(),
            timeout,
            door,
            edges,
            events: Events::with_capacity(EVENTS),
            flows: Slab::new(),
            ready: VecDeque::new(),
            next_expiry: None,
            buffer: vec![0; BUFFER],
            losses: Losses::new(service),
        })
    }

    /// Carries datagrams until the driver is gone.
    pub(super) async fn run(mut self) -> io::Result<()> {
        loop {
            let busy = self.round()?;
            // The driver's turn, however much there is to do here.
            tokio::task::yield_now().await;
            let expiry = self.next_expiry;
            tokio::select! {
                biased;
                flow = self.door.next() => match flow {
                    Some(flow) => drop(self.begin(flow)),
                    None => return Ok(()),
                },
                () = poll_fn(|cx| self.edges.poll_ready(cx)) => {}
                () = std::future::ready(()), if busy => {}
                () = sleep_until(expiry) => {}
            }
        }
    }

    /// Some turns; whether there is more to do at once.
    fn round(&mut self) -> io::Result<bool> {
        self.edges.take(&mut self.events)?;
        let mut events = 0;
        for event in &self.events {
            events += 1;
            let token = event.token();
            let queued = match (&mut self.door, self.flows.get_mut(token.0)) {
                (Door::Clients(clients), _) if token == CLIENTS => &mut clients.queued,
                (_, Some(flow)) => &mut flow.queued,
                _ => continue,
            };
            if !std::mem::replace(queued, true) {
                self.ready.push_back(token);
            }
        }
        for _ in 0..TURNS {
            match self.ready.pop_front() {
                Some(CLIENTS) => self.take_from_clients(),
                Some(Token(key)) => self.turn(key),
                None => break,
            }
        }
        self.expire();
        Ok(!self.ready.is_empty() || events == EVENTS)
    }

    fn turn(&mut self, key: usize) {
        let Some(flow) = self.flows.get_mut(key) else {
            return;
        };
        match flow.turn(&mut self.buffer, &mut self.losses) {
            Ok(more) => {
                flow.queued = more;
                if more {
                    self.ready.push_back(Token(key));
                }
            }
            Err(error) => self.ended(key, &error),
        }
    }

    /// A batch of what clients sent.
    fn take_from_clients(&mut self) {
        let mut more = true;
        for _ in 0..BATCH {
            let Door::Clients(clients) = &mut self.door else {
                return;
            };
            match clients.socket.receive(&mut self.buffer) {
                Ok((len, client)) => {
                    more = true;
                    self.pass_on(client, len);
                }
                Err(error) => {
                    more = false;
                    if error.kind() == io::ErrorKind::WouldBlock {
                        break;
                    }
                    self.losses.note(&error);
                }
            }
        }
        if let Door::Clients(clients) = &mut self.door {
            clients.queued = more;
            if more {
                self.ready.push_back(CLIENTS);
            }
        }
    }

    /// Passes a client's datagram on: `len` bytes in the buffer.
    fn pass_on(&mut self, client: Client, len: usize) {
        let Some(key) = self.flow_of(client) else {
            return;
        };
        let datagram = &self.buffer[..len];
        if let Err(error) = self.flows[key].put(datagram, &mut self.losses) {
            self.ended(key, &error);
        }
    }

    /// The flow of a client, begun if there is none and one may be.
    fn flow_of(&mut self, client: Client) -> Option<usize> {
        let Door::Clients(clients) = &mut self.door else {
            return None;
        };
        if let Some(key) = clients.flows.get(&client) {
            return Some(*key);
        }
        if clients
            .held_until
            .is_some_and(|until| Instant::now() < until)
        {
            self.losses.note("the service was just refused");
            return None;
        }
        let begun = Pipe::pair().and_then(|(pipe, driver)| {
            clients.driver.give(driver)?;
            Ok(Flow::new(
                pipe,
                Remote::Client(clients.socket.clone(), client),
            ))
        });
        let key = match begun {
            Ok(flow) => self.begin(flow)?,
            Err(error) => {
                self.losses.note(&error);
                return None;
            }
        };
        if let Door::Clients(clients) = &mut self.door {
            clients.flows.insert(client, key);
        }
        Some(key)
    }

    /// Adds a flow, in place of another one if there are too many.
    fn begin(&mut self, mut flow: Flow) -> Option<usize> {
        if self.flows.len() >= MAX_FLOWS {
            let idlest = self.flows.iter().min_by_key(|(_, flow)| flow.used);
            if let Some((key, _)) = idlest {
                self.end(key, "another flow takes its place");
            }
        }
        let entry = self.flows.vacant_entry();
        let key = entry.key();
        if let Err(error) = flow.register(self.edges.registry(), Token(key)) {
            self.losses.note(&error);
            return None;
        }
        let expiry = flow.used + self.timeout;
        self.next_expiry.get_or_insert(expiry);
        entry.insert(flow);
        debug!(service = self.service, key, "flow begun");
        Some(key)
    }

    /// A flow was ended by the driver, or by what came from there.
    fn ended(&mut self, key: usize, error: &io::Error) {
        if let Door::Clients(clients) = &mut self.door
            && self.flows[key].was_refused()
        {
            clients.held_until = Some(Instant::now() + RETRY);
        }
        match error.kind() {
            io::ErrorKind::UnexpectedEof => self.end(key, "its stream ended"),
            _ => self.end(key, &error.to_string()),
        }
    }

    fn end(&mut self, key: usize, why: &str) {
        let flow = self.flows.remove(key);
        if flow.queued {
            self.ready.retain(|token| *token != Token(key));
        }
        if let (Door::Clients(clients), Remote::Client(_, client)) = (&mut self.door, &flow.remote)
        {
            clients.flows.remove(client);
        }
        debug!(service = self.service, key, why, "flow ended");
    }

    /// Ends the flows that were idle for too long.
    fn expire(&mut self) {
        let now = Instant::now();
        if self.next_expiry.is_none_or(|at| now < at) {
            return;
        }
        let idle = |flow: &Flow| now - flow.used >= self.timeout;
        let expired: Vec<_> = self
            .flows
            .iter()
            .filter_map(|(key, flow)| idle(flow).then_some(key))
            .collect();
        for key in expired {
            self.end(key, "idle");
        }
        let oldest = self.flows.iter().map(|(_, flow)| flow.used).min();
        self.next_expiry = oldest.map(|used| used + self.timeout);
    }
}
