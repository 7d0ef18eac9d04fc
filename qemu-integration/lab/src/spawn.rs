//! Starts a program that cannot outlive this process.
//!
//! A test run that is killed must not leave emulators behind on the machine. The kernel can end a child when its
//! parent goes (PR_SET_PDEATHSIG), but it takes "parent" to be the *thread* that forked, and a test's thread ends
//! long before the guest that other tests share. So one thread, which lives as long as the process, starts them all.
//! Each child leads a process group of its own: Ctrl-C at the terminal reaches this process alone, which then ends
//! its children in order.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};

type Request = (Command, Sender<io::Result<Child>>);

/// Starts `command`; the kernel kills it when this process ends in whatever way.
pub fn spawn(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Mutex<Sender<Request>>> = OnceLock::new();
    let gone = || io::Error::other("the thread that starts programs has ended");
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, requests) = channel::<Request>();
        std::thread::spawn(move || {
            for (command, reply) in requests {
                // The asker may have given up; then the child ends with its handle's owner.
                let _ = reply.send(start(command));
            }
        });
        Mutex::new(sender)
    });
    let (reply, answer) = channel();
    spawner
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send((command, reply))
        .map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

fn start(mut command: Command) -> io::Result<Child> {
    let parent = std::process::id();
    command.process_group(0);
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have ended before the request was made.
            if u32::try_from(libc::getppid()) != Ok(parent) {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
    command.spawn()
}

/// Sends `signal` to a child by its own id; nothing happens when it has already been waited for.
pub fn signal(child: &Child, signal: i32) {
    if let Ok(pid) = libc::pid_t::try_from(child.id()) {
        // SAFETY: kill takes two integers; the id is that of a child which has not been reaped while `child` lives.
        unsafe { libc::kill(pid, signal) };
    }
}

/// A command as a person would type it.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| quoted(&word.to_string_lossy()))
        .collect::<Vec<_>>()
        .join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shown_commands_can_be_pasted() {
        let mut command = Command::new("ssh");
        command.args(["-p", "9022", "root@127.0.0.1", "echo 'a b'", ""]);
        assert_eq!(
            shown(&command),
            r"ssh -p 9022 root@127.0.0.1 'echo '\''a b'\''' ''"
        );
    }

    #[test]
    fn a_child_outlives_the_thread_that_asked_for_it() {
        let mut child = std::thread::spawn(|| {
            let mut command = Command::new("sleep");
            command.arg("30");
            spawn(command).unwrap()
        })
        .join()
        .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert!(child.try_wait().unwrap().is_none());
        signal(&child, libc::SIGTERM);
        assert!(!child.wait().unwrap().success());
    }
}
