//! A vsock device of another project: vhost-device-vsock, with which a guest's AF_VSOCK meets UNIX sockets of the host.
//!
//! No distribution carries it, so its released source is built with this machine's own cargo, once, into the cache. It
//! is only asked for by tests that need it: the build takes minutes.
//!
//! For a guest's port P, whoever connects to the UNIX socket `uds` and says `CONNECT P` reaches the guest; and what the
//! guest connects to on CID 2, port P, arrives at the UNIX socket `uds_P`, where somebody of the host listens.

use crate::cache::{self, Cache};
use crate::lab::Lab;
use crate::progress::Task;
use crate::spawn;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const CRATE: &str = "vhost-device-vsock";
const VERSION: &str = "0.3.0";
const LOG: &str = "vsock.log";
/// What the guest may send before it must be told that some was taken. That message can get lost in this device, and
/// with its default of 64 KiB a guest that only sends then waits for ever; but every message to the guest tells it too.
const BUFFER: u32 = 8 << 20;
/// How long it may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(10);

/// A running vhost-device-vsock; it ends with this value.
#[derive(Debug)]
pub struct VsockDevice {
    child: Child,
    socket: PathBuf,
    uds: PathBuf,
}

impl VsockDevice {
    /// Builds it if it is not in the cache yet, and starts it for a guest with the context id `cid`. Its sockets and
    /// its log are in `folder`.
    pub fn start(lab: &Lab, cid: u32, folder: &Path) -> Result<Self> {
        let program = program(&lab.cache)?;
        let [socket, uds, log] = ["vsock-device", "vsock", LOG].map(|name| folder.join(name));
        let said = File::create(&log).context("cannot create the vsock device's log")?;
        let mut command = Command::new(program);
        command
            .arg("--vm")
            .arg(format!(
                "guest-cid={cid},socket={},uds-path={},tx-buffer-size={BUFFER}",
                socket.display(),
                uds.display()
            ))
            .stdin(Stdio::null())
            .stdout(said.try_clone()?)
            .stderr(said);
        let child = spawn::spawn(command).context("cannot start vhost-device-vsock")?;
        let mut device = Self { child, socket, uds };
        let deadline = Instant::now() + START_LIMIT;
        while !device.socket.exists() {
            let ended = device.child.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                bail!("{CRATE} does not listen: {}", device.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(device)
    }

    /// Its name and version.
    pub fn title() -> String {
        format!("{CRATE} {VERSION}")
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.socket.with_file_name(LOG)).unwrap_or_default()
    }

    /// Where QEMU reaches the device.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The UNIX socket where the host says `CONNECT PORT` to reach the guest.
    pub fn uds(&self) -> &Path {
        &self.uds
    }

    /// The UNIX socket where the guest's connections to the host's `port` arrive.
    pub fn uds_of(&self, port: u32) -> PathBuf {
        let mut path = self.uds.clone().into_os_string();
        path.push(format!("_{port}"));
        path.into()
    }
}

impl Drop for VsockDevice {
    fn drop(&mut self) {
        // Errors here mean that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program, built when it is not in the cache.
fn program(cache: &Cache) -> Result<PathBuf> {
    let root = cache.path(format!("{CRATE}-{VERSION}"));
    let program = Path::new("bin").join(CRATE);
    if root.join(&program).is_file() {
        return Ok(root.join(program));
    }
    let _lock = cache.lock()?;
    // Whoever held the lock may have built it.
    if !root.join(&program).is_file() {
        build(&root)?;
    }
    Ok(root.join(program))
}

fn build(root: &Path) -> Result<()> {
    let task = Task::start(&format!("Building {CRATE} {VERSION} (minutes)"), 0);
    let temporary = cache::beside(root);
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["install", CRATE, "--version", VERSION, "--locked", "--root"])
        .arg(&temporary)
        .arg("--target-dir")
        .arg(temporary.join("target"))
        // The test that asks may itself run with flags and a target of its own.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET")
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!(
            "{CRATE} {VERSION} could not be built. Cure: see that cargo reaches its registry, then run the same \
             command again; or build it elsewhere and put it at {}",
            root.join("bin").display()
        );
    }
    let cannot = || format!("cannot put {CRATE} into {}", root.display());
    fs::remove_dir_all(temporary.join("target")).with_context(cannot)?;
    fs::rename(&temporary, root).with_context(cannot)?;
    task.done(&format!("in {}", root.display()));
    Ok(())
}
