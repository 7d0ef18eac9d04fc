//! The one driver that both ends of virtproxy share: a session over a channel, joined to local sockets.

pub mod admin;
mod backlog;
pub mod channel;
pub mod channels;
pub mod counters;
pub mod driver;
pub mod edges;
pub mod fd_link;
pub mod fine_timer;
pub mod limits;
pub mod log_limit;
pub mod lossy_link;
pub mod pauses;
pub mod program;
pub mod sandbox;
pub mod segment;
mod socket;
pub mod spec;
pub mod tty;
mod udp;
pub mod unix_socket;
