//! The host end of virtproxy: the vhost-user virtio-console device that QEMU attaches.

pub mod confine;
pub mod device;
pub mod keeper;
pub mod ports;
