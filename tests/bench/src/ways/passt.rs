//! passt, with its data path in vhost-user: TCP forwarded to the guest's network card.
//!
//! As its manual has it: the MTU is the one that it advertises by default, and the build is the one for this processor. The
//! guest's address is set by hand instead of by DHCP.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use virtproxy_lab::{GuestOptions, Lab};
use virtproxy_tests::scene::{Daemon, new_address};

use super::up::{self, Up};
use super::{Running, Way};
use crate::limits;
use crate::results::Kind;

/// What passt advertises.
const MTU: u16 = 65520;

/// More descriptors than it has beside those of connections.
const OTHERS: usize = 200;

pub(super) struct Passt;

impl Way for Passt {
    fn key(&self) -> &'static str {
        "passt"
    }

    fn kind(&self) -> Kind {
        Kind::Peer
    }

    fn start(&self, folder: &Path) -> Result<Box<dyn Running>> {
        let (socket, address) = (folder.join("card"), new_address());
        // The plain one would run the other in its place, but cannot find it when it is not installed.
        let lab = Lab::get()?;
        let program = lab.tool(match is_x86_feature_detected!("avx2") {
            true => "passt.avx2",
            false => "passt",
        })?;
        // Asked for its version through a pipe it prints nothing.
        let version = lab.tool_version("passt", "passt");
        let (host, port) = address.split_once(':').context("an address has a port")?;
        let mut command = Command::new(program);
        command
            // Started by root it would become nobody, who cannot get at the socket.
            .args(["--foreground", "--one-off", "--runas", &user()])
            .arg("--vhost-user")
            .arg("--socket")
            .arg(&socket)
            .args(["--ipv4-only", "--address", "10.0.2.15", "--netmask", "24"])
            .args(["--gateway", "10.0.2.2", "--udp-ports", "none"])
            .args(["--tcp-ports", &format!("{host}/{port}:7000")]);
        let most = limits::descriptors().saturating_sub(OTHERS) / 2;
        let passt = Daemon::run(folder, command)?;
        up::wait_listens(&socket, &passt)?;
        let guest = up::boot(GuestOptions::default().vhost_user_network(&socket, MTU))?;
        Up::new(format!("passt {version} (vhost-user)"), guest, address)
            .program(passt)
            .most_connections(most, "passt takes two descriptors for each")
            .works()
    }
}

/// Who runs this, as a number.
fn user() -> String {
    // SAFETY: geteuid only returns a number.
    unsafe { libc::geteuid() }.to_string()
}
