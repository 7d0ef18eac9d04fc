//! The guest end of virtproxy: what it takes to live on a virtio port of the guest. All else is the engine's.

pub mod port;
