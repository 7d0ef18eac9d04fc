//! The decision, over a socket. A whole line, with both programs' channels, is in `tests/serial.rs`.

use std::future::poll_fn;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use tokio::time::timeout;
use virtproxy_link::{Config, Endpoint};
use virtproxy_mux::hello::MIN_LIMIT;

use super::*;
use crate::fd_link::FdLink;

/// A channel with one socket, again and again.
struct Sockets(UnixStream);

impl Channel for Sockets {
    fn open(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Link>>> {
        Box::pin(async {
            let link = FdLink::new(self.0.try_clone()?.into())?;
            Ok(Box::new(link) as Box<dyn Link>)
        })
    }

    fn name(&self) -> &str {
        "test"
    }
}

/// Runs `test` with the channel and the other end of its socket.
fn with_channel(test: impl AsyncFnOnce(Box<dyn Channel>, UnixStream)) {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_all().build().unwrap();
    let limit = Duration::from_secs(30);
    runtime.block_on(async {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let test = test(Detecting::over(Box::new(Sockets(ours))), theirs);
        timeout(limit, test).await.expect("the test hangs");
    });
}

/// Reads from `link` until `len` bytes have come or it ends.
async fn receive(link: &mut dyn Link, len: usize) -> io::Result<Vec<u8>> {
    let mut got = Vec::new();
    loop {
        let progress = link.receive(&mut |segments| {
            let mut cursor = Cursor::new(segments);
            let at = got.len();
            got.resize(at + cursor.remaining(), 0);
            cursor.read(&mut got[at..]);
        })?;
        if got.len() >= len {
            return Ok(got);
        }
        if progress == Progress::Wait {
            poll_fn(|cx| link.poll_ready(cx)).await;
        }
    }
}

/// What an end of a serial line says first.
fn line_hello() -> Vec<u8> {
    let mut hello = Vec::new();
    let config = Config {
        id: 7,
        speed: Some(115_200),
    };
    assert!(Endpoint::new(config).poll_transmit(0, &mut hello));
    hello
}

fn session_hello() -> Vec<u8> {
    let hello = SessionHello {
        min_version: 1,
        max_version: 1,
        epoch: 5,
        ack: 0,
        features: 0,
        max_frame: MIN_LIMIT,
        session_window: MIN_LIMIT,
        max_streams: 1,
        product: String::new(),
    };
    hello.encode()
}

#[test]
fn a_line_behind_noise_is_found_and_the_next_link_is_the_link_layer() {
    with_channel(async |mut channel, mut theirs| {
        let mut link = channel.open().await.unwrap();
        let noise = b"[    0.5] random: crng init done\r\nguest login: ";
        for byte in noise.iter().chain(&line_hello()) {
            theirs.write_all(&[*byte]).unwrap();
        }
        let error = receive(&mut *link, usize::MAX).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        drop(link);

        let mut link = channel.open().await.unwrap();
        let mut nothing = |_: &[crate::segment::Segment<'_>]| 0;
        let _ = link.send(&mut nothing).unwrap();
        let mut said = [0; 256];
        let n = theirs.read(&mut said).unwrap();
        let (mut deframer, mut said) = (Deframer::default(), &said[1..n]);
        let frame = deframer.next(&mut said).unwrap().unwrap();
        assert!(virtproxy_link::Hello::decode(frame).is_some());
    });
}

#[test]
fn after_the_sessions_handshake_nothing_is_looked_at() {
    with_channel(async |mut channel, mut theirs| {
        let mut link = channel.open().await.unwrap();
        let mut all = b"login: ".to_vec();
        all.extend(session_hello());
        theirs.write_all(&all).unwrap();
        let mut got = receive(&mut *link, all.len()).await.unwrap();
        // The same bytes are data of a session now.
        theirs.write_all(&line_hello()).unwrap();
        all.extend(line_hello());
        got.extend(receive(&mut *link, all.len() - got.len()).await.unwrap());
        assert!(got == all);
    });
}
