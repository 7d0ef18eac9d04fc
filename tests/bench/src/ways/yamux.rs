//! yamux over QEMU's virtserialport, by programs such as a user would write (`rival`).

use std::path::Path;

use anyhow::Result;
use virtproxy_lab::{GuestFile, GuestOptions, virtserialport};
use virtproxy_tests::scene::new_address;

use super::up::{self, Up};
use super::{PEER_INSIDE, Running, Way};
use crate::results::Kind;

const PORT: &str = "yamux";

/// With so many connections, the guest's memory is half full of buffers. Smaller ones would cost speed.
const MOST: usize = 2000;

pub(super) struct Yamux;

impl Way for Yamux {
    fn key(&self) -> &'static str {
        "yamux"
    }

    fn kind(&self) -> Kind {
        Kind::Peer
    }

    fn start(&self, folder: &Path) -> Result<Box<dyn Running>> {
        let (socket, address) = (folder.join("port"), new_address());
        let rival = GuestFile::copy(virtproxy_lab::program("rival")?, "/usr/bin/rival");
        let device = virtserialport(&socket, PORT);
        let guest = up::boot(GuestOptions::default().device(device).file(rival))?;
        let port = guest.virtio_port(PORT)?;
        up::start_in(&guest, &format!("rival yamux guest {port} {PEER_INSIDE}"))?;
        let path = socket.display().to_string();
        let host = up::own(folder, "rival", &["yamux", "host", &path, &address])?;
        Up::new("yamux 0.14 (virtserialport)".to_owned(), guest, address)
            .program(host)
            .guest_programs(&["rival"])
            .most_connections(
                MOST,
                "two buffers of 64 KiB for each do not fit into the guest",
            )
            .works()
    }
}
