//! Programs of the host side: the system's own when they are installed, else the ones extracted into the cache.
//!
//! An extracted program runs through the loader and libraries it was extracted with, because the machine's C library
//! may be older. A short shell script in the cache's `bin` folder does that, so every tool has one plain path that
//! can be printed, copied and run by hand.

use crate::cache::{Cache, write_whole};
use crate::prefix::Prefix;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// One of the project's own programs (`virtproxy`, `virtproxy-agent`): in the folder that `VIRTPROXY_BIN_DIR` names, else
/// where cargo put it beside the test that asks.
pub fn program(name: &str) -> Result<PathBuf> {
    let folder = match std::env::var_os("VIRTPROXY_BIN_DIR").filter(|dir| !dir.is_empty()) {
        Some(folder) => PathBuf::from(folder),
        None => {
            let own = std::env::current_exe().context("cannot tell where this program lies")?;
            let folder = own.parent().unwrap_or(Path::new("."));
            let folder = if folder.ends_with("deps") {
                folder.parent().unwrap_or(folder)
            } else {
                folder
            };
            folder.to_owned()
        }
    };
    let program = folder.join(name);
    if !is_executable(&program) {
        bail!(
            "{} is not there: build it with `cargo build --release`, or name its folder with VIRTPROXY_BIN_DIR",
            program.display()
        );
    }
    Ok(program)
}

/// The file that a shell would run for `program`.
pub(crate) fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| is_executable(file))
}

/// The version of a package that is installed on this machine.
pub(crate) fn installed_version(package: &str) -> Option<String> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Version}", package])
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let version = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.success() && !version.is_empty()).then_some(version)
}

/// A package's version without what the distribution added: `1:10.0p1-7+deb13u2` is 10.0p1.
pub(crate) fn upstream(version: &str) -> &str {
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    version.rsplit_once('-').map_or(version, |(rest, _)| rest)
}

/// True for a file that may be run.
pub(crate) fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Writes the script `bin/NAME` that runs `program` of `prefix`; `environment` and `arguments` come before the
/// caller's own.
pub(crate) fn wrap(
    cache: &Cache,
    prefix: &Prefix,
    program: &str,
    environment: &[(&str, String)],
    arguments: &[String],
) -> Result<PathBuf> {
    let name = program.rsplit('/').next().unwrap_or(program);
    let file = cache.dir("bin")?.join(name);
    let environment: String = environment
        .iter()
        .map(|(key, value)| format!("{key}='{value}' "))
        .collect();
    let arguments: String = arguments
        .iter()
        .map(|argument| format!("'{argument}' "))
        .collect();
    let script = format!(
        "#!/bin/sh\n# Written by virtproxy's lab: runs the cache's own {name} with the libraries it came with.\n\
         {environment}exec '{}' --library-path '{}' '{}' {arguments}\"$@\"\n",
        prefix.loader()?.display(),
        prefix.library_path(),
        prefix.root().join(program).display(),
    );
    write_whole(&file, script.as_bytes(), 0o755)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_loses_what_the_distribution_added() {
        for (version, of_the_project) in [
            ("1:10.0p1-7+deb13u2", "10.0p1"),
            (
                "0.0~git20250503.587980c-2+deb13u1",
                "0.0~git20250503.587980c",
            ),
            ("1.8.0.3", "1.8.0.3"),
            ("2:1-rc1-1", "1-rc1"),
        ] {
            assert_eq!(upstream(version), of_the_project);
        }
    }
}
