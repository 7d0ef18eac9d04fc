//! The channels that either end can have; each is a small file here. What belongs to one end alone (the device of the
//! host, the virtio port of the guest) is with that end.

use std::io;

use crate::channel::Channel;
use crate::program::Options;
use crate::spec::{ChannelSpec, Method};

/// The channel that `spec` names, if its method is not one of the other program's own; `hint` then says what to use here.
pub fn make(spec: &ChannelSpec, options: &Options, hint: &str) -> io::Result<Box<dyn Channel>> {
    let _ = options;
    match spec.method {
        Method::VhostUser | Method::VirtserialOpen => {
            Err(io::Error::new(io::ErrorKind::Unsupported, hint))
        }
        _ => todo!(),
    }
}
