//! What the keeper and its worker tell each other, beside the vhost-user messages: whole messages on a socket pair.
//!
//! ```text
//!   worker: Hello                       it was started, and understands its flags
//!   keeper: Begin, one for each device  begin your work; this became of the workers before you, and this is what the last
//!                                       one said of the device
//!   worker: State                       whenever it changes: what the next worker cannot learn from the guest
//!   worker: Ended                       QEMU's connection to the device is over
//! ```
//!
//! If the socket ends, the other one is gone. The worker holds it as the keeper's descendant: see
//! [`Kept::take`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::str::FromStr;
use std::sync::Arc;

use rustix::io::{Errno, FdFlags, fcntl_setfd, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use serde::{Deserialize, Serialize};

use super::history::History;

/// The most bytes that a worker's state of one device may have.
pub(crate) const MAX_STATE: usize = 64 * 1024;

/// The most bytes of what comes before the state in a Begin.
const MAX_BEGIN: usize = 1024;

const HELLO: u8 = 0;
const STATE: u8 = 1;
const ENDED: u8 = 2;

/// What a worker says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Word {
    Hello,
    State(usize, Vec<u8>),
    Ended(usize),
}

/// Both ends: the keeper's, and that of the worker to be.
pub(super) fn leash() -> io::Result<(OwnedFd, OwnedFd)> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(socketpair(family, kind, SocketFlags::CLOEXEC, None)?)
}

/// What a worker is told beside the state; a line of JSON, so that keeper and worker may be of different versions.
#[derive(Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Begin {
    /// QEMU's connection lives on.
    pub(super) resumed: bool,
    #[serde(default)]
    pub(super) history: History,
}

/// Lets a worker begin with a device.
pub(super) fn begin(leash: &OwnedFd, begin: &Begin, state: &[u8]) -> io::Result<()> {
    let mut message = serde_json::to_vec(begin)?;
    message.push(b'\n');
    message.extend(state);
    retry_on_intr(|| send(leash, &message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT))?;
    Ok(())
}

/// What the worker said next, if anything. An error: it is gone, or cannot be understood.
pub(super) fn hear(leash: &OwnedFd) -> io::Result<Option<Word>> {
    let mut bytes = vec![0; MAX_STATE + 2];
    let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
    let len = match retry_on_intr(|| recv(leash, &mut *bytes, flags)) {
        Ok((_, len)) => len,
        Err(Errno::AGAIN) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    match *bytes.get(..len).unwrap_or_default() {
        [] if len == 0 => Err(io::ErrorKind::UnexpectedEof.into()),
        [HELLO] => Ok(Some(Word::Hello)),
        [STATE, device, ref state @ ..] => Ok(Some(Word::State(device.into(), state.to_vec()))),
        [ENDED, device] => Ok(Some(Word::Ended(device.into()))),
        _ => Err(io::Error::other("it says what makes no sense")),
    }
}

/// The descriptors that a worker is started with: its end of the leash, and a listener for each device.
#[derive(Clone, Debug)]
pub struct Inherited(Vec<RawFd>);

impl Inherited {
    /// As the worker's flag has them.
    pub(super) fn flag(fds: &[BorrowedFd<'_>]) -> String {
        let numbers = fds.iter().map(|fd| fd.as_raw_fd().to_string());
        numbers.collect::<Vec<_>>().join(",")
    }
}

impl FromStr for Inherited {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fd = |part: &str| part.parse().ok().filter(|fd| *fd > 2);
        let fds = text.split(',').map(fd).collect::<Option<_>>();
        fds.map(Inherited)
            .ok_or_else(|| "only a keeper sets this".to_owned())
    }
}

/// A device that a keeper holds the connection of.
#[derive(Debug)]
pub struct Kept {
    pub(crate) leash: Leash,
    /// Where the keeper connects for QEMU.
    pub(crate) listener: UnixListener,
    /// What the last worker said; nothing, if this one is the first.
    pub state: Vec<u8>,
    /// What became of the workers before.
    pub history: History,
    /// Whether QEMU's connection lives on.
    pub(crate) resumed: bool,
}

impl Kept {
    /// Takes over what the worker was started with, and waits until it may begin; the devices in their order.
    pub fn take(inherited: Inherited) -> io::Result<Vec<Kept>> {
        let mut fds = inherited.0.into_iter().map(|fd| -> io::Result<OwnedFd> {
            // SAFETY: the keeper opened it for this process, which has not touched it before. Were it not open, the
            // next call would say so.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
            Ok(fd)
        });
        let leash = Arc::new(
            fds.next()
                .unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()))?,
        );
        send(&*leash, &[HELLO], SendFlags::NOSIGNAL)?;
        let devices = fds.zip(0..).map(|(listener, device)| {
            let mut message = vec![0; MAX_BEGIN + MAX_STATE];
            let (_, len) = retry_on_intr(|| recv(&*leash, &mut *message, RecvFlags::empty()))?;
            message.truncate(len);
            let line = message.iter().position(|byte| *byte == b'\n');
            let state = message.split_off(line.ok_or(io::ErrorKind::UnexpectedEof)? + 1);
            let begin: Begin = serde_json::from_slice(&message)?;
            Ok(Kept {
                leash: Leash {
                    socket: leash.clone(),
                    device,
                },
                listener: listener?.into(),
                state,
                history: begin.history,
                resumed: begin.resumed,
            })
        });
        devices.collect()
    }
}

/// What a device tells the keeper. A keeper that is gone hears nothing, and [`Leash`] can be polled for that: nothing
/// but its end ever comes.
#[derive(Clone, Debug)]
pub(crate) struct Leash {
    socket: Arc<OwnedFd>,
    device: u8,
}

impl Leash {
    /// This is what the next worker will not learn from the guest.
    pub(crate) fn state(&self, state: &[u8]) {
        self.say(&[&[STATE, self.device], state].concat());
    }

    /// QEMU's connection is over.
    pub(crate) fn ended(&self) {
        self.say(&[ENDED, self.device]);
    }

    /// Whether the keeper is gone.
    pub(crate) fn is_loose(&self) -> bool {
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        let received = retry_on_intr(|| recv(&*self.socket, &mut [0], flags));
        received.map_or_else(|error| error != Errno::AGAIN, |(_, len)| len == 0)
    }

    fn say(&self, message: &[u8]) {
        let _ = retry_on_intr(|| send(&*self.socket, message, SendFlags::NOSIGNAL));
    }
}

impl AsFd for Leash {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;
    use std::time::Duration;

    use super::super::history::Ending;
    use super::*;

    #[test]
    fn a_worker_is_told_what_became_of_those_before_it_and_what_the_last_one_said() {
        let (keeper, worker) = leash().unwrap();
        let mut history = History::default();
        let killed = ExitStatus::from_raw(libc::SIGKILL);
        history.note(Ending::Died, killed, Duration::from_millis(1500));
        let words = Begin {
            resumed: true,
            history,
        };
        // The largest state there may be, whose end would be missed.
        let mut state = vec![b'\n'; MAX_STATE];
        state[MAX_STATE - 1] = b'!';
        begin(&keeper, &words, &state).unwrap();
        let (listener, _) = leash().unwrap();
        let inherited = Inherited(vec![worker.into_raw_fd(), listener.into_raw_fd()]);
        let kept = Kept::take(inherited).unwrap().remove(0);
        assert_eq!(hear(&keeper).unwrap(), Some(Word::Hello));
        assert!(kept.resumed && kept.state == state);
        assert_eq!((kept.history.died, kept.history.replaced), (1, 0));
        let last = kept.history.last.unwrap();
        assert_eq!(last, "signal: 9 (SIGKILL) after 1.5s");
    }

    #[test]
    fn another_versions_words_are_understood() {
        let words: Begin = serde_json::from_str(r#"{"resumed":true,"later":[1]}"#).unwrap();
        assert_eq!(words.history, History::default());
    }
}
