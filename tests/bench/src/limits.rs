//! How many descriptors this process and its children may have: ten thousand connections take one each, and a program
//! in between two.

/// Enough for two descriptors a connection.
const WANTED: libc::rlim_t = 32_768;

/// Raises the limit, as far as this user may. What then does not fit fails with its own reason.
pub(crate) fn raise() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: both calls take a pointer to a whole `rlimit`, which outlives them.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) != 0 {
            return;
        }
        let whole = libc::rlimit {
            rlim_cur: limit.rlim_max.max(WANTED),
            rlim_max: limit.rlim_max.max(WANTED),
        };
        if libc::setrlimit(libc::RLIMIT_NOFILE, &whole) != 0 {
            // Only a privileged user may go beyond the hard limit.
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}
