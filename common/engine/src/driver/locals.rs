//! The streams' local sides: clients that come in, targets that are connected to, and how they end.

use std::future::Future;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use mio::Token;
use tokio::task::JoinError;
use tracing::{debug, info, warn};
use virtproxy_mux::{OpenError, Reason, StreamId};

use super::local::{Local, Phase};
use super::{Connected, Driver, EVENTS, MAX_WAITING};
use crate::counters::Ended;
use crate::sandbox;
use crate::socket::Socket;
use crate::spec::is_udp;

/// Tokens from here on are local sides; below are listeners.
const FIRST_LOCAL: usize = usize::MAX / 2;
/// Clients taken from one listener in one turn.
const ACCEPTS: usize = 64;
/// How long to wait for descriptors to become free.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

impl Driver {
    /// Handles what happened to the local sockets since the last turn.
    pub(super) fn local_events(&mut self) -> io::Result<()> {
        self.clock = Instant::now();
        self.accept_again();
        while std::mem::take(&mut self.events_pending) {
            self.sockets.take(&mut self.events)?;
            let events = std::mem::replace(&mut self.events, mio::Events::with_capacity(0));
            let mut count = 0;
            for event in &events {
                count += 1;
                match event.token() {
                    Token(token) if token < FIRST_LOCAL => self.accept(token),
                    Token(token) => self.local_ready(token - FIRST_LOCAL, event),
                }
            }
            self.events = events;
            self.events_pending = count == EVENTS;
        }
        self.expire_waiting();
        Ok(())
    }

    fn accept_again(&mut self) {
        if self.outlets.iter().all(|outlet| outlet.retry.is_none()) {
            return;
        }
        let now = Instant::now();
        for index in 0..self.outlets.len() {
            if self.outlets[index].retry.is_some_and(|at| at <= now) {
                self.outlets[index].retry = None;
                self.accept(index);
            }
        }
    }

    /// Takes the clients that wait at a listener.
    fn accept(&mut self, index: usize) {
        for _ in 0..ACCEPTS {
            let Some(outlet) = self.outlets.get_mut(index) else {
                return;
            };
            match outlet.listener.accept() {
                Ok(socket) => {
                    let service = outlet.service.clone();
                    self.new_client(socket, service);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    outlet.retry = Some(Instant::now() + ACCEPT_RETRY);
                    if let Some(more) = self.refusals.pass(Instant::now()) {
                        warn!(
                            "{}: cannot accept a client now: {error}{more}",
                            outlet.service
                        );
                    }
                    return;
                }
            }
        }
        self.outlets[index].retry = Some(Instant::now());
    }

    fn new_client(&mut self, socket: Socket, service: Rc<str>) {
        let patience = if is_udp(&service) {
            // Its datagrams would be stale.
            Duration::ZERO
        } else {
            self.settings.wait_for_peer
        };
        let until = Instant::now() + patience;
        let mut local = Local::new(service, Phase::Waiting(until));
        local.socket = Some(socket);
        let key = self.locals.insert(local);
        if let Err(error) = self.watch(key) {
            self.refuse_client(key, &error.to_string());
        } else {
            self.open_stream(key);
        }
    }

    fn watch(&mut self, key: usize) -> io::Result<()> {
        match &mut self.locals[key].socket {
            Some(socket) => socket.register(self.sockets.registry(), Token(FIRST_LOCAL + key)),
            None => Ok(()),
        }
    }

    /// Makes the local side at `key` that of `stream`.
    fn join(&mut self, stream: StreamId, key: usize) {
        let index = stream.index();
        if self.keys.len() <= index {
            self.keys.resize(index + 1, usize::MAX);
        }
        self.keys[index] = key;
        self.locals[key].stream = Some(stream);
    }

    /// The key of the stream's local side.
    pub(super) fn key_of(&self, stream: StreamId) -> Option<usize> {
        let key = *self.keys.get(stream.index())?;
        (self.locals.get(key)?.stream == Some(stream)).then_some(key)
    }

    /// All streams that have a local side.
    pub(super) fn streams(&self) -> impl Iterator<Item = StreamId> {
        self.locals.iter().filter_map(|(_, local)| local.stream)
    }

    /// Opens the stream of a client that has none, or lets it wait for the peer, or refuses it.
    fn open_stream(&mut self, key: usize) {
        let local = &mut self.locals[key];
        match self.session.open(&local.service) {
            Ok(stream) => {
                debug!(%stream, service = %local.service, "asked the other end to open");
                self.counters.opened.inc();
                local.phase = Phase::Opening;
                self.join(stream, key);
            }
            Err(OpenError::NotEstablished | OpenError::GoingAway) => {
                if self.incompatible {
                    self.refuse_client(key, "the other end speaks another protocol version");
                } else if self.waits_until(key) <= Some(Instant::now()) {
                    self.refuse_client(key, "the other end is not there");
                } else if self.waiting.len() >= MAX_WAITING {
                    self.counters.limits.waiting.reached.inc();
                    self.refuse_client(key, "too many clients wait for the other end");
                } else {
                    self.waiting.push_back(key);
                }
            }
            Err(OpenError::Limit) => {
                self.counters.limits.streams.reached.inc();
                self.refuse_client(key, "the limit of streams is reached");
            }
            Err(OpenError::BadServiceName) => self.refuse_client(key, "bad service name"),
        }
    }

    /// The session is up: opens the streams of the clients that waited for it.
    pub(super) fn open_waiting(&mut self) {
        for key in std::mem::take(&mut self.waiting) {
            if self.locals.contains(key) {
                self.open_stream(key);
            }
        }
    }

    /// Until when a client may wait, if it does.
    pub(super) fn waits_until(&self, key: usize) -> Option<Instant> {
        match self.locals.get(key)?.phase {
            Phase::Waiting(until) => Some(until),
            _ => None,
        }
    }

    fn expire_waiting(&mut self) {
        while let Some(key) = self.waiting.front().copied() {
            match self.waits_until(key) {
                Some(until) if until > Instant::now() => return,
                Some(_) => {
                    self.waiting.pop_front();
                    self.refuse_client(key, "the other end did not appear in time");
                }
                None => {
                    self.waiting.pop_front();
                }
            }
        }
    }

    /// Refuses every client that waits.
    pub(super) fn refuse_waiting(&mut self, why: &str) {
        for key in std::mem::take(&mut self.waiting) {
            self.refuse_client(key, why);
        }
    }

    fn refuse_client(&mut self, key: usize, why: &str) {
        // Dropped, its socket is cut off.
        let Some(local) = self.locals.try_remove(key) else {
            return;
        };
        self.counters.clients_refused.inc();
        if is_udp(&local.service) {
            // Its next datagram tries again, for as long as the other end is not there.
            debug!(service = %local.service, why, "a flow is refused");
        } else if let Some(more) = self.refusals.pass(Instant::now()) {
            warn!("{}: a client is refused: {why}{more}", local.service);
        } else {
            debug!("{}: a client is refused: {why}", local.service);
        }
    }

    /// A local socket became ready.
    fn local_ready(&mut self, key: usize, event: &mio::event::Event) {
        let Some(local) = self.locals.get_mut(key) else {
            return;
        };
        local.ready(event);
        let gone = event.is_error() || event.is_write_closed();
        match (&local.phase, local.stream) {
            (Phase::Waiting(_), _) if gone => {
                debug!(service = %local.service, "client gave up waiting");
                self.waiting.retain(|waiting| *waiting != key);
                self.locals.remove(key);
            }
            (Phase::Opening, Some(stream)) if gone => {
                self.session.reset(stream, Reason::Cancelled, "");
                self.remove_stream(stream, Ended::Reset(Reason::Cancelled, "client gave up"));
            }
            (Phase::Open, Some(stream)) => {
                if local.readable {
                    self.session.set_readable(stream);
                }
                self.flush(key, stream);
            }
            _ => {}
        }
    }

    /// Writes a stream's backlog on.
    fn flush(&mut self, key: usize, stream: StreamId) {
        let now = self.now();
        let Some(local) = self.locals.get_mut(key) else {
            return;
        };
        if local.backlog.is_empty() {
            return;
        }
        let (written, result) = local.flush();
        self.session.consumed(now, stream, written);
        match result {
            Ok(()) => self.settle(key, stream),
            Err(error) => self.broken(stream, &error),
        }
    }

    /// Does what is due after a stream's local side moved on.
    pub(super) fn settle(&mut self, key: usize, stream: StreamId) {
        if let Some(local) = self.locals.get_mut(key) {
            local.settle();
            if local.is_done() {
                debug!(%stream, service = %local.service, why = %Ended::Finished, "stream ended");
                self.counters.ended(Ended::Finished);
                if let Some(socket) = self.locals.remove(key).socket {
                    socket.end();
                }
            }
        }
    }

    /// The local socket broke.
    pub(super) fn broken(&mut self, stream: StreamId, error: &io::Error) {
        let text = error.to_string();
        self.session.reset(stream, Reason::ConnectionBroken, &text);
        self.remove_stream(stream, Ended::Reset(Reason::ConnectionBroken, &text));
    }

    /// A stream that has a local side ended: cuts that off and forgets it.
    pub(super) fn remove_stream(&mut self, stream: StreamId, how: Ended<'_>) {
        let Some(key) = self.key_of(stream) else {
            return;
        };
        let service = &self.locals[key].service;
        debug!(%stream, %service, why = %how, "stream ended");
        self.counters.ended(how);
        self.cut_off(stream, key);
    }

    fn cut_off(&mut self, stream: StreamId, key: usize) {
        let now = self.now();
        let local = self.locals.remove(key);
        self.session.consumed(now, stream, local.backlog.len());
        if let Phase::Connecting(Some(task)) = local.phase {
            task.abort();
        }
    }

    /// Cuts off every stream; clients that wait go on waiting.
    pub(super) fn abort_streams(&mut self, why: &str) {
        let streams: Vec<_> = self.streams().collect();
        if !streams.is_empty() {
            info!(streams = streams.len(), why, "streams cut off");
        }
        for stream in streams {
            self.remove_stream(stream, Ended::CutOff(why));
        }
        self.peer_silent = false;
    }

    /// The peer asks for a stream to a service: starts connecting, or refuses.
    pub(super) fn asked(&mut self, stream: StreamId, service: &str) {
        self.counters.asked.inc();
        let (now, connecting) = (self.now(), self.connects.len());
        if let Err(full) = self.quota.open(now, connecting, &self.counters) {
            return self.refuse(stream, service, Reason::Limit, full);
        }
        let Some(target) = self.services.get(service).cloned() else {
            return self.refuse(stream, service, Reason::NoSuchService, "no -i names it");
        };
        let deadline = self.settings.connect_timeout;
        let key = self.locals.vacant_key();
        let mut connect = Box::pin(async move {
            let result = tokio::time::timeout(deadline, target.connect()).await;
            let result = result.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            let named = result.map_err(|error| {
                let hint = sandbox::hint(&error);
                io::Error::new(error.kind(), format!("{target}: {error}{hint}"))
            });
            (key, stream, named)
        });
        debug!(%stream, service, "connecting");
        // To a service of the same machine it is done at once, and needs no task.
        let now = connect
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()));
        let task = now.is_pending().then(|| self.connects.spawn(connect));
        self.locals
            .insert(Local::new(service.into(), Phase::Connecting(task)));
        self.join(stream, key);
        if let Poll::Ready(connected) = now {
            self.connected(connected);
        }
    }

    /// A task that connects has ended.
    pub(super) fn joined(&mut self, joined: Result<Connected, JoinError>) {
        // Else it was cancelled.
        if let Ok(connected) = joined {
            self.connected(connected);
        }
    }

    /// A target was connected to, or not.
    fn connected(&mut self, (key, stream, result): Connected) {
        if self.key_of(stream) != Some(key) {
            return; // cancelled just now
        }
        let result = result.and_then(|socket| {
            self.locals[key].socket = Some(socket);
            self.watch(key)
        });
        match result {
            Ok(()) => {
                self.locals[key].phase = Phase::Open;
                self.session.accept(stream);
                debug!(%stream, service = %self.locals[key].service, "connected");
            }
            Err(error) => {
                let reason = match error.kind() {
                    io::ErrorKind::ConnectionRefused => Reason::TargetRefused,
                    io::ErrorKind::TimedOut => Reason::Timeout,
                    _ => Reason::TargetUnreachable,
                };
                let service = self.locals[key].service.clone();
                self.cut_off(stream, key);
                self.refuse(stream, &service, reason, &error.to_string());
            }
        }
    }

    fn refuse(&mut self, stream: StreamId, service: &str, reason: Reason, text: &str) {
        if let Some(more) = self.refusals.pass(Instant::now()) {
            warn!("{service}: the other end's request is refused: {reason}: {text}{more}");
        }
        let how = Ended::Refused(reason, text);
        debug!(%stream, service, why = %how, "stream ended");
        self.counters.ended(how);
        self.session.refuse(stream, reason, text);
    }
}
