//! A folder of extracted packages, complete or absent.
//!
//! Nothing is configured and no package script runs: `dpkg-deb -x` unpacks each package of a closure over the others.
//! The folder's name holds a hash of its recipe, so another version of the lab that asks for other packages makes
//! another folder, and the stamp inside lists each package with its version.

use crate::apt::Apt;
use crate::cache::{self, Cache, STAMP};
use crate::progress::Task;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What a prefix is made of.
#[derive(Debug)]
pub(crate) struct Recipe<'a> {
    /// The folder's name.
    pub(crate) name: &'a str,
    /// For people.
    pub(crate) what: &'a str,
    /// The suite that wins where several have a package.
    pub(crate) suite: &'a str,
    /// Packages asked for.
    pub(crate) packages: &'a [&'a str],
    /// Which packages of the closure are taken.
    pub(crate) keep: fn(&str) -> bool,
    /// Files that must be there afterwards.
    pub(crate) must_have: &'a [&'a str],
}

/// An extracted, complete folder of packages.
#[derive(Debug, Clone)]
pub struct Prefix {
    root: PathBuf,
}

impl Recipe<'_> {
    fn folder(&self, cache: &Cache) -> PathBuf {
        let packages = self.packages.join(" ");
        let key = cache::fingerprint(&[self.suite.as_bytes(), packages.as_bytes()]);
        cache.path(format!("{}-{}-{}", self.name, self.suite, &key[..8]))
    }

    /// The prefix when it is in the cache.
    pub(crate) fn cached(&self, cache: &Cache) -> Option<Prefix> {
        let root = self.folder(cache);
        root.join(STAMP).is_file().then_some(Prefix { root })
    }

    /// Downloads and extracts it. Call it with the cache's lock held.
    pub(crate) fn build(&self, cache: &Cache, apt: &Apt) -> Result<Prefix> {
        let root = self.folder(cache);
        cache::sweep(cache.root())?;
        let debs = apt.resolve(self.packages, self.suite, self.keep)?;
        let files = apt.download(&debs, self.what)?;
        let temporary = cache::beside(&root);
        fs::create_dir_all(&temporary)
            .with_context(|| format!("cannot create {}", temporary.display()))?;
        let mut task = Task::start(&format!("Extracting {}", self.what), debs.len());
        let mut stamp = format!("{} from {}\n", self.what, self.suite);
        for (index, (deb, file)) in std::iter::zip(&debs, &files).enumerate() {
            task.part(index + 1, &deb.name, deb.size);
            extract(file, &temporary).with_context(|| {
                // The next run must not trust it again.
                let _ = fs::remove_file(file);
                format!(
                    "the package {} {} could not be extracted; its file was removed. Cure: see that the disk of {} \
                     has room, then run the same command again",
                    deb.name,
                    deb.version,
                    cache.root().display()
                )
            })?;
            stamp.push_str(&format!("{} {}\n", deb.name, deb.version));
        }
        for file in self.must_have {
            if !temporary.join(file).exists() {
                bail!(
                    "{} has no {file}: the suite {} lays its packages out differently",
                    self.what,
                    self.suite
                );
            }
        }
        fs::write(temporary.join(STAMP), stamp).context("cannot write the stamp")?;
        if root.exists() {
            fs::remove_dir_all(&root)
                .with_context(|| format!("cannot replace {}", root.display()))?;
        }
        fs::rename(&temporary, &root)
            .with_context(|| format!("cannot rename to {}", root.display()))?;
        for file in files {
            // Extracted and stamped: the archive file is only disk space now.
            let _ = fs::remove_file(file);
        }
        task.done(&format!("in {}", root.display()));
        Ok(Prefix { root })
    }
}

fn extract(deb: &Path, into: &Path) -> Result<()> {
    let output = Command::new("dpkg-deb")
        .arg("-x")
        .args([deb, into])
        .stdin(Stdio::null())
        .output()
        .context("cannot start dpkg-deb: is dpkg installed?")?;
    if !output.status.success() {
        bail!("dpkg-deb: {}", crate::apt::last_lines(&output.stderr, 4));
    }
    Ok(())
}

/// Where the dynamic loader may be below a root.
const LOADERS: &[&str] = &[
    "usr/lib64/ld-linux-x86-64.so.2",
    "lib64/ld-linux-x86-64.so.2",
];
/// Where libraries may be below a root.
const LIBRARIES: &[&str] = &["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];

impl Prefix {
    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What is in it: the recipe on the first line, then a package and its version a line.
    pub fn stamp(&self) -> String {
        fs::read_to_string(self.root.join(STAMP)).unwrap_or_default()
    }

    /// The version of one of its packages.
    pub fn version(&self, package: &str) -> Option<String> {
        let stamp = self.stamp();
        stamp
            .lines()
            .find_map(|line| Some(line.strip_prefix(package)?.strip_prefix(' ')?.to_owned()))
    }

    /// Its dynamic loader.
    pub(crate) fn loader(&self) -> Result<PathBuf> {
        let found = LOADERS
            .iter()
            .map(|path| self.root.join(path))
            .find(|path| path.exists());
        found.with_context(|| {
            format!(
                "{} has no dynamic loader: remove that folder",
                self.root.display()
            )
        })
    }

    /// Its library folders, as the loader wants them.
    pub(crate) fn library_path(&self) -> String {
        let folders = LIBRARIES
            .iter()
            .map(|path| self.root.join(path))
            .filter(|path| path.is_dir());
        folders
            .map(|path| path.display().to_string())
            .collect::<Vec<_>>()
            .join(":")
    }

    /// The shared libraries that `program` (a file on the host) needs, found in this prefix.
    pub(crate) fn libraries_of(&self, program: &Path) -> Result<Vec<PathBuf>> {
        let output = Command::new(self.loader()?)
            .args(["--library-path", &self.library_path(), "--list"])
            .arg(program)
            .stdin(Stdio::null())
            .output()
            .context("cannot run the extracted loader")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let said = format!("{text}\n{}", String::from_utf8_lossy(&output.stderr));
        if let Some(line) = said.lines().find(|line| line.contains("not found")) {
            bail!(
                "{} cannot run in the guest: {}. Cure: set VIRTPROXY_SUITE to a release that is not older than this \
                 machine's",
                program.display(),
                line.trim()
            );
        }
        // `libz.so.1 => /prefix/usr/lib/x86_64-linux-gnu/libz.so.1 (0x...)`; a static program prints one sentence.
        let paths = text
            .lines()
            .filter_map(|line| line.split("=> ").nth(1)?.split(" (").next());
        Ok(paths
            .map(PathBuf::from)
            .filter(|path| path.starts_with(&self.root))
            .collect())
    }
}
