//! The value of `-c`: METHOD, and what ADDR and PORT are to it.

use std::fmt;
use std::str::FromStr;

use super::{Fields, Form, Host, SpecError, check_unix_path, write_id};

/// A kind of channel: the METHOD of `-c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// `vhost-user:PATH:-`: be the device itself, on the UNIX socket at PATH.
    VhostUser,
    /// `virtserial-open:PATH_OR_NAME:-`: open a virtio port of this guest.
    VirtserialOpen,
    /// `isa-serial-open:PATH:SPEED`: open a serial line, such as a 16550's.
    IsaSerialOpen,
    /// `unix-connect:PATH:-`: connect to a UNIX socket, such as a QEMU chardev's.
    UnixConnect,
    /// `unix-listen:PATH:-`: let the other end, or a QEMU chardev, connect to a UNIX socket.
    UnixListen,
    /// `tcp-connect:HOST:PORT`
    TcpConnect,
    /// `tcp-listen:HOST:PORT`
    TcpListen,
    /// `vsock-connect:CID:PORT`
    VsockConnect,
    /// `vsock-listen:CID:PORT`
    VsockListen,
    /// `hvsock-connect:PATH:PORT`: a vsock port of a guest, through its monitor's UNIX socket.
    HvsockConnect,
    /// `stdio:-:-`: this program's standard input and output.
    Stdio,
    /// `exec:COMMAND:-`: a command's standard input and output.
    Exec,
}

/// One kind of channel, as the command line sees it.
struct Row {
    method: Method,
    name: &'static str,
    /// Whether ADDR and PORT make sense to it.
    check: fn(addr: &str, port: Option<u32>) -> Result<(), SpecError>,
}

/// Every method. A new kind of channel is one more row.
const METHODS: &[Row] = &[
    Row {
        method: Method::VhostUser,
        name: "vhost-user",
        check: socket_path,
    },
    Row {
        method: Method::VirtserialOpen,
        name: "virtserial-open",
        check: any_path,
    },
    Row {
        method: Method::IsaSerialOpen,
        name: "isa-serial-open",
        check: line,
    },
    Row {
        method: Method::UnixConnect,
        name: "unix-connect",
        check: socket_path,
    },
    Row {
        method: Method::UnixListen,
        name: "unix-listen",
        check: socket_path,
    },
    Row {
        method: Method::TcpConnect,
        name: "tcp-connect",
        check: tcp_target,
    },
    Row {
        method: Method::TcpListen,
        name: "tcp-listen",
        check: tcp,
    },
    Row {
        method: Method::VsockConnect,
        name: "vsock-connect",
        check: vsock,
    },
    Row {
        method: Method::VsockListen,
        name: "vsock-listen",
        check: vsock,
    },
    Row {
        method: Method::HvsockConnect,
        name: "hvsock-connect",
        check: socket_and_port,
    },
    Row {
        method: Method::Stdio,
        name: "stdio",
        check: nothing,
    },
    Row {
        method: Method::Exec,
        name: "exec",
        check: any_path,
    },
];

fn any_path(_addr: &str, port: Option<u32>) -> Result<(), SpecError> {
    port.map_or(Ok(()), |port| {
        Err(SpecError::PortAfterPath(port.to_string()))
    })
}

fn socket_path(addr: &str, port: Option<u32>) -> Result<(), SpecError> {
    any_path(addr, port)?;
    check_unix_path(addr)
}

/// Host and port to listen on.
fn tcp(addr: &str, port: Option<u32>) -> Result<(), SpecError> {
    let port = port.ok_or_else(|| SpecError::NoNumber(addr.into()))?;
    Host::from_str(addr)?;
    u16::try_from(port).map(drop).map_err(|_| too_large(port))
}

/// Host and port to connect to.
fn tcp_target(addr: &str, port: Option<u32>) -> Result<(), SpecError> {
    tcp(addr, port)?;
    match port {
        Some(0) => Err(SpecError::TargetPortZero),
        _ => Ok(()),
    }
}

fn too_large(port: u32) -> SpecError {
    SpecError::LargePort {
        port: port.to_string(),
        max: u16::MAX.into(),
    }
}

/// A device and the line's speed.
fn line(_addr: &str, port: Option<u32>) -> Result<(), SpecError> {
    port.map(drop).ok_or(SpecError::NoSpeed)
}

/// A context id (or its name) and a port.
fn vsock(addr: &str, port: Option<u32>) -> Result<(), SpecError> {
    Cid::from_str(addr)?;
    port.map(drop).ok_or(SpecError::NoVsockPort)
}

fn socket_and_port(addr: &str, port: Option<u32>) -> Result<(), SpecError> {
    port.ok_or(SpecError::NoVsockPort)?;
    check_unix_path(addr)
}

fn nothing(addr: &str, port: Option<u32>) -> Result<(), SpecError> {
    match (addr, port) {
        ("-", None) => Ok(()),
        _ => Err(SpecError::NotNothing),
    }
}

impl Method {
    /// The name it has on the command line.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    fn row(self) -> &'static Row {
        METHODS
            .iter()
            .find(|row| row.method == self)
            .expect("METHODS has a row for each method")
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Method {
    type Err = SpecError;

    fn from_str(s: &str) -> Result<Self, SpecError> {
        METHODS
            .iter()
            .find(|row| row.name == s)
            .map(|row| row.method)
            .ok_or_else(|| SpecError::UnknownMethod(s.into()))
    }
}

pub(super) fn method_names() -> String {
    let names: Vec<_> = METHODS.iter().map(|row| row.name).collect();
    names.join(", ")
}

/// The value of `-c`: a way to the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelSpec {
    /// Which kind of channel.
    pub method: Method,
    /// Where; its meaning depends on the method.
    pub addr: String,
    /// The number in PORT (a port, a line's speed, ...); `None` is `-`.
    pub port: Option<u32>,
    /// What forwards call it.
    pub id: Option<String>,
}

impl FromStr for ChannelSpec {
    type Err = SpecError;

    fn from_str(s: &str) -> Result<Self, SpecError> {
        let fields = Fields::split(s, Form::Channel)?;
        let method = Method::from_str(fields.first)?;
        let rest = fields.rest?;
        let port = rest.number(u32::MAX)?;
        (method.row().check)(rest.addr, port)?;
        Ok(ChannelSpec {
            method,
            addr: rest.addr.into(),
            port,
            id: rest.id.map(Into::into),
        })
    }
}

impl fmt::Display for ChannelSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:", self.method, self.addr)?;
        match self.port {
            Some(port) => write!(f, "{port}")?,
            None => f.write_str("-")?,
        }
        write_id(f, self.id.as_deref())
    }
}

/// A vsock context id (vsock(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cid(pub u32);

impl Cid {
    /// Any, to listen on: `VMADDR_CID_ANY`.
    pub const ANY: Self = Cid(u32::MAX);
    /// This machine itself: `VMADDR_CID_LOCAL`.
    pub const LOCAL: Self = Cid(1);
    /// The host: `VMADDR_CID_HOST`.
    pub const HOST: Self = Cid(2);
}

impl FromStr for Cid {
    type Err = SpecError;

    fn from_str(s: &str) -> Result<Self, SpecError> {
        match s {
            "any" => Ok(Cid::ANY),
            "local" => Ok(Cid::LOCAL),
            "host" => Ok(Cid::HOST),
            number => number
                .parse()
                .map(Cid)
                .map_err(|_| SpecError::BadCid(s.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_has_one_row() {
        for row in METHODS {
            assert_eq!(row.method.name(), row.name);
            assert_eq!(row.name.parse(), Ok(row.method));
        }
    }
}
