//! `cargo xtask test`: every test there is, the quick ones first.
//!
//! Plain `cargo test` boots no guest: the tests that do are in test targets whose names begin with `guest` and are
//! `#[ignore]`d. They run here, in release, one at a time (they measure latencies, and the emulator wants every core).

use crate::steps::{Steps, run as run_command};
use crate::{bench, fuzz, instructions, workspace};
use anyhow::Result;
use std::process::Command;
use virtproxy_lab::Lab;

/// Options of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Run only the steps whose names contain WORD; may be repeated or hold several, separated by commas
    #[arg(long, value_name = "WORD", value_delimiter = ',')]
    filter: Vec<String>,
    /// Name the steps and run none
    #[arg(long)]
    list: bool,
    /// How long each fuzz target runs
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    fuzz_seconds: u32,
    /// Words for the test programs, such as a part of a test's name
    #[arg(last = true, value_name = "ARGS")]
    arguments: Vec<String>,
}

const STEPS: &[(&str, &str)] = &[
    ("fmt", "the source is formatted"),
    ("clippy", "no lint complains"),
    ("doc", "the documentation builds without a warning"),
    ("unit", "tests inside one process, and simulations"),
    ("fuzz", "each fuzz target for a bounded time"),
    (
        "deny",
        "licences and sources of the dependencies (needs cargo-deny)",
    ),
    (
        "instructions",
        "the mux takes no more of them than what is kept (needs valgrind)",
    ),
    ("release", "the programs build"),
    ("lab", "QEMU, kernel and guest image are there"),
    ("guest", "tests with real guests"),
    (
        "bench",
        "virtproxy is not far behind a bare relay of the same run",
    ),
];

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.list {
        for (name, what) in STEPS {
            println!("{name:8} {what}");
        }
        return Ok(());
    }
    let mut steps = Steps::new(&arguments.filter);
    steps.command("fmt", workspace::cargo().args(["fmt", "--all", "--check"]))?;
    steps.command(
        "clippy",
        workspace::cargo().args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--",
            "-D",
            "warnings",
        ]),
    )?;
    steps.command(
        "doc",
        workspace::cargo()
            .args(["doc", "--workspace", "--no-deps", "--locked"])
            .env("RUSTDOCFLAGS", "-Dwarnings"),
    )?;
    steps.command(
        "unit",
        workspace::cargo()
            .args(["test", "--workspace", "--locked", "--"])
            .args(&arguments.arguments),
    )?;
    steps.step("fuzz", || fuzz::run(arguments.fuzz_seconds))?;
    steps.step("deny", deny)?;
    steps.step("instructions", instructions::check)?;
    let target = workspace::target()?;
    steps.command("release", &mut build_programs())?;
    steps.step("lab", || {
        for line in Lab::get()?.describe() {
            println!("{line}");
        }
        Ok(None)
    })?;
    // Figures are asked for by name: nothing of them can fail.
    let figures: &[&str] = match arguments.arguments.is_empty() {
        true => &["--skip", "figures_"],
        false => &[],
    };
    steps.command(
        "guest",
        workspace::cargo()
            .args([
                "test",
                "--release",
                "--locked",
                "-p",
                "virtproxy-lab",
                "-p",
                "virtproxy-tests",
            ])
            .args([
                "--test",
                "guest*",
                "--",
                "--ignored",
                "--test-threads=1",
                "--nocapture",
            ])
            .args(figures)
            .args(&arguments.arguments)
            .env("VIRTPROXY_LAB", "1")
            // The errors of these tests say enough; a backtrace behind one hides it where only the end of a log is kept.
            .env("RUST_LIB_BACKTRACE", "0")
            .env("VIRTPROXY_BIN_DIR", target.join("release")),
    )?;
    steps.step("bench", || bench::quick().map(|()| None))?;
    steps.finish()
}

/// Builds `virtproxy` and `virtproxy-agent` as users get them.
pub(crate) fn build_programs() -> Command {
    let mut command = workspace::cargo();
    command.args([
        "build",
        "--release",
        "--locked",
        "-p",
        "virtproxy-host",
        "-p",
        "virtproxy-agent",
    ]);
    command
}

fn deny() -> Result<Option<String>> {
    let there = workspace::cargo()
        .args(["deny", "--version"])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !there {
        return Ok(Some(
            "cargo-deny is not installed; `cargo install cargo-deny` adds it".to_owned(),
        ));
    }
    if !workspace::root().join("deny.toml").is_file() {
        return Ok(Some("the workspace has no deny.toml".to_owned()));
    }
    // Advisories need the network: `cargo deny check advisories`, by hand.
    run_command(workspace::cargo().args([
        "deny",
        "--offline",
        "check",
        "bans",
        "licenses",
        "sources",
    ]))?;
    Ok(None)
}
