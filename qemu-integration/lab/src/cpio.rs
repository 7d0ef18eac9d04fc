//! Writes the `newc` cpio format that the kernel unpacks as its first root.
//!
//! Each entry is a header of the magic `070701` and thirteen 8-digit hexadecimal fields, the name with its NUL, and the
//! bytes, each padded to four. `TRAILER!!!` ends an archive. The kernel takes several archives one after the other, and
//! needs no compression; device nodes are only bytes here, so no root is needed to make one.

use anyhow::{Context, Result};
use std::collections::BTreeSet;

/// An archive being written. Parent folders appear by themselves.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    entries: u32,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

impl Archive {
    /// An empty archive.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// A folder with mode 0755, and the ones above it.
    pub(crate) fn directory(&mut self, path: &str) -> Result<()> {
        self.directory_with(path, 0o755)
    }

    /// A folder with a mode of its own.
    pub(crate) fn directory_with(&mut self, path: &str, mode: u32) -> Result<()> {
        let path = path.trim_matches('/');
        if path.is_empty() || !self.folders.insert(path.to_owned()) {
            return Ok(());
        }
        self.parent(path)?;
        self.entry(path, DIRECTORY | mode, &[], (0, 0))
    }

    /// A regular file.
    pub(crate) fn file(&mut self, path: &str, bytes: &[u8], mode: u32) -> Result<()> {
        let path = path.trim_start_matches('/');
        self.parent(path)?;
        self.entry(path, REGULAR | mode, bytes, (0, 0))
    }

    /// A symbolic link.
    pub(crate) fn link(&mut self, path: &str, target: &str) -> Result<()> {
        let path = path.trim_start_matches('/');
        self.parent(path)?;
        self.entry(path, SYMLINK | 0o777, target.as_bytes(), (0, 0))
    }

    /// A character device.
    pub(crate) fn device(&mut self, path: &str, major: u32, minor: u32) -> Result<()> {
        let path = path.trim_start_matches('/');
        self.parent(path)?;
        self.entry(path, CHARACTER | 0o600, &[], (major, minor))
    }

    /// The archive's bytes.
    pub(crate) fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[], (0, 0))?;
        Ok(self.bytes)
    }

    fn parent(&mut self, path: &str) -> Result<()> {
        match path.rsplit_once('/') {
            Some((parent, _)) => self.directory(parent),
            None => Ok(()),
        }
    }

    fn entry(
        &mut self,
        path: &str,
        mode: u32,
        bytes: &[u8],
        (major, minor): (u32, u32),
    ) -> Result<()> {
        let size = u32::try_from(bytes.len())
            .with_context(|| format!("{path} is too large for the image"))?;
        let name_size = u32::try_from(path.len() + 1).context("a name in the image is too long")?;
        self.entries += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        // inode mode uid gid links mtime size major minor rdev-major rdev-minor name-size check
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            major,
            minor,
            name_size,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(bytes);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive back: (name, mode, bytes).
    fn entries(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |index: usize| {
                let start = at + 6 + index * 8;
                u32::from_str_radix(std::str::from_utf8(&bytes[start..start + 8]).unwrap(), 16)
                    .unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name =
                String::from_utf8(bytes[at + 110..at + 110 + name_size - 1].to_vec()).unwrap();
            let body = (at + 110 + name_size).next_multiple_of(4);
            entries.push((name, mode, bytes[body..body + size].to_vec()));
            at = (body + size).next_multiple_of(4);
        }
        entries
    }

    #[test]
    fn what_is_written_can_be_read_back() {
        let mut archive = Archive::new();
        archive.file("/usr/bin/a", b"12345", 0o755).unwrap();
        archive.link("bin", "usr/bin").unwrap();
        archive.directory_with("tmp", 0o1777).unwrap();
        archive.device("dev/console", 5, 1).unwrap();
        let read = entries(&archive.finish().unwrap());
        let names: Vec<_> = read.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "usr",
                "usr/bin",
                "usr/bin/a",
                "bin",
                "tmp",
                "dev",
                "dev/console",
                "TRAILER!!!"
            ]
        );
        assert_eq!(
            read[2],
            ("usr/bin/a".to_owned(), 0o100_755, b"12345".to_vec())
        );
        assert_eq!(read[3].2, b"usr/bin");
        assert_eq!(read[4].1, 0o041_777);
    }
}
