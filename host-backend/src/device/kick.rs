//! The guest's kicks, heard by the engine's thread itself.
//!
//! # Theory of operation
//!
//! The library listens for each ring's kick on the data thread. A link that is woken from there pays for two changes of
//! thread where one is enough. So a link watches the eventfds of its two rings itself, on the reactor of the thread that
//! polls it: edge-triggered, so they are never read.
//!
//! ```text
//!                      no link, or not watching yet            a link is watching
//!   guest --eventfd--> data thread --Signal--> engine    guest --eventfd--> engine
//! ```
//!
//! The library's own registration stays, with no events in it while a link is watching. Nobody but the data thread changes
//! that: when it hears a kick for a ring whose link is watching, it passes it on and becomes deaf to that ring; when a link
//! is dropped it is poked, and listens again. What was written to the eventfd meanwhile is still in it. A ring that stops
//! and starts is registered anew by the library, and watched anew by its link (`Vring::kicks` counts).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::task::{Context, Poll};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use vhost_user_backend::VringT;

use super::port::Rings;
use super::vring::Vring;

/// The kicks of a link's two rings.
pub(super) struct Kicks([Kick; 2]);

struct Kick {
    ring: Vring,
    /// Which of the ring's eventfds is watched.
    seen: Option<u64>,
    watch: Option<AsyncFd<OwnedFd>>,
}

impl Kicks {
    pub(super) fn new(rings: &Rings) -> Self {
        let kick = |ring: &Vring| Kick {
            ring: ring.clone(),
            seen: None,
            watch: None,
        };
        Kicks([kick(&rings.to_guest), kick(&rings.from_guest)])
    }

    /// Watches what eventfds there are now. Whether both rings are watched. Panics outside a tokio runtime.
    pub(super) fn watch(&mut self) -> bool {
        let [to_guest, from_guest] = &mut self.0;
        to_guest.watch() & from_guest.watch()
    }

    /// Ready if a ring was kicked since the last time.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut kicked = Poll::Pending;
        for watch in self.0.iter().filter_map(|kick| kick.watch.as_ref()) {
            if let Poll::Ready(guard) = watch.poll_read_ready(cx) {
                // An error: the runtime is shutting down, and nothing will be ready any more.
                if let Ok(mut guard) = guard {
                    guard.clear_ready();
                }
                kicked = Poll::Ready(());
            }
        }
        kicked
    }
}

impl Kick {
    fn watch(&mut self) -> bool {
        let count = self.ring.kicks();
        if self.seen != Some(count) {
            self.watch = None;
            // Without descriptors to spare, kicks come the other way.
            self.watch = self.ring.kick().ok().flatten().and_then(|fd| {
                // SAFETY: it owns its descriptor, which is the same one for as long as it lives.
                unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.ok()
            });
            self.seen = Some(count);
        }
        self.watch.is_some()
    }
}

/// Makes the library's epoll instance hear the kicks of a ring that it has registered as `event`, or not.
pub(super) fn hear(epoll: &OwnedFd, ring: &Vring, event: u16, on: bool) -> io::Result<()> {
    let guard = ring.get_ref();
    let Some(kick) = guard.get_kick() else {
        return Ok(());
    };
    let mut event = libc::epoll_event {
        events: if on { libc::EPOLLIN.cast_unsigned() } else { 0 },
        u64: event.into(),
    };
    // SAFETY: both descriptors are open, the second one as long as `guard` is held, and `event` is a valid event.
    let result = unsafe {
        libc::epoll_ctl(
            epoll.as_raw_fd(),
            libc::EPOLL_CTL_MOD,
            kick.as_raw_fd(),
            &raw mut event,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
