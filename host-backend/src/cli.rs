//! What is the host's own on the command line: ports beside the mux, and commands for a running program.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::Value;
use tracing::warn;
use virtproxy_engine::admin::{self, CallError, Request};
use virtproxy_engine::limits::HEADING;
use virtproxy_engine::program::Options;
use virtproxy_engine::spec::{ChannelSpec, Method};
use virtproxy_host::confine::{self, Needs};
use virtproxy_host::device::{MAX_PORTS, PortSpec};
use virtproxy_host::ports::{CONSOLE, Place, PortArg, console_spec, port_spec};

/// The port that the agent opens when nothing else is said.
pub(crate) const MUX_PORT: &str = "org.virtproxy.0";

/// How the mux's port is served.
#[derive(Args, Debug)]
pub(crate) struct Tuning {
    /// Look for something to do for so long before sleeping, while that pays: answers come sooner, for processor time.
    /// 50 is a good value, 0 is not at all
    #[arg(
        long,
        value_name = "MICROSECONDS",
        default_value_t = 0,
        hide_default_value = true
    )]
    #[arg(value_parser = clap::value_parser!(u32).range(..=10_000))]
    busy_poll: u32,
}

impl Tuning {
    pub(crate) fn busy_poll(&self) -> Duration {
        Duration::from_micros(self.busy_poll.into())
    }
}

/// What the program gives up before it serves a guest.
#[derive(Args, Debug)]
pub(crate) struct Sandbox {
    /// When started as root, go on as this user. Without it that is nobody, but root (with no capabilities) where
    /// something is yet to be reached in the file system, such as the UNIX socket of an -i
    #[arg(long, value_name = "NAME", conflicts_with = "no_sandbox")]
    user: Option<String>,

    /// Go on with every right that the program was started with
    #[arg(long)]
    no_sandbox: bool,
}

impl Sandbox {
    /// Gives up what the other flags do not need.
    pub(crate) fn enter(&self, options: &Options, beside: &Beside) -> io::Result<()> {
        if self.no_sandbox {
            warn!("no sandbox: whoever gains control of this program has all of its rights");
            return Ok(());
        }
        let places = beside.served().map(|(_, _, place)| place);
        let needs = Needs::new(options, places, beside.admin.as_deref());
        if let Some(command) = needs.command() {
            warn!(
                "no sandbox, as the command of -c {command} may need anything: run what a guest reaches in a program of \
                 its own"
            );
            return Ok(());
        }
        confine::enter(&needs, self.user.as_deref()).map_err(io::Error::other)
    }

    /// Gives up what nobody needs who is started to [`enter`](Self::enter) it.
    pub(crate) fn enter_as_keeper(&self, options: &Options) -> io::Result<()> {
        let runs_a_command = |spec: &ChannelSpec| spec.method == Method::Exec;
        match self.no_sandbox || options.channels.iter().any(runs_a_command) {
            // Which the worker says.
            true => Ok(()),
            false => confine::enter_as_keeper().map_err(io::Error::other),
        }
    }
}

/// Ports beside the mux. With several devices, they are the first one's.
#[derive(Args, Debug, Default)]
pub(crate) struct Beside {
    /// Give the guest a port /dev/virtio-ports/NAME that leads to PLACE: unix-listen:PATH, unix-connect:PATH,
    /// file:PATH, pty, pty:LINK or stdio
    #[arg(long = "port", value_name = "NAME=PLACE")]
    ports: Vec<PortArg>,

    /// Give the guest a console (/dev/hvc0) that leads to PLACE
    #[arg(long, value_name = "PLACE")]
    console: Option<Place>,

    /// Leave room for N ports in all, so that some can be added later; QEMU's num_vqs is 2 * (N + 1)
    #[arg(long, value_name = "N", help_heading = HEADING, value_parser = clap::value_parser!(u8).range(1..=31))]
    max_ports: Option<u8>,

    /// Take commands (virtproxy port ...) on a UNIX socket at PATH
    #[arg(long, value_name = "PATH")]
    pub(crate) admin: Option<PathBuf>,
}

impl Beside {
    /// Flags that contradict each other or the channels.
    pub(crate) fn check(&self, channels: &[ChannelSpec]) -> Result<(), String> {
        let is = |method| move |spec: &ChannelSpec| spec.method == method;
        let first = [
            self.ports.first().map(|port| format!("--port {port}")),
            self.console
                .as_ref()
                .map(|place| format!("--console {place}")),
            self.max_ports.map(|n| format!("--max-ports {n}")),
            self.admin
                .as_ref()
                .map(|path| format!("--admin {}", path.display())),
        ];
        let first = first.into_iter().flatten().next();
        if let Some(flag) = first.filter(|_| !channels.iter().any(is(Method::VhostUser))) {
            return Err(format!(
                "{flag} needs a device to have ports: add -c vhost-user:PATH:-"
            ));
        }
        for (index, port) in self.ports.iter().enumerate() {
            if port.name == MUX_PORT {
                return Err(format!(
                    "--port {port}: {MUX_PORT} carries the streams of -o and -i: use another name"
                ));
            }
            if self.ports[..index]
                .iter()
                .any(|other| other.name == port.name)
            {
                return Err(format!(
                    "--port {port}: there is a --port {} already: use another name",
                    port.name
                ));
            }
        }
        let stdio = self
            .served()
            .filter(|(_, _, place)| **place == Place::Stdio);
        let uses = stdio.count()
            + channels
                .iter()
                .filter(|spec| is(Method::Stdio)(spec))
                .count();
        if uses > 1 {
            return Err(
                "stdio is used twice: leave it to one of -c, --console and --port".to_owned(),
            );
        }
        let count = self.specs().len();
        if count > MAX_PORTS {
            return Err(format!(
                "--port: {count} ports with {MUX_PORT} and the console are too many: use at most {MAX_PORTS}"
            ));
        }
        match self.max_ports {
            Some(room) if usize::from(room) < count => Err(format!(
                "--max-ports {room}: there are {count} ports, with {MUX_PORT} and the console: use at least {count}"
            )),
            _ => Ok(()),
        }
    }

    /// The ports of the device, that of the mux first.
    pub(crate) fn specs(&self) -> Vec<PortSpec> {
        let console = self.console.iter().map(console_spec);
        let ports = self
            .ports
            .iter()
            .map(|port| port_spec(&port.name, &port.place));
        let mux = PortSpec::generic(MUX_PORT);
        [mux].into_iter().chain(console).chain(ports).collect()
    }

    /// Whether a port, with its place, is one of these. Not if the place has become a link: a program that may add ports
    /// may make links, and so may who takes it over.
    pub(crate) fn has(&self, spec: &PortSpec) -> bool {
        let is_link =
            |path: &PathBuf| fs::symlink_metadata(path).is_ok_and(|file| file.is_symlink());
        let is_planted = |place: &Place| match place {
            Place::File(path) => self.admin.is_some() && is_link(path),
            _ => false,
        };
        self.served().any(|(_, name, place)| {
            name == spec.name && place.to_string() == spec.memo && !is_planted(place)
        })
    }

    /// Flag, name and place of each port but that of the mux, in the same order.
    pub(crate) fn served(&self) -> impl Iterator<Item = (&'static str, &str, &Place)> {
        let console = self
            .console
            .iter()
            .map(|place| ("--console", CONSOLE, place));
        let ports = self.ports.iter();
        console.chain(ports.map(|port| ("--port", &*port.name, &port.place)))
    }

    /// How many ports there may be.
    pub(crate) fn room(&self) -> usize {
        self.max_ports.map_or(self.specs().len(), usize::from)
    }
}

/// A command for a running program, instead of flags.
#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Add, remove or list ports of a running virtproxy
    #[command(subcommand)]
    Port(PortCommand),
}

#[derive(Subcommand, Debug)]
pub(crate) enum PortCommand {
    /// Give the guest one more port, as --port does
    Add {
        /// How the guest finds it, and where it leads to
        #[arg(value_name = "NAME=PLACE")]
        port: PortArg,
        #[command(flatten)]
        socket: Socket,
    },
    /// Take a port from the guest
    Remove {
        /// Which one
        #[arg(value_name = "NAME")]
        name: String,
        #[command(flatten)]
        socket: Socket,
    },
    /// Show the ports beside the mux
    List {
        #[command(flatten)]
        socket: Socket,
    },
}

#[derive(Args, Debug)]
pub(crate) struct Socket {
    /// The admin socket of the running virtproxy
    #[arg(long, value_name = "PATH")]
    admin: PathBuf,
}

impl Command {
    /// Asks the running program, and shows its answer.
    pub(crate) fn run(self) -> ExitCode {
        let Command::Port(command) = self;
        match command.run() {
            Ok(text) => {
                print!("{text}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("error: {error}");
                ExitCode::FAILURE
            }
        }
    }
}

impl PortCommand {
    fn run(self) -> Result<String, CallError> {
        match self {
            PortCommand::Add { port, socket } => {
                let place = port.place.to_string();
                let request =
                    Request::new("port-add").with("port", format!("{}={place}", port.name));
                let answer = admin::call(&socket.admin, &request)?;
                let address = answer["address"].as_str().unwrap_or(&place);
                Ok(format!("added {} at {address}\n", port.name))
            }
            PortCommand::Remove { name, socket } => {
                let request = Request::new("port-remove").with("name", &*name);
                let answer = admin::call(&socket.admin, &request)?;
                Ok(match answer["let_go"].as_bool() {
                    Some(true) => format!("removed {name}\n"),
                    _ => format!(
                        "removed {name}; the guest has not noticed yet, as if it were paused\n"
                    ),
                })
            }
            PortCommand::List { socket } => {
                let answer = admin::call(&socket.admin, &Request::new("port-list"))?;
                let ports = answer["ports"].as_array().map_or(&[][..], Vec::as_slice);
                Ok(ports.iter().map(show).collect())
            }
        }
    }
}

fn show(port: &Value) -> String {
    let text = |key: &str| port[key].as_str().unwrap_or("-").to_owned();
    let host = match port["connected"].as_bool() {
        Some(true) => "connected",
        _ => "waiting",
    };
    let address = port["address"].as_str().map(|at| format!(" at {at}"));
    format!(
        "{}\t{}{}\t{host}\tguest {}\n",
        text("name"),
        text("place"),
        address.unwrap_or_default(),
        text("guest")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(flags: &[&str]) -> Result<(), String> {
        use clap::{FromArgMatches, Parser};
        #[derive(Parser)]
        struct Flags {
            #[arg(short = 'c')]
            channels: Vec<ChannelSpec>,
            #[command(flatten)]
            beside: Beside,
        }
        let command = <Flags as clap::CommandFactory>::command();
        let matches = command
            .try_get_matches_from([&["virtproxy"], flags].concat())
            .map_err(|error| error.to_string())?;
        let flags = Flags::from_arg_matches(&matches).map_err(|error| error.to_string())?;
        flags.beside.check(&flags.channels)
    }

    #[test]
    fn each_contradiction_is_named_with_its_cure() {
        let many: Vec<String> = (0..31).map(|n| format!("--port=p{n}=pty")).collect();
        let mut too_many = vec!["-c", "vhost-user:/s:-"];
        too_many.extend(many.iter().map(String::as_str));
        let device = ["-c", "vhost-user:/s:-"];
        let with = |flags: &[&'static str]| [&device[..], flags].concat();
        for (flags, part) in [
            (
                vec!["-c", "unix-listen:/s:-", "--port", "a=pty"],
                "--port a=pty needs a device",
            ),
            (
                vec!["-c", "unix-listen:/s:-", "--console", "pty"],
                "--console pty needs a device",
            ),
            (
                vec!["-c", "unix-listen:/s:-", "--admin", "/a"],
                "--admin /a needs a device",
            ),
            (with(&["--port", "org.virtproxy.0=pty"]), "use another name"),
            (
                with(&["--port", "a=pty", "--port", "a=stdio"]),
                "there is a --port a already",
            ),
            (
                with(&["--port", "a=stdio", "--console", "stdio"]),
                "stdio is used twice",
            ),
            (
                with(&["-c", "stdio:-:-", "--console", "stdio"]),
                "stdio is used twice",
            ),
            (
                with(&["--console", "pty", "--console", "pty"]),
                "'--console <PLACE>' cannot be used",
            ),
            (with(&["--console", "vc"]), "unknown PLACE \"vc\""),
            (with(&["--port", "a/b=pty"]), "A-Z a-z 0-9 . _ -"),
            (with(&["--max-ports", "32"]), "32 is not in 1..=31"),
            (
                with(&["--max-ports", "1", "--port", "a=pty"]),
                "use at least 2",
            ),
            (too_many, "use at most 31"),
        ] {
            let error = check(&flags).unwrap_err();
            assert!(error.contains(part), "{flags:?}: {error}");
        }
        check(&with(&[
            "--port",
            "a=pty",
            "--console",
            "stdio",
            "--max-ports",
            "31",
        ]))
        .unwrap();
    }

    #[test]
    fn the_console_comes_right_after_the_mux() {
        let beside = Beside {
            ports: vec!["a=pty".parse().unwrap()],
            console: Some(Place::Stdio),
            ..Beside::default()
        };
        let names: Vec<_> = beside.specs().into_iter().map(|spec| spec.name).collect();
        assert_eq!(names, [MUX_PORT, CONSOLE, "a"]);
        let served: Vec<_> = beside
            .served()
            .map(|(_, name, _)| name.to_owned())
            .collect();
        assert_eq!(served, names[1..]);
    }
}
