//! Builds the guest's first (and only) root file system.
//!
//! busybox gives init, the shell, the web server and the small tools; the SSH server and socat come from the same
//! release's packages with the libraries that the loader says they need. The base part depends only on packages,
//! scripts and keys and is cached under a hash of them. What a test adds (the agent, further programs of the packages,
//! kernel modules, its own lines for the start) is a second archive that follows the first, made anew for each boot: a
//! guest that does not ask for something does not unpack it.

use crate::apt::Apt;
use crate::cache::{self, Cache, write_whole};
use crate::cpio::Archive;
use crate::keys::Keys;
use crate::plan::Plan;
use crate::prefix::{Prefix, Recipe};
use crate::progress::{self, Task};
use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Packages whose programs are used in the guest, or on the host when they are not installed there.
const PACKAGES: &[&str] = &[
    "busybox-static",
    "openssh-server",
    "openssh-sftp-server",
    "openssh-client",
    "socat",
    "qemu-guest-agent",
    "dnsmasq-base",
    "bind9-dnsutils",
    "wget",
    "passt",
];

/// Programs copied into every guest. What a release does not have yet or any more is left out.
const PROGRAMS: &[&str] = &[
    "usr/sbin/sshd",
    "usr/lib/openssh/sshd-session",
    "usr/lib/openssh/sshd-auth",
    "usr/lib/openssh/sftp-server",
    "usr/bin/socat",
];

/// Libraries that no list of needs names: loaded by name at run time, or wanted by older programs.
const MORE_LIBRARIES: &[&str] = &[
    "libgcc_s.so.1",
    "libm.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "librt.so.1",
    "libresolv.so.2",
    "libnss_dns.so.2",
];

const LIBRARY_FOLDER: &str = "usr/lib/x86_64-linux-gnu";

fn recipe(plan: &Plan) -> Recipe<'_> {
    Recipe {
        name: "userland",
        what: "the guest's programs",
        suite: &plan.suite,
        packages: PACKAGES,
        keep: |_| true,
        must_have: &[
            "usr/bin/busybox",
            "usr/sbin/sshd",
            "usr/bin/socat",
            "usr/bin/ssh-keygen",
            "usr/sbin/qemu-ga",
            "usr/sbin/dnsmasq",
            "usr/bin/dig",
            "usr/bin/wget",
            "usr/bin/passt.avx2",
        ],
    }
}

/// The extracted programs, when they are in the cache.
pub(crate) fn cached_userland(cache: &Cache, plan: &Plan) -> Option<Prefix> {
    recipe(plan).cached(cache)
}

/// Extracts them.
pub(crate) fn fetch_userland(cache: &Cache, plan: &Plan, apt: &Apt) -> Result<Prefix> {
    recipe(plan).build(cache, apt)
}

/// Where busybox is.
pub(crate) fn busybox(userland: &Prefix) -> PathBuf {
    userland.root().join("usr/bin/busybox")
}

/// The base image, built when no cached one has the same inputs.
pub(crate) fn base(cache: &Cache, userland: &Prefix, keys: &Keys) -> Result<PathBuf> {
    let stamp = userland.stamp();
    let mut inputs: Vec<Vec<u8>> = vec![stamp.into_bytes()];
    // This file's own text: the layout below is an input too.
    inputs.push(include_bytes!("image.rs").to_vec());
    inputs.extend(
        texts()
            .into_iter()
            .map(|(_, text, _)| text.as_bytes().to_vec()),
    );
    for key in [&keys.host, &keys.user_public()] {
        inputs.push(fs::read(key).with_context(|| format!("cannot read {}", key.display()))?);
    }
    let key = cache::fingerprint(&inputs.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let folder = cache.dir("images")?;
    let file = folder.join(format!("base-{key}.cpio"));
    if file.is_file() {
        return Ok(file);
    }
    let task = Task::start("Building the guest's image", 0);
    for old in fs::read_dir(&folder)
        .context("cannot list the images")?
        .flatten()
    {
        // Another checkout may still boot from a young one.
        let age = old
            .metadata()
            .and_then(|meta| meta.modified())
            .ok()
            .and_then(|time| time.elapsed().ok());
        if age.is_some_and(|age| age > Duration::from_secs(24 * 3600)) {
            let _ = fs::remove_file(old.path());
        }
    }
    let bytes = assemble(userland, keys)?;
    write_whole(&file, &bytes, 0o600)?;
    task.done(&progress::size(bytes.len() as u64));
    Ok(file)
}

/// (path in the guest, text, mode)
fn texts() -> Vec<(&'static str, &'static str, u32)> {
    vec![
        ("etc/inittab", include_str!("../guest/inittab"), 0o644),
        ("etc/init.d/rcS", include_str!("../guest/rcS"), 0o755),
        ("lib/lab/shell", include_str!("../guest/shell"), 0o755),
        (
            "etc/ssh/sshd_config",
            include_str!("../guest/sshd_config"),
            0o644,
        ),
        (
            "srv/www/index.html",
            include_str!("../guest/index.html"),
            0o644,
        ),
        (
            "etc/hosts",
            "127.0.0.1 localhost guest\n::1 localhost\n",
            0o644,
        ),
        (
            "etc/nsswitch.conf",
            "passwd: files\ngroup: files\nhosts: files\n",
            0o644,
        ),
        ("etc/group", "root:x:0:\nnogroup:x:65534:\n", 0o644),
        ("etc/shells", "/bin/sh\n", 0o644),
        (
            "etc/profile",
            "export PATH=/usr/bin:/usr/sbin\nexport PS1='guest# '\n",
            0o644,
        ),
        // The password is `virtproxy`; the SSH server takes none, so it opens the consoles only.
        (
            "etc/shadow",
            "root:$6$virtproxy$3BQgPvgWaTHSn4sWrFLtxeYprTE55L9af.mPDvduTZMZd3JT5Hst18ikxeyLp/vyzMVgEAfZ90XeiOCwsWhq70\
             :20000:0:99999:7:::\nsshd:!:20000::::::\n",
            0o600,
        ),
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n\
             nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
            0o644,
        ),
    ]
}

fn assemble(userland: &Prefix, keys: &Keys) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for link in ["bin", "sbin", "lib", "lib64"] {
        archive.directory(&format!("usr/{link}"))?;
        archive.link(link, &format!("usr/{link}"))?;
    }
    for folder in [
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "var/log",
        "var/empty",
        "mnt",
        "srv/www",
    ] {
        archive.directory(folder)?;
    }
    archive.directory_with("root", 0o700)?;
    archive.directory_with("root/.ssh", 0o700)?;
    archive.device("dev/console", 5, 1)?;
    for (path, text, mode) in texts() {
        // `/lib` is a link, and an archive may not put files below a link.
        let path = path
            .strip_prefix("lib/")
            .map_or_else(|| path.to_owned(), |rest| format!("usr/lib/{rest}"));
        archive.file(&path, text.as_bytes(), mode)?;
    }
    archive.link("var/run", "/run")?;
    // Files made at run time can be served too.
    archive.link("srv/www/tmp", "/tmp")?;
    archive.file("etc/ssh/host_ed25519", &read(&keys.host)?, 0o600)?;
    archive.file(
        "root/.ssh/authorized_keys",
        &read(&keys.user_public())?,
        0o600,
    )?;

    let busybox = busybox(userland);
    archive.file("usr/bin/busybox", &read(&busybox)?, 0o755)?;
    archive.link("init", "usr/bin/busybox")?;
    let output = Command::new(&busybox)
        .arg("--list")
        .output()
        .context("cannot run the extracted busybox")?;
    let applets = String::from_utf8_lossy(&output.stdout).into_owned();
    let own: BTreeSet<_> = PROGRAMS
        .iter()
        .filter_map(|path| path.rsplit('/').next())
        .chain(["busybox"])
        .collect();
    for applet in applets.lines().filter(|applet| !own.contains(applet)) {
        archive.link(&format!("usr/bin/{applet}"), "busybox")?;
    }
    for applet in ["init", "reboot", "poweroff", "halt", "modprobe", "insmod"] {
        archive.link(&format!("usr/sbin/{applet}"), "../bin/busybox")?;
    }

    let mut libraries = BTreeSet::new();
    for program in PROGRAMS {
        let file = userland.root().join(program);
        if file.is_file() {
            archive.file(program, &read(&file)?, 0o755)?;
            libraries.extend(userland.libraries_of(&file)?);
        }
    }
    libraries.extend(more_libraries(userland));
    for library in &libraries {
        add_library(&mut archive, library)?;
    }
    archive.file(
        "usr/lib64/ld-linux-x86-64.so.2",
        &read(&userland.loader()?)?,
        0o755,
    )?;
    archive.finish()
}

fn more_libraries(userland: &Prefix) -> impl Iterator<Item = PathBuf> + '_ {
    let path = userland.library_path();
    let folders: Vec<PathBuf> = path.split(':').map(PathBuf::from).collect();
    MORE_LIBRARIES.iter().filter_map(move |name| {
        folders
            .iter()
            .map(|folder| folder.join(name))
            .find(|file| file.is_file())
    })
}

fn add_library(archive: &mut Archive, library: &Path) -> Result<()> {
    let name = library.file_name().unwrap_or_default().to_string_lossy();
    archive.file(&format!("{LIBRARY_FOLDER}/{name}"), &read(library)?, 0o755)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// A file that a test adds to the guest.
#[derive(Debug, Clone)]
pub struct GuestFile {
    /// Where it goes.
    pub path: String,
    /// What it holds.
    pub content: Content,
    /// Its mode.
    pub mode: u32,
}

/// What an added file holds.
#[derive(Debug, Clone)]
pub enum Content {
    /// These bytes.
    Bytes(Vec<u8>),
    /// A copy of this file of the host; a program brings the libraries it needs.
    Copy(PathBuf),
    /// The program at this path of the lab's own packages, with its libraries.
    Packaged(String),
}

impl GuestFile {
    /// A copy of a file of the host, with its mode.
    pub fn copy(from: impl Into<PathBuf>, path: impl Into<String>) -> Self {
        let from = from.into();
        let mode = fs::metadata(&from).map_or(0o644, |meta| meta.permissions().mode() & 0o777);
        Self {
            path: path.into(),
            content: Content::Copy(from),
            mode,
        }
    }

    /// A program of the lab's packages (`usr/sbin/qemu-ga`, `usr/sbin/dnsmasq`), at the same path in the guest.
    pub fn packaged(path: &str) -> Self {
        Self {
            path: path.to_owned(),
            content: Content::Packaged(path.to_owned()),
            mode: 0o755,
        }
    }

    /// A text or other bytes, with mode 0644.
    pub fn bytes(bytes: impl Into<Vec<u8>>, path: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            content: Content::Bytes(bytes.into()),
            mode: 0o644,
        }
    }
}

/// The whole image for one boot: the base, then the caller's files and start lines. Written to `into`.
pub(crate) fn for_boot(
    base: &Path,
    userland: &Prefix,
    files: &[GuestFile],
    boot_lines: &[String],
    into: &Path,
) -> Result<()> {
    let mut archive = Archive::new();
    let mut libraries = BTreeSet::new();
    for file in files {
        let mut program = |from: &Path| -> Result<Vec<u8>> {
            let bytes = fs::read(from).with_context(|| {
                format!(
                    "cannot read {}, which goes into the guest: build it first",
                    from.display()
                )
            })?;
            if bytes.starts_with(b"\x7fELF") {
                libraries.extend(userland.libraries_of(from)?);
            }
            Ok(bytes)
        };
        let bytes = match &file.content {
            Content::Bytes(bytes) => bytes.clone(),
            Content::Copy(from) => program(from)?,
            Content::Packaged(path) => program(&userland.root().join(path))?,
        };
        let path = file.path.trim_start_matches('/');
        if ["bin/", "sbin/", "lib/", "lib64/"]
            .iter()
            .any(|link| path.starts_with(link))
        {
            bail!("/{path} lies below a link in the guest: use /usr/{path}");
        }
        archive.file(path, &bytes, file.mode)?;
    }
    for library in &libraries {
        add_library(&mut archive, library)?;
    }
    if !boot_lines.is_empty() {
        archive.file(
            "etc/lab/boot",
            format!("{}\n", boot_lines.join("\n")).as_bytes(),
            0o644,
        )?;
    }
    let mut image = read(base)?;
    image.extend(archive.finish()?);
    fs::write(into, image).with_context(|| format!("cannot write {}", into.display()))
}
