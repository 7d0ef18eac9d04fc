//! Emulation or hardware virtualisation? Asked of a guest, never of a device node.
//!
//! `/dev/kvm` can be there and open and yet run no stock kernel (nested and paravirtual flavours do that). So the lab
//! boots its own kernel once with a one-line initramfs under `-accel kvm` and waits ten seconds for that line. The
//! verdict is cached for this QEMU, this kernel and this host; without a usable node there is nothing to ask.
//! `VIRTPROXY_ACCEL` (`kvm` or `tcg`) overrides it.

use crate::cache::{self, Cache, write_whole};
use crate::cpio::Archive;
use crate::kernel::Kernel;
use crate::progress::Task;
use crate::qemu::Qemu;
use crate::spawn;
use anyhow::{Context, Result, bail};
use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// How guests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// Emulation: works everywhere.
    Tcg,
    /// Hardware virtualisation: a guest was seen to boot with it.
    Kvm,
}

const LIMIT: Duration = Duration::from_secs(10);
const PROOF: &str = "virtproxy-lab: this guest runs";

impl Accel {
    /// QEMU's arguments.
    pub fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Tcg => &["-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm"],
            Self::Kvm => &["-accel", "kvm", "-cpu", "host"],
        }
    }

    /// The cached verdict for this machine, or a new one.
    pub(crate) fn probe(
        cache: &Cache,
        qemu: &Qemu,
        kernel: &Kernel,
        busybox: &Path,
    ) -> Result<Self> {
        match std::env::var("VIRTPROXY_ACCEL").as_deref() {
            Ok("kvm") => return Ok(Self::Kvm),
            Ok("tcg") => return Ok(Self::Tcg),
            Ok("") | Err(_) => {}
            Ok(other) => bail!(
                "VIRTPROXY_ACCEL is {other}: set it to kvm or tcg, or unset it to have it probed"
            ),
        }
        if OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_err()
        {
            return Ok(Self::Tcg);
        }
        let read = |path: &str| fs::read(path).unwrap_or_default();
        let processor = String::from_utf8_lossy(&read("/proc/cpuinfo"))
            .lines()
            .take(9)
            .collect::<Vec<_>>()
            .join("\n");
        let host = read("/proc/version");
        let key = cache::fingerprint(&[
            qemu.version.as_bytes(),
            kernel.release.as_bytes(),
            processor.as_bytes(),
            &host,
        ]);
        let file = cache.dir("kvm")?.join(&key[..8]);
        match fs::read_to_string(&file).as_deref() {
            Ok("works\n") => return Ok(Self::Kvm),
            Ok(_) => return Ok(Self::Tcg),
            Err(_) => {}
        }
        let task = Task::start(
            "Does a guest boot with KVM here? Trying for 10 s at most",
            0,
        );
        let works = boots(cache, qemu, kernel, busybox)?;
        task.done(if works {
            "yes, guests use it"
        } else {
            "no, guests are emulated"
        });
        write_whole(
            &file,
            if works {
                b"works\n"
            } else {
                b"does not work\n"
            },
            0o644,
        )?;
        Ok(if works { Self::Kvm } else { Self::Tcg })
    }
}

fn boots(cache: &Cache, qemu: &Qemu, kernel: &Kernel, busybox: &Path) -> Result<bool> {
    let dir = cache::beside(&cache.path("kvm-probe"));
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let mut archive = Archive::new();
    archive.directory("dev")?;
    archive.file(
        "busybox",
        &fs::read(busybox).context("cannot read busybox")?,
        0o755,
    )?;
    let init = format!("#!/busybox sh\necho '{PROOF}'\n/busybox poweroff -f\n");
    archive.file("init", init.as_bytes(), 0o755)?;
    archive.device("dev/console", 5, 1)?;
    let image = dir.join("probe.cpio");
    fs::write(&image, archive.finish()?).context("cannot write the probe's image")?;
    let console = dir.join("console");
    let mut command = qemu.command();
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-machine",
            "q35",
            "-m",
            "256",
            "-no-reboot",
        ])
        .args(Accel::Kvm.arguments())
        .args(["-append", "console=ttyS0 quiet panic=-1"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(&image)
        .args(["-serial", &format!("file:{}", console.display())])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = spawn::spawn(command).context("cannot start QEMU")?;
    let begun = Instant::now();
    let mut works = false;
    while !works && begun.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(50));
        let ended = child.try_wait().context("cannot wait for QEMU")?.is_some();
        works = fs::read(&console).is_ok_and(|text| String::from_utf8_lossy(&text).contains(PROOF));
        if ended {
            break;
        }
    }
    // It may have powered off by itself.
    let _ = child.kill();
    child.wait().context("cannot wait for QEMU")?;
    fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    Ok(works)
}
