//! `cargo xtask`: the project's commands `demo`, `test` and `bench`; `instructions`, which counts what the mux costs; and
//! `lab`, which only prepares what guests need.
//!
//! They are programs and not shell scripts so that they can tell what went wrong and what cures it, and because the
//! tests boot the same guests through the same library.

mod bench;
mod daemon;
mod demo;
mod fuzz;
mod http;
mod instructions;
mod steps;
mod test;
mod workspace;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;
use virtproxy_lab::Lab;

/// Runs the demonstration, the tests and the benchmark of virtproxy.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", after_help = ENVIRONMENT)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Boots a guest without a network and reaches its web and SSH servers through virtproxy
    Demo(demo::Arguments),
    /// Runs every test there is, with the same set-up
    Test(test::Arguments),
    /// Counts the instructions of the mux's operations, beside those that are kept (needs valgrind)
    Instructions(instructions::Arguments),
    /// Measures every way into a guest, side by side
    Bench(bench::Arguments),
    /// Only fetches and builds what guests need, and says what there is
    Lab,
}

const ENVIRONMENT: &str = "\
Environment:
  VIRTPROXY_CACHE  folder for QEMU, the guest's kernel and image (default: ~/.cache/virtproxy)
  VIRTPROXY_QEMU   the qemu-system-x86_64 to use, 10.2 or newer (default: the system's, else one from the archive)
  VIRTPROXY_SUITE  the archive's suite to take packages from, and after a comma the one for QEMU
  VIRTPROXY_ACCEL  kvm or tcg (default: kvm when a guest was seen to boot with it)
  VIRTPROXY_KEEP   when set, a guest's folder with its console and QEMU's errors is kept";

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Demo(arguments) => demo::run(&arguments),
        Task::Test(arguments) => test::run(&arguments),
        Task::Instructions(arguments) => instructions::run(&arguments),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Lab => lab(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn lab() -> Result<()> {
    for line in Lab::get()?.describe() {
        println!("{line}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Arguments::command().debug_assert();
    }
}
