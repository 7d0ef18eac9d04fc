//! What the program still has to do once everything that its flags name is open: from this the sandbox is cut.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use virtproxy_engine::program::Options;
use virtproxy_engine::spec::{ChannelSpec, Endpoint, Host, Method};
use virtproxy_engine::unix_socket::folder_of;

use crate::ports::Place;

/// The port of DNS, which is also asked over TCP.
const DNS: u16 = 53;

/// What is done with a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Use {
    /// Files of ours in this folder are removed at the end.
    Tidy,
    /// Sockets, links and files are made in this folder at any time, for ports that are added.
    Make,
    /// This device is opened, again and again.
    Open,
    /// A UNIX socket is connected to.
    Reach,
}

/// What the program still has to do after its start.
#[derive(Debug, Default)]
pub struct Needs {
    paths: BTreeSet<(PathBuf, Use)>,
    names: BTreeSet<String>,
    families: BTreeSet<libc::c_int>,
    connects: BTreeSet<u16>,
    listens: BTreeSet<u16>,
    binds: bool,
    terminals: bool,
    command: Option<String>,
}

impl Needs {
    /// Those of a program with these flags: `places` are of the ports beside the mux, `admin` is the admin socket.
    pub fn new<'p>(
        options: &Options,
        places: impl IntoIterator<Item = &'p Place>,
        admin: Option<&Path>,
    ) -> Self {
        let mut needs = Needs::default();
        for channel in &options.channels {
            needs.channel(channel);
        }
        for forward in &options.out {
            if let Endpoint::Unix(path) = &forward.endpoint {
                needs.tidies(path);
            }
        }
        for forward in &options.serve {
            match &forward.endpoint {
                Endpoint::Unix(path) => needs.reaches(path),
                Endpoint::Tcp { host, port } => {
                    needs.network(host);
                    needs.connects.insert(*port);
                }
                Endpoint::Udp { host, .. } => {
                    needs.network(host);
                    needs.binds = true;
                }
            }
        }
        for place in places {
            needs.place(place);
        }
        if let Some(path) = admin {
            needs.tidies(path);
            needs.paths.insert((folder_of(path).to_owned(), Use::Make));
            needs.families.insert(libc::AF_UNIX);
            (needs.binds, needs.terminals) = (true, true);
        }
        needs
    }

    fn channel(&mut self, spec: &ChannelSpec) {
        let path = Path::new(&spec.addr);
        let port = spec.port.and_then(|port| u16::try_from(port).ok());
        match spec.method {
            Method::UnixListen => self.tidies(path),
            Method::UnixConnect | Method::HvsockConnect => self.reaches(path),
            Method::TcpConnect | Method::TcpListen => {
                if let Ok(host) = spec.addr.parse() {
                    self.network(&host);
                }
                if spec.method == Method::TcpConnect {
                    self.connects.extend(port);
                } else {
                    self.listens.extend(port);
                    self.binds = true;
                }
            }
            Method::VsockConnect => drop(self.families.insert(libc::AF_VSOCK)),
            Method::VsockListen => {
                self.families.insert(libc::AF_VSOCK);
                self.binds = true;
            }
            Method::IsaSerialOpen => {
                self.paths.insert((path.to_owned(), Use::Open));
                self.terminals = true;
            }
            Method::Exec => self.command = Some(spec.to_string()),
            // The keeper's; taken at the start; and what this program refuses.
            Method::VhostUser | Method::Stdio | Method::VirtserialOpen => {}
        }
    }

    fn place(&mut self, place: &Place) {
        match place {
            Place::Listen(path) => self.tidies(path),
            Place::Connect(path) => self.reaches(path),
            Place::Pty(link) => {
                link.iter().for_each(|path| self.tidies(path));
                self.terminals = true;
            }
            Place::Stdio => self.terminals = true,
            Place::File(_) => {}
        }
    }

    fn tidies(&mut self, path: &Path) {
        self.paths.insert((folder_of(path).to_owned(), Use::Tidy));
    }

    fn reaches(&mut self, path: &Path) {
        self.paths.insert((path.to_owned(), Use::Reach));
        self.families.insert(libc::AF_UNIX);
    }

    /// Sockets that reach `host`, and looking it up if it is a name.
    fn network(&mut self, host: &Host) {
        match host {
            Host::Ip(IpAddr::V4(_)) => drop(self.families.insert(libc::AF_INET)),
            Host::Ip(IpAddr::V6(_)) => drop(self.families.insert(libc::AF_INET6)),
            Host::Name(name) => {
                self.names.insert(name.clone());
                self.connects.insert(DNS);
                self.binds = true;
                // The C library asks the kernel which addresses there are, and local services for names.
                self.families.extend([
                    libc::AF_INET,
                    libc::AF_INET6,
                    libc::AF_NETLINK,
                    libc::AF_UNIX,
                ]);
            }
        }
    }

    /// The flag that runs a command, whose needs nobody knows: then there can be no sandbox.
    pub fn command(&self) -> Option<&str> {
        self.command.as_deref()
    }

    /// What is done with paths.
    pub(super) fn paths(&self) -> impl Iterator<Item = (&Path, Use)> {
        self.paths.iter().map(|(path, use_)| (&**path, *use_))
    }

    /// A path for which it counts as whom the program runs; files that are not removed are replaced at the next start.
    pub(super) fn reached_later(&self) -> Option<&Path> {
        let mut paths = self.paths();
        paths
            .find(|(_, use_)| *use_ != Use::Tidy)
            .map(|(path, _)| path)
    }

    /// Names to be looked up.
    pub(super) fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// Kinds of sockets that are made.
    pub(super) fn families(&self) -> impl Iterator<Item = libc::c_int> {
        self.families.iter().copied()
    }

    /// TCP ports that are connected to.
    pub(super) fn connects(&self) -> impl Iterator<Item = u16> {
        self.connects.iter().copied()
    }

    /// TCP ports that are listened on later, as when an address was not there yet.
    pub(super) fn listens(&self) -> impl Iterator<Item = u16> {
        self.listens.iter().copied()
    }

    /// Whether sockets are given an address of their own.
    pub(super) fn binds(&self) -> bool {
        self.binds
    }

    /// Whether terminals are set up.
    pub(super) fn terminals(&self) -> bool {
        self.terminals
    }

    /// Whether ports are added.
    pub(super) fn adds_ports(&self) -> bool {
        self.paths().any(|(_, use_)| use_ == Use::Make)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        options: Options,
    }

    fn needs(flags: &[&str]) -> Needs {
        let flags = [&["test"], flags].concat();
        Needs::new(&Flags::parse_from(flags).options, [], None)
    }

    #[test]
    fn a_device_with_listeners_needs_no_socket_and_no_file() {
        let needs = needs(&[
            "-cvhost-user:/run/vp/sock:-",
            "-ohttp:127.0.0.1:80",
            "-ons/udp:localhost:53",
        ]);
        assert_eq!(needs.families().count(), 0);
        assert_eq!(needs.names().len(), 0);
        assert!(!needs.binds() && !needs.terminals() && needs.reached_later().is_none());
        assert_eq!(needs.paths().count(), 0);
    }

    #[test]
    fn targets_need_what_reaches_them() {
        let address = needs(&["-cvhost-user:/s:-", "-ipkg:127.0.0.1:3142"]);
        assert_eq!(address.families().collect::<Vec<_>>(), [libc::AF_INET]);
        assert_eq!(address.connects().collect::<Vec<_>>(), [3142]);
        assert!(!address.binds());
        let name = needs(&["-cvhost-user:/s:-", "-ipkg:example.org:80"]);
        assert_eq!(name.connects().collect::<Vec<_>>(), [53, 80]);
        assert_eq!(name.names().collect::<Vec<_>>(), ["example.org"]);
        let socket = needs(&["-cvhost-user:/s:-", "-idocker:/run/docker.sock:-"]);
        assert_eq!(socket.families().collect::<Vec<_>>(), [libc::AF_UNIX]);
        let reached = socket.reached_later();
        assert_eq!(reached, Some(Path::new("/run/docker.sock")));
    }

    #[test]
    fn a_command_needs_everything() {
        assert!(needs(&["-cexec:ssh box:-"]).command().is_some());
    }
}
