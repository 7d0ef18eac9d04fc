//! What both programs are made of: the common flags, the log, signals, and one driver for each channel.

use std::collections::HashSet;
use std::future::pending;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{ArgAction, Args};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{JoinSet, LocalSet};
use tracing::{debug, error, info};
use tracing_subscriber::EnvFilter;
use virtproxy_mux::Config;

use crate::channel::Channel;
use crate::counters::Channels;
use crate::driver::{Driver, DriverError, Settings};
use crate::limits::Limits;
use crate::spec::{ChannelSpec, ForwardSpec};

/// How the programs exit, for `--help` and the manual.
pub const EXIT_CODES: &str = "\
Exit codes:
  0  ended in order, on SIGTERM or SIGINT, or with standard input
  1  the system refuses something every program needs
  2  bad flags
  3  an address of -o cannot be listened on
  4  a channel of -c cannot ever work";

/// What `-c` may name, for `--help`.
pub const CHANNELS: &str = "\
Channels:
  vhost-user:PATH:-           on the host: be the device, on the socket that QEMU
                              connects to
  virtserial-open:NAME:-      in the guest: a virtio port, by its name or path
  isa-serial-open:PATH:SPEED  a serial line
  unix-connect:PATH:-         a UNIX socket, such as that of a QEMU chardev
  unix-listen:PATH:-          the same, the other way round
  tcp-connect:HOST:PORT       TCP; with --tls-creds, mutual TLS 1.3
  tcp-listen:HOST:PORT        the same, the other way round
  vsock-connect:CID:PORT      AF_VSOCK; CID is a number, host or local
  vsock-listen:CID:PORT       the same, the other way round; CID may be any
  hvsock-connect:PATH:PORT    a guest's vsock port, through the UNIX socket of
                              Firecracker, Cloud Hypervisor or vhost-device-vsock
  stdio:-:-                   standard input and output
  exec:COMMAND:-              those of a command, which is run by /bin/sh";

/// The flags both programs share.
#[derive(Args, Debug)]
pub struct Options {
    /// A channel to the other end, see below; may be repeated
    #[arg(
        short = 'c',
        long = "channel",
        value_name = "METHOD:ADDR:PORT[:ID]",
        required = true
    )]
    pub channels: Vec<ChannelSpec>,

    /// Listen at ADDR:PORT and forward each client to SERVICE of the other end; `-` as PORT makes ADDR the path of a
    /// UNIX socket; UDP if SERVICE ends in /udp
    #[arg(
        short = 'o',
        long = "oforward",
        value_name = "SERVICE:ADDR:PORT[:ID]",
        value_parser = ForwardSpec::parse_listen
    )]
    pub out: Vec<ForwardSpec>,

    /// Serve SERVICE to the other end by connecting to ADDR:PORT; `-` as PORT makes ADDR the path of a UNIX socket; UDP
    /// if SERVICE ends in /udp
    #[arg(
        short = 'i',
        long = "iforward",
        value_name = "SERVICE:ADDR:PORT[:ID]",
        value_parser = ForwardSpec::parse_target
    )]
    pub serve: Vec<ForwardSpec>,

    /// Seconds that a client of -o waits for the other end to appear; 0 refuses it at once
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub wait_for_peer: Duration,

    /// Seconds that a target of -i may take to answer
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub connect_timeout: Duration,

    /// Seconds that streams may go on when the program is asked to end
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = seconds)]
    pub grace: Duration,

    /// Seconds that a UDP client or target may be silent before its flow is ended
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = some_seconds)]
    pub udp_timeout: Duration,

    /// The directory of the certificates for tcp-connect and tcp-listen, by QEMU's names: ca-cert.pem, and
    /// client-cert.pem with client-key.pem or server-cert.pem with server-key.pem
    #[arg(long, value_name = "DIR")]
    pub tls_creds: Option<PathBuf>,

    /// Let tcp-connect and tcp-listen use other than loopback addresses without TLS: whoever is on the way can then
    /// read and change everything
    #[arg(long, conflicts_with = "tls_creds")]
    pub insecure_plaintext: bool,

    /// What may be used at most.
    #[command(flatten)]
    pub limits: Limits,

    /// Say more: -v each stream, -vv each hop of a byte (or set RUST_LOG)
    #[arg(short = 'v', long = "verbose", action = ArgAction::Count)]
    pub verbose: u8,
}

impl Options {
    /// What may be said without encryption.
    pub fn plaintext(&self) -> Plaintext {
        if self.insecure_plaintext {
            Plaintext::Allowed
        } else if is_first_version() {
            Plaintext::Implied
        } else {
            Plaintext::Loopback
        }
    }
}

/// What a channel over a network may do without TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plaintext {
    /// Talk within this machine only.
    Loopback,
    /// Talk to any address, as the user said.
    Allowed,
    /// Talk to any address, as the first version did; worth a warning.
    Implied,
}

/// Whether the program was started under the name of the first version, and so is to do what that did.
fn is_first_version() -> bool {
    let name = std::env::args_os().next();
    name.is_some_and(|name| Path::new(&name).file_name() == Some("qemu-vp".as_ref()))
}

pub(crate) fn seconds(value: &str) -> Result<Duration, String> {
    let wrong = || format!("{value:?} is not a number of seconds: write one like 10 or 0.5");
    let seconds: f64 = value.parse().map_err(|_| wrong())?;
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|duration| duration.as_secs() <= 365 * 86_400)
        .ok_or_else(wrong)
}

fn some_seconds(value: &str) -> Result<Duration, String> {
    match seconds(value)? {
        Duration::ZERO => Err("no time at all: write a number of seconds above 0".into()),
        duration => Ok(duration),
    }
}

/// Why a program ends before it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Flags that contradict each other.
    #[error("{0}")]
    Usage(String),
    /// A driver cannot be set up.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// A channel cannot ever work.
    #[error("-c {channel}: {source}")]
    Channel {
        /// How the user named it.
        channel: String,
        /// What is wrong, and the cure.
        source: io::Error,
    },
    /// The system refuses what every program needs.
    #[error("cannot start: {0}")]
    Io(#[from] io::Error),
}

impl Failure {
    /// What the program ends with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Io(_) | Failure::Driver(DriverError::Io(_)) => 1,
            Failure::Usage(_) => 2,
            Failure::Driver(DriverError::Listen(_)) => 3,
            Failure::Channel { .. } => 4,
        }
    }
}

/// Makes the channel that a `-c` names. Called on the engine's thread, in a `LocalSet`.
pub type MakeChannel<'m> = &'m dyn Fn(&ChannelSpec, &Options) -> io::Result<Box<dyn Channel>>;

/// Called once when everything that the flags name is open and listened on, and nothing is served yet. Until then the
/// program has this one thread.
pub type Ready<'r> = &'r dyn Fn() -> io::Result<()>;

/// How a program came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was asked to end, or everything that it served has.
    Done,
    /// It leaves its place to another process, as it was asked to with SIGHUP.
    Replaced,
}

/// What one of the programs adds to the engine.
pub struct Program<'p> {
    /// Name and version.
    pub product: &'p str,
    /// What the user wants.
    pub options: &'p Options,
    /// See [`MakeChannel`].
    pub make: MakeChannel<'p>,
    /// See [`Ready`].
    pub ready: Ready<'p>,
    /// Each channel's counters are added to these.
    pub counters: &'p Channels,
    /// With it, SIGHUP has it called, and then ends the program without a delay.
    pub replaced: Option<&'p dyn Fn()>,
}

/// The exit code, once the user knows what went wrong.
pub fn exit_code(result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            error!("{failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

/// Lets the program tell its user what it does.
pub fn start_log(verbose: u8) {
    let level = match verbose {
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new(format!("{level},mio=off")));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_writer(io::stderr)
        // Standard error may be gone before the program, as when `ssh` ran it; to tell that there would be to panic.
        .log_internal_errors(false)
        .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
        .init();
}

impl Program<'_> {
    /// Runs the program, whose log is started, until it is asked to end.
    pub fn run(&self) -> Result<End, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        LocalSet::new().block_on(&runtime, self.serve())
    }

    async fn serve(&self) -> Result<End, Failure> {
        let options = self.options;
        let session = options.limits.session().map_err(Failure::Usage)?;
        if let Err(error) = raise_descriptor_limit() {
            debug!("cannot raise the limit of open files: {error}");
        }
        let (stop, stopped) = watch::channel(None);
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hang_up = match self.replaced {
            Some(replaced) => Some((signal(SignalKind::hangup())?, replaced)),
            None => None,
        };
        let mut end = End::Done;

        let mut prepared = Vec::new();
        for (index, spec) in options.channels.iter().enumerate() {
            let out = forwards("-o", &options.out, &options.channels, index)?;
            let serve = forwards("-i", &options.serve, &options.channels, index)?;
            served_once(&serve)?;
            let settings = Settings {
                connect_timeout: options.connect_timeout,
                wait_for_peer: options.wait_for_peer,
                udp_timeout: options.udp_timeout,
                limits: options.limits.clone(),
                session: Config {
                    product: self.product.into(),
                    ..session.clone()
                },
            };
            let driver = Driver::new(settings, &out, &serve)?;
            self.counters.add(spec.to_string(), driver.counters());
            let named = |source| Failure::Channel {
                channel: spec.to_string(),
                source,
            };
            prepared.push((driver, (self.make)(spec, options).map_err(named)?));
        }
        (self.ready)()?;
        let mut drivers = JoinSet::new();
        for (driver, channel) in prepared {
            let name = channel.name().to_owned();
            let stopped = stopped.clone();
            drivers.spawn_local(async move {
                let result = driver.run(channel, stopped).await;
                result.map_err(|source| Failure::Channel {
                    channel: name,
                    source,
                })
            });
        }
        loop {
            let hung_up = async {
                match &mut hang_up {
                    Some((signal, replaced)) => {
                        signal.recv().await;
                        *replaced
                    }
                    None => pending().await,
                }
            };
            let grace = tokio::select! {
                _ = terminate.recv() => options.grace,
                _ = interrupt.recv() => options.grace,
                replaced = hung_up => {
                    replaced();
                    end = End::Replaced;
                    Duration::ZERO
                }
                ended = drivers.join_next() => match ended {
                    Some(Ok(result)) => {
                        result?;
                        continue;
                    }
                    Some(Err(error)) => return Err(io::Error::other(error).into()),
                    None => {
                        info!("ended");
                        return Ok(end);
                    }
                },
            };
            debug!(?grace, "asked to end");
            // A receiver that is gone has ended already.
            let _ = stop.send(Some(grace));
        }
    }
}

/// The forwards of the channel at `index`: those that name its ID, and for the first channel those that name none.
fn forwards(
    flag: &str,
    all: &[ForwardSpec],
    channels: &[ChannelSpec],
    index: usize,
) -> Result<Vec<ForwardSpec>, Failure> {
    let mut found = Vec::new();
    for forward in all {
        let at = match &forward.channel {
            None => 0,
            Some(id) => channels
                .iter()
                .position(|channel| channel.id.as_ref() == Some(id))
                // What a channel without an ID was called in the first version.
                .or((id == "0").then_some(0))
                .ok_or_else(|| {
                    Failure::Usage(format!(
                        "{flag} {forward}: no -c has the ID {id:?}: add :{id} to one, or leave it off here"
                    ))
                })?,
        };
        if at == index {
            found.push(forward.clone());
        }
    }
    Ok(found)
}

/// A service has one target.
fn served_once(services: &[ForwardSpec]) -> Result<(), Failure> {
    let mut names = HashSet::new();
    match services.iter().find(|spec| !names.insert(&spec.service)) {
        None => Ok(()),
        Some(twice) => Err(Failure::Usage(format!(
            "-i {twice}: another -i serves {} already: leave one out, or name it otherwise",
            twice.service
        ))),
    }
}

/// Lets this process have as many descriptors as the system allows it, as each stream takes one. Returns how many.
///
/// # Errors
/// The system refuses; the limit is what it was.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid `rlimit` for both calls.
    let raised = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0
        }
    };
    match raised {
        true => Ok(limit.rlim_max),
        false => Err(io::Error::last_os_error()),
    }
}
