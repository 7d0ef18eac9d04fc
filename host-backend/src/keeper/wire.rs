//! vhost-user messages on a socket: a header of 12 bytes, a payload, and descriptors that come with the first byte.
//!
//! A [`Wire`] never waits. What comes is put together piece by piece, what leaves is queued; each has a bound.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use thiserror::Error;

const HEADER: usize = 12;
/// The largest payload, and the most descriptors, of any message that the device understands.
const MAX_PAYLOAD: usize = 4096;
const MAX_FDS: usize = 32;

/// In the header's flags: the version of the protocol, and two bits.
const VERSION_MASK: u32 = 0x3;
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;

/// Why a connection cannot go on.
#[derive(Debug, Error)]
pub(super) enum Broken {
    #[error("it closed the connection")]
    Closed,
    #[error("it closed the connection within a message")]
    Cut,
    #[error("flags {0:#x} in a header")]
    Version(u32),
    #[error("a message of {0} bytes")]
    Length(usize),
    #[error("descriptors in the middle of a message")]
    Descriptors,
    #[error("more regions of memory than a device has")]
    TooMany,
    #[error(transparent)]
    System(#[from] Errno),
}

/// A request, or the answer to one.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) request: u32,
    pub(super) flags: u32,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Message {
    /// A request of our own.
    pub(super) fn new(request: u32, payload: Vec<u8>) -> Self {
        Message {
            request,
            flags: VERSION,
            payload,
            fds: Vec::new(),
        }
    }

    pub(super) fn needs_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// The 64-bit number at `at` of the payload; 0 beyond its end.
    pub(super) fn u64(&self, at: usize) -> u64 {
        let bytes = self.payload.get(at..).and_then(<[u8]>::first_chunk);
        bytes.copied().map_or(0, u64::from_ne_bytes)
    }

    /// The 32-bit number at `at` of the payload; 0 beyond its end.
    pub(super) fn u32(&self, at: usize) -> u32 {
        let bytes = self.payload.get(at..).and_then(<[u8]>::first_chunk);
        bytes.copied().map_or(0, u32::from_ne_bytes)
    }

    pub(super) fn bytes(&self, answer: Answer) -> Vec<u8> {
        let len = u32::try_from(self.payload.len()).unwrap_or(u32::MAX);
        let flags = match answer {
            Answer::AsItSays => self.flags,
            Answer::None => self.flags & !NEED_REPLY,
        };
        let header = [self.request, flags, len].map(u32::to_ne_bytes);
        [&header.concat(), &*self.payload].concat()
    }
}

/// Whether the other side is to acknowledge a message.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    AsItSays,
    None,
}

/// One end of a connection.
pub(super) struct Wire {
    socket: OwnedFd,
    /// What has come of the next message.
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// What is to leave, and how much of the first has.
    queue: VecDeque<(Rc<Message>, Answer)>,
    sent: usize,
}

impl Wire {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Wire {
            socket,
            bytes: Vec::new(),
            fds: Vec::new(),
            queue: VecDeque::new(),
            sent: 0,
        }
    }

    /// Whether nothing waits to leave.
    pub(super) fn is_flushed(&self) -> bool {
        self.queue.is_empty()
    }

    /// How many messages wait to leave.
    #[cfg(feature = "rogue")]
    pub(super) fn queued(&self) -> usize {
        self.queue.len()
    }

    /// How much has come of a message that is not whole.
    #[cfg(feature = "rogue")]
    pub(super) fn partial(&self) -> usize {
        self.bytes.len()
    }

    /// Lets a message leave as soon as there is room.
    pub(super) fn send(&mut self, message: Rc<Message>, answer: Answer) {
        self.queue.push_back((message, answer));
    }

    /// Writes what there is room for.
    pub(super) fn flush(&mut self) -> Result<(), Broken> {
        while let Some((message, answer)) = self.queue.front() {
            let bytes = message.bytes(*answer);
            let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
            let fds = if self.sent == 0 { &*fds } else { &[] };
            match send_with(&self.socket, &bytes[self.sent..], fds) {
                Ok(written) => self.sent += written,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Broken::Closed),
                Err(error) => return Err(error.into()),
            }
            if self.sent == bytes.len() {
                self.queue.pop_front();
                self.sent = 0;
            }
        }
        Ok(())
    }

    /// The next message, if all of it is here.
    pub(super) fn receive(&mut self) -> Result<Option<Message>, Broken> {
        loop {
            let wanted = match self.length()? {
                Some(length) if self.bytes.len() == HEADER + length => {
                    return Ok(Some(self.take()));
                }
                Some(length) => HEADER + length,
                None => HEADER,
            };
            let at = self.bytes.len();
            self.bytes.resize(wanted, 0);
            let received = receive_with(&self.socket, &mut self.bytes[at..], &mut self.fds);
            self.bytes.truncate(at + received.unwrap_or(0));
            match received {
                Ok(0) | Err(Errno::CONNRESET) if at == 0 => return Err(Broken::Closed),
                Ok(0) | Err(Errno::CONNRESET) => return Err(Broken::Cut),
                Ok(_) if at > 0 && self.fds.len() > MAX_FDS => return Err(Broken::Descriptors),
                Ok(_) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The length of the payload, once it is known.
    fn length(&self) -> Result<Option<usize>, Broken> {
        if self.bytes.len() < HEADER {
            return Ok(None);
        }
        let flags = self.word(4);
        if flags & VERSION_MASK != VERSION {
            return Err(Broken::Version(flags));
        }
        let length = usize::try_from(self.word(8)).unwrap_or(usize::MAX);
        match length <= MAX_PAYLOAD {
            true => Ok(Some(length)),
            false => Err(Broken::Length(length)),
        }
    }

    fn word(&self, at: usize) -> u32 {
        let bytes = self.bytes.get(at..).and_then(<[u8]>::first_chunk);
        bytes.copied().map_or(0, u32::from_ne_bytes)
    }

    fn take(&mut self) -> Message {
        let message = Message {
            request: self.word(0),
            flags: self.word(4),
            payload: self.bytes.split_off(HEADER),
            fds: std::mem::take(&mut self.fds),
        };
        self.bytes.clear();
        message
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sends bytes and descriptors at once, as far as there is room.
pub(super) fn send_with(
    socket: &OwnedFd,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOMANYREFS);
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    retry_on_intr(|| sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags))
}

/// Receives bytes, and the descriptors that come with them.
fn receive_with(
    socket: &OwnedFd,
    bytes: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received =
        retry_on_intr(|| recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, flags))?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok(received.bytes)
}
