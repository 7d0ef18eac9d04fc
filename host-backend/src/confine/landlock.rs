//! Landlock: which files, devices and TCP ports are left, and that no other process is.
//!
//! The kernel decides by version ("ABI") what can be limited; what it cannot is left open and said. Nothing newer than
//! [`TESTED`] is asked for, so that a new kernel does not forbid what was never tried. Up to that ABI Landlock does not
//! know of connecting to a UNIX socket's path: there the kinds of sockets that seccomp leaves, and the user, are what counts.

use std::fmt;
use std::io;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, NetPort, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, Scope, make_bitflags,
};

use super::Needs;
use super::needs::Use;

/// The newest version that the tests have run with.
const TESTED: ABI = ABI::V7;

/// What can be limited, and since which version.
const LIMITS: [(i32, &str); 4] = [
    (1, "files"),
    (4, "TCP ports"),
    (5, "devices"),
    (6, "signals and abstract sockets"),
];

/// Where the C library reads how names are looked up. They are folders, as such files are replaced, not written.
const NAMES: &[&str] = &[
    "/etc",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/NetworkManager",
    // Modules that it loads when it needs them.
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
];

/// Where pseudo-terminals are made.
const TERMINALS: &[&str] = &["/dev/ptmx", "/dev/pts"];

/// Rules that are not in force yet.
pub(super) struct Rules(RulesetCreated);

impl Rules {
    /// Those that leave what is in `needs`.
    pub(super) fn new(needs: &Needs) -> io::Result<Self> {
        let mut rules = Ruleset::default()
            .handle_access(AccessFs::from_all(TESTED))
            .and_then(|rules| rules.handle_access(AccessNet::from_all(TESTED)))
            .and_then(|rules| rules.scope(Scope::from_all(TESTED)))
            .and_then(Ruleset::create)
            .map_err(io::Error::other)?;
        let read = BitFlags::from(AccessFs::ReadFile);
        let terminal = make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev});
        for (path, use_) in needs.paths() {
            match use_ {
                Use::Tidy => rules = allow(rules, path, AccessFs::RemoveFile.into())?,
                Use::Make => {
                    let make = make_bitflags!(AccessFs::{
                        MakeSock | MakeSym | MakeReg | WriteFile | RemoveFile
                    });
                    rules = allow(rules, path, make)?;
                }
                Use::Open => rules = allow(rules, path, terminal)?,
                Use::Reach => {}
            }
        }
        if needs.names().len() > 0 {
            for path in NAMES {
                rules = allow(rules, path.as_ref(), read)?;
            }
        }
        if needs.adds_ports() {
            for path in TERMINALS {
                rules = allow(rules, path.as_ref(), terminal)?;
            }
        }
        let connects = needs.connects().map(|port| (port, AccessNet::ConnectTcp));
        let listens = needs.listens().map(|port| (port, AccessNet::BindTcp));
        for (port, access) in connects.chain(listens) {
            rules = rules
                .add_rule(NetPort::new(port, access))
                .map_err(io::Error::other)?;
        }
        Ok(Rules(rules))
    }

    /// Those that leave everything but other processes.
    pub(super) fn apart() -> io::Result<Self> {
        let rules = Ruleset::default().scope(Scope::from_all(TESTED));
        let rules = rules.and_then(Ruleset::create);
        rules.map(Rules).map_err(io::Error::other)
    }

    /// Puts them in force for this thread, and those that it starts.
    pub(super) fn enforce(self) -> io::Result<Held> {
        let status = self.0.restrict_self().map_err(io::Error::other)?;
        Ok(Held(match status.landlock {
            LandlockStatus::Available { effective_abi, .. } => effective_abi as i32,
            _ => 0,
        }))
    }
}

/// Leaves `access` beneath `path`. A device that is not there yet may be any in its folder.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> io::Result<RulesetCreated> {
    let opened = PathFd::new(path).or_else(|_| match path.parent() {
        Some(folder) if access.contains(AccessFs::IoctlDev) => PathFd::new(folder),
        _ => PathFd::new(path),
    });
    match opened {
        Ok(opened) => rules
            .add_rule(PathBeneath::new(opened, access))
            .map_err(io::Error::other),
        // What is not there needs no right; should it come, the message about it has a hint.
        Err(_) => Ok(rules),
    }
}

/// What the kernel limits, by its version of Landlock; 0 is none.
pub(super) struct Held(i32);

impl Held {
    pub(super) fn abi(&self) -> i32 {
        self.0
    }

    /// Whether everything is limited that can be.
    pub(super) fn is_whole(&self) -> bool {
        LIMITS.iter().all(|(since, _)| *since <= self.0)
    }

    /// What is not.
    pub(super) fn missing(&self) -> String {
        listed(|since| since > self.0)
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("no Landlock"),
            have => write!(f, "Landlock ({})", listed(|since| since <= have)),
        }
    }
}

fn listed(which: impl Fn(i32) -> bool) -> String {
    let listed = LIMITS.iter().filter(|(since, _)| which(*since));
    let listed: Vec<_> = listed.map(|(_, what)| *what).collect();
    listed.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kernel_limits_and_what_it_does_not_is_said() {
        let old = Held(3);
        assert_eq!(old.to_string(), "Landlock (files)");
        assert_eq!(
            old.missing(),
            "TCP ports, devices, signals and abstract sockets"
        );
        assert!(!old.is_whole() && !Held(0).is_whole());
        assert!(Held(6).is_whole() && Held(7).missing().is_empty());
        assert_eq!(Held(0).to_string(), "no Landlock");
    }
}
