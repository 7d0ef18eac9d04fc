//! A link over a TCP socket, which notices when the other end has vanished.
//!
//! A machine that lost power says nothing, and TCP goes on asking for a quarter of an hour; so long nobody else would be
//! let in. `TCP_USER_TIMEOUT` shortens that, but it also ends the connection of a peer that is there and does not read,
//! as a stopped program does not; and a stopped peer is not a dead one. So the link itself looks now and then: a peer has
//! vanished when something sent is unacknowledged and not one packet has come for [`VANISHED`]. Who merely does not read
//! acknowledges what was sent; what waits for its window was not. Where nothing is unacknowledged, because nothing is
//! sent, the kernel's keepalive asks.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{Socket, TcpKeepalive};
use tokio::time::{Sleep, sleep};

use crate::channel::{Link, Needs, Progress, Sink, Source};
use crate::fd_link::FdLink;

/// How often a link looks, and the kernel asks on an idle one.
const LOOK: Duration = Duration::from_secs(15);
/// After so long without an answer a peer has vanished.
const VANISHED: Duration = Duration::from_secs(60);

/// See the [module](self).
pub(super) struct TcpLink {
    inner: FdLink,
    look: Pin<Box<Sleep>>,
    vanished: bool,
}

impl TcpLink {
    /// A link over `socket`, over which every frame is sealed.
    pub(super) fn new(socket: Socket) -> io::Result<Self> {
        let keepalive = TcpKeepalive::new()
            .with_time(LOOK)
            .with_interval(LOOK)
            .with_retries(3);
        socket.set_tcp_keepalive(&keepalive)?;
        // Small frames leave at once.
        socket.set_tcp_nodelay(true)?;
        Ok(TcpLink {
            inner: FdLink::new(socket.into())?.sealed(),
            look: Box::pin(sleep(LOOK)),
            vanished: false,
        })
    }
}

impl Link for TcpLink {
    fn needs(&self) -> Needs {
        self.inner.needs()
    }

    fn min_room(&self) -> usize {
        self.inner.min_room()
    }

    fn receive(&mut self, sink: &mut Sink<'_>) -> io::Result<Progress> {
        if self.vanished {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("the other end has vanished: no answer for {VANISHED:?}"),
            ));
        }
        self.inner.receive(sink)
    }

    fn send(&mut self, source: &mut Source<'_>) -> io::Result<Progress> {
        self.inner.send(source)
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.look.as_mut().poll(cx).is_ready() {
            self.look.set(sleep(LOOK));
            self.vanished = silence(self.inner.as_fd()) >= VANISHED;
            if self.vanished {
                return Poll::Ready(());
            }
        }
        self.inner.poll_ready(cx)
    }
}

/// For how long nothing has come although something sent is unacknowledged.
fn silence(socket: BorrowedFd<'_>) -> Duration {
    // SAFETY: all zeros is a valid `tcp_info`.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = libc::socklen_t::try_from(size_of_val(&info)).expect("it is small");
    // SAFETY: `info` is `len` bytes of writable memory. The kernel may know fewer; the others stay 0.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut len,
        )
    };
    match got == 0 && info.tcpi_unacked > 0 {
        true => Duration::from_millis(info.tcpi_last_ack_recv.into()),
        false => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::time::Instant;

    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (ours, listener.accept().unwrap().0)
    }

    /// Nothing that comes reaches the socket any more, as if its machine were gone.
    fn vanish(socket: &TcpStream) {
        let mut nothing = libc::sock_filter {
            code: u16::try_from(libc::BPF_RET | libc::BPF_K).unwrap(),
            jt: 0,
            jf: 0,
            k: 0,
        };
        let program = libc::sock_fprog {
            len: 1,
            filter: &raw mut nothing,
        };
        // SAFETY: a program of one instruction, which the kernel copies.
        let attached = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const program).cast(),
                size_of_val(&program).try_into().unwrap(),
            )
        };
        assert_eq!(attached, 0, "{}", io::Error::last_os_error());
    }

    #[test]
    fn who_has_vanished_is_silent_and_who_does_not_read_is_not() {
        let (mut to_vanished, vanished) = pair();
        let (mut to_stopped, _stopped) = pair();
        vanish(&vanished);
        to_vanished.write_all(b"are you there?").unwrap();
        to_stopped.set_nonblocking(true).unwrap();
        let end = Instant::now() + LONG;
        loop {
            // Sends whatever the window lets through, until it is shut for good.
            while to_stopped.write(&[0; 65536]).is_ok() {}
            let silent = silence(to_vanished.as_fd());
            if silent >= Duration::from_secs(2) && silence(to_stopped.as_fd()).is_zero() {
                break;
            }
            assert!(
                Instant::now() < end,
                "{silent:?}, {:?}",
                silence(to_stopped.as_fd())
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
