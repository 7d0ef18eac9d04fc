//! Whom root becomes.
//!
//! `--user` says. Without it root becomes `nobody`, unless something is to be reached in the file system later, such as the
//! UNIX socket of a target: then nobody but the user can know who may, and root stays root, though without capabilities,
//! and says so.

use std::ffi::{CStr, CString};
use std::fmt;
use std::io;
use std::mem::MaybeUninit;

use tracing::warn;

use super::{ConfineError, Needs, done};

/// Whom root becomes unasked.
const NOBODY: &CStr = c"nobody";

/// Room for the strings of an entry of the user database.
const ENTRY: usize = 16 * 1024;

/// A user of this machine.
pub(super) struct User {
    name: CString,
    uid: libc::uid_t,
    gid: libc::gid_t,
}

impl User {
    /// Whom to become; `None` is nobody else. `asked` is what `--user` says.
    pub(super) fn choose(asked: Option<&str>, needs: &Needs) -> Result<Option<Self>, ConfineError> {
        let is_root = uid() == 0;
        match asked {
            Some(name) => {
                let failed = |why: String| ConfineError::User(name.to_owned(), why);
                if !is_root {
                    return Err(failed(
                        "only root can become another user: leave it out".into(),
                    ));
                }
                let entry = CString::new(name).map_err(|_| failed("no name of a user".into()))?;
                match Self::find(&entry) {
                    Ok(Some(user)) => Ok(Some(user)),
                    Ok(None) => Err(failed(
                        "there is no such user: name one, such as nobody".into(),
                    )),
                    Err(error) => Err(failed(error.to_string())),
                }
            }
            None if !is_root => Ok(None),
            None => {
                if let Some(path) = needs.reached_later() {
                    warn!(
                        "the sandbox has to stay root's, as {} is to be reached later: name a user that may, with --user",
                        path.display()
                    );
                    return Ok(None);
                }
                match Self::find(NOBODY) {
                    Ok(Some(user)) => Ok(Some(user)),
                    _ => Err(ConfineError::User(
                        "nobody".into(),
                        "root becomes this user, and there is none: name another with --user"
                            .into(),
                    )),
                }
            }
        }
    }

    fn find(name: &CStr) -> io::Result<Option<Self>> {
        let mut entry = MaybeUninit::<libc::passwd>::uninit();
        let mut strings = vec![0; ENTRY];
        let mut found = std::ptr::null_mut();
        // SAFETY: every pointer is valid for the call, and the length is that of the buffer.
        let failed = unsafe {
            libc::getpwnam_r(
                name.as_ptr(),
                entry.as_mut_ptr(),
                strings.as_mut_ptr(),
                strings.len(),
                &raw mut found,
            )
        };
        if failed != 0 {
            return Err(io::Error::from_raw_os_error(failed));
        }
        if found.is_null() {
            return Ok(None);
        }
        // SAFETY: the call succeeded and found one, so it has filled the entry.
        let (uid, gid) = unsafe {
            let entry = entry.assume_init_ref();
            (entry.pw_uid, entry.pw_gid)
        };
        let name = name.to_owned();
        Ok(Some(User { name, uid, gid }))
    }

    /// Becomes this user for good, with the groups it has.
    pub(super) fn become_it(&self) -> io::Result<()> {
        // SAFETY: plain integers, and a string that ends with a NUL.
        unsafe {
            done(libc::initgroups(self.name.as_ptr(), self.gid))?;
            done(libc::setresgid(self.gid, self.gid, self.gid))?;
            done(libc::setresuid(self.uid, self.uid, self.uid))
        }
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name.to_string_lossy())
    }
}

fn uid() -> libc::uid_t {
    // SAFETY: it takes nothing and cannot fail.
    unsafe { libc::geteuid() }
}
