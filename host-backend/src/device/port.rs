//! A port of the device: a [`Channel`] whose links run straight over the guest's memory.
//!
//! # Theory of operation
//!
//! A [`Port`] and its links belong to the engine's thread; the [`Cell`] behind them is shared with the device's
//! own threads (see [`super`] for who they are and for the order of locks). One lock guards all there is to a
//! port, and a link holds it for the length of one transaction, which is bounded. So the control thread, once it
//! has the lock, sees no half-used chain, and the boundary it notes when the guest closes the port is exact.
//!
//! When a link ends:
//!
//! * *the guest closed the port*: the link still receives what the guest wrote before, then gets
//!   `UnexpectedEof`; from the close on nothing is put in the ring to the guest, whose driver throws away what it
//!   finds there;
//! * *the engine drops the link first*: our side of the port closes (PORT_OPEN(0), a hang-up for the agent) until
//!   the guest has closed its side; what it writes until then is discarded, so that it never blocks;
//! * *the driver starts anew, or QEMU ends*: at once, the ring is no more.
//!
//! * *the port is removed*: at once, and what the guest still writes is discarded.
//!
//! GET_VRING_BASE alone (the VM is paused) ends nothing: the link finds its rings stopped and waits.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tracing::{info, warn};
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use virtproxy_engine::channel::{BoxFuture, Channel, Link, Needs, Progress, Sink, Source};
use vm_memory::GuestAddressSpace;

use super::chains::{self, Batch, Direction};
use super::control::HostSide;
use super::eager::Eager;
use super::gather::Gather;
use super::kick::Kicks;
use super::late::Late;
use super::quiet::Quiet;
use super::ring::{Fault, Ring};
use super::sessions::{Sessions, Standing, chains_left};
use super::signal::Signal;
use super::to_guest::Pace;
use super::vring::{Memory, Vring, is_running};
use super::{PortKind, PortSpec, Shared, from_guest, to_guest};

/// What the engine and the device's threads share of a port.
pub(super) struct Cell {
    /// For messages; another one when the slot has another port.
    name: Mutex<String>,
    state: Mutex<State>,
    /// Mirrors `State::sessions`, so that a kick need not wait for a transaction to end.
    discarding: AtomicBool,
    /// A link hears the kicks itself.
    watched: AtomicBool,
    /// What the ring holds was written to a process before this one, and where that ends is not known yet.
    stale: AtomicBool,
    /// There may be something to receive, room to send, or the link has ended.
    pub(super) link: Signal,
    /// There may be a session to claim.
    opened: Signal,
    /// Characters from the configuration that nobody has fetched, at most [`MAX_EMERGENCY`].
    emergency: Mutex<Vec<u8>>,
    emergency_came: Signal,
    quiet: Quiet,
}

/// Emergency characters that wait to be fetched. What is more is lost, as it would be on a line that nobody reads.
const MAX_EMERGENCY: usize = 4096;

/// Bytes that the guest may have on their way to us. They lie in its memory. When the engine's thread must wait for a
/// processor, which may take a few milliseconds on a busy host, the guest goes on for so long.
const WINDOW: u32 = 4 << 20;

struct State {
    rings: Option<Rings>,
    sessions: Sessions,
    /// Where the ring from the guest stopped. Boundaries hold only if it goes on from there.
    stopped_at: Option<u16>,
    /// The guest has the port open since before this process was; a session begins where the one before ends.
    reopens: bool,
    /// The engine still has its [`Port`].
    served: bool,
    /// Nobody's slot: what comes from the guest is discarded.
    vacant: bool,
    /// What [`Port::set_connected`] said last, and whether it was `false` since the guest was told.
    connected: bool,
    blinked: bool,
}

/// The port's two virtqueues, for as long as one frontend is connected.
pub(super) struct Rings {
    pub(super) memory: Memory,
    pub(super) to_guest: Vring,
    pub(super) from_guest: Vring,
}

impl Cell {
    pub(super) fn new(spec: &PortSpec) -> Self {
        let cell = Self::vacant();
        cell.occupy(spec);
        cell
    }

    /// A port whose guest knew it before this process was. What the guest has open stays open: it may never close it, as it
    /// may be waiting for us to open our side. But what it wrote so far was for the process before; only a console's goes on.
    pub(super) fn taken_over(spec: &PortSpec, open: bool) -> Self {
        let cell = Self::new(spec);
        let goes_on = open && matches!(spec.kind, PortKind::Console { .. });
        cell.change(|state| match goes_on {
            true => state.sessions.open(),
            false => {
                state.sessions.open_before();
                state.reopens = open;
            }
        });
        cell.stale.store(!goes_on, Ordering::Relaxed);
        cell
    }

    /// A slot without a port.
    pub(super) fn vacant() -> Self {
        Cell {
            name: Mutex::default(),
            state: Mutex::new(State {
                rings: None,
                sessions: Sessions::default(),
                stopped_at: None,
                reopens: false,
                served: false,
                vacant: true,
                connected: false,
                blinked: false,
            }),
            discarding: AtomicBool::new(true),
            watched: AtomicBool::new(false),
            stale: AtomicBool::new(false),
            link: Signal::default(),
            opened: Signal::default(),
            emergency: Mutex::default(),
            emergency_came: Signal::default(),
            quiet: Quiet::default(),
        }
    }

    /// The slot has a port from now on. Whatever the ring still holds was for the one before.
    pub(super) fn occupy(&self, spec: &PortSpec) {
        spec.name.clone_into(&mut self.name());
        self.emergency().clear();
        self.change(|state| {
            if state.rings.is_some() {
                self.discard_once(state);
            }
            state.served = true;
            state.vacant = false;
            state.connected = spec.connected;
            state.blinked = false;
        });
    }

    /// The slot has no port any more: its link ends, and whatever comes from the guest is discarded.
    pub(super) fn vacate(&self) {
        self.change(|state| {
            state.sessions.clear();
            state.served = false;
            state.vacant = true;
        });
    }

    /// The driver wrote a character to the configuration.
    pub(super) fn emergency_write(&self, byte: u8) {
        let mut emergency = self.emergency();
        if emergency.len() < MAX_EMERGENCY {
            emergency.push(byte);
        }
        drop(emergency);
        self.emergency_came.set();
    }

    fn emergency(&self) -> MutexGuard<'_, Vec<u8>> {
        self.emergency
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn name(&self) -> MutexGuard<'_, String> {
        self.name.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A frontend is connected, and these are the rings.
    pub(super) fn attach(&self, rings: Rings) {
        self.change(|state| state.rings = Some(rings));
    }

    /// The frontend is gone.
    pub(super) fn detach(&self) {
        self.stale.store(false, Ordering::Relaxed);
        self.change(|state| {
            state.rings = None;
            state.restart();
        });
    }

    /// The rings are as before any driver came.
    pub(super) fn restart(&self) {
        self.stale.store(false, Ordering::Relaxed);
        self.change(State::restart);
    }

    /// A driver starts. One that has no new rings, but those of the driver before, does not speak for that one.
    pub(super) fn driver_started(&self) {
        self.change(|state| {
            state.restart();
            if let Some(rings) = &state.rings {
                self.discard_up_to(rings, None);
            }
        });
    }

    /// The guest opened the port.
    pub(super) fn guest_opened(&self) {
        self.note("guest opened the port");
        self.change(|state| {
            state.close();
            state.sessions.open();
        });
    }

    /// The guest's driver opened the port anew for a program that had it open. That is told that nobody is there.
    pub(super) fn guest_resumed(&self) {
        self.note("guest woke up with the port open; it is hung up on");
        self.change(|state| {
            state.close();
            state.sessions.open_before();
        });
    }

    /// The guest closed the port. On return nothing more goes into the ring to it.
    pub(super) fn guest_closed(&self) {
        self.note("guest closed the port");
        self.change(State::close);
    }

    /// Whether [`Cell::settle`] is to be called when the ring from the guest starts.
    pub(super) fn is_stale(&self) -> bool {
        self.stale.load(Ordering::Relaxed)
    }

    /// Notes where that ends which the guest wrote to a process before this one. False: the ring is to start first.
    pub(super) fn settle(&self) -> bool {
        if self.is_stale() {
            self.change(|state| {
                if !state.is_awaited() {
                    state.close();
                    if std::mem::take(&mut state.reopens) {
                        state.sessions.open();
                    }
                    self.stale.store(false, Ordering::Relaxed);
                }
            });
        }
        !self.is_stale()
    }

    /// The frontend stops one of the rings; it may start it again where it is.
    pub(super) fn ring_stopped(&self, direction: Direction) {
        if direction == Direction::FromGuest {
            let mut state = self.lock();
            state.stopped_at = state
                .rings
                .as_ref()
                .map(|rings| rings.from_guest.queue_next_avail());
        }
    }

    /// What our side of the port is to look like to the guest.
    pub(super) fn host_side(&self) -> HostSide {
        let mut state = self.lock();
        HostSide {
            open: state.served && state.connected && !state.sessions.is_hung_up(),
            blinked: std::mem::take(&mut state.blinked),
        }
    }

    /// The ring from the guest got chains, or sessions changed: discards what is nobody's. Bounded by what the
    /// guest makes available meanwhile, so it is for a thread that has nothing better to do.
    pub(super) fn discard(&self) {
        while self.discarding.load(Ordering::Acquire) {
            let mut more = false;
            self.change(|state| more = self.discard_once(state));
            if !more {
                break;
            }
        }
    }

    /// Whether a link hears the kicks itself.
    pub(super) fn is_watched(&self) -> bool {
        self.watched.load(Ordering::SeqCst)
    }

    /// Whether the frontend has set up the ring from the guest at all.
    pub(super) fn configured(&self) -> bool {
        let state = self.lock();
        state
            .rings
            .as_ref()
            .is_some_and(|rings| rings.from_guest.configured())
    }

    /// Tells of the guest's doings, not too often.
    fn note(&self, what: &str) {
        if let Some(held_back) = self.quiet.permit() {
            info!(port = *self.name(), "{what}{held_back}");
        }
    }

    /// Reports what the guest's driver did wrong, not too often.
    pub(super) fn report(&self, direction: Direction, fault: &Fault) {
        if let Some(held_back) = self.quiet.permit() {
            warn!(
                port = *self.name(),
                ?direction,
                "guest misuses its ring: {fault}{held_back}"
            );
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and tells everybody whom it may concern.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        let discarding = state.vacant || state.sessions.abandoned().is_some();
        self.discarding.store(discarding, Ordering::Release);
        drop(state);
        self.link.set();
        self.opened.set();
    }

    /// One bounded pass; whether another one should follow.
    fn discard_once(&self, state: &mut State) -> bool {
        let goes = state.check_restart();
        let standing = match state.vacant {
            true => Some(Standing::Open),
            false => state.sessions.abandoned(),
        };
        let (Some(standing), Some(rings)) = (standing, &state.rings) else {
            return false;
        };
        if !goes {
            return false;
        }
        let end = match standing {
            Standing::Closed { end } => Some(end),
            _ => None,
        };
        let Some(more) = self.discard_up_to(rings, end) else {
            return false;
        };
        if end.is_some() {
            // Should the ring be unusable, there is nothing to wait for either.
            state.sessions.forget_abandoned();
        }
        more || end.is_some()
    }

    /// Discards what there is in the ring from the guest, up to a position or all of it. Whether more came meanwhile;
    /// nothing if the ring does not run.
    fn discard_up_to(&self, rings: &Rings, end: Option<u16>) -> Option<bool> {
        let memory = rings.memory.memory();
        let mut vring = rings.from_guest.get_mut();
        if !is_running(&vring) {
            return None;
        }
        let result = Ring::new(&mut vring, &memory).and_then(|mut ring| {
            let max = match end {
                Some(end) => chains_left(ring.next(), end, ring.size()),
                None => ring.size(),
            };
            chains::discard(&mut ring, max)?;
            Ok(ring.arm(1))
        });
        Some(result.unwrap_or_else(|fault| {
            self.report(Direction::FromGuest, &fault);
            false
        }))
    }
}

impl State {
    /// Gives the next session to a link, if there is one.
    fn claim(&mut self) -> Option<(u64, Kicks)> {
        let kicks = Kicks::new(self.rings.as_ref()?);
        Some((self.sessions.claim()?, kicks))
    }

    fn restart(&mut self) {
        self.reopens = false;
        self.sessions.clear();
        self.stopped_at = None;
    }

    fn close(&mut self) {
        self.check_restart();
        if let Some(rings) = &self.rings {
            let (mut vring, memory) = (rings.from_guest.get_mut(), rings.memory.memory());
            let next = vring.get_queue().next_avail();
            // None that can be taken, if what the driver says makes no sense.
            let available = Ring::new(&mut vring, &memory)
                .and_then(|ring| ring.available())
                .unwrap_or(0);
            self.sessions.close(next.wrapping_add(available), next);
        }
    }

    /// Whether the ring from the guest was told where to start, and has yet to.
    fn is_awaited(&self) -> bool {
        self.rings.as_ref().is_some_and(|rings| {
            let ring = &rings.from_guest;
            ring.is_placed() && !ring.get_ref().get_queue().ready()
        })
    }

    /// Positions in a ring mean nothing once it was stopped and starts elsewhere: the driver has set it up anew.
    /// Whether the ring goes. One that was stopped may start at any moment, but must not be touched before this has
    /// seen where.
    fn check_restart(&mut self) -> bool {
        let (Some(rings), Some(stopped_at)) = (&self.rings, self.stopped_at) else {
            return true;
        };
        let (running, next) = {
            let ring = rings.from_guest.get_ref();
            (ring.get_queue().ready(), ring.get_queue().next_avail())
        };
        if running {
            self.stopped_at = None;
            if next != stopped_at {
                self.sessions.clear();
            }
        }
        running
    }
}

/// The engine's end of a port. See the [module](super).
pub struct Port {
    shared: Arc<Shared>,
    index: usize,
    busy_poll: Duration,
}

impl Port {
    pub(super) fn new(shared: &Arc<Shared>, index: usize) -> Self {
        Port {
            shared: shared.clone(),
            index,
            busy_poll: Duration::ZERO,
        }
    }

    /// How long, at most, links to come look on for something to do before the thread sleeps.
    pub fn set_busy_poll(&mut self, most: Duration) {
        self.busy_poll = most;
    }

    pub(super) fn slot(&self) -> usize {
        self.index
    }

    /// What [`Channel::open`] waits for.
    pub fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<Box<dyn Link>> {
        loop {
            let claimed = self.cell().lock().claim();
            if let Some((generation, kicks)) = claimed {
                let link = PortLink {
                    shared: self.shared.clone(),
                    index: self.index,
                    generation,
                    kicks,
                    eager: Eager::new(self.busy_poll),
                    gather: Gather::new(),
                    late: Late::new(),
                    batch: Batch::default(),
                    pace: Pace::new(),
                };
                self.cell().link.set();
                return Poll::Ready(Box::new(link));
            }
            ready!(self.cell().opened.poll(cx));
        }
    }

    /// Whether there is somebody on the host whom the guest can reach: the guest sees our side closed otherwise, and
    /// sees it even if it lasts but a moment. Has no effect on links.
    pub fn set_connected(&self, connected: bool) {
        self.cell().change(|state| {
            state.blinked |= state.connected && !connected;
            state.connected = connected;
        });
        self.shared.poke();
    }

    /// Whether the guest has it open.
    pub fn guest_has_it_open(&self) -> bool {
        self.cell().lock().sessions.is_open()
    }

    /// The terminal of a console has this size from now on. Other ports have none.
    pub fn resize(&self, columns: u16, rows: u16) {
        self.shared
            .control()
            .machine
            .resize(self.index, columns, rows);
        self.shared.poke();
    }

    /// Waits for characters that the guest's driver could not write the ordinary way, and appends them to `out`.
    pub fn poll_emergency(&self, cx: &mut Context<'_>, out: &mut Vec<u8>) -> Poll<()> {
        ready!(self.cell().emergency_came.poll(cx));
        out.append(&mut self.cell().emergency());
        Poll::Ready(())
    }

    fn cell(&self) -> &Cell {
        &self.shared.ports[self.index]
    }
}

impl Channel for Port {
    fn open(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Link>>> {
        Box::pin(std::future::poll_fn(|cx| self.poll_open(cx).map(Ok)))
    }

    fn name(&self) -> &str {
        &self.shared.name
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.cell().change(|state| state.served = false);
        self.shared.poke();
    }
}

/// One opening of the port by the guest.
struct PortLink {
    shared: Arc<Shared>,
    index: usize,
    generation: u64,
    kicks: Kicks,
    eager: Eager,
    gather: Gather,
    late: Late,
    /// Only its buffers matter from call to call.
    batch: Batch<'static>,
    pace: Pace,
}

impl PortLink {
    /// Tells the guest's driver what it is owed: what was owed for long enough, or all of it.
    fn settle(&mut self, all: bool) {
        let mut state = self.shared.ports[self.index].lock();
        let goes = state.check_restart();
        let over = state.sessions.standing(self.generation) == Standing::Over;
        let Some(rings) = state.rings.as_ref().filter(|_| goes && !over) else {
            return;
        };
        let (memory, mut vring) = (rings.memory.memory(), rings.from_guest.get_mut());
        // One that is stopped starts with an interrupt (`vring`).
        if is_running(&vring)
            && let Ok(ring) = Ring::new(&mut vring, &memory)
        {
            self.late.settle(ring, all);
        }
    }
}

impl Link for PortLink {
    fn needs(&self) -> Needs {
        Needs {
            window: WINDOW,
            ..Needs::default()
        }
    }

    fn receive(&mut self, sink: &mut Sink<'_>) -> io::Result<Progress> {
        self.eager.busy();
        if self.late.is_due() {
            self.settle(false);
        }
        let cell = &self.shared.ports[self.index];
        let mut state = cell.lock();
        let goes = state.check_restart();
        let standing = state.sessions.standing(self.generation);
        let Some(rings) = state.rings.as_ref().filter(|_| standing != Standing::Over) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let habits = (&mut self.gather, &mut self.late);
        from_guest::receive(cell, rings, goes, standing, habits, &mut self.batch, sink)
    }

    fn send(&mut self, source: &mut Source<'_>) -> io::Result<Progress> {
        // Who sends and sends never comes to `poll_ready`.
        if self.late.is_due() {
            self.settle(false);
        }
        let cell = &self.shared.ports[self.index];
        let mut state = cell.lock();
        state.check_restart();
        match (state.sessions.standing(self.generation), &state.rings) {
            (Standing::Open, Some(rings)) => {
                to_guest::send(cell, rings, &mut self.pace, &mut self.batch, source)
            }
            // The end of what the guest wrote is yet to be received.
            (Standing::Closed { .. }, Some(_)) => Ok(Progress::Wait),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.late.poll_due(cx).is_ready() {
            self.settle(false);
        }
        let cell = &self.shared.ports[self.index];
        let watched = self.kicks.watch();
        cell.watched.store(watched, Ordering::SeqCst);
        let gathered = self.gather.poll_due(cx);
        match (self.kicks.poll(cx), cell.link.poll(cx), gathered) {
            (Poll::Pending, Poll::Pending, Poll::Pending) => {
                self.eager.idle(cx);
                Poll::Pending
            }
            _ => Poll::Ready(()),
        }
    }
}

impl Drop for PortLink {
    fn drop(&mut self) {
        self.settle(true);
        let cell = &self.shared.ports[self.index];
        cell.watched.store(false, Ordering::SeqCst);
        cell.change(|state| state.sessions.release(self.generation));
        self.shared.poke();
    }
}
