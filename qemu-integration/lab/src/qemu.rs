//! Chooses a QEMU that has `vhost-user-test-device-pci`.
//!
//! In this order: the one that `VIRTPROXY_QEMU` names, the system's own, one extracted into the cache. QEMU has that
//! device under this name from 10.2 on; before, the same code could not be created by a user. An extracted QEMU is
//! run by a script in the cache, which also names its module folder: without that it would load the machine's modules
//! of another version and die.

use crate::apt::Apt;
use crate::cache::Cache;
use crate::plan::Plan;
use crate::prefix::{Prefix, Recipe};
use crate::tools;
use anyhow::{Context, Result, bail};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The device that lets this daemon be a guest's console.
pub const DEVICE: &str = "vhost-user-test-device-pci";
const PROGRAM: &str = "qemu-system-x86_64";

/// Where the chosen QEMU comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// `VIRTPROXY_QEMU` names it.
    Environment,
    /// It is installed on this machine.
    System,
    /// The lab extracted it.
    Cache,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Environment => "named by VIRTPROXY_QEMU",
            Self::System => "the system's own",
            Self::Cache => "extracted into the cache",
        })
    }
}

/// A QEMU that has the device.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// What to run: the program, or the script that runs it.
    pub program: PathBuf,
    /// Where it comes from.
    pub origin: Origin,
    /// As it says itself.
    pub version: String,
}

impl Qemu {
    /// The one that `VIRTPROXY_QEMU` names, or the system's when it has the device.
    pub(crate) fn installed() -> Result<Option<Self>> {
        if let Some(program) =
            std::env::var_os("VIRTPROXY_QEMU").filter(|program| !program.is_empty())
        {
            let program = PathBuf::from(program);
            return match Self::at(&program, Origin::Environment) {
                Ok(qemu) => Ok(Some(qemu)),
                Err(error) => Err(error.context(
                    "VIRTPROXY_QEMU names a QEMU that cannot be used: name one of version 10.2 or newer, or unset it",
                )),
            };
        }
        let Some(program) = tools::in_path(PROGRAM) else {
            return Ok(None);
        };
        Ok(Self::at(&program, Origin::System).ok())
    }

    /// The cache's own, when it is there already.
    pub(crate) fn cached(cache: &Cache, plan: &Plan) -> Result<Option<Self>> {
        match recipe(plan).cached(cache) {
            Some(prefix) => Self::extracted(cache, &prefix).map(Some),
            None => Ok(None),
        }
    }

    /// Extracts one into the cache.
    pub(crate) fn fetch(cache: &Cache, plan: &Plan, apt: &Apt) -> Result<Self> {
        let prefix = recipe(plan).build(cache, apt)?;
        Self::extracted(cache, &prefix).inspect_err(|_| {
            // The next run must not take it for a good one.
            let _ = std::fs::remove_dir_all(prefix.root());
        })
    }

    fn extracted(cache: &Cache, prefix: &Prefix) -> Result<Self> {
        let modules = prefix
            .root()
            .join("usr/lib/x86_64-linux-gnu/qemu")
            .display()
            .to_string();
        let firmware = ["usr/share/qemu", "usr/share/seabios"]
            .map(|dir| prefix.root().join(dir).display().to_string());
        let arguments: Vec<_> = firmware
            .into_iter()
            .flat_map(|dir| ["-L".to_owned(), dir])
            .collect();
        let program = tools::wrap(
            cache,
            prefix,
            &format!("usr/bin/{PROGRAM}"),
            &[("QEMU_MODULE_DIR", modules)],
            &arguments,
        )?;
        Self::at(&program, Origin::Cache).context(
            "the QEMU from this machine's archive cannot be used: install QEMU 10.2 or newer and set \
             VIRTPROXY_QEMU=/path/to/qemu-system-x86_64",
        )
    }

    fn at(program: &Path, origin: Origin) -> Result<Self> {
        let version = ask(program, &["--version"])?;
        let version = version
            .lines()
            .next()
            .unwrap_or("")
            .trim_start_matches("QEMU emulator version ")
            .to_owned();
        if !ask(program, &["-device", "help"])?.contains(&format!("\"{DEVICE}\"")) {
            bail!(
                "{} is QEMU {version}, which has no {DEVICE} (10.2 is the first)",
                program.display()
            );
        }
        Ok(Self {
            program: program.to_owned(),
            origin,
            version,
        })
    }

    /// A command that runs it.
    pub fn command(&self) -> Command {
        Command::new(&self.program)
    }
}

fn ask(program: &Path, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    if !output.status.success() {
        bail!(
            "{} {}: {}",
            program.display(),
            arguments.join(" "),
            crate::apt::last_lines(&output.stderr, 4)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn recipe(plan: &Plan) -> Recipe<'_> {
    Recipe {
        name: "qemu",
        what: "QEMU",
        suite: plan.qemu_suite.as_ref().unwrap_or(&plan.suite),
        packages: &["qemu-system-x86", "qemu-system-data", "seabios"],
        keep: |_| true,
        must_have: &[
            "usr/bin/qemu-system-x86_64",
            "usr/share/seabios",
            "usr/share/qemu",
        ],
    }
}
