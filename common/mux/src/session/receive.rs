//! Input: from bytes to events, data and credit.

use alloc::string::String;

use super::{Event, Expect, Payload, Session, State, Time, end_receiving};
use crate::frame::{
    HEADER_LEN, Header, IGNORABLE, MAX_CONTROL_PAYLOAD, MAX_SERVICE_LEN, MAX_TEXT_LEN, kind,
    split_u16, split_u32, valid_service_name,
};
use crate::hello::printable;
use crate::reason::{End, Reason, Violation};
use crate::seal::SEAL_LEN;
use crate::stream::{Address, Half, Phase, Stream, StreamId};

/// How many round trips a whole window may take for it to count as what holds the stream back.
const GROWTH_ROUND_TRIPS: Time = 4;
/// Taken for the round trip until one is measured, in microseconds.
const UNKNOWN_ROUND_TRIP: Time = 5_000;

/// What became of the bytes at the front of the input.
pub(super) enum Taken {
    /// So many of them were a header, or a whole control frame.
    Whole(usize),
    /// Nothing yet: so many must be there first.
    Needs(usize),
}

impl Session {
    /// The length of the payload that comes next in the input, if its seal must be seen first.
    pub fn unverified(&self) -> Option<usize> {
        match self.expect {
            Expect::Unverified(header) => Some(header.len as usize),
            _ => None,
        }
    }

    /// The seal behind the payload that [`Session::unverified`] announced. If it is right, the payload comes next.
    ///
    /// # Panics
    /// If none was announced.
    pub fn verify(&mut self, seal: [u8; SEAL_LEN]) {
        let Expect::Unverified(header) = self.expect else {
            panic!("no payload to verify");
        };
        let sound = self.check_seal(seal);
        if let Err(end) = sound.and_then(|()| self.bulk(header).map_err(End::Violation)) {
            self.fail(end);
        }
    }

    /// The data that comes next in the input, if data comes next.
    pub fn payload(&self) -> Option<Payload> {
        match self.expect {
            Expect::Frame | Expect::Unverified(_) => None,
            Expect::Data(id, remaining) => Some(Payload {
                stream: Some(id),
                remaining,
            }),
            Expect::Skip(remaining) => Some(Payload {
                stream: None,
                remaining,
            }),
        }
    }

    /// The driver took `n` bytes of the data that [`Session::payload`] announced.
    ///
    /// # Panics
    /// If that is more than was announced.
    pub fn payload_taken(&mut self, n: usize) {
        let Some(payload) = self.payload() else {
            assert_eq!(n, 0, "no payload was announced");
            return;
        };
        let left = payload
            .remaining
            .checked_sub(n)
            .expect("more than was announced");
        self.expect = match (payload.stream, left) {
            (Some(_), 0) if self.sealing.is_some() => Expect::Skip(SEAL_LEN),
            (_, 0) => Expect::Frame,
            (Some(id), left) => Expect::Data(id, left),
            (None, left) => Expect::Skip(left),
        };
    }

    /// Uses bytes from the front of `bytes` and returns how many. It stops early, at a frame's end, when there are
    /// events to take or data comes next. An ended session uses none.
    pub fn handle_bytes(&mut self, now: Time, bytes: &[u8]) -> usize {
        let mut used = 0;
        while used < bytes.len() && self.events.is_empty() && self.expect == Expect::Frame {
            used += match self.state {
                State::Seeking => self.seek(&bytes[used..]),
                State::Established => self.gather(now, &bytes[used..]),
                State::Ended => break,
            };
        }
        used
    }

    /// Takes a header or a control frame, or the part of it that is here; returns the bytes used. What is not whole is
    /// gathered, and no other frame is copied.
    fn gather(&mut self, now: Time, bytes: &[u8]) -> usize {
        if self.partial.is_empty() {
            return match self.take(now, bytes) {
                Ok(Taken::Whole(n)) => n,
                Ok(Taken::Needs(_)) => {
                    self.partial.extend_from_slice(bytes);
                    bytes.len()
                }
                Err(end) => {
                    self.fail(end);
                    0
                }
            };
        }
        let mut frame = core::mem::take(&mut self.partial);
        let mut used = 0;
        loop {
            match self.take(now, &frame) {
                Ok(Taken::Needs(need)) => {
                    let n = (need - frame.len()).min(bytes.len() - used);
                    if n == 0 {
                        break;
                    }
                    frame.extend_from_slice(&bytes[used..used + n]);
                    used += n;
                }
                taken => {
                    frame.clear();
                    if let Err(end) = taken {
                        self.fail(end);
                    }
                    break;
                }
            }
        }
        self.partial = frame;
        used
    }

    /// Takes the header or the control frame at the front of `bytes`, if it is whole.
    fn take(&mut self, now: Time, bytes: &[u8]) -> Result<Taken, End> {
        if bytes.first() == Some(&kind::HELLO) {
            return self.hello_again(bytes).map_err(|bad| self.blame(bad));
        }
        let Some(head) = bytes.first_chunk() else {
            return Ok(Taken::Needs(HEADER_LEN));
        };
        let header = Header::decode(*head);
        if header.kind == kind::FILLER {
            self.end(End::PeerRestarted);
            return Ok(Taken::Whole(HEADER_LEN));
        }
        if self.is_bulk(header).map_err(|bad| self.blame(bad))? {
            if self.sealing.is_some() {
                self.expect = Expect::Unverified(header);
            } else {
                self.bulk(header).map_err(End::Violation)?;
            }
            return Ok(Taken::Whole(HEADER_LEN));
        }
        let len = HEADER_LEN + header.len as usize;
        let need = len + self.seal_len();
        let Some(frame) = bytes.get(..need) else {
            return Ok(Taken::Needs(need));
        };
        let (frame, seal) = frame.split_at(len);
        if let Some(seal) = seal.first_chunk() {
            self.check_seal(*seal)?;
        }
        let done = self.frame(now, header, &frame[HEADER_LEN..]);
        done.map(|()| Taken::Whole(need)).map_err(End::Violation)
    }

    /// Whose fault it is that something that no seal vouches for is wrong.
    fn blame(&self, violation: Violation) -> End {
        match self.sealing {
            Some(_) => End::Damaged,
            None => End::Violation(violation),
        }
    }

    /// Checks the seal of the frame that has arrived.
    fn check_seal(&mut self, seal: [u8; SEAL_LEN]) -> Result<(), End> {
        let next = self
            .sealing
            .as_mut()
            .map(|sealing| sealing.receiving.next_seal());
        match next.is_none_or(|next| next == seal) {
            true => Ok(()),
            false => Err(End::Damaged),
        }
    }

    /// Whether the payload behind a header is one that does not go through the session.
    fn is_bulk(&self, header: Header) -> Result<bool, Violation> {
        header.check()?;
        let bulk = header.kind == kind::DATA || header.kind & IGNORABLE != 0;
        if bulk && header.len > self.config.max_frame {
            return Err(match header.kind {
                kind::DATA => Violation::CreditOverdrawn,
                kind => Violation::BadLength {
                    kind,
                    len: header.len,
                },
            });
        }
        debug_assert!(bulk || header.len as usize <= MAX_CONTROL_PAYLOAD);
        Ok(bulk)
    }

    /// Decides what becomes of a payload that does not go through the session.
    fn bulk(&mut self, header: Header) -> Result<(), Violation> {
        self.expect = match header.len as usize + self.seal_len() {
            0 => Expect::Frame,
            len => Expect::Skip(len),
        };
        match header.kind {
            kind::DATA => self.data(header),
            _ => Ok(()),
        }
    }

    /// Accounts for a data frame whose payload comes next.
    fn data(&mut self, header: Header) -> Result<(), Violation> {
        let (at, len) = (Address::from_wire(header.stream), header.len);
        self.receive
            .granted
            .spend(len)
            .map_err(|_| Violation::CreditOverdrawn)?;
        self.receive.returnable += len;
        self.stats.data_received += u64::from(len);
        // It changes neither what the stream owes nor what it may send: so no `with`, which would look.
        match self.streams.at_mut(at) {
            Some(stream) if stream.phase == Phase::Open && stream.receiving == Half::Open => {
                let granted = &mut stream.receive.granted;
                let spent = granted.spend(len);
                spent.map_err(|_| Violation::CreditOverdrawn)?;
                stream.receive.held += len;
                self.expect = Expect::Data(stream.id, len as usize);
            }
            Some(stream) if stream.phase != Phase::Closing => {
                return Err(Violation::Unexpected(kind::DATA));
            }
            Some(_) | None => self.stats.late_frames += 1,
        }
        Ok(())
    }

    /// The stream a frame is for, if it lives; counts frames that come too late.
    fn live(
        &mut self,
        handled: Option<(StreamId, Result<bool, Violation>)>,
    ) -> Result<Option<StreamId>, Violation> {
        let live = match handled {
            Some((id, result)) => result?.then_some(id),
            None => None,
        };
        self.stats.late_frames += u64::from(live.is_none());
        Ok(live)
    }

    fn fin(&mut self, at: Address) -> Result<(), Violation> {
        let finished = self.with_at(at, |stream, committed| {
            match (stream.phase, stream.receiving) {
                (Phase::Open, Half::Open) => {
                    end_receiving(stream, committed);
                    stream.owed.credit = false;
                    Ok(true)
                }
                (Phase::Closing, _) => {
                    // The peer has both FINs: for it the stream is over, and it may open another in the slot.
                    stream.owed.reset &= stream.sending == Half::Open;
                    Ok(false)
                }
                _ => Err(Violation::Unexpected(kind::FIN)),
            }
        });
        if let Some(id) = self.live(finished)? {
            self.events.push_back(Event::Finished(id));
        }
        Ok(())
    }

    /// A control frame is complete and sound.
    fn frame(&mut self, now: Time, header: Header, payload: &[u8]) -> Result<(), Violation> {
        let at = Address::from_wire(header.stream);
        let short = Violation::BadLength {
            kind: header.kind,
            len: header.len,
        };
        match header.kind {
            kind::OPEN => {
                let (window, name) = split_u32(payload).ok_or(short)?;
                self.asked(at, window, name)
            }
            kind::ACCEPT => {
                let (window, _) = split_u32(payload).ok_or(short)?;
                self.accepted(at, window)
            }
            kind::REFUSE | kind::RESET => {
                let (code, text) = split_u16(payload).ok_or(short)?;
                let reason = Reason::from_code(code);
                self.over(at, header.kind, reason, printable(text, MAX_TEXT_LEN))
            }
            kind::FIN => self.fin(at),
            kind::CREDIT => {
                let (bytes, _) = split_u32(payload).ok_or(short)?;
                let added = self.with_at(at, |stream, _| match stream.phase {
                    Phase::Open => {
                        let sum = stream.send.add(bytes);
                        sum.map_err(|_| Violation::CreditOverflow).map(|()| true)
                    }
                    Phase::Closing => Ok(false),
                    Phase::Opening | Phase::Asked => Err(Violation::Unexpected(kind::CREDIT)),
                });
                self.live(added).map(|_| ())
            }
            kind::SESSION_CREDIT => {
                let (bytes, _) = split_u32(payload).ok_or(short)?;
                self.send.add(bytes).map_err(|_| Violation::CreditOverflow)
            }
            kind::PING | kind::PONG => {
                let token = payload.first_chunk().ok_or(short)?;
                self.token(now, header.kind, u64::from_le_bytes(*token));
                Ok(())
            }
            kind::GOAWAY => {
                let (code, text) = split_u16(payload).ok_or(short)?;
                let reason = Reason::from_code(code);
                let text = printable(text, MAX_TEXT_LEN);
                self.goes_away(reason, text);
                Ok(())
            }
            other => Err(Violation::Unexpected(other)),
        }
    }

    fn asked(&mut self, at: Address, window: u32, name: &[u8]) -> Result<(), Violation> {
        if !at.peer_opened() || at.slot() >= self.config.max_streams {
            return Err(Violation::BadOpen);
        }
        if name.len() > MAX_SERVICE_LEN || !valid_service_name(name) {
            return Err(Violation::BadServiceName);
        }
        let id = self.streams.name(at);
        let mut stream = Stream::new(id, Phase::Asked);
        stream
            .send
            .add(window)
            .map_err(|_| Violation::CreditOverflow)?;
        let window = self.first_window();
        self.admit(stream, window.unwrap_or(0))
            .ok_or(Violation::BadOpen)?;
        if window.is_none() {
            self.stats.memory_refused += 1;
            self.refuse(id, Reason::Limit, "too much lies unread");
            return Ok(());
        }
        if self.going_away {
            self.refuse(id, Reason::ShuttingDown, "");
            return Ok(());
        }
        let service = String::from_utf8_lossy(name).into_owned();
        self.events.push_back(Event::Asked {
            stream: id,
            service,
        });
        Ok(())
    }

    fn accepted(&mut self, at: Address, window: u32) -> Result<(), Violation> {
        let accepted = self.with_at(at, |stream, _| match stream.phase {
            Phase::Opening if !stream.owed.open => {
                stream.phase = Phase::Open;
                stream
                    .send
                    .add(window)
                    .map_err(|_| Violation::CreditOverflow)?;
                Ok(true)
            }
            Phase::Closing => Ok(false),
            _ => Err(Violation::Unexpected(kind::ACCEPT)),
        });
        if let Some(id) = self.live(accepted)? {
            self.events.push_back(Event::Accepted(id));
        }
        Ok(())
    }

    /// A REFUSE or RESET: the stream is gone, whatever it still owed.
    fn over(
        &mut self,
        at: Address,
        kind: u8,
        reason: Reason,
        text: String,
    ) -> Result<(), Violation> {
        let told = self.with_at(at, |stream, committed| {
            let (phase, unsent) = (stream.phase, stream.owed.open);
            let allowed = match kind {
                kind::REFUSE => !at.peer_opened() && phase != Phase::Open,
                _ => true,
            };
            if !allowed || (phase == Phase::Opening && unsent) {
                return Err(Violation::Unexpected(kind));
            }
            super::close(stream, committed);
            Ok(phase != Phase::Closing)
        });
        let Some(stream) = self.live(told)? else {
            return Ok(());
        };
        self.events.push_back(match kind {
            kind::REFUSE => Event::Refused {
                stream,
                reason,
                text,
            },
            _ => Event::Reset {
                stream,
                reason,
                text,
            },
        });
        Ok(())
    }

    fn token(&mut self, now: Time, kind: u8, token: u64) {
        if kind == kind::PING {
            self.owed.pong = Some(token);
        } else if let (Some(sent), true) = (self.ping_sent, token == self.ping_token) {
            let round_trip = now.saturating_sub(sent).max(1);
            self.ping_sent = None;
            self.round_trip = Some(round_trip);
            self.streams.fence_passed();
            self.fence();
            self.events.push_back(Event::RoundTrip(round_trip));
        }
    }

    fn goes_away(&mut self, reason: Reason, text: String) {
        if reason == Reason::ShuttingDown {
            self.going_away = true;
            if core::mem::replace(&mut self.peer_going_away, true) {
                return;
            }
            self.events.push_back(Event::GoingAway { reason, text });
        } else {
            self.end(End::PeerAborted(reason));
        }
    }

    /// Ends the session for what arrived, and tells the peer if that is to blame.
    fn fail(&mut self, end: End) {
        let farewell = match &end {
            End::Violation(violation) => Some(alloc::format!("{violation}")),
            _ => None,
        };
        self.end(end);
        self.owed.goaway = farewell.map(|text| (Reason::ProtocolError, text.into()));
    }

    pub(super) fn end(&mut self, end: End) {
        self.state = State::Ended;
        self.expect = Expect::Frame;
        self.partial.clear();
        let unused = |stream: &Stream| match stream.exposure() {
            0 => 0,
            window => window - u64::from(stream.receive.held),
        };
        self.committed -= self.streams.iter().map(unused).sum::<u64>();
        self.streams.clear();
        self.control.clear();
        self.owed = super::Owed::default();
        self.events.push_back(Event::Ended(end));
    }

    /// See [`Session::consumed`].
    pub(super) fn return_credit(&mut self, now: Time, id: StreamId, n: usize) {
        let n = u32::try_from(n).unwrap_or(u32::MAX);
        let round_trip = self.round_trip.unwrap_or(UNKNOWN_ROUND_TRIP);
        let max_window = self.config.max_window;
        let pool = self.pool();
        let mut denied = false;
        let counted = self.with(id, |stream, committed| {
            if stream.receiving == Half::Ended {
                return false;
            }
            let receive = &mut stream.receive;
            debug_assert!(n <= receive.held, "consumed more than was held");
            let n = n.min(receive.held);
            receive.held -= n;
            receive.returnable += n;
            receive.measured += n;
            if receive.measured >= receive.window {
                let fast = now.saturating_sub(receive.since) <= GROWTH_ROUND_TRIPS * round_trip;
                let drained = receive.held < receive.window / 2;
                let growth = receive
                    .window
                    .min(max_window - receive.window.min(max_window));
                let affordable = u64::from(growth) * 4 <= pool;
                denied = fast && drained && !affordable;
                if fast && drained && affordable {
                    receive.window += growth;
                    receive.returnable += growth;
                    *committed += u64::from(growth);
                }
                (receive.measured, receive.since) = (0, now);
            }
            stream.owed.credit |= receive.returnable >= receive.window / 2;
            true
        });
        self.stats.growth_denied += u64::from(denied);
        if counted != Some(true) {
            self.committed = self.committed.saturating_sub(u64::from(n));
        }
    }
}
