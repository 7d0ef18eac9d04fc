//! `virtproxy`: the host end. With a device, the process that the user starts is its keeper, which starts itself again as
//! the worker that does all else.

mod cli;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::pin::pin;
use std::process::ExitCode;
use std::rc::Rc;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use tracing::{error, info};
use virtproxy_engine::admin;
use virtproxy_engine::channel::{BoxFuture, Channel, Link};
use virtproxy_engine::channels;
use virtproxy_engine::counters::Channels;
use virtproxy_engine::program::{
    self, CHANNELS, EXIT_CODES, End, Failure, MakeChannel, Options, Program,
};
use virtproxy_engine::spec::{ChannelSpec, Method};
use virtproxy_engine::unix_socket;
use virtproxy_host::confine::EXIT_CODE as DENIED;
use virtproxy_host::device::{Device, Port, PortSpec};
use virtproxy_host::keeper::{self, Inherited, Kept};
use virtproxy_host::ports::{CONSOLE, PortError, Ports};

use cli::{Beside, Command, MUX_PORT, Sandbox, Tuning};

const PRODUCT: &str = concat!("virtproxy ", env!("CARGO_PKG_VERSION"));

/// Admin clients that wait to be accepted.
const ADMIN_BACKLOG: i32 = 16;

const EXAMPLES: &str = "\
Examples:
  Reach the guest's web server at http://127.0.0.1:9080/ and its SSH server at
  port 9022, and let the guest reach this host's 127.0.0.1:3142 as \"pkg\":
    virtproxy -c vhost-user:/run/vp.sock:- -o http:127.0.0.1:9080 \\
        -o ssh:127.0.0.1:9022 -i pkg:127.0.0.1:3142

  Then start QEMU (10.2 or later) with shared memory and the device:
    qemu-system-x86_64 ... -machine q35,memory-backend=mem0 \\
        -object memory-backend-memfd,id=mem0,size=256M,share=on \\
        -chardev socket,id=vp,path=/run/vp.sock \\
        -device vhost-user-test-device-pci,chardev=vp,virtio-id=3,\\
num_vqs=4,config_size=12,vq_size=1024

  A UNIX socket has - as PORT:
    virtproxy -c vhost-user:/run/vp.sock:- -o docker:/run/guest-docker.sock:-

  The device also serves programs that know nothing of virtproxy, such as
  QEMU's guest agent, and a login on the guest's console (num_vqs=8 then):
    virtproxy -c vhost-user:/run/vp.sock:- --console pty:/run/vm-console \\
        --port org.qemu.guest_agent.0=unix-listen:/run/qga.sock \\
        --admin /run/vp-admin.sock
    virtproxy port add org.example.0=pty --admin /run/vp-admin.sock";

/// The host end of virtproxy: a virtio console device for QEMU that joins sockets of this host to its guest.
#[derive(Parser)]
#[command(
    name = "virtproxy",
    version,
    after_help = format!("{CHANNELS}\n\n{EXAMPLES}\n\n{EXIT_CODES}\n  {DENIED}  the sandbox does not allow a system call"),
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    subcommand_value_name = "COMMAND"
)]
struct Cli {
    #[command(flatten)]
    options: Options,

    #[command(flatten)]
    beside: Beside,

    #[command(flatten)]
    sandbox: Sandbox,

    #[command(flatten)]
    tuning: Tuning,

    /// The program's own: this process is the worker of a keeper, which left it these descriptors
    #[arg(long, hide = true, value_name = "FDS")]
    kept: Option<Inherited>,

    #[command(subcommand)]
    command: Option<Command>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(command) = cli.command {
        return command.run();
    }
    let limits = cli.options.limits.session().map(drop);
    if let Err(message) = cli.beside.check(&cli.options.channels).and(limits) {
        let mut command = Cli::command();
        command.error(ErrorKind::ArgumentConflict, message).exit();
    }
    program::start_log(cli.options.verbose);
    let devices: Vec<_> = cli.options.channels.iter().filter(is_device).collect();
    match cli.kept.clone() {
        Some(inherited) => work(&cli, inherited),
        None if devices.is_empty() => run(&cli, &other, &Channels::default(), None),
        None => keep(&cli, &devices),
    }
}

fn is_device(spec: &&ChannelSpec) -> bool {
    spec.method == Method::VhostUser
}

/// Holds the devices, and lets a worker serve them.
fn keep(cli: &Cli, devices: &[&ChannelSpec]) -> ExitCode {
    let kept = cli.sandbox.enter_as_keeper(&cli.options);
    let kept = kept.map_err(Failure::Io);
    let result = kept.and_then(|()| keeper::run(devices));
    result.unwrap_or_else(|failure| program::exit_code(Err(failure)))
}

/// Serves what a keeper holds.
fn work(cli: &Cli, inherited: Inherited) -> ExitCode {
    let kept = match Kept::take(inherited) {
        Ok(kept) => RefCell::new(VecDeque::from(kept)),
        Err(error) => return program::exit_code(Err(error.into())),
    };
    let replaced = Rc::new(Cell::new(false));
    let counters = Channels::default();
    let make = |spec: &ChannelSpec, options: &Options| -> io::Result<Box<dyn Channel>> {
        if spec.method != Method::VhostUser {
            return other(spec, options);
        }
        let kept = kept.borrow_mut().pop_front();
        let kept = kept.ok_or_else(|| io::Error::other("its keeper has no such device"))?;
        let none = Beside::default();
        let beside = match has_ports(spec, &options.channels) {
            true => &cli.beside,
            false => &none,
        };
        let port = MuxPort::new(spec, kept, beside, &cli.tuning, replaced.clone(), &counters)?;
        Ok(Box::new(port))
    };
    run(cli, &make, &counters, Some(&|| replaced.set(true)))
}

fn run(
    cli: &Cli,
    make: MakeChannel<'_>,
    counters: &Channels,
    replaced: Option<&dyn Fn()>,
) -> ExitCode {
    let ready = || cli.sandbox.enter(&cli.options, &cli.beside);
    let program = Program {
        product: PRODUCT,
        options: &cli.options,
        make,
        ready: &ready,
        counters,
        replaced,
    };
    match program.run() {
        Ok(End::Replaced) => ExitCode::from(keeper::REPLACED),
        result => program::exit_code(result.map(drop)),
    }
}

fn other(spec: &ChannelSpec, options: &Options) -> io::Result<Box<dyn Channel>> {
    let wrong_end = "this method is the guest's: use vhost-user:PATH:- on the host";
    channels::make(spec, options, wrong_end)
}

/// Whether it is the one device that has the ports of `--port` and `--console`.
fn has_ports(spec: &ChannelSpec, channels: &[ChannelSpec]) -> bool {
    channels
        .iter()
        .find(is_device)
        .is_some_and(|first| std::ptr::eq(first, spec))
}

/// A device, and the port of it that the engine's session runs over.
struct MuxPort {
    port: Port,
    name: String,
    /// The device is there as long as these are.
    ports: Rc<Ports>,
    /// Places that open in the sandbox, as they were added by command.
    added: Vec<(PortSpec, Port)>,
    /// Another process takes over.
    replaced: Rc<Cell<bool>>,
}

impl MuxPort {
    fn new(
        spec: &ChannelSpec,
        kept: Kept,
        beside: &Beside,
        tuning: &Tuning,
        replaced: Rc<Cell<bool>>,
        counters: &Channels,
    ) -> io::Result<Self> {
        let first = kept.state.is_empty();
        let workers = kept.history.clone();
        let (device, ports) = Device::kept(&spec.addr, kept, beside.specs(), beside.room())
            .map_err(io::Error::other)?;
        if first {
            let queues = device.queues();
            info!("{spec}: QEMU's -device line must say num_vqs={queues}");
        }
        let beside_mux = Rc::new(Ports::new(device, MUX_PORT, counters.clone(), workers));
        let mut ports = ports.into_iter();
        let (_, mut port) = ports.next().expect("the mux port comes first");
        port.set_busy_poll(tuning.busy_poll());
        // What the last worker said may be an attacker's. So only what the flags say too is opened with all rights.
        let (ports, added): (Vec<_>, _) = ports.partition(|(spec, _)| first || beside.has(spec));
        for (spec, port) in ports {
            match beside_mux.serve_again(&spec, port) {
                Ok(()) => {}
                Err(error) if first => {
                    let flag = if spec.name == CONSOLE {
                        "--console"
                    } else {
                        "--port"
                    };
                    return Err(io::Error::other(format!("{flag} {error}")));
                }
                Err(error) => lost(&error),
            }
        }
        if let Some(path) = &beside.admin {
            start_admin(path, beside_mux.clone())
                .map_err(|error| io::Error::other(format!("--admin {error}")))?;
        }
        Ok(MuxPort {
            port,
            name: spec.to_string(),
            ports: beside_mux,
            added,
            replaced,
        })
    }
}

impl Drop for MuxPort {
    fn drop(&mut self) {
        if self.replaced.get() {
            self.ports.leave();
        }
    }
}

/// The others, and QEMU, must not suffer.
fn lost(error: &PortError) {
    error!("a port is lost: {error}");
}

impl Channel for MuxPort {
    fn open(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Link>>> {
        // Only now is the program in its sandbox, and may have the device's threads.
        for (spec, port) in self.added.drain(..) {
            if let Err(error) = self.ports.serve_again(&spec, port) {
                lost(&error);
            }
        }
        match self.ports.serve_device() {
            Ok(()) => self.port.open(),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }

    fn name(&self) -> &str {
        &self.name
    }
}

/// Serves the admin socket until the program ends.
fn start_admin(path: &Path, ports: Rc<Ports>) -> io::Result<()> {
    let (listener, file) = unix_socket::listen(path, ADMIN_BACKLOG).map_err(io::Error::other)?;
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    tokio::task::spawn_local(async move {
        let server = pin!(admin::serve(listener, ports));
        // Dropped before the socket.
        let _file = file;
        server.await;
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        super::Cli::command().debug_assert();
    }
}
