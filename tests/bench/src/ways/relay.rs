//! The floors: a bare relay (`virtproxy_tests::relay`) over the same device as virtproxy, and over QEMU's.

use std::path::Path;

use anyhow::Result;
use virtproxy_lab::{
    DeviceOptions, Guest, GuestFile, GuestOptions, vhost_user_console, virtserialport,
};
use virtproxy_tests::scene::new_address;

use super::up::{self, Up};
use super::{PEER_INSIDE, Running, Way};
use crate::results::Kind;

/// What the relay calls its port.
const PORT: &str = "relay";

/// The relay is the device.
pub(super) struct VhostUser;

impl Way for VhostUser {
    fn key(&self) -> &'static str {
        "relay"
    }

    fn kind(&self) -> Kind {
        Kind::Floor
    }

    fn start(&self, folder: &Path) -> Result<Box<dyn Running>> {
        let (socket, address) = (folder.join("device"), new_address());
        let path = socket.display().to_string();
        let relay = up::own(folder, "relay", &["device", &path, &address])?;
        up::wait_listens(&socket, &relay)?;
        let guest = boot(vhost_user_console(&socket, &DeviceOptions::default()))?;
        up(guest, "vhost-user", address).program(relay).works()
    }
}

/// The relay connects to the chardev of QEMU's own device.
pub(super) struct OverChardev;

impl Way for OverChardev {
    fn key(&self) -> &'static str {
        "relay-chardev"
    }

    fn kind(&self) -> Kind {
        Kind::Floor
    }

    fn start(&self, folder: &Path) -> Result<Box<dyn Running>> {
        let (socket, address) = (folder.join("port"), new_address());
        let guest = boot(virtserialport(&socket, PORT))?;
        let path = socket.display().to_string();
        let relay = up::own(folder, "relay", &["chardev", &path, &address])?;
        up(guest, "virtserialport", address).program(relay).works()
    }
}

fn boot(device: Vec<String>) -> Result<Guest> {
    let relay = GuestFile::copy(virtproxy_lab::program("relay")?, "/usr/bin/relay");
    let guest = up::boot(GuestOptions::default().device(device).file(relay))?;
    let port = guest.virtio_port(PORT)?;
    up::start_in(&guest, &format!("relay guest {port} {PEER_INSIDE}"))?;
    Ok(guest)
}

fn up(guest: Guest, device: &str, address: String) -> Up {
    Up::new(format!("bare relay ({device})"), guest, address)
        .guest_programs(&["relay"])
        .most_connections(1, "a bare relay joins one port to one socket")
}
