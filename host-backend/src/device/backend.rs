//! What the vhost-user library asks the device: features, configuration, and what to do when a ring is kicked.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tracing::{debug, error, warn};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon};
use virtio_bindings::bindings::{virtio_config, virtio_ring};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use vmm_sys_util::timerfd::TimerFd;

use super::Shared;
use super::chains::Direction;
use super::kick;
use super::port::{Cell, Rings};
use super::vring::{Memory, Vring};

/// VIRTIO_CONSOLE_F_SIZE, VIRTIO_CONSOLE_F_MULTIPORT and VIRTIO_CONSOLE_F_EMERG_WRITE, the numbers of feature bits.
const F_SIZE: u32 = 0;
const F_MULTIPORT: u32 = 1;
const F_EMERG_WRITE: u32 = 2;

/// QEMU asserts that what the user asks for (`vq_size=`) is not more; its own limit is 1024.
const MAX_QUEUE_SIZE: usize = 1024;

/// Queues 2 and 3 are the control queues, whatever the number of ports.
pub(super) const CONTROL: usize = 0;
const CONTROL_QUEUES: u64 = 0b1100;
pub(super) const DATA: usize = 1;
const THREADS: usize = 2;

/// `struct virtio_console_config`: columns, rows, max_nr_ports, emerg_wr.
const CONFIG_LEN: usize = 12;
/// Where in it the driver writes a character that cannot wait for queues to be set up.
const EMERG_WR: usize = 8;

/// How long the worker threads may take to start. There is no reason for them to take long.
const ATTACH: Duration = Duration::from_secs(10);

/// How long after the connection a QEMU has told of all its queues.
const REALIZED: Duration = Duration::from_secs(2);
/// How long after that a guest has usually started its driver.
const BOOTED: Duration = Duration::from_secs(30);

/// The device towards one frontend.
pub(super) struct Backend {
    shared: Arc<Shared>,
    memory: Memory,
    attached: [AtomicBool; THREADS],
    /// What the data thread waits with.
    data_epoll: OnceLock<OwnedFd>,
    tell_attached: Sender<()>,
    exits: Mutex<Exits>,
    timer: Mutex<Option<(TimerFd, Tick)>>,
    negotiated: AtomicBool,
}

/// Which of our queues the frontend knows of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum SetUp {
    None,
    Some,
    All,
}

/// Which check the timer is for.
#[derive(Clone, Copy)]
enum Tick {
    Realized,
    Booted,
}

/// The eventfds that end the worker threads. The library takes the consumer's fd out of its owner and never closes
/// it, so we do when its threads are gone.
#[derive(Default)]
struct Exits {
    unused: Vec<Option<(EventConsumer, EventNotifier)>>,
    leaked: Vec<RawFd>,
}

impl Drop for Exits {
    fn drop(&mut self) {
        for fd in self.leaked.drain(..) {
            // SAFETY: `VringEpollHandler::new` (vhost-user-backend 0.24) turned the owner of this fd into a number,
            // which it only gave to its epoll. Nobody else will close it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}

impl Backend {
    /// The receiver hears of each worker thread that has given us its rings.
    pub(super) fn new(shared: Arc<Shared>, memory: Memory) -> io::Result<(Self, Receiver<()>)> {
        // Made here, where failing is still possible: without them the worker threads would never end.
        let mut exits = Exits::default();
        for _ in 0..THREADS {
            let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
            exits
                .unused
                .push(Some(new_event_consumer_and_notifier(flags)?));
        }
        let mut timer = TimerFd::new()?;
        timer.reset(REALIZED, None)?;
        let (tell_attached, attached) = mpsc::channel();
        let backend = Backend {
            shared,
            memory,
            attached: Default::default(),
            data_epoll: OnceLock::new(),
            tell_attached,
            exits: Mutex::new(exits),
            timer: Mutex::new(Some((timer, Tick::Realized))),
            negotiated: AtomicBool::new(false),
        };
        Ok((backend, attached))
    }

    /// Makes the daemon's worker threads listen for pokes and for the timer. The first poke gives us their rings;
    /// from then on, and not before, a frontend may be served.
    pub(super) fn register(
        self: &Arc<Self>,
        daemon: &VhostUserDaemon<Arc<Self>>,
        attached: &Receiver<()>,
    ) -> io::Result<()> {
        let handlers = daemon.get_epoll_handlers();
        if let Some(data) = handlers.get(DATA) {
            // SAFETY: it is open as long as the handler is there.
            let epoll = unsafe { BorrowedFd::borrow_raw(data.as_raw_fd()) };
            let _ = self.data_epoll.set(epoll.try_clone_to_owned()?);
        }
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for handler in &handlers {
            let poke = self.shared.poke.as_raw_fd();
            handler.register_listener(poke, events, u64::from(self.poke_event()))?;
        }
        if let (Some((timer, _)), Some(control)) = (&*self.timer(), handlers.get(CONTROL)) {
            control.register_listener(timer.as_raw_fd(), events, u64::from(self.timer_event()))?;
        }
        self.shared.poke();
        for _ in &handlers {
            attached.recv_timeout(ATTACH).map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn queue_count(&self) -> u16 {
        let ports = u16::try_from(self.shared.ports.len()).expect("at most MAX_PORTS");
        2 * (ports + 1)
    }

    /// The library keeps the events up to the number of queues for itself.
    pub(super) fn poke_event(&self) -> u16 {
        self.queue_count() + 1
    }

    pub(super) fn timer_event(&self) -> u16 {
        self.queue_count() + 2
    }

    fn timer(&self) -> MutexGuard<'_, Option<(TimerFd, Tick)>> {
        self.timer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rings(&self, to_guest: &Vring, from_guest: &Vring) -> Rings {
        Rings {
            memory: self.memory.clone(),
            to_guest: to_guest.clone(),
            from_guest: from_guest.clone(),
        }
    }

    fn attach(&self, thread: usize, vrings: &[Vring]) {
        if self.attached[thread].swap(true, Ordering::Relaxed) {
            return;
        }
        let mut pairs = vrings
            .chunks_exact(2)
            .map(|pair| self.rings(&pair[0], &pair[1]));
        if thread == CONTROL {
            self.shared.control().attach(pairs.next());
        } else {
            for (port, rings) in self.shared.ports.iter().zip(pairs) {
                port.attach(rings);
            }
        }
        // Nobody listens any more once the frontend is served.
        let _ = self.tell_attached.send(());
    }

    /// A worker thread's turn: a ring was kicked, or one of our own events came.
    pub(super) fn event(&self, thread: usize, event: u16, vrings: &[Vring]) {
        self.attach(thread, vrings);
        let poked = event == self.poke_event();
        if event == self.timer_event() {
            self.check();
        } else if thread == CONTROL {
            self.shared.serve_control();
        } else if poked {
            for (event, ring) in (0..).zip(vrings) {
                if self.port_of(event).is_some_and(|port| !port.is_watched()) {
                    self.hear(ring, event, true);
                }
            }
            self.shared.ports.iter().for_each(Cell::discard);
        } else if let (Some(port), Some(ring)) =
            (self.port_of(event), vrings.get(usize::from(event)))
        {
            if event % 2 == 1 {
                if port.is_stale() {
                    self.shared.poke();
                }
                port.discard();
            }
            port.link.set();
            if port.is_watched() {
                self.hear(ring, event, false);
            }
        }
    }

    /// The rings of the data thread are numbered from 0: to the guest, from the guest, and so on.
    fn port_of(&self, event: u16) -> Option<&Cell> {
        self.shared.ports.get(usize::from(event / 2))
    }

    /// Whether the data thread is to hear the kicks of a ring.
    fn hear(&self, ring: &Vring, event: u16, on: bool) {
        if let Some(epoll) = self.data_epoll.get() {
            // Fails if the ring is stopped. It is heard when it starts.
            let _ = kick::hear(epoll, ring, event, on);
        }
    }

    /// Tells the user what is wrong with a QEMU that was started with other options than it must.
    fn check(&self) {
        let mut timer = self.timer();
        let Some((fd, tick)) = timer.as_mut() else {
            return;
        };
        let queues = self.queue_count();
        match *tick {
            Tick::Realized => {
                if self.queues_set_up() == SetUp::Some {
                    error!(
                        "QEMU's device has too few queues, its guest will not find the port: \
                         say num_vqs={queues} on QEMU's -device line"
                    );
                }
                *tick = Tick::Booted;
                if fd.reset(BOOTED, None).is_err() {
                    *timer = None;
                }
            }
            Tick::Booted => {
                // A driver that cannot make sense of the device gives up without a word to us.
                if !self.shared.control().heard() {
                    warn!(
                        "the guest has not started the device yet; if it is up, it needs its virtio_console driver, and \
                         QEMU's -device line virtio-id=3,num_vqs={queues},config_size={CONFIG_LEN} and a vq_size that is \
                         a power of 2, at most {MAX_QUEUE_SIZE}"
                    );
                }
                *timer = None;
            }
        }
    }

    /// Whether the connection ended because QEMU has more queues than we: it gives eventfds to all of them before
    /// anything else, and ends when one is refused.
    pub(super) fn too_many_queues(&self) -> Option<u16> {
        let begun = self.negotiated.load(Ordering::Relaxed);
        (!begun && self.queues_set_up() == SetUp::All).then(|| self.queue_count())
    }

    fn queues_set_up(&self) -> SetUp {
        let control = self.shared.control().configured();
        let ports = self.shared.ports.iter().map(|port| port.configured());
        let all = ports.chain([control]).collect::<Vec<_>>();
        match (all.contains(&true), all.contains(&false)) {
            (false, _) => SetUp::None,
            (true, true) => SetUp::Some,
            (true, false) => SetUp::All,
        }
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let size = self.shared.control().machine.console_size();
        let (columns, rows) = size.unwrap_or((80, 25));
        let ports = u32::from(self.queue_count()) / 2 - 1;
        let mut config = [0; CONFIG_LEN];
        config[0..2].copy_from_slice(&columns.to_le_bytes());
        config[2..4].copy_from_slice(&rows.to_le_bytes());
        config[4..8].copy_from_slice(&ports.to_le_bytes());
        config
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        usize::from(self.queue_count())
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        let bits = [
            F_SIZE,
            F_MULTIPORT,
            virtio_ring::VIRTIO_RING_F_INDIRECT_DESC,
            virtio_ring::VIRTIO_RING_F_EVENT_IDX,
            virtio_config::VIRTIO_F_VERSION_1,
        ];
        let features = bits.iter().fold(0, |features, bit| features | 1 << bit);
        let console = self.shared.control().machine.console().is_some();
        let features = features | u64::from(console) << F_EMERG_WRITE;
        features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        debug!("driver's features: {features:#x}");
        self.negotiated.store(true, Ordering::Relaxed);
        let version_1 = 1 << virtio_config::VIRTIO_F_VERSION_1;
        if features & version_1 != 0 && features & (1 << F_MULTIPORT) == 0 {
            warn!(
                "the guest's driver knows no named ports (VIRTIO_CONSOLE_F_MULTIPORT): it will find none"
            );
        }
    }

    /// Not INFLIGHT_SHMFD nor STATUS: the library does not implement them.
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    /// QEMU stops the rings instead; this is for other frontends.
    fn reset_device(&self) {
        self.shared.restart();
    }

    /// The library did it.
    fn set_event_idx(&self, _enabled: bool) {}

    /// Always as many bytes as were asked for: QEMU has no use for any other answer.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.config();
        (offset..offset.saturating_add(size))
            .map(|at| config.get(at as usize).copied().unwrap_or(0))
            .collect()
    }

    /// QEMU hands over the whole configuration for each write of the driver to any part of it. So a NUL, which is
    /// what there is when nothing was written, is no emergency.
    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let byte = EMERG_WR
            .checked_sub(offset as usize)
            .and_then(|at| bytes.get(at));
        if let Some(byte) = byte.filter(|byte| **byte != 0) {
            self.shared.emergency(*byte);
        }
        Ok(())
    }

    /// The map is `self.memory`.
    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        let all = u64::MAX >> (64 - u32::from(self.queue_count()));
        let mut masks = vec![0; THREADS];
        masks[CONTROL] = CONTROL_QUEUES;
        masks[DATA] = all & !CONTROL_QUEUES;
        masks
    }

    fn exit_event(&self, thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        let mut exits = self.exits.lock().unwrap_or_else(PoisonError::into_inner);
        let (consumer, notifier) = exits.unused.get_mut(thread)?.take()?;
        exits.leaked.push(consumer.as_raw_fd());
        Some((consumer, notifier))
    }

    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        debug!(queue, "ring stopped");
        let direction = if queue.is_multiple_of(2) {
            Direction::ToGuest
        } else {
            Direction::FromGuest
        };
        let port = match queue {
            0 | 1 => 0,
            2 | 3 => return Ok(()),
            _ => queue as usize / 2 - 1,
        };
        if let Some(port) = self.shared.ports.get(port) {
            port.ring_stopped(direction);
        }
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        vrings: &[Vring],
        thread: usize,
    ) -> io::Result<()> {
        // Whatever comes out of here ends the thread.
        let result = catch_unwind(AssertUnwindSafe(|| self.event(thread, event, vrings)));
        if result.is_err() {
            error!(
                thread,
                event, "a bug: the device's worker panicked and goes on"
            );
        }
        Ok(())
    }
}
