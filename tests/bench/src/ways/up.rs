//! A way that is up: what they all have in common.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use virtproxy_lab::{Guest, GuestFile, GuestOptions, Lab, VsockDevice};
use virtproxy_tests::scene::{Daemon, SOON, wait_for, wait_works};

use super::{PEER, Running};

/// A way that is up, until it is dropped.
pub(super) struct Up {
    // Fields are dropped in this order: QEMU cannot live without a device that is another process.
    guest: Guest,
    programs: Vec<Daemon>,
    device: Option<VsockDevice>,
    title: String,
    address: String,
    guest_programs: &'static [&'static str],
    most_connections: Option<(usize, &'static str)>,
}

impl Up {
    /// A way to the service in `guest`, by programs of this host and of the guest, that begins at `address`.
    pub(super) fn new(title: String, guest: Guest, address: String) -> Self {
        Up {
            guest,
            programs: Vec::new(),
            device: None,
            title,
            address,
            guest_programs: &[],
            most_connections: None,
        }
    }

    /// One of the programs of this host that move its bytes.
    pub(super) fn program(mut self, program: Daemon) -> Self {
        self.programs.push(program);
        self
    }

    /// The device that is a program of this host, and moves its bytes too.
    pub(super) fn device(mut self, device: VsockDevice) -> Self {
        self.device = Some(device);
        self
    }

    /// The names of the programs of the guest that move its bytes.
    pub(super) fn guest_programs(mut self, names: &'static [&'static str]) -> Self {
        self.guest_programs = names;
        self
    }

    /// It can have so many connections at once and, for that reason, no more.
    pub(super) fn most_connections(mut self, most: usize, why: &'static str) -> Self {
        self.most_connections = Some((most, why));
        self
    }

    /// Waits until a connection works.
    pub(super) fn works(self) -> Result<Box<dyn Running>> {
        wait_works(&self.address, 2 * SOON).with_context(|| {
            let mut said = String::new();
            let logs = self.programs.iter().map(Daemon::log);
            for log in logs.chain(self.device.as_ref().map(VsockDevice::log)) {
                let _ = writeln!(said, "{log}");
            }
            let there = self.guest.check("tail -n 20 /tmp/*.log");
            format!(
                "{}:\n{said}in the guest:\n{}",
                self.title,
                there.unwrap_or_default()
            )
        })?;
        Ok(Box::new(self))
    }
}

impl Running for Up {
    fn title(&self) -> String {
        self.title.clone()
    }

    fn guest(&self) -> &Guest {
        &self.guest
    }

    fn address(&self) -> &str {
        &self.address
    }

    fn processes(&self) -> Vec<u32> {
        let family = |program: &Daemon| [vec![program.pid()], program.children()].concat();
        let programs = self.programs.iter().flat_map(family);
        programs
            .chain(self.device.as_ref().map(VsockDevice::pid))
            .collect()
    }

    fn guest_processes(&self) -> String {
        match self.guest_programs {
            [] => ":".to_owned(),
            names => format!("pidof {}", names.join(" ")),
        }
    }

    fn most_connections(&self) -> Option<(usize, &'static str)> {
        self.most_connections
    }
}

/// Boots a guest, and starts the service in it.
pub(super) fn boot(options: GuestOptions) -> Result<Guest> {
    let peer = virtproxy_lab::program("peer")?;
    let guest = Lab::get()?.boot(options.file(GuestFile::copy(peer, "/usr/bin/peer")))?;
    start_in(&guest, &format!("peer serve {PEER}"))?;
    guest.check("until nc 127.0.0.1 7000 </dev/null; do sleep 0.1; done")?;
    Ok(guest)
}

/// Starts a program of the guest that stays; it logs to a file in `/tmp`.
pub(super) fn start_in(guest: &Guest, command: &str) -> Result<()> {
    let name = command.split(' ').next().unwrap_or(command);
    guest.check(&format!(
        "setsid {command} >/tmp/{name}.log 2>&1 </dev/null &"
    ))?;
    Ok(())
}

/// Starts one of the project's own programs on this host.
pub(super) fn own(folder: &Path, name: &str, arguments: &[&str]) -> Result<Daemon> {
    let mut command = Command::new(virtproxy_lab::program(name)?);
    command.args(arguments);
    Daemon::run(folder, command)
}

/// Waits until `program` listens on `socket`.
pub(super) fn wait_listens(socket: &Path, program: &Daemon) -> Result<()> {
    wait_for(SOON, || socket.exists()).with_context(|| program.log())
}
