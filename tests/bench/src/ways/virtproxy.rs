//! virtproxy itself: over its own device, and over the socket of QEMU's.

use std::path::Path;

use anyhow::Result;
use virtproxy_lab::{DeviceOptions, Guest, GuestOptions, vhost_user_console, virtserialport};
use virtproxy_tests::scene::{Daemon, new_address};

use super::up::{self, Up};
use super::{PEER_INSIDE, Running, Way};
use crate::results::Kind;

const PORT: &str = "org.virtproxy.0";

/// The service that is measured, as virtproxy names it, and where it is in the guest.
const SERVICE: (&str, &str) = ("peer", PEER_INSIDE);

/// The host's end is the device.
pub(super) struct VhostUser;

impl Way for VhostUser {
    fn key(&self) -> &'static str {
        "virtproxy"
    }

    fn kind(&self) -> Kind {
        Kind::Ours
    }

    fn start(&self, folder: &Path) -> Result<Box<dyn Running>> {
        let address = new_address();
        let (daemon, guest) = start_vhost_user(folder, SERVICE, &address)?;
        up(guest, "vhost-user", address).program(daemon).works()
    }
}

/// The host's end connects to the chardev of QEMU's own device.
pub(super) struct OverChardev;

impl Way for OverChardev {
    fn key(&self) -> &'static str {
        "virtproxy-chardev"
    }

    fn kind(&self) -> Kind {
        Kind::Ours
    }

    fn start(&self, folder: &Path) -> Result<Box<dyn Running>> {
        let (socket, address) = (folder.join("port"), new_address());
        let guest = boot(virtserialport(&socket, PORT), SERVICE)?;
        let channel = format!("unix-connect:{}:-", socket.display());
        let daemon = start_daemon(folder, &channel, SERVICE, &address)?;
        up(guest, "virtserialport", address).program(daemon).works()
    }
}

/// A guest whose `service` (a name, and where it is in the guest) is reached at `address`.
pub(super) fn start_vhost_user(
    folder: &Path,
    service: (&str, &str),
    address: &str,
) -> Result<(Daemon, Guest)> {
    let socket = folder.join("device");
    let channel = format!("vhost-user:{}:-", socket.display());
    let daemon = start_daemon(folder, &channel, service, address)?;
    up::wait_listens(&socket, &daemon)?;
    let device = vhost_user_console(&socket, &DeviceOptions::default());
    Ok((daemon, boot(device, service)?))
}

fn start_daemon(
    folder: &Path,
    channel: &str,
    (service, _): (&str, &str),
    address: &str,
) -> Result<Daemon> {
    let service = format!("{service}:{address}");
    up::own(folder, "virtproxy", &["-c", channel, "-o", &service])
}

fn boot(device: Vec<String>, (service, target): (&str, &str)) -> Result<Guest> {
    let agent = virtproxy_lab::program("virtproxy-agent")?;
    let guest = up::boot(GuestOptions::default().device(device).agent(&agent))?;
    up::start_in(
        &guest,
        &format!("virtproxy-agent -c virtserial-open:{PORT}:- -i {service}:{target}"),
    )?;
    Ok(guest)
}

fn up(guest: Guest, device: &str, address: String) -> Up {
    let title = format!("virtproxy {} ({device})", env!("CARGO_PKG_VERSION"));
    Up::new(title, guest, address).guest_programs(&["virtproxy-agent"])
}
