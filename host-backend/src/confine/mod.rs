//! The sandbox: what is left to the program once everything that its flags name is open, before the first byte of a guest.
//!
//! # Theory of operation
//!
//! A guest is hostile, and shares its memory with this process. Should it ever gain control of it, it finds next to
//! nothing there that it can use:
//!
//! | layer | what it takes away |
//! | --- | --- |
//! | `PR_SET_NO_NEW_PRIVS` | gaining rights by running a program |
//! | capabilities (`caps`) | all of them, in every set |
//! | user (`user`) | root's files: who starts as root goes on as `--user` says, else as `nobody` where that can be |
//! | Landlock (`landlock`) | files, devices, TCP ports, other processes and abstract sockets, but for those in [`Needs`] |
//! | seccomp (`seccomp`) | system calls, and kinds of sockets, but for those in [`Needs`] |
//!
//! [`Needs`] is made from the flags alone: sockets that listen are open by then and cost no right. What is left are the
//! ports that are connected to, the folders of our own socket files, which are removed at the end, and so on.
//!
//! Rights are a thread's, and are inherited by the threads it starts. So [`enter`] is called while there is no other
//! thread, and refuses to go on if there is one.
//!
//! A keeper must be able to start the next worker with the rights that the first one had, and whatever a process gives up
//! is lost to those that it starts. So [`enter_as_keeper`] only takes away what no worker needs even at its start.
//!
//! What is denied is told. Landlock and the user make a call fail with `EACCES`, and the message about that has
//! [`hint`](virtproxy_engine::sandbox::hint) behind it. A system call that is not allowed ends the program with a line
//! on standard error and [`EXIT_CODE`]; the kernel's audit log has it too.

mod caps;
mod landlock;
mod needs;
mod seccomp;
mod user;

use std::fs;
use std::io;

use tracing::{debug, info, warn};
use virtproxy_engine::sandbox;

pub use needs::Needs;
pub use seccomp::EXIT_CODE;
use user::User;

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// `--user` names nobody, or may not be given.
    #[error("--user {0}: {1}")]
    User(String, String),
    /// A thread would stay outside.
    #[error("the sandbox cannot hold {0} threads: this is a bug; --no-sandbox starts without it")]
    Threads(usize),
    /// The system refuses a layer.
    #[error("the sandbox cannot be had: {0}: {1}: --no-sandbox starts without it")]
    Layer(&'static str, io::Error),
}

/// Gives up what is not in `needs`, for good. `user` is whom root becomes.
pub fn enter(needs: &Needs, user: Option<&str>) -> Result<(), ConfineError> {
    let layer = |name| move |error| ConfineError::Layer(name, error);
    only_thread()?;
    let becomes = User::choose(user, needs)?;
    // Its rules are made while every file can still be seen.
    let files = landlock::Rules::new(needs).map_err(layer("Landlock"))?;
    let filters = seccomp::Filters::new(needs).map_err(layer("seccomp"))?;
    let death_signal = parent_death_signal(None).map_err(layer("prctl"))?;

    caps::limit_bounding_set(caps::NONE).map_err(layer("capabilities"))?;
    if let Some(user) = &becomes {
        user.become_it().map_err(layer("user"))?;
    }
    caps::limit(caps::NONE).map_err(layer("capabilities"))?;
    // Whoever changes user loses it.
    parent_death_signal(Some(death_signal)).map_err(layer("prctl"))?;
    no_new_privileges().map_err(layer("no new privileges"))?;
    let held = files.enforce().map_err(layer("Landlock"))?;
    filters.install().map_err(layer("seccomp"))?;

    sandbox::entered();
    let user = becomes.map_or_else(String::new, |user| format!("user {user}, "));
    info!("sandbox: {user}no capabilities, {held}, seccomp");
    if !held.is_whole() {
        warn!(
            "the sandbox does not limit {}: this kernel's Landlock is of ABI {}",
            held.missing(),
            held.abi()
        );
    }
    Ok(())
}

/// Gives up what no process needs that is started to [`enter`] the sandbox.
pub fn enter_as_keeper() -> Result<(), ConfineError> {
    let layer = |name| move |error| ConfineError::Layer(name, error);
    only_thread()?;
    let apart = landlock::Rules::apart().map_err(layer("Landlock"))?;
    caps::limit_bounding_set(caps::STARTING).map_err(layer("capabilities"))?;
    caps::limit(caps::STARTING).map_err(layer("capabilities"))?;
    no_new_privileges().map_err(layer("no new privileges"))?;
    let held = apart.enforce().map_err(layer("Landlock"))?;
    debug!("the keeper has no capabilities but to start workers; its {held}");
    Ok(())
}

fn only_thread() -> Result<(), ConfineError> {
    // Without /proc it cannot be told; the calls below are on this thread then.
    let threads = fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    match threads {
        1 => Ok(()),
        more => Err(ConfineError::Threads(more)),
    }
}

fn no_new_privileges() -> io::Result<()> {
    // SAFETY: plain integers.
    done(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
}

/// The signal that this process gets when its parent dies; sets it to `new` first, if there is that.
fn parent_death_signal(new: Option<libc::c_int>) -> io::Result<libc::c_int> {
    let mut signal = 0;
    // SAFETY: a plain integer, and a valid place for one.
    unsafe {
        if let Some(new) = new {
            done(libc::prctl(libc::PR_SET_PDEATHSIG, new))?;
        }
        done(libc::prctl(libc::PR_GET_PDEATHSIG, &raw mut signal))?;
    }
    Ok(signal)
}

fn done(result: impl Into<libc::c_long>) -> io::Result<()> {
    match result.into() {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
