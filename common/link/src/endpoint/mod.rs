//! One end of a line.
//!
//! # Theory of operation
//!
//! An [`Endpoint`] is one *incarnation* of an end: it lives until the other end restarts or the line is beyond repair, and
//! is then thrown away. Its random number names it.
//!
//! ```text
//!              new()
//!                |               HELLO with ack = our number
//!                v                         |
//!           [Opening] ---------------------+--> [Open]
//!            says HELLO now and then              |  HELLO of another number, nonsense under a sound checksum
//!            skips all but HELLOs                 v
//!                                              [Ended]
//! ```
//!
//! The handshake tells each end the other's number, and from both follow the checksums of all other frames; so nothing of
//! a dead incarnation is ever taken for a living one's. While open, noise is answered with a HELLO now and then: it may
//! be the voice of somebody new at the other end, who does not speak this protocol until it hears one (the host end
//! of a QEMU chardev does not know whether a serial line lies behind it).
//!
//! Data is never refused: [`Endpoint::handle_bytes`] hands over all that is in order, and holds at most a window of what
//! is not. A pause of any length is no end.
//!
//! # Call contract
//!
//! *Input*: [`Endpoint::handle_bytes`] for all that arrives; take what it appended, then look at [`Endpoint::end`].
//!
//! *Output*, whenever the line takes more (not before: what lies in a queue delays what comes later): while
//! [`Endpoint::wants_data`], hand data to [`Endpoint::push`], as long as there is any; then [`Endpoint::poll_transmit`],
//! which appends one frame. Repeat until it has none. The same at [`Endpoint::next_timeout`].
//!
//! Time is in microseconds from any fixed start and never goes back.

mod receive;
mod send;

use alloc::vec::Vec;
use core::fmt;

use crate::deframe::{Deframer, stuff};
use crate::frame::{Hello, MAX_BODY, Seal, VERSION};
use receive::Receiver;
use send::Sender;

/// Microseconds from any fixed start.
pub type Time = u64;

/// How long an end that nobody answers waits until it says HELLO again, at first and at last, in microseconds.
const HELLO_PAUSE: (Time, Time) = (100_000, 1_000_000);
/// How often noise is answered, at most, in microseconds.
const NOISE_PAUSE: Time = 1_000_000;

/// What an end knows of itself.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "sim", derive(Hash))]
pub struct Config {
    /// Names this incarnation: random, not 0.
    pub id: u64,
    /// The line's speed in bits a second, if this end knows it.
    pub speed: Option<u32>,
}

/// Why an endpoint is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "sim", derive(Hash))]
pub enum End {
    /// The other end is another incarnation now.
    PeerRestarted,
    /// The other end speaks another version of the link's protocol.
    Version(u8),
    /// What came under a sound checksum makes no sense, or nothing gets through any more.
    Violation(Violation),
}

/// What makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "sim", derive(Hash))]
pub enum Violation {
    /// A frame from beyond the window.
    Ahead,
    /// An acknowledgement of what was never sent.
    NeverSent,
    /// One frame was lost time and again while others arrived.
    Unrepairable,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::PeerRestarted => f.write_str("the other end of the line restarted"),
            End::Version(version) => write!(
                f,
                "the other end of the line speaks version {version} of the link's protocol, this one {VERSION}: \
                 install matching versions of virtproxy and virtproxy-agent"
            ),
            End::Violation(violation) => f.write_str(match violation {
                Violation::Ahead => "the other end sent a frame from beyond its window",
                Violation::NeverSent => "the other end acknowledged what was never sent",
                Violation::Unrepairable => {
                    "the line loses one frame time and again: is it set to 8 bits and no parity at both ends?"
                }
            }),
        }
    }
}

/// Counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Pieces between delimiters that were no frame of this line.
    pub noise: u64,
    /// Frames that arrived twice.
    pub duplicates: u64,
    /// Frames seen to be lost.
    pub lost: u64,
    /// Transmissions of frames that had been sent before.
    pub retransmissions: u64,
    /// Bytes that may be on their way.
    pub window: usize,
}

/// The two directions, once both ends have heard each other.
#[cfg_attr(feature = "sim", derive(Clone, Hash))]
struct Joint {
    peer: u64,
    outbound: Seal,
    inbound: Seal,
    sender: Sender,
    receiver: Receiver,
}

/// See the [module](self).
#[cfg_attr(feature = "sim", derive(Clone, Hash))]
pub struct Endpoint {
    config: Config,
    deframer: Deframer,
    /// The last incarnation heard at the other end; 0: none.
    heard: u64,
    open: Option<Joint>,
    end: Option<End>,
    owes_hello: bool,
    /// While nobody answers: when to say HELLO again, and the pause after that.
    next_hello: (Time, Time),
    /// Noise is not answered before this, and when it will be, if there was any.
    quiet_until: Time,
    noise_due: Option<Time>,
    noise: u64,
    body: Vec<u8>,
}

impl Endpoint {
    /// An end that has yet to be heard.
    pub fn new(config: Config) -> Self {
        Endpoint {
            config: Config {
                id: config.id.max(1),
                ..config
            },
            deframer: Deframer::default(),
            heard: 0,
            open: None,
            end: None,
            owes_hello: false,
            next_hello: (0, HELLO_PAUSE.0),
            quiet_until: 0,
            noise_due: None,
            noise: 0,
            body: Vec::with_capacity(MAX_BODY),
        }
    }

    /// Whether both ends have heard each other.
    pub fn is_open(&self) -> bool {
        self.open.is_some() && self.end.is_none()
    }

    /// The incarnation at the other end, once both have heard each other.
    pub fn peer(&self) -> Option<u64> {
        self.open.as_ref().map(|joint| joint.peer)
    }

    /// Why it is over, if it is.
    pub fn end(&self) -> Option<End> {
        self.end
    }

    /// The counters.
    pub fn stats(&self) -> Stats {
        let joint = self.open.as_ref();
        Stats {
            noise: self.noise,
            duplicates: joint.map_or(0, |joint| joint.receiver.duplicates),
            lost: joint.map_or(0, |joint| joint.sender.lost),
            retransmissions: joint.map_or(0, |joint| joint.sender.retransmissions),
            window: joint.map_or(0, |joint| joint.sender.window()),
        }
    }

    /// Takes bytes from the line, and appends what is in order to `out`.
    pub fn handle_bytes(&mut self, now: Time, mut bytes: &[u8], out: &mut Vec<u8>) {
        let mut deframer = core::mem::take(&mut self.deframer);
        while !bytes.is_empty() && self.end.is_none() {
            match deframer.next(&mut bytes) {
                None | Some(Some([])) => {}
                Some(Some(body)) => self.on_frame(now, body, out),
                Some(None) => self.on_noise(now),
            }
        }
        self.deframer = deframer;
    }

    fn on_frame(&mut self, now: Time, body: &[u8], out: &mut Vec<u8>) {
        if let Some(joint) = &mut self.open
            && let Some((ack, data)) = joint.inbound.decode(body)
        {
            let result = joint.sender.on_ack(now, ack);
            let result = result.and_then(|()| match data {
                Some(data) => joint.receiver.take(now, data, out),
                None => Ok(()),
            });
            self.end = result.err().map(End::Violation);
        } else if let Some(hello) = Hello::decode(body) {
            self.on_hello(hello);
        } else {
            self.on_noise(now);
        }
    }

    fn on_hello(&mut self, hello: Hello) {
        if hello.id == self.config.id {
            return; // an echo
        }
        if hello.version != VERSION {
            self.end = Some(End::Version(hello.version));
            return;
        }
        if let Some(joint) = &self.open {
            if joint.peer != hello.id {
                self.end = Some(End::PeerRestarted);
            }
            self.owes_hello |= !hello.open;
            return;
        }
        self.heard = hello.id;
        let answers = hello.ack == self.config.id;
        // Who has heard us and knows that we have heard it needs no answer.
        self.owes_hello |= !(answers && hello.open);
        if answers {
            let (id, peer) = (self.config.id, hello.id);
            let known = [
                self.config.speed,
                Some(hello.speed).filter(|speed| *speed > 0),
            ];
            self.open = Some(Joint {
                peer,
                outbound: Seal::new(id, peer),
                inbound: Seal::new(peer, id),
                sender: Sender::new(known.into_iter().flatten().min()),
                receiver: Receiver::new(),
            });
        }
    }

    fn on_noise(&mut self, now: Time) {
        self.noise += 1;
        if self.is_open() {
            self.noise_due.get_or_insert(now.max(self.quiet_until));
        }
    }

    /// Whether more data could be sent now.
    pub fn wants_data(&self) -> bool {
        self.is_open()
            && self
                .open
                .as_ref()
                .is_some_and(|joint| joint.sender.wants_data())
    }

    /// Takes data to send. Whoever gives more than a little while [`Endpoint::wants_data`] is false is the one who keeps it
    /// in memory.
    pub fn push(&mut self, bytes: &[u8]) {
        if let Some(joint) = &mut self.open {
            joint.sender.push(bytes);
        }
    }

    /// Appends the next frame, as it goes over the line, to `out`; false if there is none now.
    pub fn poll_transmit(&mut self, now: Time, out: &mut Vec<u8>) -> bool {
        if self.end.is_some() {
            return false;
        }
        if self.open.is_none() && self.next_hello.0 <= now {
            let pause = self.next_hello.1;
            self.next_hello = (now + pause, (2 * pause).min(HELLO_PAUSE.1));
            self.owes_hello = true;
        }
        if self.noise_due.take_if(|due| *due <= now).is_some() {
            self.quiet_until = now + NOISE_PAUSE;
            self.owes_hello = true;
        }
        if core::mem::take(&mut self.owes_hello) {
            let hello = Hello {
                version: VERSION,
                open: self.open.is_some(),
                id: self.config.id,
                ack: self.heard,
                speed: self.config.speed.unwrap_or(0),
            };
            stuff(&hello.encode(), out);
            return true;
        }
        let Some(joint) = &mut self.open else {
            return false;
        };
        let timeouts = joint.sender.timeouts;
        let data = joint.sender.next(now);
        if data.is_none() && !joint.receiver.is_due(now) {
            return false;
        }
        joint
            .outbound
            .encode(joint.receiver.ack(), data, &mut self.body);
        stuff(&self.body, out);
        // Nobody answers: somebody new may be there, who waits for a HELLO.
        self.owes_hello |= joint.sender.timeouts > timeouts.max(1);
        true
    }

    /// When [`Endpoint::poll_transmit`] must be called again, even if nothing arrives.
    pub fn next_timeout(&self) -> Option<Time> {
        if self.end.is_some() {
            return None;
        }
        match &self.open {
            None => Some(self.next_hello.0),
            Some(joint) => [joint.sender.due(), joint.receiver.due(), self.noise_due]
                .into_iter()
                .flatten()
                .min(),
        }
    }

    /// Bytes kept: not sent, not acknowledged, or not in order.
    pub fn held(&self) -> usize {
        let joint = self.open.as_ref();
        joint.map_or(0, |joint| joint.sender.held() + joint.receiver.held())
    }

    /// Checks what must always hold; for tests and fuzzing.
    ///
    /// # Panics
    /// If it does not.
    pub fn check_invariants(&self) {
        if let Some(joint) = &self.open {
            joint.sender.check();
        }
    }
}
