//! The vhost-user virtio-console device: QEMU attaches it, and no byte passes through QEMU.
//!
//! # Theory of operation
//!
//! [`Device::start`] makes the socket that QEMU connects to and returns a [`Port`] for each port that the guest is
//! to see. A port is a [`Channel`](virtproxy_engine::channel::Channel) straight over the guest's memory.
//!
//! ```text
//!        QEMU                                       guest's memory
//!          | vhost-user socket                     .---------------.
//!          v                                       | control rings |<--> control thread --.
//!   server thread, one connection                  |  2, 3         |                      | effects
//!   after the other; a thread of the               |---------------|  kicks               v
//!   vhost-user library for each                    | data rings    |--.-> data thread -> Cell, one a port
//!                                                  |  0, 1, 4, ... |  |                   ^
//!                                                  '---------------'<-+-------------------'
//!                                                                     '-> Port, Link: the engine's thread
//! ```
//!
//! The **control thread** (`control_queue`) never waits for anything but the end of a link's transaction: the
//! guest's kernel spins until it has been heard. All bytes move on the **engine's thread**, in [`Link`] calls; a link
//! hears its kicks there too (`kick`), lets gather what a busy guest writes (`gather`), and puts interrupts off that can wait
//! (`late`). The **data thread** passes those kicks on that come before, and discards what the guest wrote to nobody.
//! Neither this one nor the first may ever return an error or panic: the library would end the thread without a word.
//!
//! Whoever changes something that another thread must act on *pokes* both worker threads: an eventfd in both their
//! epoll sets, edge-triggered and never read.
//!
//! # Lifecycle
//!
//! | what happens | what arrives | what it means here |
//! | --- | --- | --- |
//! | a port is added or removed | nothing | DEVICE_ADD, DEVICE_REMOVE; its rings are there from the start |
//! | guest boots | rings start, DEVICE_READY | ports are announced |
//! | agent opens or closes the port | PORT_OPEN | a session begins or ends, at an exact ring position |
//! | guest reboots, driver unbound and bound | GET_VRING_BASE, rings start at 0, DEVICE_READY | every session is over |
//! | guest wakes from suspension | the same, but PORT_READY for DEVICE_READY | the same |
//! | QMP `stop` and `cont` | GET_VRING_BASE, rings start where they were | nothing; links wait |
//! | QEMU ends | connection ends | every session is over; the next QEMU may connect |
//! | we end | nothing | every port is removed, then QEMU is disconnected |
//! | another process takes over from us | rings start, without a position | the guest's sessions are over, but a console's |
//!
//! # Locks
//!
//! In this order, each held for a bounded time: `Shared::control`, its rings, a port's `Cell`, that port's rings.
//! The library's request thread takes one ring's lock at a time, and none when it calls the backend.
//!
//! [`Link`]: virtproxy_engine::channel::Link

mod backend;
mod chains;
mod control;
mod control_queue;
mod eager;
mod from_guest;
mod gather;
mod kick;
mod late;
mod port;
mod quiet;
mod ring;
#[cfg(feature = "rogue")]
pub mod rogue;
mod saved;
mod server;
mod sessions;
mod signal;
mod to_guest;
mod vring;

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tracing::warn;
use vmm_sys_util::eventfd::EventFd;

use virtproxy_engine::unix_socket::ListenError;

use control::Machine;
use control_queue::Control;
use port::Cell;
pub use port::Port;
use saved::Saved;
use server::{Incoming, Server};

use crate::keeper::Kept;

/// The most ports a device can have: the library serves 64 virtqueues, two of them are for control.
pub const MAX_PORTS: usize = 31;

/// A port the guest is to see.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct PortSpec {
    /// The guest finds it by this name: `/dev/virtio-ports/NAME`.
    pub name: String,
    /// What the guest makes of it.
    pub kind: PortKind,
    /// Whether the host's side looks open to the guest until [`Port::set_connected`] says otherwise.
    pub connected: bool,
    /// Whether a program that has it open can go on after the guest slept. Any other is hung up on, and has to open it anew.
    #[serde(default)]
    pub resumable: bool,
    /// What whoever serves the port wants to know of it again when another process takes over.
    pub memo: String,
}

impl PortSpec {
    /// A port for programs.
    pub fn generic(name: impl Into<String>) -> Self {
        PortSpec {
            name: name.into(),
            kind: PortKind::Generic,
            connected: true,
            resumable: false,
            memo: String::new(),
        }
    }
}

/// What the guest makes of a port.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub enum PortKind {
    /// A character device for programs.
    Generic,
    /// A terminal (`/dev/hvc0`) of this size.
    Console {
        /// Characters in a line.
        columns: u16,
        /// Lines.
        rows: u16,
    },
}

/// Why a device cannot be.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// The socket for QEMU cannot be made.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The number of ports is wrong.
    #[error("a device has 1 to {MAX_PORTS} ports, not {0}")]
    Ports(usize),
    /// More ports than room for them.
    #[error(
        "the device has room for {room} ports and no more: remove one, or start it with more room"
    )]
    Full {
        /// How many.
        room: usize,
    },
    /// Two ports cannot be told from each other.
    #[error("there is a port {0:?} already: name it otherwise")]
    Twice(String),
    /// A port's name is wrong.
    #[error("port name {0:?}: 1 to 255 bytes are needed, and no '/', space or control character")]
    Name(String),
    /// The system is out of something.
    #[error("cannot start the device: {0}")]
    System(#[from] io::Error),
}

/// The device. See the [module](self).
#[derive(Debug)]
pub struct Device;

impl Device {
    /// Serves QEMU on `path` from now on, one connection after the other, until the handle is dropped.
    /// The ports are in the order of `specs`; `room` is for how many there may be in all.
    pub fn start(
        path: impl AsRef<Path>,
        specs: Vec<PortSpec>,
        room: usize,
    ) -> Result<(DeviceHandle, Vec<Port>), StartError> {
        check(&specs, room)?;
        let path = path.as_ref();
        let incoming = Incoming::listen(path)?;
        let shared = Shared::new(name(path), &specs, room)?;
        let handle = Self::handle(path, incoming, shared)?;
        handle.serve()?;
        let ports = (0..specs.len()).map(|slot| Port::new(&handle.shared, slot));
        let ports = ports.collect();
        Ok((handle, ports))
    }

    /// The same on behalf of a keeper, from [`DeviceHandle::serve`] on: until then it has no thread. If another process had
    /// the device before, its ports are as they were then, whatever `specs` says; they come with what is known of them.
    pub fn kept(
        path: impl AsRef<Path>,
        kept: Kept,
        specs: Vec<PortSpec>,
        room: usize,
    ) -> Result<(DeviceHandle, Vec<(PortSpec, Port)>), StartError> {
        check(&specs, room)?;
        let saved = Saved::read(&kept.state, room);
        let resumed = kept.resumed && saved.is_some();
        let machine = Machine::new(&specs, room);
        let control = Control::kept(machine, saved, resumed, kept.leash.clone());
        let cell = |slot| match control.machine.port(slot) {
            Some((spec, open)) if resumed => Cell::taken_over(spec, open),
            Some((spec, _)) => Cell::new(spec),
            None => Cell::vacant(),
        };
        let cells = (0..room).map(cell).collect();
        let incoming = Incoming::Kept(kept.listener, kept.leash, kept.resumed);
        let ports = (0..room)
            .filter_map(|slot| Some((control.machine.port(slot)?.0.clone(), slot)))
            .collect::<Vec<_>>();
        let path = path.as_ref();
        let handle = Self::handle(path, incoming, Shared::of(name(path), control, cells)?)?;
        let port = |(spec, slot)| (spec, Port::new(&handle.shared, slot));
        let ports = ports.into_iter().map(port).collect();
        Ok((handle, ports))
    }

    fn handle(path: &Path, incoming: Incoming, shared: Shared) -> Result<DeviceHandle, StartError> {
        let shared = Arc::new(shared);
        let server = Server::new(path, incoming, shared.clone())?;
        Ok(DeviceHandle {
            shared,
            stays: AtomicBool::new(false),
            server,
        })
    }
}

/// What a device is called in messages.
fn name(path: &Path) -> String {
    format!("vhost-user:{}", path.display())
}

fn check(specs: &[PortSpec], room: usize) -> Result<(), StartError> {
    if specs.is_empty() || specs.len() > MAX_PORTS {
        return Err(StartError::Ports(specs.len()));
    }
    if room < specs.len() || room > MAX_PORTS {
        return Err(StartError::Ports(room));
    }
    for (index, spec) in specs.iter().enumerate() {
        check_name(spec)?;
        if specs[..index].iter().any(|other| other.name == spec.name) {
            return Err(StartError::Twice(spec.name.clone()));
        }
    }
    Ok(())
}

fn check_name(spec: &PortSpec) -> Result<(), StartError> {
    let bad = |c: char| c == '/' || c.is_whitespace() || c.is_control();
    let needed = spec.kind == PortKind::Generic;
    let good =
        spec.name.len() <= 255 && !spec.name.contains(bad) && !(needed && spec.name.is_empty());
    good.then_some(())
        .ok_or_else(|| StartError::Name(spec.name.clone()))
}

/// How long the end of a device waits for the guest to let go of its ports.
const FAREWELL: Duration = Duration::from_secs(1);

/// Keeps the device alive. Dropping it takes the ports from the guest, disconnects QEMU, ends every link, and removes
/// the socket.
///
/// The guest's kernel spins while it waits for a control message to be taken, and a program that closes its port sends
/// one. With nobody to take it, the guest's processor would spin for ever. So the ports are removed first, which the
/// guest is given a moment to notice: without ports its kernel has nothing to say.
pub struct DeviceHandle {
    shared: Arc<Shared>,
    /// The guest keeps its ports.
    stays: AtomicBool,
    server: Server,
}

impl DeviceHandle {
    /// Serves QEMU from now on, if that is not done yet.
    pub fn serve(&self) -> io::Result<()> {
        self.shared.control().save();
        self.server.serve()
    }

    /// Gives the guest one more port.
    pub fn add(&self, spec: PortSpec) -> Result<Port, StartError> {
        check_name(&spec)?;
        self.shared.add(&spec)
    }

    /// Takes a port from the guest. Its slot is free for another one when the guest has let go of it.
    pub fn remove(&self, port: Port) -> Removal {
        let slot = port.slot();
        drop(port);
        self.shared.remove(slot);
        Removal {
            shared: self.shared.clone(),
            slot,
        }
    }

    /// Another process takes over from this one: the ports are not taken from the guest when this is dropped.
    pub fn leave(&self) {
        self.stays.store(true, Ordering::Relaxed);
    }

    /// How many ports there may be.
    pub fn room(&self) -> usize {
        self.shared.ports.len()
    }

    /// What `num_vqs=` on QEMU's `-device` line must be.
    pub fn queues(&self) -> usize {
        2 * (self.room() + 1)
    }
}

impl Drop for DeviceHandle {
    fn drop(&mut self) {
        if *self.stays.get_mut() {
            return;
        }
        let slots = 0..self.room();
        slots.clone().for_each(|slot| self.shared.remove(slot));
        let end = Instant::now() + FAREWELL;
        for slot in slots {
            if !self.shared.wait_vacant(slot, end) {
                warn!(
                    "the guest has not let go of its ports within {FAREWELL:?}; a program in it that uses one may hang"
                );
                break;
            }
        }
    }
}

/// The guest is about to let go of a port.
pub struct Removal {
    shared: Arc<Shared>,
    slot: usize,
}

impl Removal {
    /// Waits until it has, on this thread; false if it has not within `limit`.
    pub fn wait(&self, limit: Duration) -> bool {
        self.shared.wait_vacant(self.slot, Instant::now() + limit)
    }
}

/// What the ports and all threads of a device share.
struct Shared {
    /// For messages.
    name: String,
    control: Mutex<Control>,
    /// Goes with `control`: a slot may have become vacant.
    vacated: Condvar,
    /// One for each slot.
    ports: Vec<Cell>,
    /// Written to make both worker threads look at what changed.
    poke: EventFd,
}

impl Shared {
    fn new(name: String, specs: &[PortSpec], room: usize) -> io::Result<Self> {
        let cells = specs.iter().map(Cell::new);
        let cells = cells
            .chain(std::iter::repeat_with(Cell::vacant))
            .take(room)
            .collect();
        Self::of(name, Control::new(Machine::new(specs, room)), cells)
    }

    fn of(name: String, control: Control, ports: Vec<Cell>) -> io::Result<Self> {
        Ok(Shared {
            name,
            control: Mutex::new(control),
            vacated: Condvar::new(),
            ports,
            poke: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// Gives the guest one more port.
    fn add(self: &Arc<Self>, spec: &PortSpec) -> Result<Port, StartError> {
        let mut control = self.control();
        if control.machine.has_name(&spec.name) {
            return Err(StartError::Twice(spec.name.clone()));
        }
        let slot = control.machine.add(spec.clone()).ok_or(StartError::Full {
            room: self.ports.len(),
        })?;
        self.ports[slot].occupy(spec);
        drop(control);
        self.poke();
        Ok(Port::new(self, slot))
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a port from the guest, if there is one in the slot.
    fn remove(&self, slot: usize) {
        self.control().machine.remove(slot);
        self.ports[slot].vacate();
        self.poke();
    }

    /// Waits until the guest has let go of what was in the slot; false if it has not by `end`.
    fn wait_vacant(&self, slot: usize, end: Instant) -> bool {
        let left = end.saturating_duration_since(Instant::now());
        let (control, _) = self
            .vacated
            .wait_timeout_while(self.control(), left, |control| {
                !control.machine.is_vacant(slot)
            })
            .unwrap_or_else(PoisonError::into_inner);
        control.machine.is_vacant(slot)
    }

    /// The driver wrote a character to the configuration, for want of working queues.
    fn emergency(&self, byte: u8) {
        if let Some(slot) = self.control().machine.console() {
            self.ports[slot].emergency_write(byte);
        }
    }

    /// The device is as it was before any driver came.
    fn restart(&self) {
        self.control().restart();
        self.vacated.notify_all();
        self.ports.iter().for_each(Cell::restart);
    }

    /// The frontend lives on, but not with us.
    fn leave(&self) {
        self.control().leave();
        self.detach();
    }

    /// The frontend is gone.
    fn detach(&self) {
        self.control().detach();
        self.vacated.notify_all();
        self.ports.iter().for_each(Cell::detach);
    }

    fn poke(&self) {
        // Fails only when the counter is full, after 2^64 pokes.
        let _ = self.poke.write(1);
    }
}
