//! A vhost-user frontend and a guest driver for tests, without QEMU: [`Guest`] behaves like QEMU's generic
//! vhost-user device with Linux's virtio_console behind it, [`Host`] is the engine's side of a port.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "a module of each test program, which uses a part"
)]

pub mod guest;
pub mod host;
pub mod ring;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use virtproxy_host::device::{Device, DeviceHandle, Port, PortSpec};

pub use guest::{Guest, Setup};
pub use host::Host;

/// The name of the one port of [`device`].
pub const NAME: &str = "org.virtproxy.0";

/// A device with one port.
pub fn device(path: &Path) -> (DeviceHandle, Port) {
    log();
    let (handle, mut ports) = Device::start(path, vec![PortSpec::generic(NAME)], 1).unwrap();
    (handle, ports.remove(0))
}

/// A device whose guest has opened the port.
pub fn connected(setup: Setup) -> (DeviceHandle, Port, Guest, Host) {
    let path = socket_path();
    let (handle, mut port) = device(&path);
    let mut guest = Guest::boot(&path, setup);
    guest.wait_host_connected(0, true);
    guest.open(0);
    let host = Host::open(&mut port);
    (handle, port, guest, host)
}

/// Both ways still work.
pub fn assert_alive(guest: &mut Guest, host: &mut Host) {
    guest.write_all(0, b"alive");
    assert_eq!(host.receive(5), b"alive");
    host.send(b"and well");
    assert_eq!(guest.read(0, 8), b"and well");
}

/// Shows the device's log with the output of a failed test; `RUST_LOG` says how much.
pub fn log() {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_test_writer()
        .try_init();
}

/// A path for a socket that no other test uses.
pub fn socket_path() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("virtproxy-test-{}-{number}", std::process::id()))
}

/// An endless run of bytes that differs for each seed, to send and to compare with.
#[derive(Clone)]
pub struct Pattern {
    state: u64,
    word: [u8; 8],
    at: usize,
}

impl Pattern {
    pub fn new(seed: u64) -> Self {
        Pattern {
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            word: [0; 8],
            at: 8,
        }
    }

    pub fn fill(&mut self, mut bytes: &mut [u8]) {
        while !bytes.is_empty() {
            if self.at == 8 {
                self.state ^= self.state << 13;
                self.state ^= self.state >> 7;
                self.state ^= self.state << 17;
                self.word = self.state.to_le_bytes();
                self.at = 0;
            }
            let (now, rest) = bytes.split_at_mut(bytes.len().min(8 - self.at));
            now.copy_from_slice(&self.word[self.at..][..now.len()]);
            self.at += now.len();
            bytes = rest;
        }
    }

    pub fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.fill(&mut bytes);
        bytes
    }

    /// Panics unless `bytes` are the next of the run.
    pub fn expect(&mut self, bytes: &[u8]) {
        assert!(
            self.take(bytes.len()) == bytes,
            "bytes were lost, repeated or changed"
        );
    }
}
