//! Serves one QEMU after the other on one socket: a path that QEMU connects to, or what a keeper connects to for it.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::process::{Signal, getpid, kill_process};
use thiserror::Error;
use tracing::{error, info, warn};
use vhost::vhost_user::{self, Listener};
use vhost_user_backend::{Error as DaemonError, ShutdownHandle, VhostUserDaemon};
use virtproxy_engine::unix_socket::{self, SocketFile};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::backend::Backend;
use super::vring::Memory;
use super::{Shared, StartError};
use crate::keeper::Leash;

/// How long to wait after a connection could not be served, in milliseconds: what there was too little of (file
/// descriptors, threads) may come back.
const PAUSE_MS: i32 = 500;

/// Connections that wait while one is served.
const BACKLOG: i32 = 16;

/// Where connections come from.
pub(super) enum Incoming {
    /// QEMU, to a socket of our own. The file goes before the socket.
    Own(SocketFile, UnixListener),
    /// A keeper, which hears on the leash when one is over. Whether the first is one that lives on from another process.
    Kept(UnixListener, Leash, bool),
}

impl Incoming {
    /// Listens on `path`.
    pub(super) fn listen(path: &Path) -> Result<Self, StartError> {
        let (listener, file) = unix_socket::listen(path, BACKLOG)?;
        Ok(Incoming::Own(file, listener))
    }
}

/// The thread that serves what comes in. Dropping it ends the thread and removes the socket.
pub(super) struct Server {
    stop: Arc<Stop>,
    thread: Mutex<Serving>,
}

enum Serving {
    NotYet(Service),
    Since(JoinHandle<()>),
    /// There can be no thread for it.
    Never,
}

impl Server {
    /// Whoever connects waits until [`serve`](Self::serve).
    pub(super) fn new(
        path: &Path,
        incoming: Incoming,
        shared: Arc<Shared>,
    ) -> Result<Self, StartError> {
        let stop = Arc::new(Stop {
            wanted: AtomicBool::new(false),
            wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            connection: Mutex::new(None),
        });
        let (file, listener, leash, resumed) = match incoming {
            Incoming::Own(file, listener) => (Some(file), listener, None, false),
            Incoming::Kept(listener, leash, resumed) => (None, listener, Some(leash), resumed),
        };
        let service = Service {
            path: path.to_owned(),
            _file: file,
            listener: listener.into(),
            leash,
            resumed,
            shared,
            stop: stop.clone(),
        };
        Ok(Server {
            stop,
            thread: Mutex::new(Serving::NotYet(service)),
        })
    }

    /// Starts the thread, if it does not run yet.
    pub(super) fn serve(&self) -> io::Result<()> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *thread, Serving::Never) {
            Serving::NotYet(service) => {
                let started = thread::Builder::new()
                    .name("vhost-user".to_owned())
                    .spawn(move || service.run())?;
                *thread = Serving::Since(started);
            }
            other => *thread = other,
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.stop();
        let thread = self
            .thread
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Serving::Since(thread) = std::mem::replace(thread, Serving::Never) {
            let _ = thread.join();
        }
    }
}

/// Ends the server's thread wherever it waits.
struct Stop {
    wanted: AtomicBool,
    wake: EventFd,
    connection: Mutex<Option<ShutdownHandle>>,
}

impl Stop {
    fn stop(&self) {
        self.wanted.store(true, Ordering::SeqCst);
        let _ = self.wake.write(1);
        if let Some(connection) = &*self.connection() {
            connection.shutdown();
        }
    }

    fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }

    /// From now on this is what is to be ended.
    fn connected(&self, connection: Option<ShutdownHandle>) {
        *self.connection() = connection;
        if self.is_wanted() {
            self.stop();
        }
    }

    fn connection(&self) -> MutexGuard<'_, Option<ShutdownHandle>> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a connection was not served.
#[derive(Debug, Error)]
enum ServeError {
    #[error(transparent)]
    System(#[from] io::Error),
    #[error(transparent)]
    Daemon(DaemonErrorText),
}

/// [`DaemonError`] is no [`std::error::Error`].
#[derive(Debug, Error)]
#[error("{0}")]
struct DaemonErrorText(DaemonError);

impl From<DaemonError> for ServeError {
    fn from(error: DaemonError) -> Self {
        ServeError::Daemon(DaemonErrorText(error))
    }
}

struct Service {
    path: PathBuf,
    _file: Option<SocketFile>,
    listener: Listener,
    leash: Option<Leash>,
    /// The next connection is one that lives on from another process.
    resumed: bool,
    shared: Arc<Shared>,
    stop: Arc<Stop>,
}

impl Service {
    fn run(mut self) {
        if self.leash.is_none() {
            info!("waiting for QEMU on {}", self.path.display());
        }
        if let Err(error) = self.serve() {
            error!(
                "no QEMU can connect to {} any more: {error}",
                self.path.display()
            );
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        let stopped = Epoll::new()?;
        watch(&stopped, &self.stop.wake)?;
        let wanted = Epoll::new()?;
        watch(&wanted, &self.stop.wake)?;
        watch(&wanted, &self.listener)?;
        if let Some(leash) = &self.leash {
            watch(&wanted, &leash.as_fd())?;
        }
        loop {
            wait(&wanted, -1)?;
            if self.stop.is_wanted() {
                return Ok(());
            }
            if self.leash.as_ref().is_some_and(Leash::is_loose) {
                error!("the keeper is gone, and with it the connection to QEMU: ending");
                kill_process(getpid(), Signal::TERM)?;
                return Ok(());
            }
            let served = self.serve_one();
            if self.stop.is_wanted() {
                // What the guest was told is still true for who comes next.
                self.shared.leave();
                return Ok(());
            }
            self.shared.detach();
            if let Some(leash) = &self.leash {
                leash.ended();
            }
            if let Err(error) = served {
                warn!("cannot serve QEMU on {}: {error}", self.path.display());
                wait(&stopped, PAUSE_MS)?;
            }
        }
    }

    /// Serves the connection that waits to be accepted, until it ends.
    fn serve_one(&mut self) -> Result<(), ServeError> {
        let memory = Memory::new(GuestMemoryMmap::new());
        let (backend, attached) = Backend::new(self.shared.clone(), memory.clone())?;
        let backend = Arc::new(backend);
        // The worker threads start here, and end when the daemon is dropped.
        let mut daemon = VhostUserDaemon::new("vhost-user".to_owned(), backend.clone(), memory)?;
        backend.register(&daemon, &attached)?;
        daemon.start(&mut self.listener)?;
        self.stop.connected(daemon.shutdown_handle());
        match std::mem::take(&mut self.resumed) {
            true => info!(
                "serving the QEMU that is connected to {}",
                self.path.display()
            ),
            false => info!("QEMU connected to {}", self.path.display()),
        }

        let ended = daemon.wait();
        self.stop.connected(None);
        match ended {
            _ if self.stop.is_wanted() => info!("disconnected from QEMU"),
            Ok(()) => info!("QEMU is gone: it closed the connection"),
            Err(DaemonError::HandleRequest(
                vhost_user::Error::Disconnected | vhost_user::Error::PartialMessage,
            )) => info!("QEMU is gone: it closed the connection"),
            Err(error) => match (&error, backend.too_many_queues()) {
                (DaemonError::HandleRequest(vhost_user::Error::InvalidParam), Some(queues)) => {
                    error!(
                        "QEMU's device has too many queues: say num_vqs={queues} on QEMU's -device line"
                    )
                }
                (DaemonError::HandleRequest(vhost_user::Error::InvalidParam), None) => error!(
                    "QEMU's request is not valid: the guest's memory must be shared, as with -object \
                     memory-backend-memfd,id=mem0,size=256M,share=on -machine q35,memory-backend=mem0"
                ),
                _ => warn!("connection to QEMU ended: {error}"),
            },
        }
        Ok(())
    }
}

fn watch(epoll: &Epoll, fd: &impl AsRawFd) -> io::Result<()> {
    epoll.ctl(
        ControlOperation::Add,
        fd.as_raw_fd(),
        EpollEvent::new(EventSet::IN, 0),
    )
}

/// Waits until one of the fds is readable, or for `timeout` milliseconds. A signal does not count: the library would spin
/// for a connection that is not there.
fn wait(epoll: &Epoll, timeout: i32) -> io::Result<()> {
    loop {
        match epoll.wait(timeout, &mut [EpollEvent::default()]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map(drop),
        }
    }
}
