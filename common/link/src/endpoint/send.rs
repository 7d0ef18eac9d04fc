//! Sending: cuts frames, keeps them until they have arrived, and sends those again that did not.
//!
//! **What is lost** is known, not guessed: each transmission has a number (`order`) and the line keeps its order, so when
//! one has arrived, every earlier one that has not is lost, and only that is sent again. Only what nothing follows, or a
//! lost acknowledgement, waits for the timer; then the oldest frame alone goes out again, as a question. The
//! answer tells what else is missing. The timer doubles up to [`MAX_TIMEOUT`] and never gives up: a machine that was
//! stopped for an hour goes on within a second.
//!
//! **How much is on its way** ([`Sender::window`]) starts from what the line's nominal speed carries in [`TARGET`], which
//! is also its floor. An emulated line is often much faster than it says, so the window grows while round trips stay below
//! [`TARGET`], and shrinks when they are well above or a frame is lost. That keeps little in front of an interactive
//! request, at any speed.
//!
//! **How long a frame is** follows what the line does to them: a lost one makes the next shorter, one that arrives makes
//! them longer, up to [`MAX_PAYLOAD`].

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use super::{Time, Violation};
use crate::frame::{Ack, Data, MAX_FRAMES, MAX_PAYLOAD};

/// The round trip that the window is steered to, in microseconds.
const TARGET: Time = 60_000;
/// The timer's bounds, and its start, in microseconds.
const MIN_TIMEOUT: Time = 50_000;
const MAX_TIMEOUT: Time = 1_000_000;
const FIRST_TIMEOUT: Time = 500_000;
/// Bounds of the window, in bytes.
const MIN_WINDOW: usize = 512;
const MAX_WINDOW: usize = MAX_FRAMES * MAX_PAYLOAD;
/// The shortest payload that damage makes us cut.
const MIN_PAYLOAD: usize = 64;
/// Speed taken for a line whose speed neither end knows, in bits a second.
const UNKNOWN_SPEED: u32 = 115_200;
/// How often one frame may be seen to be lost, while others arrive, until the line counts as beyond repair.
const MAX_LOSSES: u16 = 200;
/// Transmissions that may be unanswered before further ones get no number of their own, so that numbers stay clear.
const MAX_UNSEEN: u8 = 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "sim", derive(Hash))]
enum Fate {
    OnItsWay,
    Lost,
    Arrived,
}

/// A frame that was cut.
#[cfg_attr(feature = "sim", derive(Clone, Hash))]
struct Frame {
    payload: Vec<u8>,
    /// Of its last transmission.
    order: u8,
    sent_at: Time,
    asked: bool,
    fate: Fate,
    losses: u16,
}

impl Frame {
    /// Counts a loss.
    fn lose(&mut self) -> Result<(), Violation> {
        self.losses += 1;
        match self.losses {
            0..MAX_LOSSES => Ok(()),
            _ => Err(Violation::Unrepairable),
        }
    }
}

#[cfg_attr(feature = "sim", derive(Clone, Hash))]
pub(super) struct Sender {
    /// The first frame of `frames`.
    base: u8,
    frames: VecDeque<Frame>,
    /// Bytes of frames that are on their way.
    in_flight: usize,
    /// What has not been cut yet.
    backlog: VecDeque<u8>,
    /// The next transmission's number, and the last that is known to have arrived.
    order: u8,
    seen: u8,
    window: usize,
    floor: usize,
    /// Whether the window held something back since the last round trip was measured.
    limited: bool,
    payload: usize,
    /// Bytes sent since an acknowledgement was asked for.
    unasked: usize,
    /// Smoothed round trip and its deviation (RFC 6298), in microseconds.
    round_trip: Option<(Time, Time)>,
    timer: Option<Time>,
    /// Timeouts in a row.
    pub(super) timeouts: u32,
    pub(super) retransmissions: u64,
    pub(super) lost: u64,
}

impl Sender {
    pub(super) fn new(speed: Option<u32>) -> Self {
        let bytes_a_second = u64::from(speed.unwrap_or(UNKNOWN_SPEED)) / 10;
        let floor = usize::try_from(bytes_a_second * TARGET / 1_000_000).unwrap_or(MAX_WINDOW);
        let floor = floor.clamp(MIN_WINDOW, MAX_WINDOW / 2);
        Sender {
            base: 0,
            frames: VecDeque::with_capacity(MAX_FRAMES),
            in_flight: 0,
            backlog: VecDeque::new(),
            order: 0,
            seen: u8::MAX,
            window: floor,
            floor,
            limited: false,
            payload: MAX_PAYLOAD,
            unasked: 0,
            round_trip: None,
            timer: None,
            timeouts: 0,
            retransmissions: 0,
            lost: 0,
        }
    }

    /// Whether a frame could be cut if there were more data.
    pub(super) fn wants_data(&self) -> bool {
        self.backlog.len() < self.cut() && self.has_room()
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.backlog.extend(bytes);
    }

    /// The payload of the next frame: as long as the line lets through, and short enough that several fill the window.
    fn cut(&self) -> usize {
        self.payload.min(self.window / 4).max(MIN_PAYLOAD)
    }

    fn has_room(&self) -> bool {
        self.in_flight < self.window && self.frames.len() < MAX_FRAMES
    }

    /// The next frame to transmit, if any.
    pub(super) fn next(&mut self, now: Time) -> Option<Data<'_>> {
        let timed_out = self.timer.is_some_and(|timer| timer <= now);
        let lost = |frame: &Frame| frame.fate == Fate::Lost;
        let (at, ask) = if timed_out {
            self.timeouts += 1;
            let oldest = |frame: &Frame| frame.fate != Fate::Arrived;
            (self.frames.iter().position(oldest)?, true)
        } else if let Some(at) = self.frames.iter().position(lost) {
            (at, false)
        } else {
            (self.cut_frame()?, false)
        };
        self.timer.take_if(|_| timed_out);
        Some(self.transmit(now, at, ask))
    }

    /// Makes a frame of what waits; its place.
    fn cut_frame(&mut self) -> Option<usize> {
        if !self.has_room() {
            self.limited = true;
            return None;
        }
        if self.backlog.is_empty() {
            return None;
        }
        let len = self.backlog.len().min(self.cut());
        self.frames.push_back(Frame {
            payload: self.backlog.drain(..len).collect(),
            order: 0,
            sent_at: 0,
            asked: false,
            fate: Fate::Lost, // not sent yet, which comes to the same
            losses: 0,
        });
        Some(self.frames.len() - 1)
    }

    fn transmit(&mut self, now: Time, at: usize, ask: bool) -> Data<'_> {
        let half = self.window / 2;
        let frame = &mut self.frames[at];
        let len = frame.payload.len();
        if frame.fate == Fate::Lost {
            self.in_flight += len;
        }
        if frame.sent_at > 0 {
            self.retransmissions += 1;
        }
        self.unasked += len;
        let ask = ask || self.unasked >= half;
        if ask {
            self.unasked = 0;
        }
        if self.order.wrapping_sub(self.seen) < MAX_UNSEEN {
            frame.order = self.order;
            self.order = self.order.wrapping_add(1);
        } else {
            frame.order = self.order.wrapping_sub(1);
        }
        frame.fate = Fate::OnItsWay;
        frame.sent_at = now;
        frame.asked = ask;
        let seq = self.base.wrapping_add(u8::try_from(at).unwrap_or(0));
        let timer = now + self.timeout();
        self.timer.get_or_insert(timer);
        let frame = &self.frames[at];
        Data {
            seq,
            order: frame.order,
            ask,
            payload: &frame.payload,
        }
    }

    /// Takes an acknowledgement.
    pub(super) fn on_ack(&mut self, now: Time, ack: Ack) -> Result<(), Violation> {
        let advance = usize::from(ack.next.wrapping_sub(self.base));
        match advance {
            128.. => return Ok(()), // one from before the last
            _ if advance > self.frames.len() => return Err(Violation::NeverSent),
            _ => {}
        }
        let sent = self.order.wrapping_sub(1);
        if sent.wrapping_sub(ack.seen) > 2 * MAX_UNSEEN {
            return Err(Violation::NeverSent);
        }
        let mut progress = advance > 0;
        for at in 0..self.frames.len() {
            let gap = at.checked_sub(advance + 1);
            let arrived = at < advance || gap.is_some_and(|bit| ack.gaps >> bit & 1 != 0);
            progress |= arrived && self.frames[at].fate != Fate::Arrived;
            self.learn(now, at, arrived, ack.seen)?;
        }
        self.frames.drain(..advance);
        self.base = ack.next;
        self.seen = ack.seen;
        if self.timeouts > 0 && !progress {
            // The other end lives, so it is the line that lost what the timer sent again.
            let oldest = self
                .frames
                .iter_mut()
                .find(|frame| frame.fate != Fate::Arrived);
            oldest.map_or(Ok(()), Frame::lose)?;
        }
        if progress || self.timeouts > 0 {
            self.timeouts = 0;
            self.timer = None;
        }
        if self.frames.is_empty() {
            self.timer = None;
        } else {
            let timer = now + self.timeout();
            self.timer.get_or_insert(timer);
        }
        Ok(())
    }

    /// What an acknowledgement says of the frame at `at`.
    fn learn(&mut self, now: Time, at: usize, arrived: bool, seen: u8) -> Result<(), Violation> {
        let frame = &mut self.frames[at];
        let len = frame.payload.len();
        if frame.order == seen && frame.asked && frame.fate == Fate::OnItsWay {
            frame.asked = false;
            let sample = now.saturating_sub(frame.sent_at);
            self.measured(sample);
        }
        let frame = &mut self.frames[at];
        let passed = seen.wrapping_sub(frame.order) < 128;
        match frame.fate {
            Fate::Arrived => {}
            _ if arrived => {
                if frame.fate == Fate::OnItsWay {
                    self.in_flight -= len;
                }
                frame.fate = Fate::Arrived;
                frame.payload = Vec::new();
                self.payload = (self.payload + 8).min(MAX_PAYLOAD);
            }
            Fate::OnItsWay if passed => {
                self.in_flight -= len;
                frame.fate = Fate::Lost;
                frame.lose()?;
                self.lost += 1;
                self.payload = (self.payload - self.payload / 4).max(MIN_PAYLOAD);
                self.shrink();
            }
            Fate::OnItsWay | Fate::Lost => {}
        }
        Ok(())
    }

    /// A round trip was measured.
    fn measured(&mut self, sample: Time) {
        let sample = sample.min(MAX_TIMEOUT);
        self.round_trip = Some(match self.round_trip {
            None => (sample, sample / 2),
            Some((smooth, deviation)) => {
                let off = smooth.abs_diff(sample);
                ((7 * smooth + sample) / 8, (3 * deviation + off) / 4)
            }
        });
        if sample > 2 * TARGET {
            self.shrink();
        } else if sample < TARGET && self.limited {
            self.window = (self.window + MAX_PAYLOAD).min(MAX_WINDOW);
        }
        self.limited = false;
    }

    fn shrink(&mut self) {
        self.window = (self.window - self.window / 8).max(self.floor);
    }

    fn timeout(&self) -> Time {
        let first = match self.round_trip {
            None => FIRST_TIMEOUT,
            Some((smooth, deviation)) => (smooth + 4 * deviation).max(MIN_TIMEOUT),
        };
        (first << self.timeouts.min(10)).min(MAX_TIMEOUT)
    }

    /// When [`Sender::next`] must be asked again.
    pub(super) fn due(&self) -> Option<Time> {
        self.timer
    }

    /// Bytes that wait or are on their way.
    pub(super) fn held(&self) -> usize {
        self.backlog.len()
            + self
                .frames
                .iter()
                .map(|frame| frame.payload.len())
                .sum::<usize>()
    }

    pub(super) fn window(&self) -> usize {
        self.window
    }

    pub(super) fn check(&self) {
        assert!(self.frames.len() <= MAX_FRAMES);
        let on_its_way = |frame: &&Frame| frame.fate == Fate::OnItsWay;
        let bytes: usize = self
            .frames
            .iter()
            .filter(on_its_way)
            .map(|frame| frame.payload.len())
            .sum();
        assert_eq!(bytes, self.in_flight, "bytes in flight");
        assert!((self.floor..=MAX_WINDOW).contains(&self.window));
    }
}
