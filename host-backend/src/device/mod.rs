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
//!   vhost-user library for each                    | data rings    |----> data thread -> Cell, one a port
//!                                                  |  0, 1, 4, ... |                      ^
//!                                                  '---------------'<---------------------'
//!                                                                       Port, Link: the engine's thread
//! ```
//!
//! The **control thread** (`control_queue`) never waits for anything but the end of a link's transaction: the
//! guest's kernel spins until it has been heard. The **data thread** only passes kicks on as wake-ups, and discards
//! what the guest wrote to nobody. All bytes move on the **engine's thread**, in [`Link`] calls. Neither of the
//! first two may ever return an error or panic: the library would end the thread without a word.
//!
//! Whoever changes something that another thread must act on *pokes* both worker threads: an eventfd in both their
//! epoll sets, edge-triggered and never read.
//!
//! # Lifecycle
//!
//! | what happens | what arrives | what it means here |
//! | --- | --- | --- |
//! | guest boots | rings start, DEVICE_READY | ports are announced |
//! | agent opens or closes the port | PORT_OPEN | a session begins or ends, at an exact ring position |
//! | guest reboots, driver unbound and bound | GET_VRING_BASE, rings start at 0, DEVICE_READY | every session is over |
//! | guest wakes from suspension | the same, but PORT_READY for DEVICE_READY | the same |
//! | QMP `stop` and `cont` | GET_VRING_BASE, rings start where they were | nothing; links wait |
//! | QEMU ends | connection ends | every session is over; the next QEMU may connect |
//!
//! # Locks
//!
//! In this order, each held for a bounded time: `Shared::control`, its rings, a port's `Cell`, that port's rings.
//! The library's request thread takes one ring's lock at a time, and none when it calls the backend.
//!
//! [`Link`]: virtproxy_engine::channel::Link

mod backend;
mod control;
mod control_queue;
mod from_guest;
mod port;
mod quiet;
mod ring;
mod server;
mod sessions;
mod signal;
mod to_guest;
mod vring;

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use virtproxy_engine::unix_socket::ListenError;

use control::Machine;
use control_queue::Control;
use port::Cell;
pub use port::Port;
use server::Server;

/// The most ports a device can have: the library serves 64 virtqueues, two of them are for control.
pub const MAX_PORTS: usize = 31;

/// A port the guest is to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortSpec {
    /// The guest finds it by this name: `/dev/virtio-ports/NAME`.
    pub name: String,
    /// What the guest makes of it.
    pub kind: PortKind,
}

impl PortSpec {
    /// A port for programs.
    pub fn generic(name: impl Into<String>) -> Self {
        PortSpec {
            name: name.into(),
            kind: PortKind::Generic,
        }
    }
}

/// What the guest makes of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// The ports are in the order of `specs`.
    pub fn start(
        path: impl AsRef<Path>,
        specs: Vec<PortSpec>,
    ) -> Result<(DeviceHandle, Vec<Port>), StartError> {
        if specs.is_empty() || specs.len() > MAX_PORTS {
            return Err(StartError::Ports(specs.len()));
        }
        if let Some(bad) = specs.iter().find(|spec| !is_good_name(spec)) {
            return Err(StartError::Name(bad.name.clone()));
        }
        let path = path.as_ref();
        let shared = Arc::new(Shared {
            control: Mutex::new(Control::new(Machine::new(&specs))),
            ports: specs.iter().map(|spec| Cell::new(&spec.name)).collect(),
            specs,
            poke: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        });
        let server = Server::start(path, shared.clone())?;
        let ports = (0..shared.ports.len())
            .map(|index| Port::new(&shared, index, format!("vhost-user:{}", path.display())))
            .collect();
        Ok((DeviceHandle { _server: server }, ports))
    }
}

fn is_good_name(spec: &PortSpec) -> bool {
    let bad = |c: char| c == '/' || c.is_whitespace() || c.is_control();
    let needed = spec.kind == PortKind::Generic;
    spec.name.len() <= 255 && !spec.name.contains(bad) && !(needed && spec.name.is_empty())
}

/// Keeps the device alive. Dropping it disconnects QEMU (which its guest will not survive), ends every link, and
/// removes the socket.
#[derive(Debug)]
pub struct DeviceHandle {
    _server: Server,
}

/// What the ports and all threads of a device share.
struct Shared {
    specs: Vec<PortSpec>,
    control: Mutex<Control>,
    ports: Vec<Cell>,
    /// Written to make both worker threads look at what changed.
    poke: EventFd,
}

impl Shared {
    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device is as it was before any driver came.
    fn restart(&self) {
        self.control().restart();
        self.ports.iter().for_each(Cell::restart);
    }

    /// The frontend is gone.
    fn detach(&self) {
        self.control().detach();
        self.ports.iter().for_each(Cell::detach);
    }

    fn poke(&self) {
        // Fails only when the counter is full, after 2^64 pokes.
        let _ = self.poke.write(1);
    }
}
