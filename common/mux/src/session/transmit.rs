//! Output: which frame goes next.

use super::{Envelope, Session, State, Time, Transmit};
use crate::frame::{HEADER_LEN, Header, MAX_CONTROL_FRAME, Writer, kind};
use crate::reason::Reason;
use crate::seal::SEAL_LEN;
use crate::stream::{Note, Phase, Stream, StreamId};

/// The least data worth a frame of its own, in bytes.
const MIN_DATA: usize = 1024;
/// Payload of a padding frame, in bytes: it fits wherever a control frame does.
const MAX_PADDING: usize = MAX_CONTROL_FRAME - HEADER_LEN - SEAL_LEN;

impl Session {
    /// The next frame to send, if there is one that fits in `room` bytes. Control frames are written to `buf`, which
    /// holds at least [`MAX_CONTROL_FRAME`] bytes.
    ///
    /// A control frame is only made where [`MAX_CONTROL_FRAME`] bytes fit, and data only where 1024 bytes of it do, so
    /// that a link that is nearly full is not fed crumbs.
    pub fn poll_transmit(&mut self, now: Time, room: usize, buf: &mut [u8]) -> Option<Transmit> {
        if self.owes_control() || self.owes_session_credit() {
            if room < MAX_CONTROL_FRAME {
                return None;
            }
            if let Some(len) = self.handshake(buf) {
                return Some(Transmit::Control(len));
            }
            let frame = self.session_frame(now, buf);
            if let Some(len) = frame.or_else(|| self.stream_frames(buf)) {
                return Some(Transmit::Control(self.seal(buf, len)));
            }
        }
        self.data_turn(room).or_else(|| self.padding(room, buf))
    }

    /// Puts its seal behind the frame of `len` bytes at the front of `buf`; returns how long it is now.
    fn seal(&mut self, buf: &mut [u8], len: usize) -> usize {
        match self.next_seal(len) {
            Some(seal) => {
                buf[len..len + SEAL_LEN].copy_from_slice(&seal);
                len + SEAL_LEN
            }
            None => len,
        }
    }

    /// The seal of the frame that is sent now, of `len` bytes, if it gets one.
    fn next_seal(&mut self, len: usize) -> Option<[u8; SEAL_LEN]> {
        let sealing = self.sealing.as_mut()?;
        self.owed.padding = self.owed.padding.saturating_sub(len + SEAL_LEN);
        Some(sealing.sending.next_seal())
    }

    /// A frame that means nothing, if a peer that may have lost bytes waits for more and there is nothing better.
    fn padding(&mut self, room: usize, buf: &mut [u8]) -> Option<Transmit> {
        if self.owed.padding == 0 || room < MAX_CONTROL_FRAME {
            return None;
        }
        let frame = Writer::new(buf, kind::PADDING, 0);
        let len = frame.bytes(&[0; MAX_PADDING]).finish();
        Some(Transmit::Control(self.seal(buf, len)))
    }

    fn data_turn(&mut self, room: usize) -> Option<Transmit> {
        let max_frame = self.peer()?.max_frame as usize;
        let room = room.checked_sub(HEADER_LEN + self.seal_len())?;
        if room < MIN_DATA || self.send.bytes() == 0 {
            return None;
        }
        let (id, turn) = self.schedule.next(&mut self.streams)?;
        let max = room
            .min(max_frame)
            .min(turn.min(self.send.bytes()) as usize);
        Some(Transmit::Data { stream: id, max })
    }

    /// See [`Session::sent`].
    pub(super) fn account_sent(&mut self, id: StreamId, n: usize) -> Envelope {
        let len = u32::try_from(n).expect("no longer than a frame");
        self.send.spend(len).expect("within the session's credit");
        self.stats.data_sent += u64::from(len);
        // It can only lose its right to send, which the schedule sees by itself.
        if let Some(stream) = self.streams.get_mut(id) {
            stream.send.spend(len).expect("within the stream's credit");
            self.schedule.spent(stream, len);
        }
        let header = Header {
            kind: kind::DATA,
            len,
            stream: id.address().to_wire(),
        };
        Envelope {
            header: header.encode(),
            seal: self.next_seal(HEADER_LEN + n),
        }
    }

    pub(super) fn owes_session_credit(&self) -> bool {
        self.state == State::Established
            && self.receive.returnable >= self.config.session_window / 4
    }

    /// A frame that the session itself owes.
    fn session_frame(&mut self, now: Time, buf: &mut [u8]) -> Option<usize> {
        if let Some(token) = self.owed.pong.take() {
            return Some(token_frame(buf, kind::PONG, token));
        }
        if core::mem::take(&mut self.owed.ping) {
            self.ping_token = self.ping_token.wrapping_add(1);
            self.ping_sent = Some(now);
            self.streams.fence();
            return Some(token_frame(buf, kind::PING, self.ping_token));
        }
        if let Some((reason, text)) = self.owed.goaway.take() {
            return Some(reason_frame(buf, kind::GOAWAY, 0, reason, &text));
        }
        if self.owes_session_credit() {
            let bytes = core::mem::take(&mut self.receive.returnable);
            self.receive.granted.add(bytes).expect("within the window");
            return Some(credit_frame(buf, kind::SESSION_CREDIT, 0, bytes));
        }
        None
    }

    /// A frame that a stream owes.
    fn stream_frames(&mut self, buf: &mut [u8]) -> Option<usize> {
        while let Some(id) = self.control.front().copied() {
            match self.with(id, |stream, _| stream_frame(stream, buf)) {
                Some(Some(len)) => return Some(len),
                Some(None) | None => {
                    self.control.pop_front();
                }
            }
        }
        None
    }
}

/// The next control frame a stream owes, in the order the peer must see them; `None` when it owes no more.
fn stream_frame(stream: &mut Stream, buf: &mut [u8]) -> Option<usize> {
    use core::mem::take;
    let wire = stream.id.address().to_wire();
    let window = stream.receive.window;
    if take(&mut stream.owed.open) {
        debug_assert_eq!(stream.phase, Phase::Opening);
        let frame = Writer::new(buf, kind::OPEN, wire).bytes(&window.to_le_bytes());
        return match stream.note.take() {
            Some(Note::Service(name)) => Some(frame.bytes(&name).finish()),
            _ => None,
        };
    }
    if take(&mut stream.owed.accept) {
        return Some(credit_frame(buf, kind::ACCEPT, wire, window));
    }
    if take(&mut stream.owed.credit) {
        let bytes = take(&mut stream.receive.returnable);
        stream
            .receive
            .granted
            .add(bytes)
            .expect("within the window");
        return Some(credit_frame(buf, kind::CREDIT, wire, bytes));
    }
    if take(&mut stream.owed.fin) {
        return Some(Writer::new(buf, kind::FIN, wire).finish());
    }
    let (refuse, reset) = (take(&mut stream.owed.refuse), take(&mut stream.owed.reset));
    let last = match (refuse, reset) {
        (true, _) => kind::REFUSE,
        (_, true) => kind::RESET,
        _ => {
            stream.in_control = false;
            return None;
        }
    };
    match stream.note.take() {
        Some(Note::Why(reason, text)) => Some(reason_frame(buf, last, wire, reason, &text)),
        _ => Some(reason_frame(buf, last, wire, Reason::Cancelled, "")),
    }
}

fn credit_frame(buf: &mut [u8], kind: u8, stream: u32, bytes: u32) -> usize {
    Writer::new(buf, kind, stream)
        .bytes(&bytes.to_le_bytes())
        .finish()
}

fn token_frame(buf: &mut [u8], kind: u8, token: u64) -> usize {
    Writer::new(buf, kind, 0)
        .bytes(&token.to_le_bytes())
        .finish()
}

fn reason_frame(buf: &mut [u8], kind: u8, stream: u32, reason: Reason, text: &str) -> usize {
    Writer::new(buf, kind, stream)
        .bytes(&reason.code().to_le_bytes())
        .bytes(text.as_bytes())
        .finish()
}
