//! `ssh -L` to the guest's own SSH server, which is reached over virtproxy.
//!
//! With the cipher that is the fastest for it: the two would agree on chacha20-poly1305, which moves half as much where the
//! guest is emulated, to the guest 75 MB/s beside 158, and takes as long for a small call.

use std::path::Path;

use anyhow::{Context, Result};
use virtproxy_lab::Lab;
use virtproxy_tests::scene::{Daemon, new_address};

use super::up::Up;
use super::virtproxy::start_vhost_user;
use super::{PEER_INSIDE, Running, Way};
use crate::results::Kind;

const CIPHER: &str = "aes128-gcm@openssh.com";

pub(super) struct Ssh;

impl Way for Ssh {
    fn key(&self) -> &'static str {
        "ssh"
    }

    fn kind(&self) -> Kind {
        Kind::Peer
    }

    fn start(&self, folder: &Path) -> Result<Box<dyn Running>> {
        let (lab, server, address) = (Lab::get()?, new_address(), new_address());
        let (daemon, guest) = start_vhost_user(folder, ("ssh", "127.0.0.1:22"), &server)?;
        let (host, port) = server.split_once(':').context("an address has a port")?;
        let mut command = lab.ssh_command()?;
        command
            .args([
                "-N",
                "-c",
                CIPHER,
                "-o",
                "ExitOnForwardFailure=yes",
                "-p",
                port,
            ])
            .args(["-L", &format!("{address}:{PEER_INSIDE}")])
            .arg(format!("root@{host}"));
        let ssh = Daemon::run(folder, command)?;
        let version = lab.tool_version("ssh", "openssh-client");
        let title = format!("OpenSSH {version} -L (aes128-gcm, over virtproxy)");
        Up::new(title, guest, address)
            .program(daemon)
            .program(ssh)
            // The process of the connection is called otherwise than the server, or not, by its version.
            .guest_programs(&["virtproxy-agent", "sshd-session", "sshd"])
            .works()
    }
}
