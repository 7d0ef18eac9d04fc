//! `virtproxy`: the host end.

mod cli;

use std::io;
use std::path::Path;
use std::pin::pin;
use std::process::ExitCode;
use std::rc::Rc;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use tracing::info;
use virtproxy_engine::admin;
use virtproxy_engine::channel::{BoxFuture, Channel, Link};
use virtproxy_engine::channels;
use virtproxy_engine::program::{self, CHANNELS, EXIT_CODES, Options};
use virtproxy_engine::spec::{ChannelSpec, Method};
use virtproxy_engine::unix_socket;
use virtproxy_host::confine::EXIT_CODE as DENIED;
use virtproxy_host::device::{Device, Port};
use virtproxy_host::ports::Ports;

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

    #[command(subcommand)]
    command: Option<Command>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(command) = cli.command {
        return command.run();
    }
    if let Err(message) = cli.beside.check(&cli.options.channels) {
        let mut command = Cli::command();
        command.error(ErrorKind::ArgumentConflict, message).exit();
    }
    program::run(
        PRODUCT,
        &cli.options,
        &|spec, options| make_channel(spec, options, &cli.beside, &cli.tuning),
        &|| cli.sandbox.enter(&cli.options, &cli.beside),
    )
}

fn make_channel(
    spec: &ChannelSpec,
    options: &Options,
    beside: &Beside,
    tuning: &Tuning,
) -> io::Result<Box<dyn Channel>> {
    match spec.method {
        Method::VhostUser if has_ports(spec, &options.channels) => {
            Ok(Box::new(MuxPort::start(spec, beside, tuning)?))
        }
        Method::VhostUser => Ok(Box::new(MuxPort::start(spec, &Beside::default(), tuning)?)),
        _ => channels::make(
            spec,
            options,
            "this method is the guest's: use vhost-user:PATH:- on the host",
        ),
    }
}

/// Whether it is the one device that has the ports of `--port` and `--console`.
fn has_ports(spec: &ChannelSpec, channels: &[ChannelSpec]) -> bool {
    let is_device = |spec: &&ChannelSpec| spec.method == Method::VhostUser;
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
}

impl MuxPort {
    fn start(spec: &ChannelSpec, beside: &Beside, tuning: &Tuning) -> io::Result<Self> {
        let specs = beside.specs();
        let room = beside.room();
        let (device, ports) = Device::bind(&spec.addr, specs, room).map_err(io::Error::other)?;
        info!(
            "{spec}: QEMU's -device line must say num_vqs={}",
            device.queues()
        );
        let beside_mux = Rc::new(Ports::new(device, MUX_PORT));
        let mut ports = ports.into_iter();
        let mut port = ports.next().expect("the mux port comes first");
        port.set_busy_poll(tuning.busy_poll());
        for ((flag, name, place), port) in beside.served().zip(ports) {
            beside_mux
                .serve(name, place.clone(), port)
                .map_err(|error| io::Error::other(format!("{flag} {error}")))?;
        }
        if let Some(path) = &beside.admin {
            start_admin(path, beside_mux.clone())
                .map_err(|error| io::Error::other(format!("--admin {error}")))?;
        }
        Ok(MuxPort {
            port,
            name: spec.to_string(),
            ports: beside_mux,
        })
    }
}

impl Channel for MuxPort {
    fn open(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Link>>> {
        // Only now is the program in its sandbox, and may have the device's threads.
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
