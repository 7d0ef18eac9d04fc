//! One device, as the keeper has it: the socket that QEMU finds, QEMU's connection, and what goes over it.
//!
//! # Theory of operation
//!
//! ```text
//!            nobody --- QEMU connects ---> served <--- the worker died: its successor is told the record
//!              ^                              |
//!              '---- worker: it is over ---- parting: QEMU is gone
//! ```
//!
//! Messages go through one at a time, unchanged. Of those that need an answer there is one on its way at most; QEMU waits
//! for it in any case. What QEMU sends meanwhile, or while there is no worker, stays in its socket.
//!
//! A worker that dies over what it was told is followed by one that is told the same. After [`MAX_DEATHS`] of those in a row
//! it is what they are told that kills them, and there will be no end to it: then QEMU's connection is given up, as if the
//! device had broken. One that dies before it answers anything is not counted: its file does not run, and the next may.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::thread;
use std::time::Duration;

use rustix::event::PollFlags;
use tracing::{error, info, warn};
use virtproxy_engine::program::Failure;
use virtproxy_engine::spec::ChannelSpec;
use virtproxy_engine::unix_socket::{self, ListenError, SocketFile};

use super::history::History;
use super::leash::{self, Begin};
use super::record::Record;
use super::wire::{Answer, Broken, Message, Wire};

/// See [`rogue`].
#[cfg(feature = "rogue")]
pub mod rogue;

/// Connections of QEMUs that wait while one is served.
const BACKLOG: i32 = 16;

/// How long to wait when a connection cannot be accepted.
const PAUSE: Duration = Duration::from_millis(50);

/// Workers that may die in a row over the same that QEMU said.
const MAX_DEATHS: u32 = 5;

pub(super) struct Device {
    spec: ChannelSpec,
    path: PathBuf,
    door: Door,
    /// Where QEMU connects: from when a worker first was ready.
    socket: Option<Socket>,
    /// What the worker said last.
    state: Vec<u8>,
    frontend: Frontend,
}

/// The file goes before the listener.
struct Socket {
    _file: SocketFile,
    listener: UnixListener,
}

enum Frontend {
    Nobody,
    Served(Box<Connection>),
    Parting,
}

struct Connection {
    qemu: Wire,
    /// `None` while there is no worker, or when it has let go.
    worker: Option<Wire>,
    record: Record,
    /// What QEMU waits to be answered.
    asked: Option<Rc<Message>>,
    /// Answers to what QEMU did not ask that are still to come.
    swallow: usize,
    /// Workers that died in a row over the record, or over what QEMU asks.
    deaths: u32,
}

impl Device {
    pub(super) fn new(spec: &ChannelSpec) -> Result<Self, Failure> {
        let path = PathBuf::from(&spec.addr);
        Ok(Device {
            door: Door::new(&path).map_err(|error| failure(spec, error))?,
            spec: spec.clone(),
            path,
            socket: None,
            state: Vec::new(),
            frontend: Frontend::Nobody,
        })
    }

    /// Where a worker listens for us.
    pub(super) fn door(&self) -> BorrowedFd<'_> {
        self.door.listener.as_fd()
    }

    /// A worker is there: tells it how things are.
    pub(super) fn begin(&mut self, leash: &OwnedFd, history: &History) -> io::Result<()> {
        self.door.empty();
        let begin = Begin {
            resumed: matches!(self.frontend, Frontend::Served(_)),
            history: history.clone(),
        };
        leash::begin(leash, &begin, &self.state)?;
        if let Frontend::Served(connection) = &mut self.frontend {
            connection.resume(self.door.connect()?);
        }
        Ok(())
    }

    /// The worker is gone; `died`: not because it was asked to.
    pub(super) fn worker_gone(&mut self, died: bool) {
        if let Frontend::Served(connection) = &mut self.frontend {
            connection.worker_gone(died);
            if connection.deaths < MAX_DEATHS {
                return;
            }
            error!(
                "{MAX_DEATHS} workers in a row died over {}: the connection of the QEMU on {} is given up, and its device \
                 with it",
                connection.topic(),
                self.path.display()
            );
        }
        self.frontend = Frontend::Nobody;
    }

    /// This is the worker's last word on what it told the guest. It also means that QEMU may come.
    pub(super) fn set_state(&mut self, state: Vec<u8>) -> Result<(), Failure> {
        self.state = state;
        if self.socket.is_none() {
            let (listener, file) =
                listen(&self.path).map_err(|error| failure(&self.spec, error))?;
            info!("waiting for QEMU on {}", self.path.display());
            self.socket = Some(Socket {
                _file: file,
                listener,
            });
        }
        Ok(())
    }

    /// The worker says that the connection is over.
    pub(super) fn ended(&mut self) {
        self.turn();
        self.frontend = Frontend::Nobody;
    }

    /// What is to be waited for.
    pub(super) fn interests(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        match (&self.frontend, &self.socket) {
            (Frontend::Nobody, Some(socket)) => vec![(socket.listener.as_fd(), PollFlags::IN)],
            (Frontend::Served(connection), _) => connection.interests(),
            _ => Vec::new(),
        }
    }

    /// Does what can be done now.
    pub(super) fn turn(&mut self) {
        if let (Frontend::Nobody, Some(socket)) = (&self.frontend, &self.socket) {
            match socket.listener.accept() {
                Ok((qemu, _)) => self.accepted(qemu.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // For want of descriptors, as a rule. QEMU still knocks: this must not become a spin.
                Err(_) => thread::sleep(PAUSE),
            }
        }
        if let Frontend::Served(connection) = &mut self.frontend
            && let Err(end) = connection.turn()
        {
            if !matches!(end, Broken::Closed) {
                warn!("connection of QEMU to {} ended: {end}", self.path.display());
            }
            // The worker sees its own connection end, and says when it is done with it.
            self.frontend = match connection.worker {
                Some(_) => Frontend::Parting,
                None => Frontend::Nobody,
            };
        }
    }

    fn accepted(&mut self, qemu: OwnedFd) {
        let mut connection = Connection {
            qemu: Wire::new(qemu),
            worker: None,
            record: Record::default(),
            asked: None,
            swallow: 0,
            deaths: 0,
        };
        match self.door.connect() {
            Ok(worker) => {
                connection.worker = Some(worker);
                self.frontend = Frontend::Served(Box::new(connection));
            }
            Err(error) => warn!("cannot serve QEMU on {}: {error}", self.path.display()),
        }
    }
}

impl Connection {
    /// Another worker is there: tells it all that QEMU said, then what QEMU waits for.
    fn resume(&mut self, mut worker: Wire) {
        let (messages, answers) = self.record.replay();
        for message in messages {
            worker.send(message, Answer::None);
        }
        self.swallow = answers;
        self.worker = Some(worker);
    }

    fn worker_gone(&mut self, died: bool) {
        self.worker = None;
        // It has answered the first of what it was told, and not yet the last.
        let over_us = self.swallow == 1 || self.swallow == 0 && self.asked.is_some();
        if died && over_us {
            self.deaths += 1;
        }
    }

    /// What the worker has to deal with.
    fn topic(&self) -> String {
        match &self.asked {
            Some(asked) if self.swallow == 0 => format!("QEMU's request {}", asked.request),
            _ => "what QEMU has set up".to_owned(),
        }
    }

    fn interests(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        let Some(worker) = &self.worker else {
            return Vec::new();
        };
        let from_qemu = (&self.qemu, self.hears_qemu(worker));
        let from_worker = (worker, self.qemu.is_flushed());
        let interest = |(wire, hears): (&'_ Wire, bool)| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, hears);
            flags.set(PollFlags::OUT, !wire.is_flushed());
            flags
        };
        [from_qemu, from_worker]
            .into_iter()
            .map(|side| (side.0.as_fd(), interest(side)))
            .filter(|(_, flags)| !flags.is_empty())
            .collect()
    }

    /// Whether QEMU's next message may be taken.
    fn hears_qemu(&self, worker: &Wire) -> bool {
        self.swallow == 0 && self.asked.is_none() && worker.is_flushed()
    }

    /// Carries all that there is and room for. An error is QEMU's end of it.
    fn turn(&mut self) -> Result<(), Broken> {
        while let Some(mut worker) = self.worker.take() {
            let moved = match self.hears_qemu(&worker) {
                true => self.carry_request(&mut worker),
                false => Ok(false),
            };
            // Put back first: whether there was a worker matters at the end, too.
            let answered = self.carry_answer(&mut worker);
            let flushed = worker.flush();
            match flushed.and(answered) {
                Ok(answered) => {
                    self.worker = Some(worker);
                    self.qemu.flush()?;
                    if !(moved? | answered) {
                        break;
                    }
                }
                // It let go, or died. Which, its leash or its end will tell.
                Err(_) => {
                    moved?;
                    self.qemu.flush()?;
                }
            }
        }
        Ok(())
    }

    fn carry_request(&mut self, worker: &mut Wire) -> Result<bool, Broken> {
        let Some(message) = self.qemu.receive()?.map(Rc::new) else {
            return Ok(false);
        };
        worker.send(message.clone(), Answer::AsItSays);
        match self.record.awaits_answer(&message) {
            true => self.asked = Some(message),
            false => self.record.note(message)?,
        }
        Ok(true)
    }

    fn carry_answer(&mut self, worker: &mut Wire) -> Result<bool, Broken> {
        if !self.qemu.is_flushed() {
            return Ok(false);
        }
        let Some(answer) = worker.receive()? else {
            return Ok(false);
        };
        if self.swallow > 0 {
            self.swallow -= 1;
            match &self.asked {
                _ if self.swallow > 0 => {}
                Some(asked) => worker.send(asked.clone(), Answer::AsItSays),
                None => self.deaths = 0,
            }
            return Ok(true);
        }
        self.deaths = 0;
        if let Some(asked) = self.asked.take() {
            self.record.answered(asked, &answer)?;
        }
        self.qemu.send(Rc::new(answer), Answer::AsItSays);
        Ok(true)
    }
}

/// A listening socket without a name: only who holds this can connect. The vhost-user library serves what it accepted
/// from a listener and nothing else.
struct Door {
    listener: UnixListener,
    /// Refers to the socket's file, which is in no directory any more.
    file: File,
}

impl Door {
    /// Beside `path` for a moment, where we may make sockets.
    fn new(path: &Path) -> Result<Self, ListenError> {
        unix_socket::check_folder(path)?;
        let name = PathBuf::from(format!("{}.{}", path.display(), std::process::id()));
        // The user knows of the other path only.
        let failed = |source| ListenError::System {
            path: path.to_owned(),
            source,
        };
        let (listener, named) = listen(&name).map_err(|error| failed(error.into()))?;
        let opened = File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
            .open(named.path());
        drop(named);
        Ok(Door {
            listener,
            file: opened.map_err(failed)?,
        })
    }

    fn connect(&self) -> io::Result<Wire> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(Wire::new(UnixStream::connect(path)?.into()))
    }

    /// Forgets what a worker has not accepted. (There is none, or it does not accept yet.)
    fn empty(&self) {
        while self.listener.accept().is_ok() {}
    }
}

fn failure(spec: &ChannelSpec, error: ListenError) -> Failure {
    Failure::Channel {
        channel: spec.to_string(),
        source: io::Error::other(error),
    }
}

/// A listener that nobody waits for.
fn listen(path: &Path) -> Result<(UnixListener, SocketFile), ListenError> {
    let (listener, file) = unix_socket::listen(path, BACKLOG)?;
    let failed = |source| ListenError::System {
        path: path.to_owned(),
        source,
    };
    listener.set_nonblocking(true).map_err(failed)?;
    Ok((listener, file))
}

#[cfg(test)]
mod tests;
