//! Temporary folders for sockets and logs.
//!
//! A test that is killed, or keeps its guest in a static, never removes its folder. Whoever makes the next one removes
//! those whose process is gone.

use anyhow::{Context, Result};
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Folders younger than this are left alone: they may belong to a process of another container.
const STALE: Duration = Duration::from_secs(3600);

/// A new folder of this user alone, below the system's folder for temporary files. Its path is short enough for
/// sockets.
pub fn temporary_folder() -> Result<PathBuf> {
    let base = Some(std::env::temp_dir()).filter(|dir| dir.as_os_str().len() < 60);
    temporary_folder_in(&base.unwrap_or_else(|| "/tmp".into()))
}

/// The same below a folder of the caller's choice.
pub fn temporary_folder_in(base: &Path) -> Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    sweep(base);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = base.join(format!("virtproxy-{}-{number}", std::process::id()));
        match fs::DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => return Ok(folder),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot create {}: set TMPDIR", folder.display()));
            }
        }
    }
}

fn sweep(base: &Path) {
    // Whatever cannot be read or removed is somebody else's.
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix("virtproxy-")?.split_once('-'));
        let Some((pid, _)) = owner.filter(|(pid, _)| pid.parse::<u32>().is_ok()) else {
            continue;
        };
        let process = Path::new("/proc").join(pid);
        let stale = entry.metadata().is_ok_and(|meta| {
            let age = meta.modified().ok().and_then(|time| time.elapsed().ok());
            meta.is_dir() && age.is_some_and(|age| age > STALE) && is_ours(&meta)
        });
        if stale && !process.exists() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn is_ours(meta: &fs::Metadata) -> bool {
    // SAFETY: geteuid only returns a number.
    meta.uid() == unsafe { libc::geteuid() }
}
