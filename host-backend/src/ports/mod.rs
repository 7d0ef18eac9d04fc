//! Ports beside the mux: the device is a whole virtio-console, so it also serves programs that know nothing of us.
//!
//! Each such port joins a character device of the guest to a [`Place`] on the host, by a relay in a task of its
//! own on the engine's thread. Ports are made at the start and, through the admin socket, at any time later.

mod peer;
mod place;
mod relay;
#[cfg(feature = "rogue")]
pub mod rogue;
mod terminal;

use std::cell::{Cell, RefCell};
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::info;
use virtproxy_engine::admin::{Handler, Request, RequestError};
use virtproxy_engine::channel::BoxFuture;
use virtproxy_engine::counters::{Channels, Count};
use virtproxy_engine::sandbox;

pub use place::{CONSOLE, Place, PlaceError, PortArg};

use crate::device::{DeviceHandle, Port, PortKind, PortSpec, StartError};
use crate::keeper::History;
use peer::Door;
use relay::Relay;

/// The size of a console's terminal until somebody's is known.
const SIZE: PortKind = PortKind::Console {
    columns: 80,
    rows: 25,
};

/// How long a removal waits for the guest. If it is paused, the port is gone all the same.
const LET_GO: Duration = Duration::from_secs(5);

/// The port for the device, of what the user asked for.
pub fn port_spec(name: &str, place: &Place) -> PortSpec {
    PortSpec {
        connected: false,
        resumable: true,
        memo: place.to_string(),
        ..PortSpec::generic(name)
    }
}

/// The console's port. Its side looks open even with nobody there: Linux would not stop to write, but spin.
pub fn console_spec(place: &Place) -> PortSpec {
    PortSpec {
        kind: SIZE,
        resumable: true,
        memo: place.to_string(),
        ..PortSpec::generic(CONSOLE)
    }
}

/// Why a port cannot be had, or not be removed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum PortError {
    #[error("{0}={1}: {2}")]
    Place(String, Place, io::Error),
    #[error("there is no port {0:?}: port list shows those there are")]
    NoSuchPort(String),
    #[error("{0} carries the streams of -o and -i: it cannot be removed")]
    Mux(String),
    #[error("stdio can only be given at the start")]
    Stdio,
    #[error(transparent)]
    Device(#[from] StartError),
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error("{0:?}: {1}")]
    Arg(String, PlaceError),
    #[error(
        "unknown request {0:?}: the requests are counters, port-add, port-remove and port-list"
    )]
    Unknown(String),
}

/// What an admin client wants.
enum Asked {
    Add(PortArg),
    Remove(String),
    List,
    Counters,
}

impl Asked {
    fn new(mut request: Request) -> Result<Self, PortError> {
        match request.name() {
            "port-add" => {
                let text = request.string("port")?;
                request.end()?;
                let arg = text.parse().map_err(|error| PortError::Arg(text, error))?;
                Ok(Asked::Add(arg))
            }
            "port-remove" => {
                let name = request.string("name")?;
                request.end()?;
                Ok(Asked::Remove(name))
            }
            "port-list" => {
                request.end()?;
                Ok(Asked::List)
            }
            "counters" => {
                request.end()?;
                Ok(Asked::Counters)
            }
            other => Err(PortError::Unknown(other.to_owned())),
        }
    }
}

/// What a relay shows of itself.
#[derive(Default)]
struct Status {
    guest_open: Cell<bool>,
    connected: Cell<bool>,
}

/// The ports of a device, and the device.
pub struct Ports {
    device: DeviceHandle,
    /// The port that is not ours to touch.
    mux: String,
    served: RefCell<Vec<Served>>,
    /// Ports that there was no room for.
    refused: Count,
    /// What the program counts beside.
    channels: Channels,
    workers: History,
}

struct Served {
    name: String,
    place: Place,
    /// Where others find it, if that is not what the user wrote.
    address: Option<PathBuf>,
    status: Rc<Status>,
    stop: oneshot::Sender<()>,
    relay: JoinHandle<Port>,
}

impl Ports {
    /// No ports yet beside `mux`. The counters of `channels`, and what became of the `workers` before this one, are shown with
    /// those of the ports.
    pub fn new(device: DeviceHandle, mux: &str, channels: Channels, workers: History) -> Self {
        Ports {
            device,
            mux: mux.to_owned(),
            served: RefCell::default(),
            refused: Count::default(),
            channels,
            workers,
        }
    }

    /// Serves QEMU from now on, if that is not done yet.
    pub fn serve_device(&self) -> io::Result<()> {
        self.device.serve()
    }

    /// Joins `port` to its place from now on. To be called on a `LocalSet`.
    pub fn serve(&self, name: &str, place: Place, port: Port) -> Result<(), PortError> {
        let door = self.open(name, &place)?;
        self.start(name, place, door, port);
        Ok(())
    }

    /// Joins a port that another process had before to its place again.
    pub fn serve_again(&self, spec: &PortSpec, port: Port) -> Result<(), PortError> {
        let place = spec.memo.parse();
        let place = place.map_err(|error| PortError::Arg(spec.name.clone(), error))?;
        self.serve(&spec.name, place, port)
    }

    /// Another process takes over: the guest keeps its ports.
    pub fn leave(&self) {
        self.device.leave();
    }

    fn open(&self, name: &str, place: &Place) -> Result<Door, PortError> {
        // A link that a crash left behind is replaced, so it must not be one of ours that is in use.
        let taken = |other: &Served| matches!(place, Place::Pty(Some(_))) && other.place == *place;
        let door = match self.served.borrow().iter().find(|other| taken(other)) {
            Some(other) => Err(io::Error::other(format!(
                "the link leads to port {} already: name another path",
                other.name
            ))),
            None => Door::open(place),
        };
        door.map_err(|error| {
            let cure = match sandbox::hint(&error) {
                "" => "",
                _ => {
                    "; in the sandbox, ports that are added later have their places in the folder of the admin socket: \
                     name one there, or give --port at the start"
                }
            };
            let error = io::Error::new(error.kind(), format!("{error}{cure}"));
            PortError::Place(name.to_owned(), place.clone(), error)
        })
    }

    fn start(&self, name: &str, place: Place, door: Door, port: Port) {
        let address = door.address().map(PathBuf::from);
        match &address {
            Some(address) => info!("port {name} is at {} ({place})", address.display()),
            None => info!("port {name} is at {place}"),
        }
        let status = Rc::<Status>::default();
        let relay = Relay::new(name, port, door, name == CONSOLE, status.clone());
        let (stop, stopped) = oneshot::channel();
        self.served.borrow_mut().push(Served {
            name: name.to_owned(),
            place,
            address,
            status,
            stop,
            relay: tokio::task::spawn_local(relay.run(stopped)),
        });
    }

    fn add(&self, arg: PortArg) -> Result<Value, PortError> {
        let PortArg { name, place } = arg;
        if place == Place::Stdio {
            return Err(PortError::Stdio);
        }
        // The guest sees the port only when its place is open.
        let door = self.open(&name, &place)?;
        let port = self.device.add(port_spec(&name, &place));
        let port = port.inspect_err(|error| {
            if matches!(error, StartError::Full { .. }) {
                self.refused.inc();
            }
        })?;
        self.start(&name, place, door, port);
        Ok(self
            .served
            .borrow()
            .last()
            .map_or(Value::Null, Served::show))
    }

    async fn remove(&self, name: String) -> Result<Value, PortError> {
        if name == self.mux {
            return Err(PortError::Mux(name));
        }
        let found = {
            let mut served = self.served.borrow_mut();
            let at = served.iter().position(|port| port.name == name);
            at.map(|at| served.remove(at))
        };
        let Some(Served { stop, relay, .. }) = found else {
            return Err(PortError::NoSuchPort(name));
        };
        drop(stop);
        let let_go = match relay.await {
            Ok(port) => {
                let removal = self.device.remove(port);
                let waited = tokio::task::spawn_blocking(move || removal.wait(LET_GO));
                waited.await.unwrap_or(false)
            }
            // It panicked, and the port went with it.
            Err(_) => false,
        };
        info!("port {name} is removed");
        Ok(json!({"let_go": let_go}))
    }

    fn list(&self) -> Value {
        let served = self.served.borrow();
        let ports: Vec<_> = served.iter().map(Served::show).collect();
        json!({"ports": ports, "room": self.room()})
    }

    /// How many ports there may be beside that of the mux.
    fn room(&self) -> usize {
        self.device.room() - 1
    }

    fn counters(&self) -> Value {
        json!({
            "channels": self.channels.show(),
            "ports": {
                "limit": self.room(),
                "now": self.served.borrow().len(),
                "reached": self.refused.get(),
            },
            "workers": self.workers,
        })
    }

    async fn answer(&self, request: Request) -> Result<Value, PortError> {
        match Asked::new(request)? {
            Asked::Add(arg) => self.add(arg),
            Asked::Remove(name) => self.remove(name).await,
            Asked::List => Ok(self.list()),
            Asked::Counters => Ok(self.counters()),
        }
    }
}

impl Handler for Ports {
    fn handle(&self, request: Request) -> BoxFuture<'_, Result<Value, String>> {
        Box::pin(async {
            let answer = self.answer(request).await;
            answer.map_err(|error| error.to_string())
        })
    }
}

impl Served {
    fn show(&self) -> Value {
        json!({
            "name": self.name,
            "place": self.place.to_string(),
            "address": self.address,
            "guest": if self.status.guest_open.get() { "open" } else { "closed" },
            "connected": self.status.connected.get(),
        })
    }
}
