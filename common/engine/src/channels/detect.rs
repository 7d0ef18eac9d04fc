//! Finds out whether a serial line lies behind a socket.
//!
//! QEMU's chardev socket says nothing of the device behind it. A `virtserialport` keeps what it is given, and the other
//! end speaks bare frames; a 16550 port loses bytes, and the other end (`isa-serial-open`) speaks the link layer. So
//! every link starts bare, and what arrives is looked at, until one of two handshakes is there:
//!
//! * the session's: the link stays as it is, and nothing is looked at any more;
//! * the link layer's: this link ends, and the next one is the link layer over the same socket.
//!
//! To the other end of a serial line, the bare handshake is noise, which makes it say who it is (see
//! `virtproxy_link::endpoint`).

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll};

use tracing::info;
use virtproxy_link::Deframer;
use virtproxy_mux::Hello as SessionHello;
use virtproxy_mux::hello::MAX_HELLO_LEN;

use crate::channel::{BoxFuture, Channel, Link, Needs, Progress, Sink, Source};
use crate::lossy_link::LossyLink;
use crate::segment::Cursor;

/// A socket that turned out to be a serial line, on its way to the next link.
type Line = Rc<Cell<Option<Box<dyn Link>>>>;

/// A channel whose other end may be one of a serial line.
pub(super) struct Detecting {
    inner: Box<dyn Channel>,
    line: Line,
}

impl Detecting {
    pub(super) fn over(inner: Box<dyn Channel>) -> Box<dyn Channel> {
        Box::new(Detecting {
            inner,
            line: Line::default(),
        })
    }
}

impl Channel for Detecting {
    fn open(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Link>>> {
        Box::pin(async {
            if let Some(line) = self.line.take() {
                info!(
                    channel = self.name(),
                    "a serial line: the link layer is used"
                );
                return Ok(Box::new(LossyLink::new(line, None)?) as Box<dyn Link>);
            }
            Ok(Box::new(Undecided {
                inner: Some(self.inner.open().await?),
                watch: Some(Watch::default()),
                line: self.line.clone(),
            }) as Box<dyn Link>)
        })
    }

    fn carried(&mut self) {
        self.inner.carried();
    }

    fn name(&self) -> &str {
        self.inner.name()
    }
}

/// A bare link, as long as nothing else is known.
struct Undecided {
    /// There until the end.
    inner: Option<Box<dyn Link>>,
    /// Gone once the session's handshake was seen.
    watch: Option<Watch>,
    line: Line,
}

impl Undecided {
    fn inner(&mut self) -> &mut dyn Link {
        &mut **self.inner.as_mut().expect("there until the end")
    }
}

impl Link for Undecided {
    fn needs(&self) -> Needs {
        self.inner
            .as_ref()
            .map(|inner| inner.needs())
            .unwrap_or_default()
    }

    fn min_room(&self) -> usize {
        self.inner.as_ref().map_or(0, |inner| inner.min_room())
    }

    fn receive(&mut self, sink: &mut Sink<'_>) -> io::Result<Progress> {
        let Some(mut watch) = self.watch.take() else {
            return self.inner().receive(sink);
        };
        let progress = self.inner().receive(&mut |segments| {
            watch.look(Cursor::new(segments));
            sink(segments);
        })?;
        match watch.seen {
            Some(Kind::Bare) => {}
            Some(Kind::Line) => {
                self.line.set(self.inner.take());
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the other end speaks the link layer",
                ));
            }
            None => self.watch = Some(watch),
        }
        Ok(progress)
    }

    fn send(&mut self, source: &mut Source<'_>) -> io::Result<Progress> {
        self.inner().send(source)
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.inner().poll_ready(cx)
    }
}

/// What lies behind the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Bare,
    Line,
}

/// Looks for the first handshake of either kind.
#[derive(Default)]
struct Watch {
    deframer: Deframer,
    /// The last bytes, in which a session's handshake may have begun.
    tail: Vec<u8>,
    seen: Option<Kind>,
}

impl Watch {
    fn look(&mut self, mut cursor: Cursor<'_, '_>) {
        let old = self.tail.len();
        self.tail.resize(old + cursor.remaining(), 0);
        cursor.read(&mut self.tail[old..]);
        let mut new = &self.tail[old..];
        while !new.is_empty() {
            if let Some(Some(frame)) = self.deframer.next(&mut new)
                && virtproxy_link::Hello::decode(frame).is_some()
            {
                self.seen = Some(Kind::Line);
                return;
            }
        }
        if SessionHello::find(&self.tail).is_some() {
            self.seen = Some(Kind::Bare);
        }
        let excess = self.tail.len().saturating_sub(MAX_HELLO_LEN);
        self.tail.drain(..excess);
    }
}

#[cfg(test)]
mod tests;
