//! A pipe in memory with two ends, as every contestant gets it: a bounded queue of blocks each way, used anew for ever.
//!
//! It can be used in two ways: through the traits of tokio and of futures, which copy, or by borrowing its memory, as a
//! virtqueue lends that of a guest.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes of a block.
const BLOCK: usize = 64 * 1024;
/// Blocks each way.
const BLOCKS: usize = 4;
/// A block with less room than that is passed on as it is to a writer who borrows: it wants room for a frame.
const LEAST_LENT: usize = 4 * 1024;

/// One end. Its read side ends when the other end is dropped.
pub(crate) struct Pipe {
    incoming: Rc<RefCell<Way>>,
    outgoing: Rc<RefCell<Way>>,
}

/// One direction.
struct Way {
    /// Those with bytes, oldest first; only the last one is still being filled.
    full: VecDeque<Block>,
    empty: Vec<Block>,
    /// Its writer is gone.
    ended: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

struct Block {
    bytes: Box<[u8]>,
    read: usize,
    written: usize,
}

/// Two ends of a new pipe.
pub(crate) fn pair() -> (Pipe, Pipe) {
    let (a, b) = (Way::new(), Way::new());
    let near = Pipe {
        incoming: a.clone(),
        outgoing: b.clone(),
    };
    let far = Pipe {
        incoming: b,
        outgoing: a,
    };
    (near, far)
}

impl Pipe {
    /// Lends `take` what has arrived, as far as it lies together; it returns how much of it is done with. Ready with 0 at
    /// the end.
    pub(crate) fn poll_receive(
        &self,
        cx: &mut Context<'_>,
        take: impl FnOnce(&[u8]) -> usize,
    ) -> Poll<usize> {
        let mut way = self.incoming.borrow_mut();
        let Some(block) = way.full.front_mut() else {
            if way.ended {
                return Poll::Ready(0);
            }
            way.reader = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let n = take(&block.bytes[block.read..block.written]);
        block.read += n;
        if block.read == block.written {
            way.recycle();
        }
        if let Some(writer) = way.writer.take() {
            writer.wake();
        }
        Poll::Ready(n)
    }

    /// Lends `fill` at least `least` bytes of room; it returns how much of it is written.
    fn poll_room(
        &self,
        cx: &mut Context<'_>,
        least: usize,
        fill: impl FnOnce(&mut [u8]) -> usize,
    ) -> Poll<usize> {
        let mut way = self.outgoing.borrow_mut();
        let fits = |block: &Block| BLOCK - block.written >= least;
        if !way.full.back().is_some_and(fits) {
            let Some(block) = way.empty.pop() else {
                way.writer = Some(cx.waker().clone());
                return Poll::Pending;
            };
            way.full.push_back(block);
        }
        let block = way.full.back_mut().expect("there is one");
        let n = fill(&mut block.bytes[block.written..]);
        block.written += n;
        if block.written == 0 {
            let block = way.full.pop_back();
            way.empty.extend(block);
        } else if let Some(reader) = way.reader.take() {
            reader.wake();
        }
        Poll::Ready(n)
    }

    /// Lends `fill` room for a frame at least; it returns how much of it is written.
    pub(crate) fn poll_send(
        &self,
        cx: &mut Context<'_>,
        fill: impl FnOnce(&mut [u8]) -> usize,
    ) -> Poll<usize> {
        self.poll_room(cx, LEAST_LENT, fill)
    }

    /// Copies what has arrived into `buf`, as far as it lies together.
    pub(crate) fn poll_copy_in(&self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<usize> {
        self.poll_receive(cx, |bytes| {
            let n = bytes.len().min(buf.len());
            buf[..n].copy_from_slice(&bytes[..n]);
            n
        })
    }

    /// Copies as much of `bytes` into the pipe as fits together.
    pub(crate) fn poll_copy_out(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<usize> {
        self.poll_room(cx, 1, |room| {
            let n = bytes.len().min(room.len());
            room[..n].copy_from_slice(&bytes[..n]);
            n
        })
    }
}

impl Way {
    fn new() -> Rc<RefCell<Self>> {
        let block = || Block {
            bytes: vec![0; BLOCK].into(),
            read: 0,
            written: 0,
        };
        Rc::new(RefCell::new(Way {
            full: VecDeque::with_capacity(BLOCKS),
            empty: (0..BLOCKS).map(|_| block()).collect(),
            ended: false,
            reader: None,
            writer: None,
        }))
    }

    /// The front block is used up.
    fn recycle(&mut self) {
        let mut block = self.full.pop_front().expect("it was there");
        (block.read, block.written) = (0, 0);
        self.empty.push(block);
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let mut way = self.outgoing.borrow_mut();
        way.ended = true;
        if let Some(reader) = way.reader.take() {
            reader.wake();
        }
    }
}

impl AsyncRead for Pipe {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let copied = self.poll_receive(cx, |bytes| {
            let n = bytes.len().min(buf.remaining());
            buf.put_slice(&bytes[..n]);
            n
        });
        copied.map(|_| Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_copy_out(cx, bytes).map(Ok)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl futures::io::AsyncRead for Pipe {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_copy_in(cx, buf).map(Ok)
    }
}

impl futures::io::AsyncWrite for Pipe {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_copy_out(cx, bytes).map(Ok)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
