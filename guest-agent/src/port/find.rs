//! Where a port's device node is.
//!
//! # Theory of operation
//!
//! The kernel calls a port's node after its place, `/dev/vport1p1`, and tells its name, which the host chose,
//! in `/sys/class/virtio-ports/vport1p1/name`. `/dev/virtio-ports/NAME` is udev's work: a link to the
//! node. A guest without udev has only the first two. So a bare name, or a path in `/dev/virtio-ports`, is
//! looked up in `/dev/virtio-ports` first and in `/sys` next; any other path is taken as it is.

use std::fs;
use std::path::{Path, PathBuf};

/// Where the device nodes and the kernel's view of them are; elsewhere in tests.
#[derive(Clone, Debug)]
pub struct Roots {
    /// `/dev`
    pub dev: PathBuf,
    /// `/sys`
    pub sys: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Roots {
            dev: "/dev".into(),
            sys: "/sys".into(),
        }
    }
}

/// Why a port has no node.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotFound {
    /// The kernel does not have it.
    #[error("there is no port {wanted} yet ({})", list(others))]
    Absent {
        wanted: String,
        /// The names of the ports that there are; the host chose them, so they are escaped.
        others: Vec<String>,
    },
    /// The kernel has it, but nobody made its node.
    #[error(
        "the kernel has port {name} as {}, but that file does not exist: mount devtmpfs on /dev, or make it \
         with mknod (character device {number})",
        node.display()
    )]
    NoNode {
        name: String,
        node: PathBuf,
        /// `MAJOR:MINOR`
        number: String,
    },
}

fn list(others: &[String]) -> String {
    match others {
        [] => "nor any other: is the device there, and virtio_console loaded?".into(),
        others => format!("there is {}", others.join(", ")),
    }
}

/// The node of the port that `addr` names.
pub(super) fn find(roots: &Roots, addr: &str) -> Result<PathBuf, NotFound> {
    let links = roots.dev.join("virtio-ports");
    let path = match addr.contains('/') {
        true => PathBuf::from(addr),
        false => links.join(addr),
    };
    if path.exists() {
        return Ok(path);
    }
    let ports = Ports::scan(roots);
    let name = path
        .strip_prefix(&links)
        .ok()
        .and_then(|name| name.to_str());
    match name.and_then(|name| ports.by_name(name)) {
        Some(port) => port.node(roots),
        None => Err(NotFound::Absent {
            wanted: addr.into(),
            others: ports
                .0
                .iter()
                .map(|port| port.name.escape_debug().to_string())
                .collect(),
        }),
    }
}

/// The ports that the kernel has.
struct Ports(Vec<Port>);

struct Port {
    /// What the host called it.
    name: String,
    /// What the kernel calls it: `vport1p1`.
    device: String,
    sys: PathBuf,
}

impl Ports {
    /// All ports that have a name, in a fixed order: should two have the same, it is always the same one
    /// that is found.
    fn scan(roots: &Roots) -> Self {
        let class = roots.sys.join("class/virtio-ports");
        let entries = fs::read_dir(class).into_iter().flatten().flatten();
        let mut ports: Vec<_> = entries
            .filter_map(|entry| {
                let sys = entry.path();
                let name = fs::read_to_string(sys.join("name")).ok()?;
                let name = name.strip_suffix('\n').unwrap_or(&name).to_string();
                let device = entry.file_name().into_string().ok()?;
                (!name.is_empty()).then_some(Port { name, device, sys })
            })
            .collect();
        ports.sort_by(|a, b| a.device.cmp(&b.device));
        Ports(ports)
    }

    fn by_name(&self, name: &str) -> Option<&Port> {
        self.0.iter().find(|port| port.name == name)
    }
}

impl Port {
    fn node(&self, roots: &Roots) -> Result<PathBuf, NotFound> {
        let node = roots.dev.join(&self.device);
        if node.exists() {
            return Ok(node);
        }
        let number = fs::read_to_string(self.sys.join("dev")).unwrap_or_default();
        Err(NotFound::NoNode {
            name: self.name.clone(),
            node,
            number: number.trim().into(),
        })
    }
}

/// A program that has `node` open, as far as we may look.
pub(super) fn holder(node: &Path) -> Option<String> {
    let node = fs::canonicalize(node).ok()?;
    let holds = |process: &Path| {
        let fds = fs::read_dir(process.join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        fds.into_iter()
            .any(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == node))
    };
    let processes = fs::read_dir("/proc").ok()?.flatten();
    processes.into_iter().find_map(|process| {
        let pid: u32 = process.file_name().to_str()?.parse().ok()?;
        if !holds(&process.path()) {
            return None;
        }
        let program = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        Some(format!("{} (pid {pid})", program.trim()))
    })
}
