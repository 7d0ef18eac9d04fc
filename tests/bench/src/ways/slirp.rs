//! slirp, QEMU's own user network: TCP forwarded to the guest's network card, by a TCP in QEMU's main thread.

use std::path::Path;

use anyhow::Result;
use virtproxy_lab::{GuestOptions, Lab};
use virtproxy_tests::scene::new_address;

use super::up::{self, Up};
use super::{Running, Way};
use crate::results::Kind;

pub(super) struct Slirp;

impl Way for Slirp {
    fn key(&self) -> &'static str {
        "slirp"
    }

    fn kind(&self) -> Kind {
        Kind::Peer
    }

    fn start(&self, _: &Path) -> Result<Box<dyn Running>> {
        let address = new_address();
        let guest = up::boot(GuestOptions::default().user_network(&[(&address, 7000)]))?;
        let version = &Lab::get()?.qemu.version;
        let version = version.split(' ').next().unwrap_or(version);
        Up::new(format!("slirp of QEMU {version} (hostfwd)"), guest, address).works()
    }
}
