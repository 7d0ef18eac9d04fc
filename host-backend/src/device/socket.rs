//! The socket that QEMU connects to: who may have the path, and who removes it.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};

use super::StartError;

/// A socket file of ours, removed when dropped: before its socket, which keeps the inode from being another's.
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode: somebody else's file at our path is not removed.
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listens on `path`. A socket that nobody listens on any more is replaced, nothing else is.
pub(super) fn listen(path: &Path) -> Result<(UnixListener, SocketFile), StartError> {
    let failed = |source| StartError::Listen {
        path: path.to_owned(),
        source,
    };
    let listener = match bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            check_stale(path)?;
            fs::remove_file(path).map_err(failed)?;
            bind(path).map_err(failed)?
        }
        result => result.map_err(failed)?,
    };
    let file = SocketFile {
        path: path.to_owned(),
        identity: identity(path).map_err(failed)?,
    };
    Ok((listener, file))
}

/// Makes the socket file with mode 0600: Linux takes the mode of the file from that of the unbound socket, so that
/// there is no moment when others could connect.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let file = File::from(OwnedFd::from(Socket::new(
        Domain::UNIX,
        Type::STREAM,
        None,
    )?));
    file.set_permissions(Permissions::from_mode(0o600))?;
    let socket = Socket::from(OwnedFd::from(file));
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(16)?;
    Ok(OwnedFd::from(socket).into())
}

fn check_stale(path: &Path) -> Result<(), StartError> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if !is_socket {
        return Err(StartError::NotASocket(path.to_owned()));
    }
    // A datagram socket cannot connect to a stream socket, so this asks without being noticed there: refused means
    // that no process holds the socket.
    let probe = UnixDatagram::unbound().and_then(|probe| probe.connect(path));
    match probe {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        _ => Err(StartError::InUse(path.to_owned())),
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
        let (_listener, file) = listen(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_live_socket_is_left_alone_and_a_stale_one_replaced() {
        let path = fresh("stale");
        let (listener, file) = listen(&path).unwrap();
        assert!(matches!(listen(&path), Err(StartError::InUse(_))));
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "nobody was there");
        std::mem::forget(file);
        drop(listener);
        assert!(path.exists(), "as after a crash");
        let _ = listen(&path).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_took_the_place_of_ours_stays() {
        let path = fresh("replaced");
        let (_first, file) = listen(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let (_second, _other) = listen(&path).unwrap();
        drop(file);
        assert!(path.exists());
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let path = fresh("file");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(listen(&path), Err(StartError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        fs::remove_file(&path).unwrap();
    }
}
