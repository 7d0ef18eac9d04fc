//! Builds and runs the fuzz targets with the stable compiler.
//!
//! cargo-fuzz wants a nightly compiler for its address sanitizer. Coverage feedback alone needs none: LLVM's pass for
//! it can be named on the command line. The mux and the link forbid unsafe code, so what is looked for are panics,
//! overflows and broken invariants; the device's target looks itself whether all that is used lies in the guest's memory.
//! The corpus stays in each crate's own folder (not in the repository) and grows from run to run.

use crate::steps::run as run_command;
use crate::workspace;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use virtproxy_lab::spawn;

const CRATES: &[&str] = &["common/mux/fuzz", "common/link/fuzz", "host-backend/fuzz"];
/// Named explicitly, so that build scripts and macros are built without instrumentation.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
const FLAGS: &[&str] = &[
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "-Cdebug-assertions=on",
    "-Coverflow-checks=on",
];

/// Runs each target of each crate for `seconds`. Gives the reason when there is none.
pub(crate) fn run(seconds: u32) -> Result<Option<String>> {
    for name in CRATES {
        if let Some(missing) = run_crate(name, seconds)? {
            return Ok(Some(missing));
        }
    }
    Ok(None)
}

fn run_crate(name: &str, seconds: u32) -> Result<Option<String>> {
    let folder = workspace::root().join(name);
    let Ok(entries) = fs::read_dir(folder.join("fuzz_targets")) else {
        return Ok(Some(format!(
            "{name}/fuzz_targets is missing: NOTHING IN IT WAS FUZZED"
        )));
    };
    let mut targets: Vec<String> = entries
        .flatten()
        .filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".rs")?.to_owned()))
        .collect();
    targets.sort();
    let build = workspace::target()?.join("fuzz");
    run_command(
        workspace::cargo()
            .current_dir(&folder)
            .args(["build", "--release", "--bins", "--target", TRIPLE])
            .env("CARGO_TARGET_DIR", &build)
            .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}")),
    )?;
    for target in targets {
        let corpus = folder.join("corpus").join(&target);
        let artifacts = folder.join("artifacts").join(&target);
        for dir in [&corpus, &artifacts] {
            fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        let program = build.join(TRIPLE).join("release").join(&target);
        let mut command = Command::new(&program);
        command
            .arg(&corpus)
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .arg(format!("-max_total_time={seconds}"))
            .args(["-timeout=10", "-rss_limit_mb=2048", "-use_value_profile=1"]);
        one(&mut command, &build.join(format!("{target}.log"))).with_context(|| {
            format!(
                "the fuzz target {target} found something: its input is in {}",
                artifacts.display()
            )
        })?;
    }
    Ok(None)
}

/// Runs one target; its many lines go to a file, of which the end is shown.
fn one(command: &mut Command, log: &Path) -> Result<()> {
    eprintln!("$ {}", spawn::shown(command));
    let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
    let file_too = file.try_clone().context("cannot share the log")?;
    let status = command
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(file_too)
        .status();
    let status = status.context("cannot run the fuzz target")?;
    let text = fs::read(log).with_context(|| format!("cannot read {}", log.display()))?;
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    if !status.success() {
        bail!(
            "{status}\n{}",
            lines[lines.len().saturating_sub(40)..].join("\n")
        );
    }
    for line in lines
        .iter()
        .filter(|line| line.contains("DONE ") || line.starts_with("Done "))
    {
        eprintln!("  {line}");
    }
    Ok(())
}
