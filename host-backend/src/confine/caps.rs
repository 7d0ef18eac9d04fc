//! Capabilities: dropped from every set, whoever the program was started as; but a keeper stays with those that a worker
//! starts with.

use std::io;

use super::done;

/// `_LINUX_CAPABILITY_VERSION_3` of capget(2).
const VERSION: u32 = 0x2008_0522;

/// Some of the first 32 capabilities, as bits.
pub(super) type Capabilities = u32;

pub(super) const NONE: Capabilities = 0;

/// What a worker may need until it enters the sandbox, if it has it, and its keeper to signal it then.
pub(super) const STARTING: Capabilities = (1 << 1) // DAC_OVERRIDE, to make sockets in anybody's folder
    | (1 << 2) // DAC_READ_SEARCH, to find them
    | (1 << 3) // FOWNER, to replace those that a crash left in folders like /tmp
    | (1 << 5) // KILL, as the worker is somebody else's later
    | (1 << 6) // SETGID
    | (1 << 7) // SETUID
    | (1 << 8) // SETPCAP, to drop capabilities for good
    | (1 << 10); // NET_BIND_SERVICE, for ports below 1024

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

/// Leaves `kept` of the set of those that could ever be gained. Without the right to, it is left: nothing can be gained
/// from it, as new privileges are barred altogether.
pub(super) fn limit_bounding_set(kept: Capabilities) -> io::Result<()> {
    for capability in (0..CAPABILITIES).filter(|bit| u64::from(kept) >> bit & 1 == 0) {
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

/// Leaves `kept` of the other sets, as far as it is in them. (That of ambient ones cannot have more than these.)
pub(super) fn limit(kept: Capabilities) -> io::Result<()> {
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    let mut sets = [Sets::default(); 2];
    // SAFETY: both are as capget(2) has them for this version.
    done(unsafe { libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr()) })?;
    let Sets {
        effective,
        permitted,
        inheritable,
    } = sets[0];
    sets[0] = Sets {
        effective: effective & kept,
        permitted: permitted & kept,
        inheritable: inheritable & kept,
    };
    sets[1] = Sets::default();
    // SAFETY: both are as capset(2) has them for this version.
    done(unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) })
}
