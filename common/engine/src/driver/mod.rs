//! The one driver: a session over a channel, joined to local sockets.
//!
//! # Theory of operation
//!
//! One task owns everything of one channel: the link, the session, the listeners and every stream's socket. No
//! lock, queue or task belongs to a stream. Sockets are watched, edge-triggered, by an epoll instance of the driver's own,
//! which tokio in turn watches as one descriptor; so an event costs the same however many streams are idle.
//!
//! A *turn* does a bounded piece of everything:
//!
//! 1. local events: accept clients, note readiness, write backlogs on (`locals`);
//! 2. input: one batch from the link goes through the session; data is written straight from the link's memory to
//!    its socket, and what the socket does not take goes to the stream's backlog, never back (`input`);
//! 3. output: while the session has frames and the link has room, control frames are copied in, and data is read from
//!    its socket straight into the link's memory behind the room for its header (`output`).
//!
//! When a turn moves nothing, the driver sleeps until the link, a socket, a connect, a deadline or the shutdown
//! wakes it. While it is busy nothing wakes it, so it looks at the sockets and the link now and then; not in each turn,
//! since a look that finds nothing costs as much as moving some kilobytes does. The reader never waits for a writer, so
//! nothing here can deadlock.

mod input;
mod local;
mod locals;
mod output;
mod quota;
mod stalls;

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::time::{Duration, Instant};

use mio::{Events, Token};
use slab::Slab;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};
use virtproxy_mux::{Config, End, Reason, Session, StreamId};

use crate::channel::{Channel, Link, Needs, Progress};
use crate::counters::{Counters, Ended};
use crate::edges::Edges;
use crate::limits::Limits;
use crate::log_limit::LogLimit;
use crate::socket::{Listener, Socket, Target};
use crate::spec::ForwardSpec;
use local::Local;
use quota::Quota;
pub use stalls::On;
use stalls::Watchdog;

/// Turns in a row before other tasks of the thread get theirs.
const TURNS_BEFORE_YIELD: u32 = 8;
/// Bytes that move in busy turns before the driver looks unasked for what may have happened meanwhile ...
const LOOK_EVERY: usize = 64 * 1024;
/// ... and what a turn counts for at least.
const LEAST_TURN: usize = 32 * 1024;
/// Readiness events taken in one system call.
const EVENTS: usize = 256;
/// How often the peer is asked for a sign of life, and how long it may take before that is reported.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// How often the handshake is repeated where it may get lost.
const SEEK_AGAIN: Duration = Duration::from_secs(5);
/// How long the rest of a frame may keep us waiting, where it may be lost, until the other end is asked about it. Doubles
/// each time, until data flows again.
const STALL: Duration = Duration::from_millis(200);
/// How long the last frames may take to leave when the program ends.
const FAREWELL: Duration = Duration::from_millis(500);
/// A session that lasted this long starts the back-off anew.
const STABLE: Duration = Duration::from_secs(10);
/// Back-off before a link is opened again after the peer broke the protocol.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Sessions that may follow each other on one link within a second.
const MAX_RESTARTS: u32 = 20;

/// What the user may set.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long a target may take to answer.
    pub connect_timeout: Duration,
    /// How long a client waits for the other end to appear; zero: it is refused at once.
    pub wait_for_peer: Duration,
    /// How long a UDP flow may carry nothing before it is ended.
    pub udp_timeout: Duration,
    /// What may be used at most.
    pub limits: Limits,
    /// How the session is.
    pub session: Config,
}

/// Clients that may wait for the other end at once; more are refused.
const MAX_WAITING: usize = 1024;

/// A listener cannot be set up: the forward, and why.
#[derive(Debug, thiserror::Error)]
#[error("-o {forward}: cannot listen: {source}{cure}", cure = bind_cure(source))]
pub struct ListenError {
    forward: ForwardSpec,
    source: io::Error,
}

/// What to do about an address that cannot be listened on, to be appended to the error.
pub fn bind_cure(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "; another program listens there: end it or choose another address"
        }
        io::ErrorKind::PermissionDenied => {
            "; choose a port above 1023 or a directory you may write to"
        }
        io::ErrorKind::AddrNotAvailable => "; the address is not one of this machine",
        io::ErrorKind::NotFound => "; create the directory first",
        _ => "",
    }
}

struct Outlet {
    service: Rc<str>,
    listener: Listener,
    /// `accept` failed for want of descriptors: try again then.
    retry: Option<Instant>,
}

/// A finished connect: the local side's key and stream, and the socket.
type Connected = (usize, StreamId, io::Result<Socket>);

/// See the [module](self).
pub struct Driver {
    settings: Settings,
    sockets: Edges,
    events: Events,
    /// There may be events that `sockets` has not been asked for.
    events_pending: bool,
    /// There may be something to receive: the link's last word on it was not `Wait`, or it is ready again.
    receivable: bool,
    /// Bytes moved in busy turns since the driver looked unasked.
    unseen: usize,
    services: HashMap<String, Target>,
    outlets: Vec<Outlet>,
    locals: Slab<Local>,
    /// Keys of the streams' local sides, each at its stream's index. One whose local side is another stream's, or gone, is
    /// out of date.
    keys: Vec<usize>,
    /// Keys of clients that wait, in the order of their deadlines.
    waiting: VecDeque<usize>,
    connects: JoinSet<Connected>,
    session: Session,
    /// What the link asks of the session.
    needs: Needs,
    /// The part that is here of a payload whose seal is not.
    staged: Vec<u8>,
    /// When the other end is to be asked about the rest of a frame, and how long it is given next time.
    stall: Option<Instant>,
    patience: Duration,
    /// Why the link must end, found while bytes were handled.
    ended: Option<End>,
    restarts: (Instant, u32),
    /// The present link has carried a session.
    carried: bool,
    started: Instant,
    /// When the present turn began, which is as much as it knows of the time.
    clock: Instant,
    next_ping: Instant,
    peer_silent: bool,
    /// The other end is there, but speaks no version that we speak.
    incompatible: bool,
    refusals: LogLimit,
    resets: LogLimit,
    quota: Quota,
    watchdog: Watchdog,
    counters: Rc<Counters>,
}

/// An orderly end under way.
struct Stopping {
    /// When the present step must be done.
    deadline: Instant,
    /// Whether this is the last step: what is left is only to reach the peer.
    last: bool,
}

/// How a link's service ended.
enum Outcome {
    /// The link went away; open the channel again.
    LinkEnded,
    /// The peer misbehaved; open it again, after a pause.
    PeerMisbehaved,
    /// The program was asked to end, and did.
    Stopped,
}

impl Driver {
    /// Listens for every forward in `outlets` (`-o`) and serves those in `services` (`-i`). Within a tokio runtime.
    pub fn new(
        settings: Settings,
        outlets: &[ForwardSpec],
        services: &[ForwardSpec],
    ) -> Result<Self, DriverError> {
        let sockets = Edges::new()?;
        let mut listening = Vec::new();
        for (index, forward) in outlets.iter().enumerate() {
            let listen = || {
                let mut listener = Listener::bind(forward, settings.udp_timeout)?;
                listener.register(sockets.registry(), Token(index))?;
                Ok(listener)
            };
            let listener = listen().map_err(|source| ListenError {
                forward: forward.clone(),
                source,
            })?;
            let service: Rc<str> = forward.service.as_str().into();
            info!(%service, address = listener.local_name(), "listening");
            listening.push(Outlet {
                service,
                listener,
                retry: None,
            });
        }
        let services = services
            .iter()
            .map(|forward| {
                let target = Target::new(forward, settings.udp_timeout)?;
                Ok((forward.service.to_string(), target))
            })
            .collect::<io::Result<_>>()?;
        let now = Instant::now();
        Ok(Driver {
            session: Session::new(settings.session.clone(), new_epoch()?),
            needs: Needs::default(),
            staged: Vec::new(),
            stall: None,
            patience: STALL,
            quota: Quota::new(&settings.limits),
            watchdog: Watchdog::new(settings.limits.stall_after),
            counters: Rc::new(Counters::new(&settings.limits, MAX_WAITING)),
            settings,
            sockets,
            events: Events::with_capacity(EVENTS),
            events_pending: true,
            receivable: true,
            unseen: 0,
            services,
            outlets: listening,
            locals: Slab::new(),
            keys: Vec::new(),
            waiting: VecDeque::new(),
            connects: JoinSet::new(),
            ended: None,
            restarts: (now, 0),
            carried: false,
            started: now,
            clock: now,
            next_ping: now + KEEPALIVE,
            peer_silent: false,
            incompatible: false,
            refusals: LogLimit::default(),
            resets: LogLimit::default(),
        })
    }

    /// What it counts.
    pub fn counters(&self) -> Rc<Counters> {
        self.counters.clone()
    }

    /// Serves `channel` until `stop` says how long streams may still go on, or the channel ends for good. An error means
    /// that it can never work.
    pub async fn run(
        mut self,
        mut channel: Box<dyn Channel>,
        mut stop: watch::Receiver<Option<Duration>>,
    ) -> io::Result<()> {
        let mut backoff = BACKOFF.0;
        let mut last_down = None;
        loop {
            let mut link = match self.open(&mut *channel, &mut stop).await {
                Ok(Some(link)) => link,
                Ok(None) => {
                    self.refuse_waiting("shutting down");
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    info!(channel = channel.name(), "ended: it cannot be opened again");
                    self.refuse_waiting("the channel to the other end has ended");
                    break;
                }
                Err(error) => return Err(error),
            };
            debug!(channel = channel.name(), "link up");
            self.counters.links.inc();
            self.counters.up.set(1);
            self.needs = link.needs();
            self.receivable = true;
            self.new_session()?;
            let up = Instant::now();
            let outcome = match self.serve(&mut *link, &mut stop).await {
                Ok(outcome) => outcome,
                Err(error) => {
                    if self.session.is_established() {
                        self.counters.sessions.link_down.inc();
                    }
                    let hangup = error.kind() == io::ErrorKind::UnexpectedEof;
                    let why = if hangup {
                        "hung up".into()
                    } else {
                        error.to_string()
                    };
                    // One that ends again and again for the same reason is told of once.
                    if up.elapsed() < STABLE && last_down.as_ref() == Some(&why) {
                        debug!(channel = channel.name(), why, "link down");
                    } else {
                        info!(channel = channel.name(), why, "link down");
                    }
                    last_down = Some(why);
                    Outcome::LinkEnded
                }
            };
            self.counters.up.set(0);
            self.abort_streams("the link to the other end is down");
            // At once: clients that come before the next link must find no session.
            self.new_session()?;
            self.incompatible = false;
            drop(link);
            if std::mem::take(&mut self.carried) {
                channel.carried();
            }
            if up.elapsed() >= STABLE {
                backoff = BACKOFF.0;
            }
            match outcome {
                Outcome::Stopped => break,
                Outcome::LinkEnded => {}
                Outcome::PeerMisbehaved => {
                    tokio::time::sleep(backoff).await;
                    backoff = (backoff * 2).min(BACKOFF.1);
                }
            }
        }
        Ok(())
    }

    /// Opens the channel; meanwhile clients may come and wait. `None`: asked to stop.
    async fn open(
        &mut self,
        channel: &mut dyn Channel,
        stop: &mut watch::Receiver<Option<Duration>>,
    ) -> io::Result<Option<Box<dyn Link>>> {
        let mut opening = pin!(channel.open());
        loop {
            if stop.borrow_and_update().is_some() {
                return Ok(None);
            }
            self.local_events()?;
            self.publish();
            let deadline = self.deadline();
            tokio::select! {
                link = &mut opening => return link.map(Some),
                () = poll_fn(|cx| self.sockets.poll_ready(cx)) => self.events_pending = true,
                () = sleep_until(deadline) => {}
                _ = stop.changed() => {}
            }
        }
    }

    /// Runs sessions over `link` until it ends.
    async fn serve(
        &mut self,
        link: &mut dyn Link,
        stop: &mut watch::Receiver<Option<Duration>>,
    ) -> io::Result<Outcome> {
        let mut turns = 0;
        let mut stopping = None;
        loop {
            if stopping.is_none() {
                let grace = *stop.borrow_and_update();
                stopping = grace.map(|grace| self.begin_stop(grace));
            }
            let busy = self.turn(link)?;
            if let Some(end) = self.ended.take() {
                if let Some(outcome) = self.session_ended(end)? {
                    return Ok(outcome);
                }
                continue;
            }
            if let Some(stop) = &mut stopping
                && self.stop_done(stop, busy)
            {
                return Ok(Outcome::Stopped);
            }
            if !busy {
                turns = 0;
                self.wait(link, stop, stopping.as_ref()).await;
            } else {
                turns += 1;
                if turns % TURNS_BEFORE_YIELD == 0 {
                    tokio::task::yield_now().await;
                }
            }
        }
    }

    /// One turn; whether another may do more at once.
    fn turn(&mut self, link: &mut dyn Link) -> io::Result<bool> {
        self.local_events()?;
        while let Some(joined) = self.connects.try_join_next() {
            self.joined(joined);
        }
        self.keepalive();
        self.look_for_stalls();
        let mut moved = 0;
        if self.receivable {
            let received = link.receive(&mut |segments| moved += self.on_bytes(segments))?;
            self.receivable = received == Progress::Again;
        }
        self.ask_for_the_rest();
        let sent = link.send(&mut |segments| {
            let filled = self.fill(segments);
            moved += filled;
            filled
        })?;
        let busy = self.receivable || sent == Progress::Again;
        if busy {
            self.look_now_and_then(moved);
        }
        self.publish();
        Ok(busy)
    }

    /// After a busy turn that moved so many bytes: has the next one look at everything, if it is time. Who sleeps is told
    /// of what happens. Who does not must look, and each look is a system call that mostly finds nothing.
    fn look_now_and_then(&mut self, moved: usize) {
        self.unseen += moved.max(LEAST_TURN);
        if self.unseen >= LOOK_EVERY {
            self.unseen = 0;
            self.events_pending = true;
            self.receivable = true;
        }
    }

    /// Sleeps until there may be something to do.
    async fn wait(
        &mut self,
        link: &mut dyn Link,
        stop: &mut watch::Receiver<Option<Duration>>,
        stopping: Option<&Stopping>,
    ) {
        let stop_step = stopping.map(|stopping| stopping.deadline);
        let stalls = self.stall_deadline();
        let deadlines = [
            self.deadline(),
            stop_step,
            Some(self.next_ping),
            self.stall,
            stalls,
        ];
        let deadline = deadlines.into_iter().flatten().min();
        tokio::select! {
            biased;
            () = poll_fn(|cx| link.poll_ready(cx)) => self.receivable = true,
            () = poll_fn(|cx| self.sockets.poll_ready(cx)) => self.events_pending = true,
            Some(joined) = self.connects.join_next(), if !self.connects.is_empty() => {
                self.joined(joined);
            }
            () = sleep_until(deadline) => {}
            _ = stop.changed(), if stopping.is_none() => {}
        }
    }

    /// The session is over: resets its streams, and makes a new one on the same link unless the peer is to blame.
    fn session_ended(&mut self, end: End) -> io::Result<Option<Outcome>> {
        self.counters.session_ended(&end);
        self.abort_streams(&end.to_string());
        let now = Instant::now();
        if now - self.restarts.0 > Duration::from_secs(1) {
            self.restarts = (now, 0);
        }
        self.restarts.1 += 1;
        match end {
            End::PeerRestarted | End::Damaged if self.restarts.1 <= MAX_RESTARTS => {
                info!("{end}; a new session begins");
                self.new_session()?;
                Ok(None)
            }
            end => {
                warn!("session ended: {end}");
                Ok(Some(Outcome::PeerMisbehaved))
            }
        }
    }

    /// Stops listening and tells the peer.
    fn begin_stop(&mut self, grace: Duration) -> Stopping {
        info!(streams = self.streams().count(), "ending");
        self.outlets.clear();
        self.refuse_waiting("shutting down");
        self.session.go_away(Reason::ShuttingDown, "");
        Stopping {
            deadline: Instant::now() + grace,
            last: false,
        }
    }

    /// Whether the stop is done. When the grace is over, resets the streams that are left and gives that a little time
    /// to reach the peer.
    fn stop_done(&mut self, stop: &mut Stopping, busy: bool) -> bool {
        if self.streams().next().is_none() && !self.session.owes_control() && !busy {
            return true;
        }
        if Instant::now() < stop.deadline {
            return false;
        }
        let streams: Vec<_> = self.streams().collect();
        for stream in streams {
            self.session.reset(stream, Reason::ShuttingDown, "");
            self.remove_stream(stream, Ended::Reset(Reason::ShuttingDown, ""));
        }
        stop.deadline += FAREWELL;
        std::mem::replace(&mut stop.last, true)
    }

    /// Asks for a sign of life now and then, and reports its absence; a paused machine is not a dead one.
    fn keepalive(&mut self) {
        if self.clock < self.next_ping {
            return;
        }
        self.next_ping = self.clock + self.ping_interval();
        let answered = self.session.ping_sent().is_none();
        // Asked again and again: that is what makes a peer that restarted unseen show itself.
        self.session.ping();
        if !answered && !self.peer_silent {
            self.peer_silent = true;
            self.counters.silences.inc();
            warn!(
                "the other end has not answered for {KEEPALIVE:?}; it may be paused: its streams are kept"
            );
        }
    }

    /// Asks about a frame whose rest does not come, before the keepalive does.
    fn ask_for_the_rest(&mut self) {
        if self.stall.is_some_and(|at| at <= self.clock) {
            self.stall = None;
            self.patience = (self.patience * 2).min(KEEPALIVE);
            self.session.stalled();
        }
    }

    fn ping_interval(&self) -> Duration {
        if self.session.is_sealed() && !self.session.is_established() {
            SEEK_AGAIN
        } else {
            KEEPALIVE
        }
    }

    /// When something that is not an event must be looked at.
    fn deadline(&self) -> Option<Instant> {
        let client = self.waiting.front().and_then(|key| self.waits_until(*key));
        let accept = self.outlets.iter().filter_map(|outlet| outlet.retry).min();
        [client, accept].into_iter().flatten().min()
    }

    /// Begins a session that has yet to shake hands, over the present link.
    fn new_session(&mut self) -> io::Result<()> {
        let Needs {
            seal,
            turn,
            window,
            frame,
        } = self.needs;
        let usual = &self.settings.session;
        let max_window = self.settings.limits.stream_window(usual.max_window, window);
        self.counters
            .limits
            .stream_buffer
            .limit
            .set(max_window as usize);
        let config = Config {
            seal,
            turn,
            max_window,
            session_window: usual.session_window.max(window),
            max_frame: usual.max_frame.max(frame),
            ..usual.clone()
        };
        self.forget_stalls();
        self.counters.session_over(self.session.stats());
        self.session = Session::new(config, new_epoch()?);
        self.publish();
        self.next_ping = Instant::now() + self.ping_interval();
        self.staged.clear();
        (self.stall, self.patience) = (None, STALL);
        Ok(())
    }

    /// Lets the counters show where things stand.
    fn publish(&self) {
        let (counters, limits) = (&self.counters, &self.counters.limits);
        let streams = self.locals.len().saturating_sub(self.waiting.len());
        counters.session(self.session.stats());
        counters
            .established
            .set(self.session.is_established().into());
        counters.streams.set(streams);
        limits.streams.now.set(streams);
        limits.waiting.now.set(self.waiting.len());
        limits.connecting.now.set(self.connects.len());
        limits
            .buffer
            .now
            .set(usize::try_from(self.session.committed()).unwrap_or(usize::MAX));
    }

    /// Microseconds from the driver's start to that of the present turn.
    fn now(&self) -> u64 {
        let elapsed = self.clock.duration_since(self.started);
        u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX)
    }
}

/// The driver cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// A forward's address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The system refuses what every program needs.
    #[error("cannot start: {0}")]
    Io(#[from] io::Error),
}

/// Waits until `deadline`; for ever if there is none.
pub(crate) async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

fn new_epoch() -> io::Result<u64> {
    Ok(getrandom::u64().map_err(io::Error::other)?.max(1))
}
