//! What was measured, and on what.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use virtproxy_lab::Lab;

/// The folder of this package's room in the repository.
pub(crate) fn room() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

/// Cargo's target folder, where this program is.
pub(crate) fn target() -> Result<PathBuf> {
    let program = std::env::current_exe().context("this program has no path")?;
    let target = program
        .ancestors()
        .nth(2)
        .context("not in a target folder")?;
    Ok(target.to_owned())
}

/// Now, in UTC.
pub(crate) fn now() -> String {
    said(Command::new("date").args(["-u", "+%FT%RZ"]))
}

/// The version of the project.
pub(crate) fn version() -> String {
    said(
        Command::new("git")
            .args(["describe", "--always", "--dirty"])
            .current_dir(room()),
    )
}

fn said(command: &mut Command) -> String {
    let output = command
        .output()
        .ok()
        .filter(|output| output.status.success());
    output.map_or("unknown".to_owned(), |output| {
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    })
}

/// The machine and what runs the guests, each a line.
pub(crate) fn machine() -> Result<Vec<String>> {
    let lab = Lab::get()?;
    let field = |file: &str, name: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line.split_once(':'));
        value.map_or("unknown".to_owned(), |(_, value)| value.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Ok(vec![
        format!(
            "processor: {}, {cores} cores",
            field("/proc/cpuinfo", "model name")
        ),
        format!("memory: {}", field("/proc/meminfo", "MemTotal")),
        format!("kernel: Linux {}", kernel.trim()),
        format!(
            "QEMU: {}, {}",
            lab.qemu.version,
            lab.accel.arguments().join(" ")
        ),
        format!("guest kernel: Linux {}", lab.kernel.release),
    ])
}
