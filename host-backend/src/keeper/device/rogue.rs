//! A QEMU and workers out of a fuzzer's bytes, and a connection of the keeper's between them.
//!
//! # Theory of operation
//!
//! [`run`] makes of its input a list of operations ([`Op`]) and carries them out one after the other: QEMU sends messages,
//! sound ones and others, whole or bit by bit, with descriptors; a worker reads or does not, answers what nobody asked,
//! sends anything over its leash, dies and is followed by another. The sockets are real, the processes are not.
//!
//! What must hold, besides that nothing panics:
//!
//! * a worker gets the record (between two questions for its features), then exactly the messages of QEMU that follow,
//!   to the byte;
//! * no more is queued than that and one message, and no record is larger than its bounds;
//! * all comes to rest when nobody says anything;
//! * when the connection is over, no descriptor of QEMU's is left.

use std::collections::VecDeque;
use std::io::{PipeReader, PipeWriter, Read, pipe};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use arbitrary::{Arbitrary, Unstructured};
use rustix::event::{PollFd, Timespec, poll};
use rustix::io::{ioctl_fionbio, ioctl_fionread};
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::super::leash::{self, MAX_STATE, Word};
use super::super::record::{self, Record};
use super::super::wire::{Answer, Broken, Message, Wire, send_with};
use super::Connection;

const MOST_OPS: usize = 200;
const VERSION: u32 = 1;

#[derive(Debug, Clone, Arbitrary)]
enum Op {
    /// QEMU says what it may say.
    Request {
        request: u8,
        needs_reply: bool,
        words: [u8; 4],
        len: u8,
        fds: u8,
    },
    /// QEMU says this, whatever it is.
    Bytes(Vec<u8>),
    /// QEMU begins a message of this length; what follows belongs to it.
    Header {
        request: u8,
        flags: u8,
        len: u16,
    },
    /// The worker takes messages.
    Take(u8),
    /// The worker says so, whether or not it was asked.
    Answer {
        request: u8,
        word: u8,
        len: u16,
    },
    /// The worker says this, whatever it is.
    Nonsense(Vec<u8>),
    /// The worker dies; another one follows at once or later.
    Die {
        next: bool,
    },
    Next,
    /// QEMU takes answers.
    Hear,
    Leash(u8, u32),
    /// QEMU is gone.
    Gone,
}

/// Does what the bytes say, and panics if something is as it must not be.
pub fn run(bytes: &[u8]) {
    let Ok(ops) = Vec::<Op>::arbitrary_take_rest(Unstructured::new(bytes)) else {
        return;
    };
    let mut world = World::new();
    for op in ops.into_iter().take(MOST_OPS) {
        world.apply(op);
        world.turn();
        if world.over {
            break;
        }
    }
    world.end();
}

/// All who take part.
struct World {
    keeper: Connection,
    qemu: OwnedFd,
    /// What QEMU has said: the messages, and the beginning of the next.
    messages: Vec<Vec<u8>>,
    said: Vec<u8>,
    worker: Option<Worker>,
    /// The message that the worker gets next.
    next: usize,
    over: bool,
    /// A descriptor to send, and how to learn that nobody has it any more.
    fd: PipeWriter,
    all_closed: PipeReader,
}

struct Worker {
    wire: Wire,
    /// What is still to come of the record.
    replay: VecDeque<Vec<u8>>,
}

impl World {
    fn new() -> Self {
        let (qemu, keeper) = pair();
        let (all_closed, fd) = pipe().expect("descriptors are there");
        let mut world = World {
            keeper: Connection {
                qemu: Wire::new(keeper),
                worker: None,
                record: Record::default(),
                asked: None,
                swallow: 0,
                deaths: 0,
            },
            qemu,
            messages: Vec::new(),
            said: Vec::new(),
            worker: None,
            next: 0,
            over: false,
            fd,
            all_closed,
        };
        let (ours, other) = pair();
        world.keeper.worker = Some(Wire::new(ours));
        world.worker = Some(Worker {
            wire: Wire::new(other),
            replay: VecDeque::new(),
        });
        world
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Request {
                request,
                needs_reply,
                words,
                len,
                fds,
            } => {
                let flags = VERSION | u32::from(needs_reply) << 3;
                let payload: Vec<u8> = words
                    .iter()
                    .flat_map(|word| u64::from(*word).to_ne_bytes())
                    .take(usize::from(len % 33))
                    .collect();
                self.say(&message(u32::from(request % 48), flags, &payload), fds % 33);
            }
            Op::Bytes(bytes) => self.say(&bytes, 0),
            Op::Header {
                request,
                flags,
                len,
            } => {
                let header = [request.into(), flags.into(), len.into()].map(u32::to_ne_bytes);
                self.say(&header.concat(), 0);
            }
            Op::Take(times) => {
                for _ in 0..times {
                    if !self.take() {
                        break;
                    }
                }
            }
            Op::Answer { request, word, len } => {
                let mut payload = vec![0; usize::from(len % 4200)];
                payload.fill(word);
                self.answer(&message(request.into(), VERSION | 1 << 2, &payload));
            }
            Op::Nonsense(bytes) => self.answer(&bytes),
            Op::Die { next } => {
                self.die();
                if next {
                    self.follow();
                }
            }
            Op::Next => self.follow(),
            Op::Hear => {
                let mut bytes = [0; 4096];
                while matches!(recv(&self.qemu, &mut bytes, RecvFlags::DONTWAIT), Ok((len, _)) if len > 0)
                {
                }
            }
            Op::Leash(kind, len) => check_leash(kind, len as usize % (MAX_STATE + 4)),
            Op::Gone => {
                let _ = shutdown(&self.qemu, Shutdown::Both);
            }
        }
    }

    /// QEMU writes as much as there is room for.
    fn say(&mut self, bytes: &[u8], fds: u8) {
        let fds: Vec<BorrowedFd<'_>> = vec![self.fd.as_fd(); fds.into()];
        if bytes.is_empty() {
            return;
        }
        let sent = send_with(&self.qemu, bytes, &fds).unwrap_or(0);
        self.said.extend(&bytes[..sent]);
        while let Some(len) = self.said.get(8..12) {
            let len = u32::from_ne_bytes(len.try_into().expect("four")) as usize;
            if self.said.len() < 12 + len {
                break;
            }
            self.messages.push(self.said.drain(..12 + len).collect());
        }
    }

    fn answer(&self, bytes: &[u8]) {
        if let Some(worker) = &self.worker {
            let _ = send(
                &worker.wire,
                bytes,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            );
        }
    }

    /// The worker takes a message. Whether there was one.
    fn take(&mut self) -> bool {
        let Some(worker) = &mut self.worker else {
            return false;
        };
        let taken = match worker.wire.receive() {
            Ok(Some(taken)) => message(taken.request, taken.flags, &taken.payload),
            Ok(None) | Err(Broken::Closed | Broken::Cut) => return false,
            Err(error) => panic!("the keeper sent what makes no sense: {error}"),
        };
        match worker.replay.pop_front() {
            Some(expected) => assert!(taken == expected, "the record is not what was replayed"),
            None => {
                assert!(taken == self.messages[self.next], "another message came");
                self.next += 1;
            }
        }
        true
    }

    fn die(&mut self) {
        while self.take() {}
        (self.worker, self.keeper.worker) = (None, None);
    }

    fn follow(&mut self) {
        if self.worker.is_some() {
            return;
        }
        let (ours, other) = pair();
        let bytes = |message: &Rc<Message>| message.bytes(Answer::None);
        self.worker = Some(Worker {
            wire: Wire::new(other),
            replay: self.keeper.record.replay().0.iter().map(bytes).collect(),
        });
        self.next = self.carried() - usize::from(self.keeper.asked.is_some());
        self.keeper.resume(Wire::new(ours));
    }

    /// How many messages the keeper has taken from QEMU.
    fn carried(&self) -> usize {
        let waiting = ioctl_fionread(&self.keeper.qemu).expect("it is a socket");
        let waiting = usize::try_from(waiting).expect("few bytes") + self.keeper.qemu.partial();
        let mut behind = self.said.len();
        let not_taken = |message: &&Vec<u8>| {
            let is = behind < waiting;
            behind += message.len();
            is
        };
        self.messages.len() - self.messages.iter().rev().take_while(not_taken).count()
    }

    fn turn(&mut self) {
        if let Err(end) = self.keeper.turn() {
            let _ = end.to_string();
            self.over = true;
        }
        self.keeper.record.check();
        let queued =
            self.keeper.qemu.queued() + self.keeper.worker.as_ref().map_or(0, Wire::queued);
        assert!(queued <= record::MOST + 2, "{queued} messages are queued");
        let interests = self.keeper.interests().into_iter();
        let mut fds: Vec<_> = interests
            .map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags))
            .collect();
        let ready = poll(&mut fds, Some(&Timespec::default()));
        assert!(self.over || ready == Ok(0), "there is more to do: {fds:?}");
    }

    /// Nothing is left of it.
    fn end(mut self) {
        while self.take() {}
        let World {
            keeper,
            qemu,
            worker,
            fd,
            mut all_closed,
            ..
        } = self;
        drop((keeper, qemu, worker, fd));
        ioctl_fionbio(&all_closed, true).expect("it is a pipe");
        let end = all_closed.read(&mut [0; 1]);
        assert_eq!(end.ok(), Some(0), "a descriptor of QEMU's is left");
    }
}

/// What a worker sends over its leash is understood, or its end.
fn check_leash(kind: u8, len: usize) {
    let (keeper, worker) = leash::leash().expect("descriptors are there");
    let mut bytes = vec![1; len];
    if let Some(first) = bytes.first_mut() {
        *first = kind;
    }
    let _ = send(&worker, &bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    match leash::hear(&keeper) {
        Ok(Some(Word::State(_, state))) => assert_eq!(state, bytes[2..]),
        Ok(Some(Word::Hello)) => assert_eq!(len, 1),
        Ok(Some(Word::Ended(_))) => assert_eq!(len, 2),
        Ok(None) | Err(_) => {}
    }
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).expect("a short payload");
    let header = [request, flags, len].map(u32::to_ne_bytes);
    [&header.concat(), payload].concat()
}

fn pair() -> (OwnedFd, OwnedFd) {
    let (one, other) = UnixStream::pair().expect("descriptors are there");
    (one.into(), other.into())
}
