//! The one driver that both ends of virtproxy share: a session over a channel, joined to local sockets.

pub mod channel;
pub mod fd_link;
pub mod segment;
pub mod spec;
