//! `cargo xtask instructions`: what each operation of the mux costs, in instructions, beside the figures that are kept in the
//! repository.
//!
//! The scenarios are a program (`common/mux/benches/instructions.rs`), which runs under callgrind for two counts of each; the
//! difference of what it took, divided by the difference of the counts, is the figure. It hardly depends on the machine,
//! and not at all on its load; it does depend a little on the compiler, which is why a rise has a tolerance, and why the
//! compiler is kept beside the figures. Callgrind's own files stay in `target/instructions`, for `callgrind_annotate`.

use crate::workspace;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use virtproxy_lab::serde_json::{self, Value};

/// Where the figures are kept.
const KEPT: &str = "common/mux/benches/instructions.txt";
/// By how many per cent a figure may rise.
const TOLERANCE: f64 = 10.0;
/// How often an operation is done in the two runs of a scenario.
const COUNTS: [u32; 2] = [1_000, 3_000];
/// What the line about the compiler begins with.
const COMPILER: &str = "# Compiler: ";
const NO_VALGRIND: &str = "valgrind is not there; `apt install valgrind` adds it (Debian, Ubuntu)";

/// Options of `cargo xtask instructions`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Keep the figures of this run
    #[arg(long)]
    write: bool,
    /// Fail if a figure has risen by more than the tolerance
    #[arg(long, conflicts_with = "write")]
    check: bool,
    /// How much a figure may rise
    #[arg(long, value_name = "PERCENT", default_value_t = TOLERANCE)]
    tolerance: f64,
}

/// Instructions of one operation, by scenario.
type Figures = BTreeMap<String, f64>;

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    ensure!(valgrind_is_there(), NO_VALGRIND);
    let text = match arguments.write {
        true => String::new(),
        false => fs::read_to_string(path()).with_context(|| format!("cannot read {KEPT}"))?,
    };
    let kept = parse(&text)?;
    let now = count()?;
    let mut risen = Vec::new();
    println!(
        "{:32} {:>10} {:>10} {:>8}",
        "instructions", "kept", "now", "change"
    );
    for (name, figure) in &now {
        let Some(before) = kept.get(name) else {
            println!("{name:32} {:>10} {figure:>10.1}", "-");
            continue;
        };
        let change = (figure / before - 1.0) * 100.0;
        println!("{name:32} {before:>10.1} {figure:>10.1} {change:>+7.1}%");
        if change > arguments.tolerance {
            risen.push(name.as_str());
        }
    }
    if arguments.write {
        fs::write(path(), render(&now, &compiler()?))
            .with_context(|| format!("cannot write {KEPT}"))?;
    }
    if arguments.check && !risen.is_empty() {
        let before = text.lines().find_map(|line| line.strip_prefix(COMPILER));
        bail!(
            "more than {} % above what {KEPT} keeps: {}; make them cheaper, or say why in a commit that renews it with \
             `cargo xtask instructions --write` (kept with {}, now {})",
            arguments.tolerance,
            risen.join(", "),
            before.unwrap_or("no compiler"),
            compiler()?
        );
    }
    Ok(())
}

/// The step of `cargo xtask test`. Gives the reason when nothing can be counted.
pub(crate) fn check() -> Result<Option<String>> {
    if !valgrind_is_there() {
        return Ok(Some(format!("NO INSTRUCTION WAS COUNTED: {NO_VALGRIND}")));
    }
    run(&Arguments {
        write: false,
        check: true,
        tolerance: TOLERANCE,
    })?;
    Ok(None)
}

fn valgrind_is_there() -> bool {
    let mut command = Command::new("valgrind");
    command.arg("--version").stdout(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn path() -> PathBuf {
    workspace::root().join(KEPT)
}

/// The compiler that cargo uses, as it calls itself.
fn compiler() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).arg("--version").output();
    let output = output.context("cannot run rustc")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn parse(text: &str) -> Result<Figures> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let figure = |line: &str| {
        let (name, figure) = line.split_once(' ')?;
        Some((name.to_owned(), figure.trim().parse().ok()?))
    };
    lines
        .map(|line| figure(line).with_context(|| format!("{KEPT}: not a figure: {line}")))
        .collect()
}

fn render(figures: &Figures, compiler: &str) -> String {
    let head = format!(
        "# Instructions of one operation of the mux, made by `cargo xtask instructions --write`.\n{COMPILER}{compiler}\n"
    );
    let lines = figures
        .iter()
        .map(|(name, figure)| format!("{name:32} {figure:.1}\n"));
    std::iter::once(head).chain(lines).collect()
}

/// Counts every scenario.
fn count() -> Result<Figures> {
    let program = build()?;
    let output = Command::new(&program).output();
    let output = output.with_context(|| format!("cannot run {}", program.display()))?;
    ensure!(output.status.success(), "the scenarios do not run");
    let folder = workspace::target()?.join("instructions");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let names = String::from_utf8(output.stdout).context("names of scenarios")?;
    names
        .lines()
        .map(|name| {
            let [few, many] = COUNTS.map(|count| collect(&program, &folder, name, count));
            let operations = f64::from(COUNTS[1] - COUNTS[0]);
            Ok((name.to_owned(), (many? - few?) / operations))
        })
        .collect()
}

/// Builds the scenarios; their program.
fn build() -> Result<PathBuf> {
    let output = workspace::cargo()
        .args(["bench", "--locked", "--package", "virtproxy-mux"])
        .args(["--bench", "instructions", "--no-run"])
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "the scenarios do not build");
    let text = String::from_utf8(output.stdout).context("what cargo says")?;
    let program = text.lines().find_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        let ours = message["target"]["name"] == "instructions";
        message["executable"]
            .as_str()
            .filter(|_| ours)
            .map(PathBuf::from)
    });
    program.context("cargo names no program")
}

/// Instructions of one run.
fn collect(program: &Path, folder: &Path, name: &str, count: u32) -> Result<f64> {
    let mut file = std::ffi::OsString::from("--callgrind-out-file=");
    file.push(folder.join(format!("{name}.{count}.callgrind")));
    let output = Command::new("valgrind")
        .arg("--tool=callgrind")
        .arg(file)
        .arg(program)
        .args([name, &count.to_string()])
        .output()
        .context("cannot run valgrind")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name} fails:\n{said}");
    let collected = said.lines().find_map(|line| {
        let (_, number) = line.split_once("Collected : ")?;
        number.trim().parse().ok()
    });
    collected.with_context(|| format!("callgrind counts nothing:\n{said}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_again() {
        let figures = Figures::from([("one".to_owned(), 12.5), ("two".to_owned(), 3.0)]);
        assert_eq!(parse(&render(&figures, "rustc 1")).unwrap(), figures);
        assert!(parse("one").is_err() && parse("one two").is_err());
        let kept = fs::read_to_string(path()).unwrap();
        assert!(!parse(&kept).unwrap().is_empty());
    }
}
