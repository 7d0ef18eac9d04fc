//! Whether this process is in a sandbox, for messages: an error may be the sandbox's doing.
//!
//! The program that has one tells ([`entered`]); a process never leaves it.

use std::error::Error;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

static ENTERED: AtomicBool = AtomicBool::new(false);

/// From now on it is.
pub fn entered() {
    ENTERED.store(true, Ordering::Relaxed);
}

/// What to append to the message about `error`: a cure, if the sandbox may be the cause of it.
pub fn hint(error: &io::Error) -> &'static str {
    match ENTERED.load(Ordering::Relaxed) && is_denial(error) {
        true => {
            "; it may be the sandbox, which allows what the flags named at the start, to the user it runs as: see --user \
             and --no-sandbox"
        }
        false => "",
    }
}

fn is_denial(error: &(dyn Error + 'static)) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
        || error.source().is_some_and(is_denial)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unix_socket::ListenError;

    #[test]
    fn a_denial_is_found_beneath_what_was_made_of_it() {
        let listening = |kind: io::ErrorKind| {
            io::Error::other(ListenError::System {
                path: "/run/s".into(),
                source: kind.into(),
            })
        };
        assert!(is_denial(&io::Error::from(io::ErrorKind::PermissionDenied)));
        assert!(is_denial(&listening(io::ErrorKind::PermissionDenied)));
        assert!(!is_denial(&listening(io::ErrorKind::AddrInUse)));
    }
}
