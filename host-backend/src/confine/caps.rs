//! Capabilities: dropped from every set, whoever the program was started as.

use std::io;

use super::done;

/// `_LINUX_CAPABILITY_VERSION_3` of capget(2).
const VERSION: u32 = 0x2008_0522;

/// Capabilities there may be, now and in times to come: they are bits of 64.
const CAPABILITIES: libc::c_ulong = 64;

#[repr(C)]
struct Header {
    version: u32,
    /// 0: this thread.
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Empties the set of those that could ever be gained. Without the right to, it is left: nothing can be gained from it,
/// as new privileges are barred altogether.
pub(super) fn drop_bounding_set() -> io::Result<()> {
    for capability in 0..CAPABILITIES {
        // SAFETY: plain integers.
        let dropped = done(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) });
        match dropped.as_ref().map_err(io::Error::raw_os_error) {
            // The kernel has no more of them.
            Err(Some(libc::EINVAL)) => break,
            Err(Some(libc::EPERM)) | Ok(()) => {}
            Err(_) => return dropped,
        }
    }
    Ok(())
}

/// Empties the other sets.
pub(super) fn drop_all() -> io::Result<()> {
    // SAFETY: plain integers.
    done(unsafe {
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL,
            0,
            0,
            0,
        )
    })?;
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    let sets = [Sets::default(); 2];
    // SAFETY: both are as capset(2) has them for this version.
    match unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
