//! Puts the pieces together: decides what is missing, fetches it once, and hands out commands that use it.

use crate::accel::Accel;
use crate::apt::Apt;
use crate::cache::{self, Cache};
use crate::guest::{Guest, GuestOptions};
use crate::image;
use crate::kernel::Kernel;
use crate::keys::Keys;
use crate::plan;
use crate::prefix::Prefix;
use crate::qemu::Qemu;
use crate::tools;
use anyhow::{Context, Result, anyhow, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Everything that guests need, on this machine's disk.
#[derive(Debug)]
pub struct Lab {
    /// The folder it is kept in.
    pub cache: Cache,
    /// The emulator.
    pub qemu: Qemu,
    /// Emulated or not.
    pub accel: Accel,
    /// The guests' kernel.
    pub kernel: Kernel,
    /// The guests' base image.
    pub image: PathBuf,
    /// SSH keys for the guests.
    pub keys: Keys,
    pub(crate) userland: Prefix,
}

impl Lab {
    /// The lab of this process: prepared by whoever asks first, who may have to wait for a download.
    pub fn get() -> Result<&'static Self> {
        static LAB: OnceLock<std::result::Result<Lab, String>> = OnceLock::new();
        let lab = LAB.get_or_init(|| Self::prepare().map_err(|error| format!("{error:#}")));
        lab.as_ref()
            .map_err(|error| anyhow!("the lab cannot be prepared: {error}"))
    }

    /// Fetches and builds what the cache does not have yet.
    pub fn prepare() -> Result<Self> {
        Self::prepare_in(Cache::open()?)
    }

    /// The same in a cache of the caller's choice.
    pub fn prepare_in(cache: Cache) -> Result<Self> {
        if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
            bail!("the lab runs on x86-64 Linux only");
        }
        let plan = plan::for_this_machine()?;
        let _lock = cache.lock()?;
        cache::sweep(cache.root())?;
        let mut qemu = Qemu::installed()?;
        if qemu.is_none() {
            qemu = Qemu::cached(&cache, &plan)?;
        }
        let mut kernel = Kernel::cached(&cache, &plan)?;
        let mut userland = image::cached_userland(&cache, &plan);
        if qemu.is_none() || kernel.is_none() || userland.is_none() {
            let apt = Apt::update(&cache, &plan, &plan.suites(qemu.is_none()))?;
            if qemu.is_none() {
                qemu = Some(Qemu::fetch(&cache, &plan, &apt)?);
            }
            if kernel.is_none() {
                kernel = Some(Kernel::fetch(&cache, &plan, &apt)?);
            }
            if userland.is_none() {
                userland = Some(image::fetch_userland(&cache, &plan, &apt)?);
            }
            apt.discard();
        }
        let (qemu, kernel, userland) = (
            qemu.context("no QEMU")?,
            kernel.context("no kernel")?,
            userland.context("no programs")?,
        );
        for program in [
            "usr/bin/ssh",
            "usr/bin/sftp",
            "usr/bin/ssh-keygen",
            "usr/bin/socat",
            "usr/bin/dig",
            "usr/bin/wget",
            "usr/bin/passt",
            "usr/bin/passt.avx2",
            "usr/sbin/dnsmasq",
        ] {
            tools::wrap(&cache, &userland, program, &[], &[])?;
        }
        let keys = Keys::prepare(&cache, &tool_in(&cache, "ssh-keygen")?)?;
        let image = image::base(&cache, &userland, &keys)?;
        let accel = Accel::probe(&cache, &qemu, &kernel, &image::busybox(&userland))?;
        Ok(Self {
            cache,
            qemu,
            accel,
            kernel,
            image,
            keys,
            userland,
        })
    }

    /// Boots a guest.
    pub fn boot(&self, options: GuestOptions) -> Result<Guest> {
        Guest::boot(self, options)
    }

    /// A command that runs QEMU.
    pub fn qemu_command(&self) -> Command {
        self.qemu.command()
    }

    /// The path of a host-side program: the system's when it is installed, else the cache's (`dig`,
    /// `dnsmasq`, `passt`, `passt.avx2`, `sftp`, `socat`, `ssh`, `ssh-keygen`, `wget`).
    pub fn tool(&self, name: &str) -> Result<PathBuf> {
        tool_in(&self.cache, name)
    }

    /// The version of the program that [`tool`](Self::tool) gives for `name`, as its project writes it; `package` is the
    /// one that has it.
    pub fn tool_version(&self, name: &str, package: &str) -> String {
        let version = match tools::in_path(name) {
            Some(_) => tools::installed_version(package),
            None => self.userland.version(package),
        };
        version.as_deref().map_or("?", tools::upstream).to_owned()
    }

    /// `ssh` with the guest's keys and nothing of the user's own settings. Add `-p PORT root@HOST COMMAND`.
    pub fn ssh_command(&self) -> Result<Command> {
        let mut command = Command::new(self.tool("ssh")?);
        command.arg("-F").arg(&self.keys.ssh_config);
        Ok(command)
    }

    /// `sftp` likewise. Add `-P PORT -b - root@HOST`.
    pub fn sftp_command(&self) -> Result<Command> {
        let mut command = Command::new(self.tool("sftp")?);
        command
            .arg("-F")
            .arg(&self.keys.ssh_config)
            .arg("-S")
            .arg(self.tool("ssh")?);
        Ok(command)
    }

    /// What there is, a line each.
    pub fn describe(&self) -> Vec<String> {
        let version = |package| {
            self.userland
                .version(package)
                .unwrap_or_else(|| "?".to_owned())
        };
        vec![
            format!("cache         {}", self.cache.root().display()),
            format!(
                "QEMU          {} ({}): {}",
                self.qemu.version,
                self.qemu.origin,
                self.qemu.program.display()
            ),
            format!("acceleration  {}", self.accel.arguments().join(" ")),
            format!(
                "guest kernel  {}: {}",
                self.kernel.release,
                self.kernel.image.display()
            ),
            format!(
                "guest image   busybox {}, openssh {}, socat {}, libc {}: {}",
                version("busybox-static"),
                version("openssh-server"),
                version("socat"),
                version("libc6"),
                self.image.display()
            ),
            format!("ssh key       {}", self.keys.user.display()),
        ]
    }
}

fn tool_in(cache: &Cache, name: &str) -> Result<PathBuf> {
    if let Some(program) = tools::in_path(name) {
        return Ok(program);
    }
    let own = Path::new("bin").join(name);
    let own = cache.path(own);
    if !tools::is_executable(&own) {
        bail!("{name} is neither installed nor in the cache: install the package that has it");
    }
    Ok(own)
}
