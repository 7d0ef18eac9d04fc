//! How many descriptors this process and its children may have: ten thousand connections take one each, and a program
//! in between two.

/// Enough for two descriptors a connection.
const WANTED: libc::rlim_t = 32_768;

/// Raises the limit, as far as this user may. What then does not fit fails with its own reason.
pub(crate) fn raise() {
    let most = limit().rlim_max;
    // Only a privileged user may go beyond the hard limit.
    if !set(most.max(WANTED)) {
        set(most);
    }
}

/// How many descriptors a child may have.
pub(crate) fn descriptors() -> usize {
    usize::try_from(limit().rlim_cur).unwrap_or(usize::MAX)
}

fn limit() -> libc::rlimit {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to a whole `rlimit`, which outlives the call. It cannot fail with one.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    limit
}

fn set(most: libc::rlim_t) -> bool {
    let limit = libc::rlimit {
        rlim_cur: most,
        rlim_max: most,
    };
    // SAFETY: the pointer is to a whole `rlimit`, which outlives the call.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) == 0 }
}
