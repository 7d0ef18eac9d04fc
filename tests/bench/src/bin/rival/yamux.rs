//! The crate `yamux` over a virtio serial port: libp2p's, which is faster with bulk than `tokio-yamux` is, and whose windows
//! grow by themselves (`cargo bench -p virtproxy-mux --bench beside` has both).
//!
//! What makes it fast here: windows without a limit; frames of 64 KiB; a buffer below it, so that a frame's header and its
//! body are one write to the port; and the port is read with many pages in one call, since the guest's kernel fills no
//! more than one for each piece of memory it is given.

use std::fs::{File, OpenOptions};
use std::future::poll_fn;
use std::io::{self, IoSliceMut, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, BufStream, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};
use yamux::{Config, Connection, Mode, Stream};

use crate::{BUFFER, join, tell};

/// Streams at once; yamux's own 512 are fewer than the measurements have.
const STREAMS: usize = 1 << 16;

/// How often the guest looks whether the host's end is there.
const LOOK: Duration = Duration::from_millis(10);

/// What the guest's kernel gives for each piece of memory.
const PAGE: usize = 4096;

/// Who gets the next stream.
type Wish = oneshot::Sender<Stream>;

pub(crate) async fn host(socket: &str, address: &str) -> Result<()> {
    let port = UnixStream::connect(socket).await?;
    let listener = TcpListener::bind(address).await?;
    let (wishes, asked) = mpsc::unbounded_channel();
    let driver = drive(connection(port, Mode::Client), asked, drop);
    let clients = async {
        loop {
            let (client, _) = listener.accept().await?;
            let (wish, stream) = oneshot::channel();
            wishes.send(wish)?;
            tokio::spawn(async move {
                tell(async { Ok(join(client, stream.await?.compat()).await?) }.await);
            });
        }
    };
    tokio::select! {
        ended = driver => ended,
        ended = clients => ended,
    }
}

pub(crate) async fn guest(device: &str, address: &str) -> Result<()> {
    let port = Port::open(device).await?;
    let (_nobody, asked) = mpsc::unbounded_channel();
    let accept = |stream: Stream| {
        let address = address.to_owned();
        tokio::spawn(async move {
            let joined = async {
                let service = TcpStream::connect(address).await?;
                Ok(join(service, stream.compat()).await?)
            };
            tell(joined.await);
        });
    };
    drive(connection(port, Mode::Server), asked, accept).await
}

fn connection<T>(port: T, mode: Mode) -> Connection<Compat<BufStream<T>>>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let mut config = Config::default();
    config
        .set_max_connection_receive_window(None)
        .set_max_num_streams(STREAMS)
        .set_split_send_size(BUFFER);
    let port = BufStream::with_capacity(2 * BUFFER, 2 * BUFFER, port);
    Connection::new(port.compat(), config, mode)
}

/// Runs `connection`: gives a new stream to each that is `asked` for, and those of the other end to `accept`.
async fn drive<T>(
    mut connection: Connection<T>,
    mut asked: mpsc::UnboundedReceiver<Wish>,
    accept: impl Fn(Stream),
) -> Result<()>
where
    T: futures::AsyncRead + futures::AsyncWrite + Unpin,
{
    let mut wish: Option<Wish> = None;
    poll_fn(move |cx| {
        loop {
            if wish.is_none()
                && let Poll::Ready(next) = asked.poll_recv(cx)
            {
                wish = next;
            }
            if wish.is_some()
                && let Poll::Ready(stream) = connection.poll_new_outbound(cx)
            {
                // Who asked may be gone, and the stream is then closed again.
                let _ = wish
                    .take()
                    .map(|wish| stream.map(|stream| wish.send(stream)));
                continue;
            }
            match ready!(connection.poll_next_inbound(cx)) {
                Some(stream) => accept(stream?),
                None => return Poll::Ready(Ok(())),
            }
        }
    })
    .await
}

/// A virtio serial port of this guest.
struct Port(AsyncFd<File>);

impl Port {
    /// Opens it, and waits until somebody is at its other end.
    async fn open(device: &str) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(device)
            .with_context(|| format!("cannot open {device}"))?;
        while hung_up(&file)? {
            tokio::time::sleep(LOOK).await;
        }
        // SAFETY: the file owns its descriptor, which is open and always the same until it is dropped.
        Ok(Port(unsafe { AsyncFd::register(file) }?))
    }
}

fn hung_up(file: &File) -> io::Result<bool> {
    let mut poll = libc::pollfd {
        fd: file.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    // SAFETY: one `pollfd`, which outlives the call, with a descriptor that is open.
    match unsafe { libc::poll(&mut poll, 1, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(poll.revents & libc::POLLHUP != 0),
    }
}

impl AsyncRead for Port {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut port = ready!(self.0.poll_read_ready(cx))?;
            let pages = buf.initialize_unfilled().chunks_mut(PAGE);
            let mut pages: Vec<_> = pages.map(IoSliceMut::new).collect();
            if let Ok(read) = port.try_io(|port| port.get_ref().read_vectored(&mut pages)) {
                buf.advance(read?);
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut port = ready!(self.0.poll_write_ready(cx))?;
            if let Ok(written) = port.try_io(|port| port.get_ref().write(bytes)) {
                return Poll::Ready(written);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
