//! The keeper: holds QEMU's connections to the devices, so that they outlive the process that serves them.
//!
//! # Theory of operation
//!
//! QEMU cannot connect a vhost-user device twice, and its guest waits for ever for a device that is gone. So the process
//! that the user starts does nothing but hold what must not be lost; a second one, its *worker*, is the program that all
//! other documents speak of.
//!
//! ```text
//!             the path of -c                       a listener without a name (Door)
//!   QEMU <=====================> keeper <========================================> worker <----> guest's memory
//!          vhost-user messages      |       the same messages; the record anew,
//!                                   |       when the worker is another one
//!                                   '----- leash: Begin, State, Ended ------------'
//! ```
//!
//! The keeper relays messages and remembers those that configure the device (`record`), and the last that the worker said
//! of what the guest was told (`leash`). It never touches the guest's memory, and reads nothing of the guest.
//!
//! | what happens | what the keeper does |
//! | --- | --- |
//! | the worker is killed, or crashes | starts another one at once; if that does not last, after a pause |
//! | SIGHUP | starts another one from the program's file as it is now; once that says that it can, asks the old one to leave, and lets the new one begin |
//! | SIGTERM, SIGINT | passes it on, and ends as the worker does |
//! | the worker ends by itself | ends as it did; but one that follows another is given further tries to begin |
//! | QEMU ends | waits for the next one; the worker is told |
//! | the keeper is killed | the worker sees it and ends; QEMU has lost its device |
//!
//! One thread, and one loop: whatever wakes it, it looks at everything there is.
//!
//! `wire` has messages on a socket, `record` what configures a device, `device` a device's connections, `leash` what is
//! said beside them, `worker` the process, `history` what became of those before it, `signals` the signals.

mod device;
mod history;
mod leash;
mod record;
mod signals;
mod wire;
mod worker;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{ExitCode, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::Signal;
use tracing::{debug, error, info, warn};
use virtproxy_engine::program::Failure;
use virtproxy_engine::spec::ChannelSpec;

use crate::confine::EXIT_CODE as DENIED;
use device::Device;
#[cfg(feature = "rogue")]
pub use device::rogue;
use history::Ending;
pub use history::History;
use leash::Word;
pub use leash::{Inherited, Kept};
pub(crate) use leash::{Leash, MAX_STATE};
use signals::Signals;
use worker::{Recipe, Worker, was_denied};

/// How a worker exits that leaves its place to the next one.
pub const REPLACED: u8 = 75;

/// How Rust ends a process whose main thread panicked.
const PANICKED: i32 = 101;

/// The pause before a worker is started again whose predecessor did not last: doubles each time.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// A worker that lasted this long starts the pauses anew.
const STABLE: Duration = Duration::from_millis(250);
/// How long a new worker may take to say that it can begin, and the one before it to leave.
const PATIENCE: Duration = Duration::from_secs(10);

/// Exit codes of our own, as in the program's help.
const FAILED: u8 = 1;
const NO_CHANNEL: u8 = 4;

/// Holds the devices of `channels`, and lets a worker serve them, until the program is to end.
///
/// # Errors
/// A device or the first worker cannot be had.
pub fn run(channels: &[&ChannelSpec]) -> Result<ExitCode, Failure> {
    let signals = Signals::new()?;
    let devices = channels.iter().map(|spec| Device::new(spec));
    let mut keeper = Keeper {
        signals,
        recipe: Recipe::new()?,
        devices: devices.collect::<Result<_, _>>()?,
        worker: None,
        next: None,
        served: false,
        history: History::default(),
        ending: None,
        deadline: None,
        pause: Duration::ZERO,
        start: None,
    };
    let first = keeper.start_worker()?;
    keeper.begin(first);
    loop {
        keeper.wait()?;
        if let Some(code) = keeper.turn() {
            return Ok(ExitCode::from(code));
        }
    }
}

struct Keeper {
    signals: Signals,
    recipe: Recipe,
    devices: Vec<Device>,
    worker: Option<Worker>,
    /// It has been started, and waits for its turn.
    next: Option<Worker>,
    /// A worker has ever been ready.
    served: bool,
    history: History,
    /// We are to end when the worker has; with which exit code, unless with the worker's.
    ending: Option<Option<u8>>,
    /// When the next worker must have said that it can begin, and then the worker have left.
    deadline: Option<Instant>,
    /// How long to wait before a worker is started.
    pause: Duration,
    /// When to start a worker.
    start: Option<Instant>,
}

impl Keeper {
    fn wait(&self) -> io::Result<()> {
        let mut fds = vec![(self.signals.as_fd(), PollFlags::IN)];
        for worker in self.worker.iter().chain(&self.next) {
            fds.push((worker.end(), PollFlags::IN));
            fds.extend(
                worker
                    .leash
                    .iter()
                    .map(|leash| (leash.as_fd(), PollFlags::IN)),
            );
        }
        for device in &self.devices {
            fds.extend(device.interests());
        }
        let mut fds: Vec<_> = fds
            .into_iter()
            .map(|(fd, flags): (BorrowedFd<'_>, _)| PollFd::from_borrowed_fd(fd, flags))
            .collect();
        let until = [self.start, self.deadline].into_iter().flatten().min();
        let left = until.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Looks at everything; the exit code at the end.
    fn turn(&mut self) -> Option<u8> {
        while let Some(signal) = self.signals.next() {
            self.signalled(signal);
        }
        self.hear();
        self.devices.iter_mut().for_each(Device::turn);
        if let Some(next) = &mut self.next
            && let Some(status) = next.ended()
        {
            self.history
                .note(Ending::Failed, status, next.since.elapsed());
            self.stay(&format!("it ended with {status}"));
        }
        if let Some(status) = self.worker.as_mut().and_then(Worker::ended) {
            // What it said before.
            self.hear();
            if let Some(code) = self.worker_ended(status) {
                return Some(code);
            }
        }
        if let (Some(code), None) = (self.ending, &self.worker) {
            return Some(code.unwrap_or(0));
        }
        let now = Instant::now();
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            self.too_late();
        }
        if self.start.is_some_and(|start| start <= now) {
            self.start_again();
        }
        None
    }

    fn signalled(&mut self, signal: i32) {
        if signal == libc::SIGHUP {
            self.replace();
        } else {
            self.end(None);
        }
    }

    /// Asks the worker to end; it is the last one.
    fn end(&mut self, code: Option<u8>) {
        self.ending.get_or_insert(code);
        (self.next, self.deadline) = (None, None);
        if let Some(worker) = &self.worker {
            worker.signal(Signal::TERM);
        }
    }

    /// Begins to replace the worker.
    fn replace(&mut self) {
        if self.ending.is_some() || self.next.is_some() || self.worker.is_none() {
            return;
        }
        match self.start_worker() {
            Ok(next) => {
                self.next = Some(next);
                self.deadline = Some(Instant::now() + PATIENCE);
            }
            Err(error) => self.stay(&error.to_string()),
        }
    }

    /// The worker is not replaced.
    fn stay(&mut self, why: &str) {
        error!(
            "{} cannot take over: {why}; the worker there is goes on",
            self.recipe
        );
        (self.next, self.deadline) = (None, None);
    }

    fn too_late(&mut self) {
        self.deadline = None;
        match (&self.next, &self.worker) {
            (Some(next), Some(worker)) if next.greeted => {
                warn!("the worker does not leave: killing it");
                worker.signal(Signal::KILL);
            }
            _ => self.stay(&format!("it does not start within {PATIENCE:?}")),
        }
    }

    fn hear(&mut self) {
        while let Some(word) = self.worker.as_mut().and_then(Worker::hear) {
            match word {
                Word::Hello => {}
                Word::State(device, state) => self.set_state(device, state),
                Word::Ended(device) => {
                    if let Some(device) = self.devices.get_mut(device) {
                        device.ended();
                    }
                }
            }
        }
        while let Some(word) = self.next.as_mut().and_then(Worker::hear) {
            if let (Word::Hello, Some(next), Some(worker)) = (word, &mut self.next, &self.worker) {
                next.greeted = true;
                info!("replacing the worker (process {})", worker.pid());
                worker.signal(Signal::HUP);
                self.deadline = Some(Instant::now() + PATIENCE);
            }
        }
    }

    fn set_state(&mut self, device: usize, state: Vec<u8>) {
        self.served = true;
        if let Some(worker) = &mut self.worker {
            worker.began = true;
        }
        if let Some(device) = self.devices.get_mut(device)
            && let Err(error) = device.set_state(state)
        {
            error!("{error}");
            self.end(Some(NO_CHANNEL));
        }
    }

    /// The worker is gone. The exit code, if that is the end.
    fn worker_ended(&mut self, status: ExitStatus) -> Option<u8> {
        let worker = self.worker.take()?;
        let lasted = worker.since.elapsed();
        let code = status.code().filter(|code| *code != PANICKED);
        let code = code.and_then(|code| u8::try_from(code).ok());
        let ending = match code {
            Some(REPLACED) => Ending::Replaced,
            Some(_) if !worker.began => Ending::Failed,
            _ => Ending::Died,
        };
        self.history.note(ending, status, lasted);
        for device in &mut self.devices {
            device.worker_gone(ending == Ending::Died);
        }
        if let Some(ending) = self.ending {
            return ending.or(code).or(Some(FAILED));
        }
        if let Some(next) = self.next.take() {
            if code != Some(REPLACED) {
                warn!("the worker ended with {status} when it was to be replaced");
            }
            self.deadline = None;
            self.begin(next);
            return None;
        }
        // A call that was denied is a crash like any other; but what the first one tries, the next would try again.
        let ends = |code: &u8| *code != REPLACED && (*code != DENIED || !self.served);
        let code = code.filter(ends);
        if code.is_some() && (worker.began || !self.served) {
            return code;
        }
        if lasted >= STABLE {
            self.pause = Duration::ZERO;
        }
        warn!(
            "the worker (process {}) ended after {lasted:.1?} with {status}{}; QEMU is kept, another one starts{}",
            worker.pid(),
            match was_denied(status) {
                true => ", as the sandbox denied it a system call",
                false => "",
            },
            match self.pause {
                Duration::ZERO => String::new(),
                pause => format!(" in {pause:?}"),
            }
        );
        self.start_later();
        None
    }

    fn start_later(&mut self) {
        self.start = Some(Instant::now() + self.pause);
        self.pause = (2 * self.pause).clamp(PAUSE.0, PAUSE.1);
    }

    fn start_again(&mut self) {
        self.start = None;
        match self.start_worker() {
            Ok(worker) => self.begin(worker),
            Err(error) => {
                error!("cannot start {}: {error}; trying again", self.recipe);
                self.start_later();
            }
        }
    }

    fn start_worker(&self) -> io::Result<Worker> {
        let doors: Vec<_> = self.devices.iter().map(Device::door).collect();
        self.recipe.start(&doors)
    }

    /// Lets a worker serve.
    fn begin(&mut self, mut worker: Worker) {
        worker.since = Instant::now();
        if let Some(leash) = &worker.leash {
            for device in &mut self.devices {
                if let Err(error) = device.begin(leash, &self.history) {
                    warn!("cannot let a worker begin: {error}");
                }
            }
        }
        debug!(history = ?self.history, "the worker is process {}", worker.pid());
        self.worker = Some(worker);
    }
}
