//! The guest's kernel: the distribution's own, of which only the package with the image is taken.
//!
//! From 6.12 on Debian's cloud kernel has VIRTIO_PCI and VIRTIO_CONSOLE built in, so the image needs no modules. The
//! package's `/boot/config-*` is checked, because with those two as modules a guest would boot and then wait for its
//! port for ever. Network cards and vsock are modules there, for guests that ask for them.

use crate::apt::Apt;
use crate::cache::Cache;
use crate::plan::Plan;
use crate::prefix::{Prefix, Recipe};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// The kernel to boot guests with.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The compressed image.
    pub image: PathBuf,
    /// Its release, such as `6.12.107+deb13-cloud-amd64`.
    pub release: String,
    modules: PathBuf,
}

/// What a virtio network card needs, in the order of loading.
pub const NETWORK: &[&str] = &["failover", "net_failover", "virtio_net"];
/// What vsock needs, towards the host and within the guest, in the order of loading.
pub const VSOCK: &[&str] = &[
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
    "vsock_loopback",
];

/// Options that must be built in.
const BUILT_IN: &[&str] = &[
    "CONFIG_VIRTIO_PCI=y",
    "CONFIG_VIRTIO_CONSOLE=y",
    "CONFIG_SERIAL_8250_CONSOLE=y",
];

impl Kernel {
    pub(crate) fn cached(cache: &Cache, plan: &Plan) -> Result<Option<Self>> {
        recipe(plan, &packages(plan))
            .cached(cache)
            .map(|prefix| Self::of(&prefix))
            .transpose()
    }

    pub(crate) fn fetch(cache: &Cache, plan: &Plan, apt: &Apt) -> Result<Self> {
        Self::of(&recipe(plan, &packages(plan)).build(cache, apt)?)
    }

    fn of(prefix: &Prefix) -> Result<Self> {
        let boot = prefix.root().join("boot");
        let names =
            fs::read_dir(&boot).with_context(|| format!("cannot read {}", boot.display()))?;
        let release = names
            .flatten()
            .find_map(|entry| {
                Some(
                    entry
                        .file_name()
                        .to_str()?
                        .strip_prefix("vmlinuz-")?
                        .to_owned(),
                )
            })
            .context("the kernel package holds no vmlinuz: set VIRTPROXY_SUITE to another suite")?;
        // Ubuntu keeps the configuration in another package; then the first boot has to tell.
        if let Ok(config) = fs::read_to_string(boot.join(format!("config-{release}")))
            && let Some(missing) = BUILT_IN
                .iter()
                .find(|option| !config.lines().any(|line| line == **option))
        {
            bail!(
                "the kernel {release} lacks {missing}: set VIRTPROXY_SUITE to a suite with Linux 6.12 or newer"
            );
        }
        Ok(Self {
            image: boot.join(format!("vmlinuz-{release}")),
            modules: prefix.root().join("usr/lib/modules").join(&release),
            release,
        })
    }

    /// The file of one of its modules.
    pub(crate) fn module(&self, name: &str) -> Result<PathBuf> {
        find(&self.modules, &format!("{name}.ko.xz")).with_context(|| {
            format!(
                "the kernel {} has no module {name}: set VIRTPROXY_SUITE to another suite",
                self.release
            )
        })
    }
}

fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    fs::read_dir(folder).ok()?.flatten().find_map(|entry| {
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        match is_folder {
            true => find(&entry.path(), name),
            false => (entry.file_name() == name).then(|| entry.path()),
        }
    })
}

fn packages(plan: &Plan) -> [&str; 1] {
    [plan.kernel_package]
}

fn recipe<'a>(plan: &'a Plan, packages: &'a [&'a str]) -> Recipe<'a> {
    Recipe {
        name: "kernel",
        what: "the guest's kernel",
        suite: &plan.suite,
        packages,
        // `linux-image-6.12...` holds the kernel; `linux-image-cloud-amd64` and the rest of the closure do not.
        keep: |name| {
            name.strip_prefix("linux-image-")
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        },
        must_have: &["boot"],
    }
}
