//! vsock: vhost-device-vsock, with socat in the guest and a small connector of ours (`rival`) on the host.
//!
//! socat's buffers are as large as a packet of vsock can be. The device has its default queue of 1024, and for each connection
//! the 8 MiB of buffer without which it stalls much more often ([`VsockDevice`] says why).

use std::path::Path;

use anyhow::Result;
use virtproxy_lab::{GuestOptions, Lab, VsockDevice};
use virtproxy_tests::scene::new_address;

use super::up::{self, Up};
use super::{PEER_INSIDE, Running, Way};
use crate::results::Kind;

/// The guest's context id: the least that a guest can have.
const CID: u32 = 3;

/// With so many connections, the guest's memory is half full of processes.
const MOST: usize = 2000;

pub(super) struct Vsock;

impl Way for Vsock {
    fn key(&self) -> &'static str {
        "vsock"
    }

    fn kind(&self) -> Kind {
        Kind::Peer
    }

    fn start(&self, folder: &Path) -> Result<Box<dyn Running>> {
        let (lab, address) = (Lab::get()?, new_address());
        let device = VsockDevice::start(lab, CID, folder)?;
        let guest = up::boot(GuestOptions::default().vsock(device.socket()))?;
        up::start_in(
            &guest,
            &format!("socat -b 65536 VSOCK-LISTEN:7000,backlog=128,fork TCP:{PEER_INSIDE},nodelay"),
        )?;
        let socket = device.uds().display().to_string();
        let connector = up::own(folder, "rival", &["vsock", &socket, "7000", &address])?;
        let socat = lab.tool_version("socat", "socat");
        let title = format!("{}, socat {socat}", VsockDevice::title());
        Up::new(title, guest, address)
            .program(connector)
            .device(device)
            .guest_programs(&["socat"])
            .most_connections(
                MOST,
                "a process of socat for each does not fit into the guest",
            )
            .works()
    }
}
