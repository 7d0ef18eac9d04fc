//! What the user writes after `--port` and `--console`.
//!
//! ```text
//! port  = NAME "=" PLACE           --port org.qemu.guest_agent.0=unix-listen:/run/qga.sock
//! NAME  = 1 to 255 of A-Z a-z 0-9 . _ -
//! PLACE = "unix-listen:" PATH | "unix-connect:" PATH | "file:" PATH | "pty" [ ":" LINK ] | "stdio"
//! ```
//!
//! What `Display` prints parses to the same value. Every error is one line that says what to write instead; clap puts
//! the flag and the value in front of it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use virtproxy_engine::spec::MAX_UNIX_PATH;

/// The name of the console's port.
pub const CONSOLE: &str = "console";

/// The longest name of a port.
const MAX_NAME: usize = 255;

/// A port beside the mux: how the guest finds it, and where it leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortArg {
    /// The guest finds it as `/dev/virtio-ports/NAME`.
    pub name: String,
    /// Where its bytes come from and go to.
    pub place: Place,
}

/// Where the bytes of a port come from and go to on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A UNIX socket that programs connect to, one after the other.
    Listen(PathBuf),
    /// A UNIX socket that is connected to, again and again.
    Connect(PathBuf),
    /// A file that what the guest writes is appended to.
    File(PathBuf),
    /// A pseudo-terminal, with a symbolic link to it if there is a path.
    Pty(Option<PathBuf>),
    /// This program's standard input and output.
    Stdio,
}

/// What is wrong with a `--port` or `--console`, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum PlaceError {
    #[error("missing PLACE: write NAME=PLACE, as in org.example.0=unix-listen:/run/example.sock")]
    MissingPlace,
    #[error("missing NAME: write NAME=PLACE, as in org.example.0=unix-listen:/run/example.sock")]
    MissingName,
    #[error("NAME {CONSOLE} is the port of --console: use another name")]
    Reserved,
    #[error("NAME {0:?} has a character that names may not have: use A-Z a-z 0-9 . _ -")]
    BadName(String),
    #[error("NAME is {0} bytes long: use at most {MAX_NAME}")]
    LongName(usize),
    #[error(
        "unknown PLACE {0:?}: write unix-listen:PATH, unix-connect:PATH, file:PATH, pty, pty:LINK or stdio"
    )]
    UnknownPlace(String),
    #[error("missing PATH: write {0}:PATH")]
    MissingPath(String),
    #[error("stdio has no PATH: write stdio")]
    StdioPath,
    #[error("PATH is {0} bytes long, too long for a UNIX socket: use at most {MAX_UNIX_PATH}")]
    LongPath(usize),
}

impl FromStr for PortArg {
    type Err = PlaceError;

    fn from_str(s: &str) -> Result<Self, PlaceError> {
        let (name, place) = s.split_once('=').ok_or(PlaceError::MissingPlace)?;
        check_name(name)?;
        Ok(PortArg {
            name: name.to_owned(),
            place: place.parse()?,
        })
    }
}

fn check_name(name: &str) -> Result<(), PlaceError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    match name.len() {
        0 => Err(PlaceError::MissingName),
        _ if name == CONSOLE => Err(PlaceError::Reserved),
        1..=MAX_NAME if name.bytes().all(allowed) => Ok(()),
        1..=MAX_NAME => Err(PlaceError::BadName(name.into())),
        len => Err(PlaceError::LongName(len)),
    }
}

impl fmt::Display for PortArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.place)
    }
}

impl FromStr for Place {
    type Err = PlaceError;

    fn from_str(s: &str) -> Result<Self, PlaceError> {
        let (kind, path) = match s.split_once(':') {
            Some((kind, path)) => (kind, Some(path)),
            None => (s, None),
        };
        let needed = || {
            path.filter(|path| !path.is_empty())
                .map(PathBuf::from)
                .ok_or_else(|| PlaceError::MissingPath(kind.into()))
        };
        let socket = || match needed()? {
            path if path.as_os_str().len() > MAX_UNIX_PATH => {
                Err(PlaceError::LongPath(path.as_os_str().len()))
            }
            path => Ok(path),
        };
        match (kind, path) {
            ("unix-listen", _) => Ok(Place::Listen(socket()?)),
            ("unix-connect", _) => Ok(Place::Connect(socket()?)),
            ("file", _) => Ok(Place::File(needed()?)),
            ("pty", None) => Ok(Place::Pty(None)),
            ("pty", Some(_)) => Ok(Place::Pty(Some(needed()?))),
            ("stdio", None) => Ok(Place::Stdio),
            ("stdio", Some(_)) => Err(PlaceError::StdioPath),
            ("", None) => Err(PlaceError::MissingPlace),
            _ => Err(PlaceError::UnknownPlace(s.into())),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Listen(path) => write!(f, "unix-listen:{}", path.display()),
            Place::Connect(path) => write!(f, "unix-connect:{}", path.display()),
            Place::File(path) => write!(f, "file:{}", path.display()),
            Place::Pty(None) => f.write_str("pty"),
            Place::Pty(Some(link)) => write!(f, "pty:{}", link.display()),
            Place::Stdio => f.write_str("stdio"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_printed_the_same() {
        for text in [
            "org.qemu.guest_agent.0=unix-listen:/run/qga.sock",
            "a=unix-connect:/run/a:b=c",
            "a-b_c.9=file:/var/log/x",
            "t=pty",
            "t=pty:/run/console",
            "s=stdio",
        ] {
            assert_eq!(text.parse::<PortArg>().unwrap().to_string(), text);
        }
        let parsed: PortArg = "a=unix-connect:/run/a:b=c".parse().unwrap();
        assert_eq!(parsed.name, "a");
        assert_eq!(parsed.place, Place::Connect("/run/a:b=c".into()));
    }

    #[test]
    fn each_mistake_is_named_with_its_cure() {
        let long = "n".repeat(256);
        let path = "p".repeat(108);
        for (text, part) in [
            ("x", "missing PLACE: write NAME=PLACE"),
            ("x=", "missing PLACE"),
            ("=pty", "missing NAME"),
            ("console=pty", "the port of --console"),
            ("a/b=pty", "use A-Z a-z 0-9 . _ -"),
            ("a b=pty", "use A-Z a-z 0-9 . _ -"),
            (&format!("{long}=pty"), "256 bytes long: use at most 255"),
            ("x=tcp:1", "unknown PLACE \"tcp:1\": write unix-listen:PATH"),
            ("x=/run/x", "unknown PLACE"),
            ("x=unix-listen", "missing PATH: write unix-listen:PATH"),
            ("x=unix-connect:", "missing PATH: write unix-connect:PATH"),
            ("x=file:", "missing PATH: write file:PATH"),
            ("x=pty:", "missing PATH: write pty:PATH"),
            ("x=stdio:-", "stdio has no PATH"),
            (
                &format!("x=unix-listen:{path}"),
                "108 bytes long, too long for a UNIX socket: use at most 107",
            ),
        ] {
            let error = text.parse::<PortArg>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
            assert_eq!(error.lines().count(), 1);
        }
    }
}
