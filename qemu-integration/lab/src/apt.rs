//! A private apt: the machine's archive and keys, but lists, cache and status of its own, so no root is needed.
//!
//! apt reads `$APT_CONFIG` before anything else, so one file moves every folder that it writes to into the cache and
//! turns off the machine's own configuration parts (their hooks are for the system). What those parts say about
//! reaching the network (proxies, time-outs) is copied in. The package status is an empty file: to this apt nothing is
//! installed, and so it resolves a whole closure down to the C library, which is what a prefix that runs through its
//! own loader needs. apt verifies what it downloads against the signed lists.

use crate::cache::{Cache, write_whole};
use crate::plan::Plan;
use crate::progress::{self, Task};
use crate::sources;
use anyhow::{Context, Result, bail};
use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// One package of a closure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Deb {
    /// Its name.
    pub(crate) name: String,
    /// Its version, epoch included.
    pub(crate) version: String,
    /// The file that holds it.
    pub(crate) file: String,
    /// Its size in bytes.
    pub(crate) size: u64,
    /// The SHA-256 of the file.
    pub(crate) sha256: String,
}

/// The private apt.
#[derive(Debug)]
pub(crate) struct Apt {
    dir: PathBuf,
    archive: String,
}

impl Apt {
    /// Writes the configuration and reads the package lists of `suites`.
    pub(crate) fn update(cache: &Cache, plan: &Plan, suites: &[String]) -> Result<Self> {
        for program in ["apt-get", "apt-config", "dpkg-deb"] {
            if crate::tools::in_path(program).is_none() {
                bail!(
                    "{program} is missing: the lab is made of Debian or Ubuntu packages, run it on one of them"
                );
            }
        }
        let machine = sources::read(Path::new("/etc/apt"))?;
        let source = sources::archive(&machine, plan.distribution, &plan.codename)?;
        let dir = cache.dir("apt")?;
        for folder in ["lists/partial", "state", "archives/partial", "debs"] {
            cache.dir(Path::new("apt").join(folder))?;
        }
        write_whole(&dir.join("status"), b"", 0o644)?;
        write_whole(
            &dir.join("lab.sources"),
            source.stanza(suites, plan.components).as_bytes(),
            0o644,
        )?;
        write_whole(
            &dir.join("apt.conf"),
            configuration(&dir)?.as_bytes(),
            0o644,
        )?;
        let apt = Self {
            dir,
            archive: source.uris.join(" "),
        };
        let task = Task::start(&format!("Package lists of {}", suites.join(" and ")), 0);
        let output = apt.run(apt.get().args(["update", "-q"]))?;
        if !output.status.success() {
            bail!(apt.explain_update(&output, suites));
        }
        task.done("read");
        Ok(apt)
    }

    /// Everything is extracted: lists and archive files are only disk space now.
    pub(crate) fn discard(self) {
        // What cannot be removed does no harm.
        let _ = fs::remove_dir_all(&self.dir);
    }

    /// `packages` and all they depend on, or only the packages whose names `keep` accepts.
    pub(crate) fn resolve(
        &self,
        packages: &[&str],
        suite: &str,
        keep: impl Fn(&str) -> bool,
    ) -> Result<Vec<Deb>> {
        let mut get = self.get();
        get.args([
            "install",
            "-qq",
            "--yes",
            "--print-uris",
            "--no-install-recommends",
            "-t",
            suite,
        ])
        .args(packages);
        let output = self.run(&mut get)?;
        if !output.status.success() {
            bail!(
                "the archive's suite {suite} cannot provide {}: {}\nCure: set VIRTPROXY_SUITE to a suite that can",
                packages.join(" "),
                last_lines(&output.stderr, 8)
            );
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let debs: Vec<_> = text
            .lines()
            .filter_map(parse_uri)
            .filter(|deb| keep(&deb.name))
            .collect();
        if debs.is_empty() {
            bail!(
                "apt found nothing to download for {}: report this with {}",
                packages.join(" "),
                self.dir.display()
            );
        }
        Ok(debs)
    }

    /// Downloads what is not here yet and gives each package's file, in the order of `debs`.
    pub(crate) fn download(&self, debs: &[Deb], what: &str) -> Result<Vec<PathBuf>> {
        let folder = self.dir.join("debs");
        let paths: Vec<_> = debs.iter().map(|deb| folder.join(&deb.file)).collect();
        let total: u64 = debs.iter().map(|deb| deb.size).sum();
        let title = format!(
            "Downloading {what}: {} packages, {}",
            debs.len(),
            progress::size(total)
        );
        let mut task = Task::start(&title, debs.len());
        // What an interrupted run left: apt would only look at the size.
        for (_, path) in wrong_files(debs, &paths)? {
            let _ = fs::remove_file(path);
        }
        let mut child = self
            .get()
            .args(["download", "-q"])
            .args(
                debs.iter()
                    .map(|deb| format!("{}={}", deb.name, deb.version)),
            )
            .current_dir(&folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start apt-get")?;
        let stderr = child.stderr.take().map(|mut pipe| {
            std::thread::spawn(move || {
                let mut text = Vec::new();
                // A broken pipe only shortens the error's text.
                let _ = pipe.read_to_end(&mut text);
                text
            })
        });
        let mut done = 0;
        for line in child
            .stdout
            .take()
            .into_iter()
            .flat_map(|pipe| BufReader::new(pipe).lines())
            .map_while(Result::ok)
        {
            if line.starts_with("Get:") {
                done += 1;
                // Get:3 URI SUITE/COMPONENT ARCH NAME ARCH VERSION [SIZE]
                let name = line.split_whitespace().nth(4).unwrap_or("").to_owned();
                let bytes = debs
                    .iter()
                    .find(|deb| deb.name == name)
                    .map_or(0, |deb| deb.size);
                task.part(done, &name, bytes);
            }
        }
        let status = child.wait().context("cannot wait for apt-get")?;
        let stderr = stderr
            .and_then(|thread| thread.join().ok())
            .unwrap_or_default();
        let broken: Vec<_> = wrong_files(debs, &paths)?
            .into_iter()
            .map(|(deb, _)| format!("{} {}", deb.name, deb.version))
            .collect();
        if !status.success() || !broken.is_empty() {
            bail!(
                "download failed for {}\n{}\nCure: run the same command again; it goes on where it stopped. If it \
                 keeps failing, see that `apt-get update` works on this machine and that {} is reachable",
                if broken.is_empty() {
                    what.to_owned()
                } else {
                    broken.join(", ")
                },
                last_lines(&stderr, 8),
                self.archive
            );
        }
        task.done("complete");
        Ok(paths)
    }

    fn get(&self) -> Command {
        let mut command = Command::new("apt-get");
        command
            .env("APT_CONFIG", self.dir.join("apt.conf"))
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    fn run(&self, command: &mut Command) -> Result<Output> {
        command
            .stdin(Stdio::null())
            .output()
            .context("cannot start apt-get: is apt installed?")
    }

    fn explain_update(&self, output: &Output, suites: &[String]) -> String {
        let said = last_lines(&output.stderr, 8);
        let cure = if said.contains("does not have a Release file") || said.contains("404") {
            "this machine's archive does not carry that suite. Install QEMU 10.2 or newer and set \
             VIRTPROXY_QEMU=/path/to/qemu-system-x86_64, and set VIRTPROXY_SUITE to a suite that the archive has"
        } else if said.contains("NO_PUBKEY") || said.contains("not signed") {
            "this machine's keys do not verify that suite: install the current debian-archive-keyring (or \
             ubuntu-keyring) package"
        } else {
            "see that `apt-get update` works on this machine; behind a proxy, tell apt (Acquire::http::Proxy) or set \
             http_proxy"
        };
        format!(
            "cannot read the package lists of {} from {}:\n{said}\nCure: {cure}",
            suites.join(" and "),
            self.archive
        )
    }
}

/// The private apt's own settings, after what the machine's say about reaching the network.
fn configuration(dir: &Path) -> Result<String> {
    let output = Command::new("apt-config")
        .arg("dump")
        .output()
        .context("cannot start apt-config")?;
    let dump = String::from_utf8_lossy(&output.stdout);
    let own = [
        "Acquire::IndexTargets",
        "Acquire::Languages",
        "Acquire::CompressionTypes",
        "Acquire::Changelogs",
    ];
    let mut text: String = dump
        .lines()
        .filter(|line| {
            line.starts_with("Acquire::") && !own.iter().any(|prefix| line.starts_with(prefix))
        })
        .flat_map(|line| [line, "\n"])
        .collect();
    let dir = dir.display();
    text.push_str(&format!(
        r#"Dir::Etc::parts "/dev/null";
Dir::Etc::main "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::sourcelist "{dir}/lab.sources";
Dir::State "{dir}/state";
Dir::State::lists "{dir}/lists";
Dir::State::status "{dir}/status";
Dir::State::extended_states "{dir}/state/extended_states";
Dir::Cache "{dir}";
Dir::Cache::srcpkgcache "";
Dir::Cache::archives "{dir}/archives";
Dir::Log "{dir}";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::ForceHash "SHA256";
Acquire::GzipIndexes "true";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::CNF::DefaultEnabled "false";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
APT::Install-Recommends "false";
Debug::NoLocking "true";
"#
    ));
    Ok(text)
}

/// One line of `--print-uris`: `'URI' NAME_VERSION_ARCH.deb SIZE SHA256:HASH`.
fn parse_uri(line: &str) -> Option<Deb> {
    let mut words = line.strip_prefix('\'')?.split_whitespace().skip(1);
    let file = words.next()?;
    let size = words.next()?.parse().ok()?;
    let sha256 = words.next()?.strip_prefix("SHA256:")?.to_owned();
    let mut parts = file.strip_suffix(".deb")?.split('_');
    let (name, version) = (parts.next()?, parts.next()?);
    Some(Deb {
        name: name.to_owned(),
        version: version.replace("%3a", ":"),
        file: file.to_owned(),
        size,
        sha256,
    })
}

/// The packages whose files are absent or have another content than the signed lists say.
fn wrong_files<'a>(debs: &'a [Deb], paths: &'a [PathBuf]) -> Result<Vec<(&'a Deb, &'a PathBuf)>> {
    let output = Command::new("sha256sum")
        .arg("--")
        .args(paths.iter().filter(|path| path.is_file()))
        .stdin(Stdio::null())
        .output()
        .context("cannot start sha256sum: is coreutils installed?")?;
    let sums = String::from_utf8_lossy(&output.stdout);
    let sums: HashMap<_, _> = sums
        .lines()
        .filter_map(|line| line.split_once("  "))
        .map(|(sum, path)| (path, sum))
        .collect();
    let right = |deb: &Deb, path: &Path| {
        path.to_str()
            .and_then(|path| sums.get(path))
            .is_some_and(|sum| *sum == deb.sha256)
    };
    Ok(std::iter::zip(debs, paths)
        .filter(|(deb, path)| !right(deb, path))
        .collect())
}

/// The end of a program's standard error, for people.
pub(crate) fn last_lines(bytes: &[u8], count: usize) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<_> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_name_package_version_and_size() {
        let line =
            "'http://x/z.deb' zlib1g_1%3a1.3.dfsg+really1.3.1-1+b1_amd64.deb 88892 SHA256:32f2";
        let deb = parse_uri(line).unwrap();
        assert_eq!((deb.name.as_str(), deb.size), ("zlib1g", 88892));
        assert_eq!(deb.version, "1:1.3.dfsg+really1.3.1-1+b1");
        assert_eq!(deb.file, "zlib1g_1%3a1.3.dfsg+really1.3.1-1+b1_amd64.deb");
        assert_eq!(parse_uri("Reading package lists..."), None);
    }
}
