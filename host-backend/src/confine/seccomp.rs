//! seccomp: which system calls are left.
//!
//! The lists below are by what a call is for. They were measured: with `strace` over the tests with guests, and by what the
//! C library does beside that (a second allocator arena, `abort`, clocks without a vDSO). A call with arguments that matter,
//! such as the kind of a socket, is left only with those in the list; the calls that carry bytes are left as they are, and
//! the kernel then does not run the filter for them at all.
//!
//! A call that is not left raises SIGSYS. Its handler says which one, and ends the program with [`EXIT_CODE`]. Who replaces
//! the handler gains nothing, as the call is not made; where the signal is blocked the kernel kills the process. The filter
//! also has the kernel write each such call to its audit log, where there is one.
//!
//! `clone3` has its flags in memory, where a filter cannot see them: it looks as if the kernel did not have it, and the C
//! library uses `clone`, of which only threads are left.

use std::collections::BTreeMap;
use std::io;
use std::mem::{self, MaybeUninit};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule,
};

use super::{Needs, done};

/// How the program exits when a system call was not allowed.
pub const EXIT_CODE: u8 = 5;

/// Of no consequence outside the process: memory, threads, time, signals to itself.
const WITHIN: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_clone3,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
];

/// Descriptors there are: their bytes, their events, and their end.
const DESCRIPTORS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
];

/// Sockets there are.
const SOCKETS: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
];

/// Paths: Landlock decides which.
const FILES: &[libc::c_long] = &[
    libc::SYS_openat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_readlinkat,
    libc::SYS_unlinkat,
    libc::SYS_faccessat,
];

/// Ports that are added: their sockets' modes and links.
const MAKING: &[libc::c_long] = &[libc::SYS_fchmod, libc::SYS_symlinkat];

/// Terminals: one is locked against other programs.
const LOCKING: &[libc::c_long] = &[libc::SYS_flock];

/// What this architecture has in older forms too.
#[cfg(target_arch = "x86_64")]
mod older {
    pub(super) const ALWAYS: &[libc::c_long] = &[
        libc::SYS_epoll_wait,
        libc::SYS_poll,
        libc::SYS_time,
        libc::SYS_open,
        libc::SYS_stat,
        libc::SYS_lstat,
        libc::SYS_readlink,
        libc::SYS_unlink,
        libc::SYS_access,
    ];
    pub(super) const MAKING: &[libc::c_long] = &[libc::SYS_symlink];
}
#[cfg(not(target_arch = "x86_64"))]
mod older {
    pub(super) const ALWAYS: &[libc::c_long] = &[];
    pub(super) const MAKING: &[libc::c_long] = &[];
}

/// What may be asked of a descriptor by `fcntl`.
const FCNTL: &[libc::c_int] = &[
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
];

/// And by `ioctl`.
const IOCTLS: &[libc::Ioctl] = &[
    libc::FIONBIO,
    libc::FIONREAD,
    libc::FIOCLEX,
    libc::TCGETS,
    libc::TCGETS2,
    libc::TIOCGWINSZ,
];

/// The same of a terminal that is set up. Pushing input into one (TIOCSTI) is not among it.
const TERMINALS: &[libc::Ioctl] = &[
    libc::TCSETS,
    libc::TCSETSW,
    libc::TCSETSF,
    libc::TCSETS2,
    libc::TCSETSW2,
    libc::TCSETSF2,
    libc::TCFLSH,
    libc::TIOCEXCL,
    libc::TIOCNXCL,
    libc::TIOCGPTN,
    libc::TIOCSPTLCK,
];

/// `PR_SET_VMA`, by which the C library names memory.
const PR_SET_VMA: u64 = 0x5356_4d41;

/// Filters that are not in force yet.
pub(super) struct Filters([BpfProgram; 2]);

impl Filters {
    /// Those that leave what is in `needs`.
    pub(super) fn new(needs: &Needs) -> io::Result<Self> {
        let rules = rules(needs).map_err(io::Error::other)?;
        let hidden = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
        Ok(Filters([
            compile(
                hidden,
                SeccompAction::Allow,
                SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
            )?,
            // The last one: it does not allow another.
            compile(rules, SeccompAction::Trap, SeccompAction::Allow)?,
        ]))
    }

    /// Puts them in force, for good.
    pub(super) fn install(self) -> io::Result<()> {
        handle_sigsys()?;
        let [hidden, rules] = self.0;
        // Each new thread meets this one: that is nothing for the audit log.
        install(&hidden, libc::SECCOMP_FILTER_FLAG_TSYNC)?;
        install(
            &rules,
            libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_LOG,
        )
    }
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    others: SeccompAction,
    these: SeccompAction,
) -> io::Result<BpfProgram> {
    let arch = std::env::consts::ARCH
        .try_into()
        .map_err(io::Error::other)?;
    let filter = SeccompFilter::new(rules, others, these, arch).map_err(io::Error::other)?;
    filter.try_into().map_err(io::Error::other)
}

fn rules(needs: &Needs) -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let mut rules = BTreeMap::new();
    let mut allow = |calls: &[libc::c_long]| {
        for call in calls {
            rules.insert(*call, Vec::new());
        }
    };
    for calls in [WITHIN, DESCRIPTORS, SOCKETS, FILES, older::ALWAYS] {
        allow(calls);
    }
    if needs.adds_ports() {
        allow(MAKING);
        allow(older::MAKING);
    }
    if needs.terminals() {
        allow(LOCKING);
    }
    if needs.binds() {
        allow(&[libc::SYS_bind, libc::SYS_listen]);
    }
    let one_of = |arg, values: &mut dyn Iterator<Item = u64>| {
        values
            .map(|value| only(&[(arg, Op::Eq, value)]))
            .collect::<Result<Vec<_>, _>>()
    };
    let number = |value: libc::c_int| u64::from(value.cast_unsigned());
    let families = &mut needs.families().map(number);
    let made = one_of(0, families)?;
    if !made.is_empty() {
        rules.insert(libc::SYS_socket, made);
    }
    // A pair of datagram sockets could send to any path.
    let kind = (1, Op::MaskedEq(0xf), number(libc::SOCK_STREAM));
    let unix = (0, Op::Eq, number(libc::AF_UNIX));
    rules.insert(libc::SYS_socketpair, vec![only(&[unix, kind])?]);
    rules.insert(
        libc::SYS_fcntl,
        one_of(1, &mut FCNTL.iter().copied().map(number))?,
    );
    let terminals = if needs.terminals() { TERMINALS } else { &[] };
    #[allow(clippy::unnecessary_cast, reason = "it is another type with musl")]
    let ioctls = &mut IOCTLS.iter().chain(terminals).map(|ioctl| *ioctl as u64);
    rules.insert(libc::SYS_ioctl, one_of(1, ioctls)?);
    let named = &mut [number(libc::PR_SET_NAME), PR_SET_VMA].into_iter();
    rules.insert(libc::SYS_prctl, one_of(0, named)?);
    // Threads, not processes.
    let thread = number(libc::CLONE_VM | libc::CLONE_THREAD);
    let threads = vec![only(&[(0, Op::MaskedEq(thread), thread)])?];
    rules.insert(libc::SYS_clone, threads);
    // As `abort` does; and who lost its keeper asks itself to end.
    for call in [libc::SYS_tgkill, libc::SYS_kill] {
        let own = &mut std::iter::once(u64::from(std::process::id()));
        rules.insert(call, one_of(0, own)?);
    }
    // Memory that is code comes with the modules for looking names up.
    let code = number(libc::PROT_EXEC);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let data = match needs.names().len() {
            0 => vec![only(&[(2, Op::MaskedEq(code), 0)])?],
            _ => Vec::new(),
        };
        rules.insert(call, data);
    }
    Ok(rules)
}

/// A call of which these arguments (their low 32 bits) are such.
fn only(conditions: &[(u8, Op, u64)]) -> Result<SeccompRule, seccompiler::BackendError> {
    let conditions = conditions
        .iter()
        .map(|(arg, op, value)| SeccompCondition::new(*arg, Len::Dword, op.clone(), *value))
        .collect::<Result<_, _>>()?;
    SeccompRule::new(conditions)
}

/// Puts a filter in force, with these flags of seccomp(2).
fn install(program: &BpfProgram, flags: libc::c_ulong) -> io::Result<()> {
    #[repr(C)]
    struct Program {
        len: libc::c_ushort,
        filter: *const seccompiler::sock_filter,
    }
    let program = Program {
        len: program.len().try_into().map_err(io::Error::other)?,
        filter: program.as_ptr(),
    };
    // SAFETY: the program is as seccomp(2) has it, and the kernel only reads it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    };
    match result {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        thread => Err(io::Error::other(format!(
            "thread {thread} has filters of its own"
        ))),
    }
}

fn handle_sigsys() -> io::Result<()> {
    let mut action: libc::sigaction = {
        // SAFETY: all zeros is a valid `sigaction`.
        unsafe { MaybeUninit::zeroed().assume_init() }
    };
    let handler: extern "C" fn(libc::c_int, *const SigSys, *const libc::c_void) = denied;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: a valid action, whose handler does only what a handler may.
    done(unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) })
}

/// `siginfo_t`, as the kernel fills it for SIGSYS.
#[repr(C)]
struct SigSys {
    signal: libc::c_int,
    error: libc::c_int,
    code: libc::c_int,
    address: *const libc::c_void,
    call: libc::c_int,
    arch: libc::c_uint,
}

const _: () = assert!(mem::offset_of!(SigSys, call) == 24);

/// Says which call was denied, and ends the program. Only what a signal handler may do is done.
extern "C" fn denied(_: libc::c_int, info: *const SigSys, _: *const libc::c_void) {
    // SAFETY: the kernel hands a valid one to the handler.
    let call = unsafe { (*info).call };
    let mut line = Line::default();
    line.push(b"virtproxy: the sandbox does not allow system call ");
    line.push_number(call.unsigned_abs());
    line.push(
        b", so the program ends. If no guest is suspected of an attack, this is a bug to be reported; \
          --no-sandbox starts without it\n",
    );
    // SAFETY: the buffer is valid for its length; `_exit` takes an integer.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len);
        libc::_exit(EXIT_CODE.into());
    }
}

/// A line of text without allocation; what does not fit is cut off.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Line {
            bytes: [0; 256],
            len: 0,
        }
    }
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = *byte;
                self.len += 1;
            }
        }
    }

    fn push_number(&mut self, number: u32) {
        if number >= 10 {
            self.push_number(number / 10);
        }
        let digits = b"0123456789";
        self.push(&digits[number as usize % 10..][..1]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_handler_writes_numbers_as_people_do() {
        let mut line = Line::default();
        for number in [0, 7, 10, 101, 4_294_967_295] {
            line.push_number(number);
            line.push(b" ");
        }
        assert_eq!(&line.bytes[..line.len], b"0 7 10 101 4294967295 ");
    }

    #[test]
    fn the_filters_can_be_made() {
        Filters::new(&Needs::default()).unwrap();
    }
}
