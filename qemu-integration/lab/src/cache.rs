//! The folder where everything fetched or built is kept between runs.
//!
//! `$VIRTPROXY_CACHE`, else `$XDG_CACHE_HOME/virtproxy`, else `~/.cache/virtproxy`. An artefact is built under a
//! temporary name, checked, stamped and only then renamed to its own name, so what has its name is complete: a second
//! run fetches nothing, and a run that was interrupted leaves nothing that looks finished. One process at a time
//! prepares the folder; the others wait for its lock and then find the work done.

use crate::progress;
use anyhow::{Context, Result, bail};
use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File, OpenOptions, Permissions};
use std::hash::{Hash, Hasher};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The cache folder.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// Held while the cache is being prepared; released on drop.
#[derive(Debug)]
pub struct CacheLock {
    _file: File,
}

/// The name of the file that marks an extracted prefix as complete and says what is in it.
pub(crate) const STAMP: &str = ".lab-stamp";

impl Cache {
    /// The folder that the environment names, created when it is not there.
    pub fn open() -> Result<Self> {
        let from = |name: &str| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        let root = match (
            from("VIRTPROXY_CACHE"),
            from("XDG_CACHE_HOME"),
            from("HOME"),
        ) {
            (Some(root), _, _) => root,
            (None, Some(cache), _) => cache.join("virtproxy"),
            (None, None, Some(home)) => home.join(".cache/virtproxy"),
            (None, None, None) => {
                bail!("no place for the cache: set VIRTPROXY_CACHE to a folder you can write to")
            }
        };
        Self::at(&root)
    }

    /// A cache in a folder of the caller's choice.
    pub fn at(root: &Path) -> Result<Self> {
        let cure = || {
            format!(
                "cannot use {} as the cache: set VIRTPROXY_CACHE to another folder",
                root.display()
            )
        };
        fs::create_dir_all(root).with_context(cure)?;
        // Scripts in the cache name other files of it, so its path must be absolute.
        let root = root.canonicalize().with_context(cure)?;
        if root
            .to_string_lossy()
            .contains(['\'', '\n', '"', ' ', ':', ','])
        {
            bail!(
                "the cache's path {:?} holds a blank, quote, comma or colon, which apt or QEMU would misread: \
                 set VIRTPROXY_CACHE to another folder",
                root
            );
        }
        Ok(Self { root })
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path inside the folder.
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.root.join(relative)
    }

    /// A folder inside the cache, created when it is not there.
    pub(crate) fn dir(&self, relative: impl AsRef<Path>) -> Result<PathBuf> {
        let path = self.path(relative);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(path)
    }

    /// Waits until no other process prepares this cache.
    pub fn lock(&self) -> Result<CacheLock> {
        let path = self.path("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        if !flock(&file, libc::LOCK_EX | libc::LOCK_NB)? {
            progress::note("another process prepares the cache, waiting for it");
            flock(&file, libc::LOCK_EX)?;
        }
        Ok(CacheLock { _file: file })
    }
}

/// True when the lock was taken, false when it is held elsewhere and `how` says not to wait.
fn flock(file: &File, how: libc::c_int) -> Result<bool> {
    loop {
        // SAFETY: the descriptor is open for as long as `file` lives; flock touches no memory.
        if unsafe { libc::flock(file.as_raw_fd(), how) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Ok(false),
            _ => {
                return Err(error)
                    .context("cannot lock the cache folder: set VIRTPROXY_CACHE to a local disk");
            }
        }
    }
}

/// Writes a file so that nobody ever sees half of it. An equal file is left alone.
pub(crate) fn write_whole(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let temporary = beside(path);
    let write = || -> io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_data()?;
        drop(file);
        fs::rename(&temporary, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// A temporary name next to `path`, of this process alone.
pub(crate) fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".tmp-{}", std::process::id()));
    path.with_file_name(name)
}

/// Removes what interrupted runs left in `dir`. Call it with the lock held.
pub(crate) fn sweep(dir: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().contains(".tmp-") {
            continue;
        }
        let path = entry.path();
        let removed = if path.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.with_context(|| format!("cannot remove the leftover {}", path.display()))?;
    }
    Ok(())
}

/// A short name for a set of inputs.
pub(crate) fn fingerprint(inputs: &[&[u8]]) -> String {
    let mut hasher = DefaultHasher::new();
    inputs.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_is_exclusive_and_ends_with_its_guard() -> Result<()> {
        let dir = std::env::temp_dir().join(format!("virtproxy-cache-test-{}", std::process::id()));
        let cache = Cache::at(&dir)?;
        let held = cache.lock()?;
        let other = File::create(cache.path("lock"))?;
        assert!(!flock(&other, libc::LOCK_EX | libc::LOCK_NB)?);
        drop(held);
        assert!(flock(&other, libc::LOCK_EX | libc::LOCK_NB)?);
        fs::remove_dir_all(dir)?;
        Ok(())
    }

    #[test]
    fn a_path_that_tools_would_misread_is_refused() {
        let dir = std::env::temp_dir().join(format!("virtproxy cache {}", std::process::id()));
        let error = Cache::at(&dir).unwrap_err().to_string();
        assert!(error.contains("VIRTPROXY_CACHE"), "{error}");
        let _ = fs::remove_dir_all(dir);
    }
}
