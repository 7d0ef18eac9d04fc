//! What talks over a link at either end: nobody in particular, or a session with one stream.

use std::time::Instant;

use virtproxy_engine::segment::{Cursor, Segment};
use virtproxy_mux::frame::MAX_CONTROL_FRAME;
use virtproxy_mux::{Config, Event, Session, StreamId, Transmit};

/// Bytes that are carried.
#[derive(Default)]
pub(crate) struct Payload {
    /// Where they come from and go to, walked through again and again; empty: they are left where they lie.
    memory: Vec<u8>,
    at: usize,
    to_send: usize,
    received: usize,
}

impl Payload {
    /// Bytes that are copied from and to so much memory.
    pub(crate) fn copied(len: usize) -> Self {
        Payload {
            memory: vec![1; len],
            ..Self::default()
        }
    }

    fn take(&mut self, cursor: &mut Cursor<'_, '_>, n: usize) {
        self.received += n;
        self.walk(n, |memory, n| match memory {
            Some(memory) => drop(cursor.read(memory)),
            None => cursor.advance(n),
        });
    }

    fn give(&mut self, cursor: &mut Cursor<'_, '_>, n: usize) {
        self.to_send -= n;
        self.walk(n, |memory, n| match memory {
            Some(memory) => cursor.write(memory),
            None => cursor.advance(n),
        });
    }

    fn walk(&mut self, n: usize, mut step: impl FnMut(Option<&mut [u8]>, usize)) {
        if self.memory.is_empty() {
            return step(None, n);
        }
        let mut left = n;
        while left > 0 {
            let piece = left.min(self.memory.len() - self.at);
            step(Some(&mut self.memory[self.at..self.at + piece]), piece);
            self.at = (self.at + piece) % self.memory.len();
            left -= piece;
        }
    }
}

/// One end of a link.
pub(crate) trait End: Send {
    /// Takes what the link received.
    fn on_bytes(&mut self, segments: &[Segment<'_>]);
    /// Fills what the link offers; returns how much of it.
    fn fill(&mut self, segments: &[Segment<'_>]) -> usize;
    /// So much more is to be sent.
    fn send_more(&mut self, bytes: usize);
    /// Bytes of payload that came so far.
    fn received(&self) -> usize;
    /// Whether payload may be sent.
    fn is_ready(&self) -> bool;
}

impl End for Payload {
    fn on_bytes(&mut self, segments: &[Segment<'_>]) {
        let mut cursor = Cursor::new(segments);
        let n = cursor.remaining();
        self.take(&mut cursor, n);
    }

    fn fill(&mut self, segments: &[Segment<'_>]) -> usize {
        let mut cursor = Cursor::new(segments);
        let n = cursor.remaining().min(self.to_send);
        self.give(&mut cursor, n);
        n
    }

    fn send_more(&mut self, bytes: usize) {
        self.to_send += bytes;
    }

    fn received(&self) -> usize {
        self.received
    }

    fn is_ready(&self) -> bool {
        true
    }
}

/// A session with one stream, called `bulk`, that one of the ends opens.
pub(crate) struct Mux {
    session: Session,
    started: Instant,
    opens: bool,
    stream: Option<StreamId>,
    payload: Payload,
}

impl Mux {
    pub(crate) fn new(opens: bool, payload: Payload) -> Self {
        Mux {
            session: Session::new(Config::default(), 1 + u64::from(opens)),
            started: Instant::now(),
            opens,
            stream: None,
            payload,
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap()
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Established(_) if self.opens => drop(self.session.open("bulk").unwrap()),
            Event::Asked { stream, .. } => {
                self.session.accept(stream);
                self.stream = Some(stream);
            }
            Event::Accepted(stream) => self.stream = Some(stream),
            Event::Established(_) | Event::RoundTrip(_) => {}
            event => panic!("{event:?}"),
        }
    }
}

impl End for Mux {
    fn on_bytes(&mut self, segments: &[Segment<'_>]) {
        let mut cursor = Cursor::new(segments);
        let mut glance = [0; 64];
        while cursor.remaining() > 0 {
            if let Some(payload) = self.session.payload() {
                let n = payload.remaining.min(cursor.remaining());
                self.payload.take(&mut cursor, n);
                self.session.payload_taken(n);
                self.session
                    .consumed(self.now(), payload.stream.unwrap(), n);
            } else {
                let n = cursor.peek(&mut glance);
                cursor.advance(self.session.handle_bytes(self.now(), &glance[..n]));
            }
            while let Some(event) = self.session.poll_event() {
                self.on_event(event);
            }
        }
    }

    fn fill(&mut self, segments: &[Segment<'_>]) -> usize {
        let mut cursor = Cursor::new(segments);
        let room = cursor.remaining();
        let mut control = [0; MAX_CONTROL_FRAME];
        while let Some(transmit) =
            self.session
                .poll_transmit(self.now(), cursor.remaining(), &mut control)
        {
            match transmit {
                Transmit::Control(len) => cursor.write(&control[..len]),
                Transmit::Data { stream, max } => {
                    let n = max.min(self.payload.to_send);
                    if n > 0 {
                        let envelope = self.session.sent(stream, n);
                        cursor.write(&envelope.header);
                        self.payload.give(&mut cursor, n);
                    }
                    if self.payload.to_send == 0 {
                        self.session.blocked(stream);
                    }
                }
            }
        }
        room - cursor.remaining()
    }

    fn send_more(&mut self, bytes: usize) {
        self.payload.send_more(bytes);
        if let Some(stream) = self.stream {
            self.session.set_readable(stream);
        }
    }

    fn received(&self) -> usize {
        self.payload.received
    }

    fn is_ready(&self) -> bool {
        self.stream.is_some()
    }
}
