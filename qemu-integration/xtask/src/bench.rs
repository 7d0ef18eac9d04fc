//! `cargo xtask bench`: builds the programs and the benchmark (`tests/bench`), and becomes the benchmark.

use crate::steps::run as run_command;
use crate::test::build_programs;
use crate::workspace;
use anyhow::{Context, Result};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Options of `cargo xtask bench`: the benchmark's own.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Arguments {
    /// Words for the benchmark: --help tells of them
    #[arg(
        value_name = "ARGS",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    arguments: Vec<String>,
}

/// Builds it all; this process then is the benchmark, whose exit status is the command's. Returns only to say why not.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut command = built()?;
    let error = command.args(&arguments.arguments).exec();
    Err(error).with_context(|| format!("cannot run {}", virtproxy_lab::spawn::shown(&command)))
}

/// Builds it all and runs the part of the benchmark that guards against regressions.
pub(crate) fn quick() -> Result<()> {
    run_command(built()?.arg("--quick"))
}

fn built() -> Result<Command> {
    run_command(build_programs().args([
        "--bins",
        "-p",
        "virtproxy-tests",
        "-p",
        "virtproxy-bench",
    ]))?;
    let programs = workspace::target()?.join("release");
    let mut command = Command::new(programs.join("virtproxy-bench"));
    command.env("VIRTPROXY_BIN_DIR", programs);
    Ok(command)
}
