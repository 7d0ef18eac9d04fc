//! A listening UNIX socket: who may have the path, and who removes it.
//!
//! The file is made with mode 0600, so that only its owner can connect, and there is no moment when others could. A
//! socket that nobody listens on any more (its program crashed) is replaced; one in use, and anything that is not a
//! socket, is left alone. At the end the file is removed, unless another program's is in its place by then.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::driver::bind_cure;

/// Why a path cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A live process listens there.
    #[error("another program listens on {}: end it, or name another path", .0.display())]
    InUse(PathBuf),
    /// The path is taken by something that must not be removed.
    #[error("{} exists and is not a socket: remove it, or name another path", .0.display())]
    NotASocket(PathBuf),
    /// Anybody could put another socket in its place.
    #[error(
        "every user of this machine may write to {folder}, and so replace the socket: chmod o-w {folder}, or name a \
         path in another directory",
        folder = .0.display()
    )]
    OpenFolder(PathBuf),
    /// The socket cannot be made.
    #[error("cannot listen on {}: {source}{cure}", path.display(), cure = bind_cure(source))]
    System {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl From<ListenError> for io::Error {
    /// For who says the path and the cure itself.
    fn from(error: ListenError) -> Self {
        match error {
            ListenError::System { source, .. } => source,
            error => io::Error::other(error),
        }
    }
}

/// A socket file of ours, removed when dropped: before its socket, which keeps the inode from being another's.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode: somebody else's file at our path is not removed.
    identity: (u64, u64),
}

impl SocketFile {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listens on `path`, with room for `backlog` clients that were not accepted yet. Drop the file before the listener.
pub fn listen(path: &Path, backlog: i32) -> Result<(UnixListener, SocketFile), ListenError> {
    let failed = |source| ListenError::System {
        path: path.to_owned(),
        source,
    };
    let listener = match bind(path, backlog) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            check_stale(path)?;
            fs::remove_file(path).map_err(failed)?;
            bind(path, backlog).map_err(failed)?
        }
        result => result.map_err(failed)?,
    };
    let file = SocketFile {
        path: path.to_owned(),
        identity: identity(path).map_err(failed)?,
    };
    Ok((listener, file))
}

/// Whether the folder of `path` is one in which others cannot replace a socket: one that they may not write to, or like
/// `/tmp` only add their own files to.
///
/// # Errors
/// It is not.
pub fn check_folder(path: &Path) -> Result<(), ListenError> {
    let folder = folder_of(path);
    let mode = fs::metadata(folder).map_or(0, |folder| folder.mode());
    match mode & (libc::S_IWOTH | libc::S_ISVTX) {
        libc::S_IWOTH => Err(ListenError::OpenFolder(folder.to_owned())),
        _ => Ok(()),
    }
}

/// The folder that `path` is in.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        // A bare name; and `/`, which nobody can listen on.
        _ => Path::new("."),
    }
}

/// Makes the socket file with mode 0600: Linux takes the mode of the file from that of the unbound socket, so that
/// there is no moment when others could connect.
fn bind(path: &Path, backlog: i32) -> io::Result<UnixListener> {
    let file = File::from(OwnedFd::from(Socket::new(
        Domain::UNIX,
        Type::STREAM,
        None,
    )?));
    file.set_permissions(Permissions::from_mode(0o600))?;
    let socket = Socket::from(OwnedFd::from(file));
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(backlog)?;
    Ok(OwnedFd::from(socket).into())
}

fn check_stale(path: &Path) -> Result<(), ListenError> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if !is_socket {
        return Err(ListenError::NotASocket(path.to_owned()));
    }
    // A datagram socket cannot connect to a stream socket, so this asks without being noticed there: refused means
    // that no process holds the socket.
    let probe = UnixDatagram::unbound().and_then(|probe| probe.connect(path));
    match probe {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        _ => Err(ListenError::InUse(path.to_owned())),
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("virtproxy-{}-{name}", std::process::id()));
        let _ = fs::remove_file(&path);
        path
    }

    #[test]
    fn the_file_is_private_and_removed_at_the_end() {
        let path = fresh("private");
        let (_listener, file) = listen(&path, 16).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_folder_that_everybody_may_write_to_is_refused_unless_it_is_sticky() {
        let folder = fresh("folder");
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("socket");
        for (mode, fits) in [(0o700, true), (0o775, true), (0o777, false), (0o1777, true)] {
            fs::set_permissions(&folder, Permissions::from_mode(mode)).unwrap();
            assert_eq!(check_folder(&path).is_ok(), fits, "{mode:o}");
        }
        fs::remove_dir(&folder).unwrap();
        assert!(check_folder(Path::new("bare")).is_ok());
    }

    #[test]
    fn a_live_socket_is_left_alone_and_a_stale_one_replaced() {
        let path = fresh("stale");
        let (listener, file) = listen(&path, 16).unwrap();
        assert!(matches!(listen(&path, 16), Err(ListenError::InUse(_))));
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "nobody was there");
        std::mem::forget(file);
        drop(listener);
        assert!(path.exists(), "as after a crash");
        let _ = listen(&path, 16).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_took_the_place_of_ours_stays() {
        let path = fresh("replaced");
        let (_first, file) = listen(&path, 16).unwrap();
        fs::remove_file(&path).unwrap();
        let (_second, _other) = listen(&path, 16).unwrap();
        drop(file);
        assert!(path.exists());
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let path = fresh("file");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(listen(&path, 16), Err(ListenError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        fs::remove_file(&path).unwrap();
    }
}
