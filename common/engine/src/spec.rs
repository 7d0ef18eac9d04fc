//! What the user writes after `-c`, `-o` and `-i`.
//!
//! # Theory of operation
//!
//! ```text
//! channel = METHOD  ":" ADDR ":" PORT [ ":" ID ]        -c vhost-user:/run/vp.sock:-
//! forward = SERVICE ":" ADDR ":" PORT [ ":" ID ]        -o http:127.0.0.1:9080   -i db:/run/db.sock:-:blue
//!
//! METHOD  = one of the names in the table `METHODS`
//! SERVICE = 1 to 255 of A-Z a-z 0-9 . _ / -
//! PORT    = digits | "-"
//! ID      = a letter, then at most 63 of A-Z a-z 0-9 . _ -   |   digits, as in the first version
//! ADDR    = what is left
//! ```
//!
//! ADDR may contain `:`, as a path or an IPv6 address does, so the line is read **from both ends**: METHOD or
//! SERVICE is what stands before the first colon; of the rest, the last field is ID if it is not `-` and the one before
//! it can be PORT, else it is PORT: `/run/a:80:-` is the path `/run/a:80`, and so it is in `/run/a:80:-:blue`. An ID that
//! is a number would be mistaken for PORT in one place, an IPv6 address without its brackets: there it is none.
//!
//! In a forward, `-` as PORT makes ADDR the path of a UNIX socket. With a number, ADDR is an IPv4 address, an
//! IPv6 address in brackets, or a name, which is resolved when it is used, never here. In a channel, what ADDR
//! and PORT mean is the method's business: each row of `METHODS` has its own check.
//!
//! What `Display` prints parses to the same value. Every error is one line that names the field and says what to
//! write instead; clap puts the flag and the value in front of it.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::path::PathBuf;
use std::str::FromStr;

/// The longest path of a UNIX socket: `sun_path` of unix(7) has 108 bytes, the last of them a NUL.
pub const MAX_UNIX_PATH: usize = 107;

/// The longest service name; its length is one byte on the wire.
pub const MAX_SERVICE: usize = 255;

/// The longest ID of a channel.
pub const MAX_ID: usize = 64;

/// The longest host name (RFC 1035, in text form).
const MAX_HOST: usize = 253;

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

fn method_names() -> String {
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

/// The value of `-o` or `-i`: a service's name, and where it is to be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardSpec {
    /// The name on the wire.
    pub service: ServiceName,
    /// For `-o` where to listen, for `-i` where to connect to.
    pub endpoint: Endpoint,
    /// The ID of its channel; without one, the first.
    pub channel: Option<String>,
}

impl ForwardSpec {
    /// The value of `-o`: port 0 lets the kernel choose one. Same as [`FromStr`].
    pub fn parse_listen(s: &str) -> Result<Self, SpecError> {
        s.parse()
    }

    /// The value of `-i`: port 0 is refused, as nothing can be connected to it.
    pub fn parse_target(s: &str) -> Result<Self, SpecError> {
        let spec: Self = s.parse()?;
        match spec.endpoint {
            Endpoint::Tcp { port: 0, .. } => Err(SpecError::TargetPortZero),
            _ => Ok(spec),
        }
    }
}

impl FromStr for ForwardSpec {
    type Err = SpecError;

    fn from_str(s: &str) -> Result<Self, SpecError> {
        let fields = Fields::split(s, Form::Forward)?;
        let service = ServiceName::from_str(fields.first)?;
        let rest = fields.rest?;
        Ok(ForwardSpec {
            service,
            endpoint: rest.endpoint()?,
            channel: rest.id.map(Into::into),
        })
    }
}

impl fmt::Display for ForwardSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.service, self.endpoint)?;
        write_id(f, self.channel.as_deref())
    }
}

fn write_id(f: &mut fmt::Formatter<'_>, id: Option<&str>) -> fmt::Result {
    id.map_or(Ok(()), |id| write!(f, ":{id}"))
}

/// The name of a service, as both ends and the wire know it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName(String);

impl ServiceName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ServiceName {
    type Err = SpecError;

    fn from_str(s: &str) -> Result<Self, SpecError> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._/-".contains(&b);
        if s.is_empty() {
            Err(SpecError::MissingService)
        } else if s.len() > MAX_SERVICE {
            Err(SpecError::LongService(s.len()))
        } else if !s.bytes().all(allowed) {
            Err(SpecError::BadService(s.into()))
        } else {
            Ok(ServiceName(s.into()))
        }
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a local socket listens or connects to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A TCP port.
    Tcp {
        /// An address, or a name to be resolved when it is used.
        host: Host,
        /// The port; 0, when listening, is one that the kernel chooses.
        port: u16,
    },
    /// The path of a UNIX socket.
    Unix(PathBuf),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Tcp { host, port } => write!(f, "{host}:{port}"),
            Endpoint::Unix(path) => write!(f, "{}:-", path.display()),
        }
    }
}

/// The host of a TCP endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// An address, known without asking anyone.
    Ip(IpAddr),
    /// A name to resolve.
    Name(String),
}

impl FromStr for Host {
    type Err = SpecError;

    fn from_str(s: &str) -> Result<Self, SpecError> {
        if let Some(inner) = s.strip_prefix('[') {
            return inner
                .strip_suffix(']')
                .and_then(|inner| inner.parse::<Ipv6Addr>().ok())
                .map(|ip| Host::Ip(ip.into()))
                .ok_or_else(|| SpecError::BadIpv6(s.into()));
        }
        if let Ok(ip) = s.parse() {
            return match ip {
                IpAddr::V4(_) => Ok(Host::Ip(ip)),
                IpAddr::V6(_) => Err(SpecError::NoBrackets(s.into())),
            };
        }
        if s.contains(':') {
            return Err(SpecError::NoBrackets(s.into()));
        }
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        // `1.2.3` or `300.1.1.1`: no name ends in a label of digits, and resolvers read odd things into it.
        let numeric = |s: &str| {
            s.rsplit('.')
                .next()
                .is_some_and(|label| label.bytes().all(|b| b.is_ascii_digit()))
        };
        if s.len() > MAX_HOST || !s.bytes().all(allowed) || numeric(s) {
            return Err(SpecError::BadHost(s.into()));
        }
        Ok(Host::Name(s.into()))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]"),
            Host::Ip(ip) => write!(f, "{ip}"),
            Host::Name(name) => f.write_str(name),
        }
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

/// Which of the two forms was meant, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `METHOD:ADDR:PORT[:ID]`
    Channel,
    /// `SERVICE:ADDR:PORT[:ID]`
    Forward,
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Form::Channel => "write METHOD:ADDR:PORT, with - as PORT where ADDR is a path",
            Form::Forward => "write SERVICE:ADDR:PORT, or SERVICE:/path:- for a UNIX socket",
        })
    }
}

/// What is wrong with a `-c`, `-o` or `-i`, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum SpecError {
    #[error("unknown METHOD {0:?}: the methods are {methods}", methods = method_names())]
    UnknownMethod(String),
    #[error("missing SERVICE: {form}", form = Form::Forward)]
    MissingService,
    #[error("SERVICE {0:?} has a character that names may not have: use A-Z a-z 0-9 . _ / -")]
    BadService(String),
    #[error("SERVICE is {0} bytes long: use at most {MAX_SERVICE}")]
    LongService(usize),
    #[error("missing ADDR: {0}")]
    MissingAddr(Form),
    #[error("missing PORT: {0}")]
    MissingPort(Form),
    #[error("PORT {0:?} is not a port: write a number, or - after a path")]
    BadPort(String),
    #[error("PORT {port} is too large: the largest is {max}")]
    LargePort { port: String, max: u32 },
    #[error("PORT 0 cannot be connected to: write the port that the service listens on")]
    TargetPortZero,
    #[error("PORT {0} after a path: write - as PORT")]
    PortAfterPath(String),
    #[error("PORT - makes ADDR {0:?} a path: write the port's number after an address")]
    NoNumber(String),
    #[error("PORT is missing the line's speed: write it in bits a second, as in /dev/ttyS1:115200")]
    NoSpeed,
    #[error("PORT - is no vsock port: write its number")]
    NoVsockPort,
    #[error("ADDR {0:?} is no vsock context id: write its number, or host, local or any")]
    BadCid(String),
    #[error("this method has neither ADDR nor PORT: write stdio:-:-")]
    NotNothing,
    #[error("ADDR {0:?} is not an IPv6 address in brackets: write one like [::1]")]
    BadIpv6(String),
    #[error("ADDR {0:?} has colons but no brackets: write an IPv6 address as in [::1]:80")]
    NoBrackets(String),
    #[error(
        "ADDR {0:?} is neither an IP address nor a host name: write one like 127.0.0.1, [::1] or localhost"
    )]
    BadHost(String),
    #[error("ADDR is a path of {0} bytes, too long for a UNIX socket: use at most {MAX_UNIX_PATH}")]
    LongPath(usize),
    #[error(
        "ID {0:?} is not an ID: use a letter, then at most 63 of A-Z a-z 0-9 . _ -, or a number"
    )]
    BadId(String),
}

/// A value cut into fields. METHOD or SERVICE is looked at first: who mistypes it wants to hear that.
struct Fields<'s> {
    first: &'s str,
    rest: Result<Rest<'s>, SpecError>,
}

/// The fields after the first.
struct Rest<'s> {
    addr: &'s str,
    port: &'s str,
    id: Option<&'s str>,
}

impl<'s> Fields<'s> {
    fn split(s: &'s str, form: Form) -> Result<Self, SpecError> {
        match s.split_once(':') {
            Some((first, rest)) => Ok(Fields {
                first,
                rest: Rest::split(rest, form),
            }),
            None => Ok(Fields {
                first: s,
                rest: Err(SpecError::MissingAddr(form)),
            }),
        }
    }
}

impl<'s> Rest<'s> {
    fn split(rest: &'s str, form: Form) -> Result<Self, SpecError> {
        let missing_port = Err(SpecError::MissingPort(form));
        let (head, last) = match rest.rsplit_once(':') {
            // The last colon is inside a path or an IPv6 address.
            Some((_, last)) if last.contains(['/', ']']) => return missing_port,
            Some((_, "")) => return missing_port,
            Some(pair) => pair,
            None if rest.is_empty() => return Err(SpecError::MissingAddr(form)),
            None => return missing_port,
        };
        let (addr, port, id) = match head.rsplit_once(':') {
            Some((addr, port))
                if is_port(port) && (!is_port(last) || is_number_id(addr, port, last)) =>
            {
                (addr, port, Some(last))
            }
            _ if is_port(last) => (head, last, None),
            _ => return Err(SpecError::BadPort(last.into())),
        };
        if addr.is_empty() {
            return Err(SpecError::MissingAddr(form));
        }
        if let Some(id) = id {
            check_id(id)?;
        }
        Ok(Rest { addr, port, id })
    }

    /// The number in PORT; `None` is `-`.
    fn number(&self, max: u32) -> Result<Option<u32>, SpecError> {
        if self.port == "-" {
            return Ok(None);
        }
        match self.port.parse() {
            Ok(port) if port <= max => Ok(Some(port)),
            _ => Err(SpecError::LargePort {
                port: self.port.into(),
                max,
            }),
        }
    }

    fn endpoint(&self) -> Result<Endpoint, SpecError> {
        let addr = self.addr;
        let Some(port) = self.number(u16::MAX.into())? else {
            if matches!(addr.parse(), Ok(Host::Ip(_))) {
                return Err(SpecError::NoNumber(addr.into()));
            }
            check_unix_path(addr)?;
            return Ok(Endpoint::Unix(addr.into()));
        };
        if addr.contains('/') {
            return Err(SpecError::PortAfterPath(port.to_string()));
        }
        Ok(Endpoint::Tcp {
            host: addr.parse()?,
            port: u16::try_from(port).expect("its maximum was u16::MAX"),
        })
    }
}

fn is_port(field: &str) -> bool {
    field == "-" || (!field.is_empty() && field.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether `last` is an ID although it is a number. Else it is PORT, and `addr` and `port` are an IPv6 address or a path.
fn is_number_id(addr: &str, port: &str, last: &str) -> bool {
    last != "-" && (port == "-" || !addr.contains(':') || addr.contains(['/', ']']))
}

fn check_id(id: &str) -> Result<(), SpecError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    let named = id.starts_with(|c: char| c.is_ascii_alphabetic()) && id.bytes().all(allowed);
    let numbered = id.bytes().all(|b| b.is_ascii_digit());
    let ok = id.len() <= MAX_ID && (named || numbered);
    ok.then_some(()).ok_or_else(|| SpecError::BadId(id.into()))
}

fn check_unix_path(path: &str) -> Result<(), SpecError> {
    match path.len() {
        0..=MAX_UNIX_PATH => Ok(()),
        len => Err(SpecError::LongPath(len)),
    }
}

#[cfg(test)]
mod tests;
