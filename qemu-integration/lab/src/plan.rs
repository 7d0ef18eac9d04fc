//! Which suite of the machine's own distribution the lab takes its packages from.
//!
//! Two things must come from a release that is new enough: QEMU (10.2 for `vhost-user-test-device-pci`), and the
//! guest's C library, which must not be older than the one that the agent was linked with on this machine. Debian 13's
//! own release gives the library and the kernel, its backports give QEMU; Ubuntu 26.04 gives all of it. A machine
//! newer than that uses its own release. `VIRTPROXY_SUITE=SUITE[,SUITE-FOR-QEMU]` overrides the choice.

use anyhow::{Context, Result, bail};
use std::fs;

/// What to take from where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    /// `debian` or `ubuntu`.
    pub(crate) distribution: &'static str,
    /// The machine's release.
    pub(crate) codename: String,
    /// The suite of the guest's kernel and programs.
    pub(crate) suite: String,
    /// The suite of QEMU, when it is another.
    pub(crate) qemu_suite: Option<String>,
    /// Components of the archive.
    pub(crate) components: &'static [&'static str],
    /// The package that depends on the current kernel.
    pub(crate) kernel_package: &'static str,
}

/// The plan for this machine.
pub(crate) fn for_this_machine() -> Result<Plan> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let mut plan = for_release(&text)?;
    if let Ok(suites) = std::env::var("VIRTPROXY_SUITE") {
        let mut suites = suites
            .split(',')
            .map(|suite| suite.trim().to_owned())
            .filter(|suite| !suite.is_empty());
        plan.suite = suites
            .next()
            .context("VIRTPROXY_SUITE is empty: unset it or name a suite, e.g. trixie")?;
        plan.qemu_suite = suites.next();
    }
    Ok(plan)
}

/// The plan for a machine whose `/etc/os-release` says `text`.
fn for_release(text: &str) -> Result<Plan> {
    let field = |name: &str| {
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        value.unwrap_or("").trim().trim_matches('"').to_owned()
    };
    let like = format!(" {} {} ", field("ID"), field("ID_LIKE"));
    let is = |id: &str| field("ID") == id;
    let version: f64 = field("VERSION_ID").parse().unwrap_or(f64::INFINITY);
    if like.contains(" ubuntu ") {
        let codename = match field("UBUNTU_CODENAME") {
            name if name.is_empty() => field("VERSION_CODENAME"),
            name => name,
        };
        let own = is("ubuntu") && version >= 26.04 && !codename.is_empty();
        return Ok(Plan {
            distribution: "ubuntu",
            suite: if own {
                codename.clone()
            } else {
                "resolute".to_owned()
            },
            codename,
            qemu_suite: None,
            components: &["main", "universe"],
            kernel_package: "linux-image-virtual",
        });
    }
    if like.contains(" debian ") {
        let codename = field("VERSION_CODENAME");
        let own = is("debian") && version > 13.0 && !codename.is_empty();
        return Ok(Plan {
            distribution: "debian",
            suite: if own {
                codename.clone()
            } else {
                "trixie".to_owned()
            },
            codename,
            qemu_suite: (!own).then(|| "trixie-backports".to_owned()),
            components: &["main"],
            kernel_package: "linux-image-cloud-amd64",
        });
    }
    bail!(
        "this machine is neither Debian nor Ubuntu, whose packages the lab is made of: run it in a container of one \
         of them, or copy a filled cache here and name it with VIRTPROXY_CACHE"
    )
}

impl Plan {
    /// The suites to read package lists of.
    pub(crate) fn suites(&self, with_qemu: bool) -> Vec<String> {
        let mut suites = vec![self.suite.clone()];
        suites.extend(self.qemu_suite.clone().filter(|_| with_qemu));
        suites
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases() {
        let suite = |text: &str| for_release(text).map(|plan| (plan.suite, plan.qemu_suite));
        let backports = Some("trixie-backports".to_owned());
        assert_eq!(
            suite("ID=debian\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\n").unwrap(),
            ("trixie".to_owned(), backports.clone())
        );
        assert_eq!(
            suite("ID=debian\nVERSION_ID=\"13\"\nVERSION_CODENAME=trixie\n")
                .unwrap()
                .1,
            backports
        );
        assert_eq!(
            suite("ID=debian\nVERSION_CODENAME=forky\n").unwrap(),
            ("forky".to_owned(), None)
        );
        let jammy = for_release(
            "ID=ubuntu\nID_LIKE=debian\nVERSION_ID=\"22.04\"\nVERSION_CODENAME=jammy\n",
        )
        .unwrap();
        assert_eq!(
            (jammy.distribution, jammy.suite.as_str()),
            ("ubuntu", "resolute")
        );
        assert!(
            for_release("ID=fedora\n")
                .unwrap_err()
                .to_string()
                .contains("Debian")
        );
    }
}
