//! `virtproxy-agent`: the guest end.

use std::io;
use std::process::ExitCode;

use clap::Parser;
use virtproxy_agent::port::PortChannel;
use virtproxy_engine::channel::Channel;
use virtproxy_engine::channels;
use virtproxy_engine::counters::Channels;
use virtproxy_engine::program::{self, CHANNELS, EXIT_CODES, Options, Program};
use virtproxy_engine::spec::{ChannelSpec, Method};

const PRODUCT: &str = concat!("virtproxy-agent ", env!("CARGO_PKG_VERSION"));

const EXAMPLES: &str = "\
Examples:
  Serve this guest's web and SSH servers to the host, and reach the host's
  service \"pkg\" at 127.0.0.1:3142:
    virtproxy-agent -c virtserial-open:/dev/virtio-ports/org.virtproxy.0:- \\
        -i http:127.0.0.1:80 -i ssh:127.0.0.1:22 -o pkg:127.0.0.1:3142

  The port may be named without its path, where udev does not make one; UNIX
  sockets have - as PORT:
    virtproxy-agent -c virtserial-open:org.virtproxy.0:- \\
        -i docker:/run/docker.sock:-";

/// The guest end of virtproxy: joins sockets of this guest to its host, over a virtio port.
#[derive(Parser)]
#[command(version, after_help = format!("{CHANNELS}\n\n{EXAMPLES}\n\n{EXIT_CODES}"))]
struct Cli {
    #[command(flatten)]
    options: Options,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    program::start_log(cli.options.verbose);
    let program = Program {
        product: PRODUCT,
        options: &cli.options,
        make: &make_channel,
        ready: &|| Ok(()),
        counters: &Channels::default(),
        replaced: None,
    };
    program::exit_code(program.run().map(drop))
}

fn make_channel(spec: &ChannelSpec, options: &Options) -> io::Result<Box<dyn Channel>> {
    match spec.method {
        Method::VirtserialOpen => Ok(Box::new(PortChannel::new(spec))),
        _ => channels::make(
            spec,
            options,
            "this method is the host's: use virtserial-open:PATH:- in the guest",
        ),
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
