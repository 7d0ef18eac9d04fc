//! The ways into the guest. Each is one file: what runs on the host, what the guest needs, and what runs in it.
//!
//! They all end at the same service, `peer serve`, which listens on [`PEER`] in the guest, and begin at one TCP address
//! of this host.

mod passt;
mod relay;
mod slirp;
mod ssh;
mod up;
mod virtproxy;
mod vsock;
mod yamux;

use std::path::Path;

use anyhow::Result;
use virtproxy_lab::Guest;

use crate::results::Kind;

/// Where the service listens in the guest: on every address, as passt and slirp reach it at the guest's own.
pub(crate) const PEER: &str = "0.0.0.0:7000";

/// Where a program of the guest reaches it.
pub(crate) const PEER_INSIDE: &str = "127.0.0.1:7000";

/// A way into the guest.
pub(crate) trait Way {
    /// Names it, as in `--way KEY`.
    fn key(&self) -> &'static str;

    /// What it is in the comparison.
    fn kind(&self) -> Kind;

    /// Boots its guest and starts all programs; sockets and logs go to `folder`, which is the way's own. The service runs
    /// and a connection works when this returns.
    fn start(&self, folder: &Path) -> Result<Box<dyn Running>>;
}

/// A way that is up, until it is dropped.
pub(crate) trait Running {
    /// For people, with versions: `passt 2025_05_03 (vhost-user)`.
    fn title(&self) -> String;

    /// Its guest.
    fn guest(&self) -> &Guest;

    /// The TCP address of this host that leads to the service.
    fn address(&self) -> &str;

    /// The processes of this host that move its bytes, without QEMU.
    fn processes(&self) -> Vec<u32>;

    /// A shell command that prints the process ids in the guest that move its bytes, without the service; it may print none.
    fn guest_processes(&self) -> String;

    /// How many connections it can have at once, and why no more; `None` for as many as the machine gives.
    fn most_connections(&self) -> Option<(usize, &'static str)> {
        None
    }
}

/// All of them, in the order of the report.
pub(crate) fn all() -> Vec<Box<dyn Way>> {
    vec![
        Box::new(virtproxy::VhostUser),
        Box::new(virtproxy::OverChardev),
        Box::new(relay::VhostUser),
        Box::new(relay::OverChardev),
        Box::new(passt::Passt),
        Box::new(slirp::Slirp),
        Box::new(vsock::Vsock),
        Box::new(ssh::Ssh),
        Box::new(yamux::Yamux),
    ]
}
