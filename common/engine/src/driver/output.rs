//! Output: frames of the session and bytes of the local sockets go to the link.

use tracing::trace;
use virtproxy_mux::frame::{HEADER_LEN, MAX_CONTROL_FRAME};
use virtproxy_mux::{StreamId, Transmit};

use super::Driver;
use super::local::Read;
use crate::segment::{Cursor, Segment};

impl Driver {
    /// Fills `segments` from the front with whole frames; returns the bytes written.
    pub(super) fn fill(&mut self, segments: &[Segment<'_>]) -> usize {
        let mut cursor = Cursor::new(segments);
        let room = cursor.remaining();
        let mut control = [0; MAX_CONTROL_FRAME];
        while let Some(transmit) =
            self.session
                .poll_transmit(self.now(), cursor.remaining(), &mut control)
        {
            match transmit {
                Transmit::Control(len) => cursor.write(&control[..len]),
                Transmit::Data { stream, max } => self.data(stream, max, &mut cursor),
            }
        }
        let filled = room - cursor.remaining();
        self.counters.link_sent.add(filled as u64);
        filled
    }

    /// Reads up to `max` bytes of a stream into the room behind its header.
    fn data(&mut self, stream: StreamId, max: usize, cursor: &mut Cursor<'_, '_>) {
        let Some(key) = self.key_of(stream) else {
            return self.session.blocked(stream);
        };
        let local = &mut self.locals[key];
        let mut payload = cursor.clone();
        payload.advance(HEADER_LEN);
        match local.read(&payload, max) {
            Ok(Read::Bytes(n)) => {
                let more = local.readable;
                trace!(%stream, hop = "socket-to-channel", bytes = n);
                let envelope = self.session.sent(stream, n);
                cursor.write(&envelope.header);
                cursor.advance(n);
                if let Some(seal) = envelope.seal {
                    cursor.write(&seal);
                }
                if !more {
                    self.session.blocked(stream);
                }
            }
            Ok(Read::Blocked) => self.session.blocked(stream),
            Ok(Read::End) => {
                self.session.finish(stream);
                self.settle(key, stream);
            }
            Err(error) => self.broken(stream, &error),
        }
    }
}
