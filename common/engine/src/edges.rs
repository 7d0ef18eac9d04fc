//! An epoll instance of one's own, watched by tokio as one descriptor.
//!
//! tokio gives each descriptor that it watches a registration and remembers a hang-up for good. Where many
//! sockets belong to one task, or where a hang-up comes and goes, an own, edge-triggered epoll instance does
//! better: it is one registration, is readable while it has events, and never hangs up.
//!
//! ```text
//!     descriptors --edge-triggered--> own epoll --readable--> tokio's epoll --> the task
//! ```

use std::io;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use mio::{Events, Registry};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// See the [module](self).
pub struct Edges {
    epoll: AsyncFd<mio::Poll>,
}

impl Edges {
    /// Watches nothing yet. Panics outside a tokio runtime.
    pub fn new() -> io::Result<Self> {
        let epoll = mio::Poll::new()?;
        // SAFETY: `mio::Poll` owns its descriptor, which is the same one for as long as it lives.
        let epoll = unsafe {
            AsyncFd::register_with_interest(epoll, Interest::READABLE)
                .map_err(|error| error.into_parts().1)?
        };
        Ok(Edges { epoll })
    }

    /// Where descriptors are registered.
    pub fn registry(&self) -> &Registry {
        self.epoll.get_ref().registry()
    }

    /// Ready once there may be events since the last time; [`Edges::take`] then gets them.
    pub fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        // An error: the runtime is shutting down, and nothing will be ready any more.
        if let Ok(mut guard) = ready!(self.epoll.poll_read_ready(cx)) {
            guard.clear_ready();
        }
        Poll::Ready(())
    }

    /// Takes the events there are, as many as fit; if `events` is full there may be more.
    pub fn take(&mut self, events: &mut Events) -> io::Result<()> {
        loop {
            match self.epoll.get_mut().poll(events, Some(Duration::ZERO)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}
