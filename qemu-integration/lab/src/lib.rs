//! The lab: gets a QEMU and a guest kernel, builds the guest's image, boots it and talks to it.
//!
//! A vhost-user console can only be tested against a real driver in a real kernel, and a test that needs root, a
//! prepared machine or a network is a test that nobody runs. So the lab takes all it needs from the machine's own
//! package archive, into a cache folder, without root, once; a guest then boots in seconds, emulated where there is no
//! working hardware virtualisation.
//!
//! ```no_run
//! use virtproxy_lab::{DeviceOptions, GuestOptions, Lab, vhost_user_console};
//! # fn main() -> anyhow::Result<()> {
//! let device = vhost_user_console("/run/vp.sock".as_ref(), &DeviceOptions::default());
//! let guest = Lab::get()?.boot(GuestOptions::default().device(device).agent("target/release/virtproxy-agent".as_ref()))?;
//! assert_eq!(guest.check("cat /sys/class/virtio-ports/*/name")?, "org.virtproxy.0");
//! # Ok(())
//! # }
//! ```
//!
//! | file | what it knows |
//! | --- | --- |
//! | `lab` | what is needed, and in which order it is made |
//! | `cache`, `progress`, `spawn`, `tools` | the folder, the terminal, child processes, host programs |
//! | `plan`, `sources`, `apt`, `prefix` | which suite, which archive, how packages get here, where they lie |
//! | `qemu`, `accel`, `kernel`, `keys`, `cpio`, `image` | the pieces of a guest |
//! | `guest`, `starting`, `folder`, `device`, `shell`, `qmp` | a running guest and how to talk to it |
//! | `vsock` | a vhost-user vsock device, built from its released source |
//!
//! The lab runs the project's programs and imports none of them.

mod accel;
mod apt;
mod cache;
mod cpio;
mod device;
mod folder;
mod guest;
mod image;
mod kernel;
mod keys;
mod lab;
mod plan;
mod prefix;
pub mod progress;
mod qemu;
mod qmp;
mod shell;
mod sources;
pub mod spawn;
mod starting;
mod tools;
mod vsock;

pub use accel::Accel;
pub use cache::{Cache, CacheLock};
pub use device::{
    Chardev, DeviceOptions, SerialPort, isa_serial, vhost_user_console, virtio_serial,
    virtserialport,
};
pub use folder::{temporary_folder, temporary_folder_in};
pub use guest::{COMMAND_LIMIT, Guest, GuestOptions};
pub use image::{Content, GuestFile};
pub use kernel::{Kernel, NETWORK, VSOCK};
pub use keys::{HOST_ALIAS, Keys};
pub use lab::Lab;
pub use prefix::Prefix;
pub use qemu::{DEVICE, Origin, Qemu};
pub use serde_json;
pub use shell::Output;
pub use tools::program;
pub use vsock::VsockDevice;
