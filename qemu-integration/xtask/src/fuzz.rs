//! Builds and runs the fuzz targets with the stable compiler.
//!
//! cargo-fuzz wants a nightly compiler for its address sanitizer. Coverage feedback alone needs none: LLVM's pass for
//! it can be named on the command line, and the fuzzed crate forbids unsafe code, so what is looked for are panics,
//! overflows and broken invariants. The corpus stays in the crate's own folder (not in the repository) and grows from
//! run to run.

use crate::steps::run as run_command;
use crate::workspace;
use anyhow::{Context, Result};
use std::fs;
use std::process::Command;

const CRATE: &str = "common/mux/fuzz";
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

/// Runs each target for `seconds`. Gives the reason when there is none.
pub(crate) fn run(seconds: u32) -> Result<Option<String>> {
    let folder = workspace::root().join(CRATE);
    let Ok(entries) = fs::read_dir(folder.join("fuzz_targets")) else {
        return Ok(Some(format!(
            "{CRATE}/fuzz_targets is missing: NOTHING WAS FUZZED"
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
        run_command(
            Command::new(&program)
                .arg(&corpus)
                .arg(format!("-artifact_prefix={}/", artifacts.display()))
                .arg(format!("-max_total_time={seconds}"))
                .args([
                    "-timeout=10",
                    "-rss_limit_mb=2048",
                    "-use_value_profile=1",
                    "-print_final_stats=1",
                ]),
        )
        .with_context(|| {
            format!(
                "the fuzz target {target} found something: its input is in {}",
                artifacts.display()
            )
        })?;
    }
    Ok(None)
}
