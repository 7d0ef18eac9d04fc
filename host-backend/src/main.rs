//! `virtproxy`: the host end.

use std::io;
use std::process::ExitCode;

use clap::Parser;
use virtproxy_engine::channel::{BoxFuture, Channel, Link};
use virtproxy_engine::channels;
use virtproxy_engine::program::{self, CHANNELS, EXIT_CODES, Options};
use virtproxy_engine::spec::{ChannelSpec, Method};
use virtproxy_host::device::{Device, DeviceHandle, Port, PortSpec};

const PRODUCT: &str = concat!("virtproxy ", env!("CARGO_PKG_VERSION"));

/// The port that the agent opens when nothing else is said.
const MUX_PORT: &str = "org.virtproxy.0";

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
    virtproxy -c vhost-user:/run/vp.sock:- -o docker:/run/guest-docker.sock:-";

/// The host end of virtproxy: a virtio console device for QEMU that joins sockets of this host to its guest.
#[derive(Parser)]
#[command(version, after_help = format!("{CHANNELS}\n\n{EXAMPLES}\n\n{EXIT_CODES}"))]
struct Cli {
    #[command(flatten)]
    options: Options,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    program::run(PRODUCT, &cli.options, make_channel)
}

fn make_channel(spec: &ChannelSpec, options: &Options) -> io::Result<Box<dyn Channel>> {
    match spec.method {
        Method::VhostUser => Ok(Box::new(MuxPort::start(spec)?)),
        _ => channels::make(
            spec,
            options,
            "this method is the guest's: use vhost-user:PATH:- on the host",
        ),
    }
}

/// A device with one port, which the engine's session runs over.
struct MuxPort {
    name: String,
    port: Port,
    /// The device is there as long as its port is.
    _device: DeviceHandle,
}

impl MuxPort {
    fn start(spec: &ChannelSpec) -> io::Result<Self> {
        let ports = vec![PortSpec::generic(MUX_PORT)];
        let (device, mut ports) = Device::start(&spec.addr, ports).map_err(io::Error::other)?;
        Ok(MuxPort {
            name: spec.to_string(),
            port: ports.remove(0),
            _device: device,
        })
    }
}

impl Channel for MuxPort {
    fn open(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Link>>> {
        self.port.open()
    }

    fn name(&self) -> &str {
        &self.name
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        super::Cli::command().debug_assert();
    }
}
