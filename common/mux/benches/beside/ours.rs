//! Two sessions of virtproxy, each in the plainest loop there can be: bytes that came go in, frames go out, until nothing
//! moves. The user of the streams is part of the loop, as local sockets are of virtproxy's driver.

use std::future::poll_fn;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::task::{LocalSet, spawn_local};
use virtproxy_mux::frame::{HEADER_LEN, MAX_CONTROL_FRAME};
use virtproxy_mux::{Config, Event, Session, StreamId, Transmit};

use crate::pipe::{self, Pipe};
use crate::{Case, LARGE_WINDOW, MESSAGE, PIECE, Windows};

/// Bytes given to the pipe at once, where it copies.
const OUTPUT: usize = 32 * 1024;

/// Reads and writes the pipe.
pub(crate) fn copying(case: Case, windows: Windows) -> Option<Duration> {
    Some(run::<Copying>(case, windows))
}

/// Borrows the pipe's memory.
pub(crate) fn lent(case: Case, windows: Windows) -> Option<Duration> {
    Some(run::<Lent>(case, windows))
}

fn run<L: Link>(case: Case, windows: Windows) -> Duration {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, async {
        let (near, far) = pipe::pair();
        let mut client = End::<L>::new(near, 1, windows);
        let mut server = End::<L>::new(far, 2, windows);
        let streams = match case {
            Case::Bulk { streams, .. } => streams,
            Case::Messages(_) | Case::Calls(_) => 1,
            Case::Opens(_) => 0,
        };
        let stand = |end: &End<L>| end.session.is_established();
        futures::join!(client.run_until(stand), server.run_until(stand));
        for _ in 0..streams {
            client.session.open("user").expect("a stream");
        }
        let open = |end: &End<L>| end.user.open == streams;
        futures::join!(client.run_until(open), server.run_until(open));
        let begun = Instant::now();
        server.user.serve(case);
        client.start(case);
        let ends = [client, server].map(|mut end| {
            spawn_local(async move {
                end.run_until(|end| end.user.left == 0).await;
                end
            })
        });
        let _ends = futures::future::join_all(ends).await;
        begun.elapsed()
    })
}

/// How a loop uses the pipe.
trait Link: Sized + 'static {
    fn new() -> Self;
    /// Everything that was sent is in the pipe.
    fn is_idle(&self) -> bool;
    /// Lets what has arrived go through `take`.
    fn receive(&mut self, pipe: &Pipe, cx: &mut Context<'_>, take: impl FnMut(&[u8])) -> Poll<()>;
    /// Sends what `fill` makes; ready if there was anything.
    fn send(
        &mut self,
        pipe: &Pipe,
        cx: &mut Context<'_>,
        fill: impl FnMut(&mut [u8]) -> usize,
    ) -> Poll<()>;
}

struct Copying {
    input: Box<[u8]>,
    output: Box<[u8]>,
    /// What of `output` is still to be written.
    unwritten: std::ops::Range<usize>,
}

struct Lent;

impl Link for Copying {
    fn is_idle(&self) -> bool {
        self.unwritten.is_empty()
    }

    fn new() -> Self {
        Copying {
            input: vec![0; PIECE].into(),
            output: vec![0; OUTPUT].into(),
            unwritten: 0..0,
        }
    }

    fn receive(
        &mut self,
        pipe: &Pipe,
        cx: &mut Context<'_>,
        mut take: impl FnMut(&[u8]),
    ) -> Poll<()> {
        pipe.poll_copy_in(cx, &mut self.input)
            .map(|n| take(&self.input[..n]))
    }

    fn send(
        &mut self,
        pipe: &Pipe,
        cx: &mut Context<'_>,
        mut fill: impl FnMut(&mut [u8]) -> usize,
    ) -> Poll<()> {
        if self.unwritten.is_empty() {
            self.unwritten = 0..fill(&mut self.output);
        }
        if self.unwritten.is_empty() {
            return Poll::Pending;
        }
        let bytes = &self.output[self.unwritten.clone()];
        pipe.poll_copy_out(cx, bytes)
            .map(|n| self.unwritten.start += n)
    }
}

impl Link for Lent {
    fn is_idle(&self) -> bool {
        true
    }

    fn new() -> Self {
        Lent
    }

    fn receive(
        &mut self,
        pipe: &Pipe,
        cx: &mut Context<'_>,
        mut take: impl FnMut(&[u8]),
    ) -> Poll<()> {
        let taken = pipe.poll_receive(cx, |bytes| {
            take(bytes);
            bytes.len()
        });
        taken.map(|_| ())
    }

    fn send(
        &mut self,
        pipe: &Pipe,
        cx: &mut Context<'_>,
        fill: impl FnMut(&mut [u8]) -> usize,
    ) -> Poll<()> {
        match pipe.poll_send(cx, fill) {
            Poll::Ready(1..) => Poll::Ready(()),
            Poll::Ready(0) | Poll::Pending => Poll::Pending,
        }
    }
}

/// One end: the session, the pipe, the user.
struct End<L> {
    session: Session,
    link: L,
    pipe: Pipe,
    user: User,
    started: Instant,
}

/// Whoever uses the streams of one end.
struct User {
    part: Part,
    /// Streams opened so far.
    open: usize,
    /// Bytes, calls or streams still to be done.
    left: usize,
    locals: Vec<Local>,
    /// Twice the user's buffer, so that it never ends within a frame.
    source: Box<[u8]>,
    sink: Box<[u8]>,
}

/// What a user does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// Nothing yet.
    Waits,
    /// Sends bytes, one way.
    Sends,
    /// Takes them.
    Takes,
    /// Sends a message, and the next one when it is answered.
    Calls,
    /// Answers.
    Answers,
    /// Opens a stream, and the next one when that has ended.
    Opens,
    /// Ends streams that have ended.
    Closes,
}

/// One stream of theirs.
#[derive(Clone, Copy, Default)]
struct Local {
    id: Option<StreamId>,
    /// Bytes to send, and how many at a time.
    unsent: usize,
    piece: usize,
    /// The stream ends behind them.
    finishes: bool,
    received: usize,
}

impl<L: Link> End<L> {
    fn new(pipe: Pipe, epoch: u64, windows: Windows) -> Self {
        let mut config = Config::default();
        if windows == Windows::Large {
            config.initial_window = LARGE_WINDOW;
            config.max_window = LARGE_WINDOW;
            config.session_window = LARGE_WINDOW;
            config.memory = 4 << 30;
        }
        End {
            session: Session::new(config, epoch),
            link: L::new(),
            pipe,
            user: User {
                part: Part::Waits,
                open: 0,
                left: 0,
                locals: Vec::new(),
                source: vec![7; 2 * PIECE].into(),
                sink: vec![0; PIECE].into(),
            },
            started: Instant::now(),
        }
    }

    /// The user of this end begins what `case` says.
    fn start(&mut self, case: Case) {
        let (part, left, unsent, piece) = match case {
            Case::Bulk { streams, bytes } => (Part::Sends, streams * bytes, bytes, PIECE),
            Case::Messages(count) => (Part::Sends, count * MESSAGE, count * MESSAGE, MESSAGE),
            Case::Calls(count) => (Part::Calls, count, MESSAGE, MESSAGE),
            Case::Opens(count) => (Part::Opens, count, 0, 0),
        };
        (self.user.part, self.user.left) = (part, left);
        if part == Part::Opens {
            self.session.open("user").expect("a stream");
        }
        for local in &mut self.user.locals {
            if let Some(id) = local.id {
                (local.unsent, local.piece) = (unsent, piece);
                self.session.set_readable(id);
            }
        }
    }

    /// Goes on until nothing moves and `done` holds.
    async fn run_until(&mut self, done: impl Fn(&Self) -> bool) {
        poll_fn(|cx| {
            while self.turn(cx) {}
            if done(self) && self.link.is_idle() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }

    /// Receives and sends once; whether anything moved.
    fn turn(&mut self, cx: &mut Context<'_>) -> bool {
        let now = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        let End {
            session,
            link,
            pipe,
            user,
            ..
        } = self;
        let received = link.receive(pipe, cx, |bytes| take(session, user, now, bytes));
        let sent = link.send(pipe, cx, |room| fill(session, user, now, room));
        received.is_ready() || sent.is_ready()
    }
}

/// Gives `bytes` that arrived to the session and the user.
fn take(session: &mut Session, user: &mut User, now: u64, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let used = if let Some(payload) = session.payload() {
            let n = payload.remaining.min(bytes.len());
            session.payload_taken(n);
            let stream = payload.stream.expect("no stream is reset");
            user.sink[..n].copy_from_slice(&bytes[..n]);
            session.consumed(now, stream, n);
            user.received(session, stream, n);
            n
        } else {
            session.handle_bytes(now, bytes)
        };
        bytes = &bytes[used..];
        while let Some(event) = session.poll_event() {
            user.on_event(session, event);
        }
    }
}

/// Fills `room` with frames, as far as there are any; how many bytes they take.
fn fill(session: &mut Session, user: &mut User, now: u64, room: &mut [u8]) -> usize {
    let mut used = 0;
    let mut control = [0; MAX_CONTROL_FRAME];
    while let Some(transmit) = session.poll_transmit(now, room.len() - used, &mut control) {
        match transmit {
            Transmit::Control(len) => {
                room[used..used + len].copy_from_slice(&control[..len]);
                used += len;
            }
            Transmit::Data { stream, max } => {
                let local = &mut user.locals[stream.index()];
                let n = local.unsent.min(local.piece).min(max);
                if n == 0 {
                    session.finish(stream);
                    continue;
                }
                // A user gives its buffer away from the front to the end, again and again.
                let at = (PIECE - local.unsent % PIECE) % PIECE;
                local.unsent -= n;
                let payload = used + HEADER_LEN;
                room[payload..payload + n].copy_from_slice(&user.source[at..at + n]);
                room[used..payload].copy_from_slice(&session.sent(stream, n).header);
                used = payload + n;
                if local.unsent == 0 && !local.finishes {
                    session.blocked(stream);
                }
                if user.part == Part::Sends {
                    user.left -= n;
                }
            }
        }
    }
    used
}

impl User {
    /// Does for the other end's user what `case` says.
    fn serve(&mut self, case: Case) {
        (self.part, self.left) = match case {
            Case::Bulk { streams, bytes } => (Part::Takes, streams * bytes),
            Case::Messages(count) => (Part::Takes, count * MESSAGE),
            Case::Calls(count) => (Part::Answers, count),
            Case::Opens(count) => (Part::Closes, count),
        };
    }

    fn received(&mut self, session: &mut Session, stream: StreamId, n: usize) {
        match self.part {
            Part::Takes => self.left -= n,
            Part::Calls | Part::Answers => {
                let local = &mut self.locals[stream.index()];
                local.received += n;
                if local.received == MESSAGE {
                    local.received = 0;
                    self.left -= 1;
                    if self.left > 0 || self.part == Part::Answers {
                        (local.unsent, local.piece) = (MESSAGE, MESSAGE);
                        session.set_readable(stream);
                    }
                }
            }
            Part::Waits | Part::Sends | Part::Opens | Part::Closes => {}
        }
    }

    fn on_event(&mut self, session: &mut Session, event: Event) {
        match event {
            Event::Asked { stream, .. } => {
                session.accept(stream);
                self.add(stream);
            }
            Event::Accepted(stream) => {
                self.add(stream);
                if self.part == Part::Opens {
                    let local = &mut self.locals[stream.index()];
                    (local.unsent, local.piece, local.finishes) = (1, 1, true);
                    session.set_readable(stream);
                }
            }
            Event::Finished(stream) => {
                self.left -= 1;
                match self.part {
                    Part::Closes => session.finish(stream),
                    _ if self.left > 0 => drop(session.open("user").expect("a stream")),
                    _ => {}
                }
            }
            Event::Established(_) | Event::RoundTrip(_) => {}
            event => panic!("unexpected: {event:?}"),
        }
    }

    fn add(&mut self, stream: StreamId) {
        let index = stream.index();
        if self.locals.len() <= index {
            self.locals.resize(index + 1, Local::default());
        }
        self.locals[index] = Local {
            id: Some(stream),
            ..Local::default()
        };
        self.open += 1;
    }
}
