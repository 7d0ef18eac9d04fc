//! One session: many streams over one reliable, ordered run of bytes.
//!
//! # Theory of operation
//!
//! A [`Session`] lives from one handshake to its end and is then thrown away; whoever drives it makes a new one,
//! with a new random epoch, for the next link or after [`Event::Ended`].
//!
//! ```text
//!            new()
//!              |                HELLO with ack = our epoch
//!              v                          |
//!          [Seeking] ---------------------+--> [Established]
//!           skips all but HELLOs                  |  |
//!                                                 |  | violation, wrong seal, peer's HELLO, peer's GOAWAY with a fault
//!                                                 v  v
//!                                               [Ended]
//! ```
//!
//! # Call contract
//!
//! *Input*, for each batch of bytes that arrived, until they are used up:
//! 1. [`Session::unverified`]: if it is `Some(n)`, the next `n` bytes may not be looked at before their seal, the
//!    [`SEAL_LEN`] bytes behind them, is known to be right: once those have arrived too, and not earlier, give a copy of
//!    them to [`Session::verify`];
//! 2. else [`Session::payload`]: if it is `Some`, the next bytes are data: move up to `remaining` of them to the stream's
//!    local side (or drop them, if `stream` is `None`) and say so with [`Session::payload_taken`];
//! 3. else hand a copy of some bytes to [`Session::handle_bytes`], which says how many it used;
//! 4. after each of them, take every [`Session::poll_event`].
//!
//! Data is never refused: credit was granted for it, so the driver keeps what the local side does not take, and
//! calls [`Session::consumed`] exactly once for each byte that left its hands (written, or dropped), even if the stream
//! is gone by then. What it holds of a stream that was reset it drops at once.
//!
//! *Output*, while the link has room: [`Session::poll_transmit`]. A [`Transmit::Control`] frame is in the buffer. For
//! a [`Transmit::Data`], leave [`HEADER_LEN`] bytes of room, read up to `max` bytes from the stream's local side behind
//! it, and call exactly one of [`Session::sent`] (which gives the header, and the seal if there is to be one behind the
//! bytes; there is room for it), [`Session::blocked`] (nothing to read now), [`Session::finish`] (end of file) or
//! [`Session::reset`].
//!
//! *Commands* may be given at any time. On a stream that is already gone they do nothing: its end is in the events.
//! The other way round, an event may tell of a stream that the driver has let go, when its last frame was still owed.
//!
//! Time is in microseconds from any fixed start and never goes back.

mod handshake;
#[cfg(feature = "sim")]
mod inspect;
mod receive;
mod transmit;
mod view;

pub use view::CreditView;

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

use crate::credit::Credit;
use crate::frame::{HEADER_LEN, Header, MAX_PAYLOAD, MAX_TEXT_LEN, valid_service_name};
use crate::hello::{Hello, MIN_LIMIT, SEAL, VERSION, truncate};
use crate::reason::{End, Reason};
use crate::schedule::Schedule;
use crate::seal::{SEAL_LEN, Seals};
use crate::stream::{Address, Half, MAX_SLOTS, Note, Phase, Receive, Stream, StreamId};
use crate::table::{Streams, line_up};

/// Microseconds from any fixed start.
pub type Time = u64;

/// The smallest window a stream is ever granted, in bytes; room for it is reserved for every stream there may be.
pub const MIN_WINDOW: u32 = 4096;

/// The largest window of a stream or session, in bytes.
pub const MAX_WINDOW: u32 = 1 << 30;

/// What a stream may send in one turn while others wait, in bytes, where a channel is fast.
pub const DEFAULT_TURN: u32 = 64 * 1024;

/// What one side allows and asks for.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "sim", derive(Hash))]
pub struct Config {
    /// Streams the peer may have open at once, and we ourselves.
    pub max_streams: u32,
    /// Credit a new stream starts with, in bytes, while memory lasts.
    pub initial_window: u32,
    /// What a stream's window may grow to, in bytes.
    pub max_window: u32,
    /// Bytes of data that may be on their way to us over all streams.
    pub session_window: u32,
    /// The most bytes the local side may ever have to hold for the peer, over all streams. At least
    /// [`MIN_WINDOW`] for each of `max_streams` each way is set aside, whatever this says.
    pub memory: u64,
    /// The longest DATA payload we take, in bytes.
    pub max_frame: u32,
    /// Bytes a stream may send in one turn while others wait.
    pub turn: u32,
    /// Asks for sealed frames: the channel may lose or gain bytes unnoticed.
    pub seal: bool,
    /// Protocol versions we speak.
    pub versions: (u8, u8),
    /// Name and version of the program.
    pub product: String,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            max_streams: 16 * 1024,
            initial_window: 64 * 1024,
            max_window: 1024 * 1024,
            session_window: 1024 * 1024,
            memory: 256 * 1024 * 1024,
            max_frame: 64 * 1024,
            turn: DEFAULT_TURN,
            seal: false,
            versions: (VERSION, VERSION),
            product: String::from("virtproxy"),
        }
    }
}

/// What happened, for the driver to act on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "sim", derive(Hash))]
pub enum Event {
    /// The handshake is done; streams may be opened.
    Established(Hello),
    /// The other end speaks no version that we speak; still waiting for one that does.
    Incompatible(Hello),
    /// The peer asks for a stream to a service: answer with [`Session::accept`] or [`Session::refuse`].
    Asked {
        /// The new stream.
        stream: StreamId,
        /// Name of the service asked for.
        service: String,
    },
    /// The peer accepted a stream opened here.
    Accepted(StreamId),
    /// The peer refused a stream opened here; it is gone.
    Refused {
        /// The stream that was.
        stream: StreamId,
        /// Why.
        reason: Reason,
        /// What the peer says about it.
        text: String,
    },
    /// The peer will send no more on the stream.
    Finished(StreamId),
    /// The peer ended the stream, both ways; it is gone.
    Reset {
        /// The stream that was.
        stream: StreamId,
        /// Why.
        reason: Reason,
        /// What the peer says about it.
        text: String,
    },
    /// A PING came back; the round trip in microseconds.
    RoundTrip(Time),
    /// The peer will take no new streams; those there are go on.
    GoingAway {
        /// Why.
        reason: Reason,
        /// What the peer says about it.
        text: String,
    },
    /// The session is over and every stream with it. Make a new one.
    Ended(End),
}

/// Why a stream cannot be opened now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// No session is established.
    NotEstablished,
    /// One of the sides is going away.
    GoingAway,
    /// The peer's limit of streams, or our own limit of memory, is reached.
    Limit,
    /// Not a service name.
    BadServiceName,
}

/// A frame to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transmit {
    /// A whole frame of this many bytes is in the buffer.
    Control(usize),
    /// Up to `max` bytes of this stream's data may be sent in one frame.
    Data {
        /// Whose turn it is.
        stream: StreamId,
        /// Payload at most, in bytes.
        max: usize,
    },
}

/// What goes around the payload of a data frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// What goes before it.
    pub header: [u8; HEADER_LEN],
    /// What goes behind it, if frames are sealed.
    pub seal: Option<[u8; SEAL_LEN]>,
}

/// Data that comes next in the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Whose it is; `None` if nobody wants it any more.
    pub stream: Option<StreamId>,
    /// Bytes of it still to come.
    pub remaining: usize,
}

/// Counters of a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes skipped while looking for a handshake.
    pub skipped: u64,
    /// Frames that were for streams already gone.
    pub late_frames: u64,
    /// Data bytes sent.
    pub data_sent: u64,
    /// Data bytes received.
    pub data_received: u64,
    /// Streams that could not be opened, by either side, because the memory is used up.
    pub memory_refused: u64,
    /// Times that a stream's window was not doubled only because the memory is short.
    pub growth_denied: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "sim", derive(Hash))]
enum State {
    /// No handshake yet.
    Seeking,
    /// Frames flow.
    Established,
    /// Over; only a farewell may be left to send.
    Ended,
}

/// What the next input bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "sim", derive(Hash))]
enum Expect {
    /// A header, a control frame, or anything while seeking.
    Frame,
    /// The payload of this header, and its seal, which is not known yet.
    Unverified(Header),
    /// Data of a live stream.
    Data(StreamId, usize),
    /// Bytes nobody wants.
    Skip(usize),
}

/// Frames the session itself owes.
#[derive(Default)]
#[cfg_attr(feature = "sim", derive(Clone, Hash))]
struct Owed {
    /// A HELLO with this `ack`.
    hello: Option<u64>,
    /// So many zero bytes behind it, and then the HELLO again.
    filler: usize,
    pong: Option<u64>,
    ping: bool,
    goaway: Option<(Reason, Box<str>)>,
    /// So many bytes of frames are to follow, whatever they mean.
    padding: usize,
}

/// The seals of a session's two directions.
#[cfg_attr(feature = "sim", derive(Clone, Hash))]
struct Sealing {
    sending: Seals,
    receiving: Seals,
}

/// See the [module](self).
#[cfg_attr(feature = "sim", derive(Clone, Hash))]
pub struct Session {
    config: Config,
    epoch: u64,
    state: State,
    /// The peer's HELLO; the last one seen while seeking, then the established one.
    peer: Option<Hello>,
    /// The epoch our last HELLO acknowledges, or will.
    answered: u64,
    /// We told the peer, or it told us, that no new streams are taken.
    going_away: bool,
    peer_going_away: bool,
    /// From the handshake on, if frames are sealed.
    sealing: Option<Sealing>,

    expect: Expect,
    /// A frame that has not arrived whole.
    partial: Vec<u8>,
    events: VecDeque<Event>,

    streams: Streams,
    owed: Owed,
    /// Streams that owe control frames.
    control: VecDeque<StreamId>,
    schedule: Schedule,

    /// What we may still send over all streams.
    send: Credit,
    /// What the peer may still send over all streams, and what we have taken and not granted anew.
    receive: Receive,
    /// Bytes the local side holds, or may have to hold by what is granted.
    committed: u64,

    ping_sent: Option<Time>,
    ping_token: u64,
    round_trip: Option<Time>,
    stats: Stats,
}

impl Session {
    /// A session that has yet to shake hands. `epoch` must be random and not 0.
    pub fn new(config: Config, epoch: u64) -> Self {
        let max_window = config.max_window.clamp(MIN_WINDOW, MAX_WINDOW);
        let config = Config {
            max_streams: config.max_streams.clamp(1, MAX_SLOTS),
            initial_window: config.initial_window.clamp(MIN_WINDOW, max_window),
            max_window,
            session_window: config.session_window.clamp(MIN_LIMIT, MAX_WINDOW),
            max_frame: config.max_frame.clamp(MIN_LIMIT, MAX_PAYLOAD),
            turn: config.turn.clamp(1, MAX_WINDOW),
            ..config
        };
        let session_window = Credit::new(config.session_window).unwrap_or_default();
        Session {
            epoch: epoch.max(1),
            state: State::Seeking,
            peer: None,
            answered: 0,
            going_away: false,
            peer_going_away: false,
            sealing: None,
            expect: Expect::Frame,
            partial: Vec::new(),
            events: VecDeque::new(),
            streams: Streams::default(),
            owed: Owed {
                hello: Some(0),
                ..Owed::default()
            },
            control: VecDeque::new(),
            schedule: Schedule::new(config.turn),
            send: Credit::default(),
            receive: Receive {
                granted: session_window,
                window: config.session_window,
                ..Receive::default()
            },
            committed: 0,
            ping_sent: None,
            ping_token: 0,
            round_trip: None,
            stats: Stats::default(),
            config,
        }
    }

    /// Whether the handshake is done and the session not over.
    pub fn is_established(&self) -> bool {
        self.state == State::Established
    }

    /// Whether the session is over.
    pub fn is_ended(&self) -> bool {
        self.state == State::Ended
    }

    /// What the peer said of itself, once established.
    pub fn peer(&self) -> Option<&Hello> {
        self.peer.as_ref().filter(|_| self.is_established())
    }

    /// Streams that live now.
    pub fn streams(&self) -> usize {
        self.streams.len()
    }

    /// The counters.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// The last measured round trip in microseconds.
    pub fn round_trip(&self) -> Option<Time> {
        self.round_trip
    }

    /// Bytes the local side holds, or may have to hold by what is granted.
    pub fn committed(&self) -> u64 {
        self.committed
    }

    /// The next thing that happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Opens a stream to a service of the peer. [`Event::Accepted`] or [`Event::Refused`] follows.
    pub fn open(&mut self, service: &str) -> Result<StreamId, OpenError> {
        if !valid_service_name(service.as_bytes()) {
            return Err(OpenError::BadServiceName);
        }
        let limit = match (self.peer(), self.going_away) {
            (None, _) => return Err(OpenError::NotEstablished),
            (_, true) => return Err(OpenError::GoingAway),
            (Some(peer), _) => peer.max_streams.min(self.config.max_streams),
        };
        let Some(window) = self.first_window() else {
            self.stats.memory_refused += 1;
            return Err(OpenError::Limit);
        };
        let address = self.streams.new_address(limit);
        let id = self.streams.name(address.ok_or(OpenError::Limit)?);
        let mut stream = Stream::new(id, Phase::Opening);
        stream.owed.open = true;
        stream.note = Some(Note::Service(service.as_bytes().into()));
        self.admit(stream, window).ok_or(OpenError::Limit)?;
        Ok(id)
    }

    /// Accepts a stream the peer asked for.
    pub fn accept(&mut self, id: StreamId) {
        self.with(id, |stream, _| {
            if stream.phase == Phase::Asked {
                stream.phase = Phase::Open;
                stream.owed.accept = true;
            }
        });
    }

    /// Refuses a stream the peer asked for.
    pub fn refuse(&mut self, id: StreamId, reason: Reason, text: &str) {
        self.with(id, |stream, committed| {
            if stream.phase == Phase::Asked {
                close(stream, committed);
                stream.owed.refuse = true;
                stream.note = Some(why(reason, text));
            }
        });
    }

    /// Ends a stream both ways at once.
    pub fn reset(&mut self, id: StreamId, reason: Reason, text: &str) {
        self.with(id, |stream, committed| {
            let unsent = stream.owed.open;
            if stream.phase != Phase::Closing {
                close(stream, committed);
                stream.owed.reset = !unsent;
                stream.note = Some(why(reason, text));
            }
        });
    }

    /// The local side has bytes to send (or is at end of file: the driver finds out when it is asked for them).
    pub fn set_readable(&mut self, id: StreamId) {
        self.with(id, |stream, _| stream.readable = true);
    }

    /// The local side has nothing to send now.
    pub fn blocked(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(id) {
            stream.readable = false; // the schedule sees it by itself
        }
    }

    /// The local side will send no more: half-closes the stream.
    pub fn finish(&mut self, id: StreamId) {
        self.with(id, |stream, _| {
            if stream.phase == Phase::Open && stream.sending == Half::Open {
                stream.sending = Half::Ended;
                stream.owed.fin = true;
            }
        });
    }

    /// `n` bytes of this stream's data are sent in the envelope that this returns.
    ///
    /// # Panics
    /// If `n` is more than the `max` that [`Session::poll_transmit`] allowed.
    pub fn sent(&mut self, id: StreamId, n: usize) -> Envelope {
        self.account_sent(id, n)
    }

    /// `n` bytes of this stream that [`Session::payload_taken`] counted have left the driver's hands.
    pub fn consumed(&mut self, now: Time, id: StreamId, n: usize) {
        self.return_credit(now, id, n);
    }

    /// Asks the peer for a sign of life. If it answers, [`Event::RoundTrip`] follows.
    ///
    /// Asked again while the answer is outstanding and a frame has not arrived whole, it does what [`Session::stalled`]
    /// does. On a channel that may lose bytes, what was lost is sent again: the PING and a HELLO, or a HELLO while seeking. So a driver
    /// calls this now and then as long as the peer is silent.
    pub fn ping(&mut self) {
        let outstanding = self.ping_sent.is_some();
        match self.state {
            State::Established if outstanding && self.is_mid_frame() => self.stalled(),
            State::Established => {
                self.owed.ping |= !outstanding || self.is_sealed();
                if outstanding && self.is_sealed() {
                    // The peer may have begun anew, and its HELLO got lost.
                    self.owed.hello = self.peer().map(|peer| peer.epoch);
                }
            }
            State::Seeking if self.is_sealed() && self.owed.filler == 0 => {
                self.owed.hello.get_or_insert(0);
            }
            State::Seeking | State::Ended => {}
        }
    }

    /// Whether a frame has arrived in part.
    pub fn is_mid_frame(&self) -> bool {
        self.is_established() && (self.expect != Expect::Frame || !self.partial.is_empty())
    }

    /// The rest of a frame keeps us waiting: repeats our HELLO. That makes a peer that restarted in mid-frame show itself,
    /// and one that did not complete what the channel lost, if frames are sealed (`PROTOCOL.md`, "Cut frames").
    pub fn stalled(&mut self) {
        if self.is_mid_frame() {
            self.owed.hello = self.peer().map(|peer| peer.epoch);
        }
    }

    /// Whether frames are sealed, or (before the handshake) will be as far as is known: one of the ends has asked for it.
    pub fn is_sealed(&self) -> bool {
        let asked = |peer: &Hello| peer.features & SEAL != 0;
        self.config.seal || self.peer.as_ref().is_some_and(asked)
    }

    /// Bytes that the seal of a frame takes.
    fn seal_len(&self) -> usize {
        match self.sealing {
            Some(_) => SEAL_LEN,
            None => 0,
        }
    }

    /// Since when a PING has been waiting for its answer.
    pub fn ping_sent(&self) -> Option<Time> {
        self.ping_sent
    }

    /// Tells the peer that no new streams are taken from here on; those there are go on. Only
    /// [`Reason::ShuttingDown`] means that: for any other reason the peer ends the session at once.
    pub fn go_away(&mut self, reason: Reason, text: &str) {
        if self.is_established() {
            self.going_away = true;
            self.owed.goaway = Some((reason, truncate(text, MAX_TEXT_LEN).into()));
        }
    }

    /// Whether anything waits to be sent that needs no data.
    pub fn owes_control(&self) -> bool {
        let owed = &self.owed;
        owed.hello.is_some()
            || owed.filler > 0
            || owed.pong.is_some()
            || owed.ping
            || owed.goaway.is_some()
            || !self.control.is_empty()
    }

    /// Changes a live stream, then puts it in whatever line it now belongs in, or frees it.
    fn with<T>(&mut self, id: StreamId, f: impl FnOnce(&mut Stream, &mut u64) -> T) -> Option<T> {
        let stream = self.streams.get_mut(id)?;
        let result = f(stream, &mut self.committed);
        if stream.is_gone() {
            self.streams.remove(id);
            self.fence();
            return Some(result);
        }
        let owes = stream.owed.any() && !stream.in_control;
        stream.in_control |= owes;
        let sends = self.schedule.admit(stream);
        if owes {
            line_up(&mut self.control, &self.streams, id);
        }
        if sends {
            self.schedule.line_up(&self.streams, id);
        }
        Some(result)
    }

    /// Asks for a PING if addresses wait for one.
    fn fence(&mut self) {
        self.owed.ping |= self.streams.wants_fence() && self.ping_sent.is_none();
    }

    /// Handles a frame for the stream at `address`; `None` if none lives there.
    fn with_at<T>(
        &mut self,
        address: Address,
        f: impl FnOnce(&mut Stream, &mut u64) -> T,
    ) -> Option<(StreamId, T)> {
        let id = self.streams.at(address)?;
        Some((id, self.with(id, f)?))
    }

    /// What a new stream is granted at first, if there is memory for it. There is, unless so much lies unread on
    /// streams that are already gone that it takes what was set aside.
    fn first_window(&self) -> Option<u32> {
        if self.committed + u64::from(MIN_WINDOW) > self.memory() {
            return None;
        }
        let share = u32::try_from(self.pool() / 64).unwrap_or(u32::MAX);
        let window = MIN_WINDOW.saturating_add(share);
        Some(window.min(self.config.initial_window))
    }

    /// Adds a stream with its first grant, if its slot is free.
    fn admit(&mut self, mut stream: Stream, window: u32) -> Option<()> {
        let id = stream.id;
        stream.receive.window = window;
        stream.receive.granted = Credit::new(window).ok()?;
        self.streams.insert(stream)?;
        self.committed += u64::from(window);
        self.with(id, |_, _| ())
    }

    /// The most bytes that may ever be granted or held.
    fn memory(&self) -> u64 {
        self.config.memory.max(self.config.set_aside())
    }

    /// Bytes that may be granted beyond the least window that is set aside for every stream there may yet be.
    fn pool(&self) -> u64 {
        let streams = u64::from(self.config.max_streams) * 2;
        let reserve = streams.saturating_sub(self.streams() as u64) * u64::from(MIN_WINDOW);
        self.config.memory.saturating_sub(reserve + self.committed)
    }
}

/// Makes a stream one that is over but for its last frame.
fn close(stream: &mut Stream, committed: &mut u64) {
    end_receiving(stream, committed);
    if stream.owed.fin {
        stream.sending = Half::Open; // the peer will never see that FIN
    }
    stream.phase = Phase::Closing;
    stream.owed = crate::stream::Owed::default();
    stream.readable = false;
}

/// Takes back what was granted; what the local side still holds stays on the books until it is consumed.
fn end_receiving(stream: &mut Stream, committed: &mut u64) {
    if stream.receiving == Half::Open {
        *committed -= u64::from(stream.receive.window - stream.receive.held);
        stream.receiving = Half::Ended;
    }
}

fn why(reason: Reason, text: &str) -> Note {
    Note::Why(reason, truncate(text, MAX_TEXT_LEN).into())
}
