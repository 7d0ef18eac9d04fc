//! What an idle stream costs a session: bytes of memory, counted by the allocator.

use std::alloc::System;

use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use virtproxy_mux::frame::MAX_CONTROL_FRAME;
use virtproxy_mux::{Config, Event, Session, Transmit};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const STREAMS: usize = 10_000;
/// What a stream may cost at one end, in bytes. A stream itself has 96; the table that finds it grows by doubling.
const LIMIT: usize = 128;

/// A session, and how many bytes it holds.
struct End {
    session: Session,
    bytes: usize,
}

impl End {
    fn new(epoch: u64) -> Self {
        End {
            session: Session::new(Config::default(), epoch),
            bytes: 0,
        }
    }

    /// Does something with the session, and counts what it allocates and frees.
    fn with<T>(&mut self, f: impl FnOnce(&mut Session) -> T) -> T {
        let before = ALLOCATOR.stats();
        let result = f(&mut self.session);
        let after = ALLOCATOR.stats();
        self.bytes += after.bytes_allocated - before.bytes_allocated;
        self.bytes -= after.bytes_deallocated - before.bytes_deallocated;
        result
    }

    /// Hands what it has to send to `peer`, which accepts every stream; whether there was anything.
    fn send(&mut self, peer: &mut End) -> bool {
        let mut frame = [0; MAX_CONTROL_FRAME];
        let transmit = self.with(|session| session.poll_transmit(0, 1 << 16, &mut frame));
        let len = match transmit {
            Some(Transmit::Control(len)) => len,
            Some(Transmit::Data { .. }) => panic!("nobody has data"),
            None => return false,
        };
        let mut rest = &frame[..len];
        while !rest.is_empty() {
            rest = &rest[peer.with(|session| session.handle_bytes(0, rest))..];
            // The name of the service that an event holds is freed here.
            peer.with(|session| {
                while let Some(event) = session.poll_event() {
                    if let Event::Asked { stream, .. } = event {
                        session.accept(stream);
                    }
                }
            });
        }
        true
    }
}

#[test]
fn an_idle_stream_is_small_at_both_ends() {
    let [mut near, mut far] = [End::new(1), End::new(2)];
    let settle = |near: &mut End, far: &mut End| while near.send(far) | far.send(near) {};
    settle(&mut near, &mut far);
    let before = [near.bytes, far.bytes];
    for _ in 0..STREAMS {
        near.with(|session| session.open("service").unwrap());
        settle(&mut near, &mut far);
    }
    assert_eq!(
        [near.session.streams(), far.session.streams()],
        [STREAMS; 2]
    );
    for (end, before) in [near, far].iter().zip(before) {
        let each = (end.bytes - before) / STREAMS;
        println!("an idle stream holds {each} bytes");
        assert!(each <= LIMIT, "an idle stream holds {each} bytes");
    }
}
