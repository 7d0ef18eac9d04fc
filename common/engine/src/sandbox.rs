//! Whether this process is in a sandbox, for messages: an error may be the sandbox's doing.
//!
//! The program that has one tells ([`entered`]); a process never leaves it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

static ENTERED: AtomicBool = AtomicBool::new(false);

/// From now on it is.
pub fn entered() {
    ENTERED.store(true, Ordering::Relaxed);
}

/// What to append to the message about `error`: a cure, if the sandbox may be the cause.
pub fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied if ENTERED.load(Ordering::Relaxed) => {
            "; it may be the sandbox, which allows what the flags named at the start, to the user it runs as: see \
             --user and --no-sandbox"
        }
        _ => "",
    }
}
