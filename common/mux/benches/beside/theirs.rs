//! What the users of a yamux connection do, for both crates: each user is a task, as is the driver of each connection.

use std::time::{Duration, Instant};

use futures::future::LocalBoxFuture;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::task::{JoinHandle, LocalSet, spawn_local};

use crate::pipe::{self, Pipe};
use crate::{Case, MESSAGE, PIECE, Windows};

/// One end of a connection of some crate.
pub(crate) trait Connection: Sized + 'static {
    type Stream: AsyncRead + AsyncWrite + Unpin + 'static;

    /// An end over `pipe`, its driver spawned; the one that opens streams, if `client`.
    fn new(pipe: Pipe, client: bool, windows: Windows) -> Self;
    fn open(&mut self) -> LocalBoxFuture<'_, Self::Stream>;
    fn accept(&mut self) -> LocalBoxFuture<'_, Self::Stream>;
}

/// Runs `case` once; how long it took.
pub(crate) fn run<C: Connection>(case: Case, windows: Windows) -> Option<Duration> {
    on_one_thread(async {
        let (near, far) = pipe::pair();
        let mut client = C::new(near, true, windows);
        let mut server = C::new(far, false, windows);
        if let Case::Opens(count) = case {
            return Some(opens(client, server, count).await);
        }
        let count = match case {
            Case::Bulk { streams, .. } => streams,
            _ => 1,
        };
        let mut streams = Vec::new();
        for _ in 0..count {
            let mut near = client.open().await;
            // What opens a stream in yamux is its first data.
            near.write_all(&[0]).await.expect("to write");
            let mut far = server.accept().await;
            far.read_exact(&mut [0]).await.expect("to read");
            streams.push((near, far));
        }
        Some(between(streams, case).await)
    })
}

/// Runs `case` over nothing but the pipe, which has no streams.
pub(crate) fn bare(case: Case, _: Windows) -> Option<Duration> {
    let case = match case {
        Case::Bulk { streams, bytes } => Case::Bulk {
            streams: 1,
            bytes: streams * bytes,
        },
        Case::Opens(_) => return None,
        case => case,
    };
    on_one_thread(async { Some(between(vec![pipe::pair()], case).await) })
}

fn on_one_thread<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, work)
}

/// Has users do `case` between the ends of streams that are open; how long it took.
async fn between<S: AsyncRead + AsyncWrite + Unpin + 'static>(
    streams: Vec<(S, S)>,
    case: Case,
) -> Duration {
    let begun = Instant::now();
    let users = streams.into_iter().flat_map(|(near, far)| match case {
        Case::Bulk { bytes, .. } => [writes(near, bytes, PIECE), reads(far, bytes)],
        Case::Messages(count) => {
            let bytes = count * MESSAGE;
            [writes(near, bytes, MESSAGE), reads(far, bytes)]
        }
        Case::Calls(count) => [calls(near, count), answers(far, count)],
        Case::Opens(_) => unreachable!("opens its own"),
    });
    // They are kept: a stream that is dropped is reset.
    let _streams = futures::future::join_all(users.collect::<Vec<_>>()).await;
    begun.elapsed()
}

fn writes<S: AsyncWrite + Unpin + 'static>(mut to: S, bytes: usize, piece: usize) -> JoinHandle<S> {
    spawn_local(async move {
        let buffer = vec![7; piece];
        for _ in 0..bytes / piece {
            to.write_all(&buffer).await.expect("to write");
        }
        to.flush().await.expect("to flush");
        to
    })
}

fn reads<S: AsyncRead + Unpin + 'static>(mut from: S, bytes: usize) -> JoinHandle<S> {
    spawn_local(async move {
        let mut buffer = vec![0; PIECE];
        let mut left = bytes;
        while left > 0 {
            left -= from.read(&mut buffer).await.expect("to read");
        }
        from
    })
}

fn calls<S: AsyncRead + AsyncWrite + Unpin + 'static>(mut to: S, count: usize) -> JoinHandle<S> {
    spawn_local(async move {
        let mut buffer = [7; MESSAGE];
        for _ in 0..count {
            to.write_all(&buffer).await.expect("to write");
            to.flush().await.expect("to flush");
            to.read_exact(&mut buffer).await.expect("to read");
        }
        to
    })
}

fn answers<S: AsyncRead + AsyncWrite + Unpin + 'static>(mut to: S, count: usize) -> JoinHandle<S> {
    spawn_local(async move {
        let mut buffer = [0; MESSAGE];
        for _ in 0..count {
            to.read_exact(&mut buffer).await.expect("to read");
            to.write_all(&buffer).await.expect("to write");
            to.flush().await.expect("to flush");
        }
        to
    })
}

async fn opens<C: Connection>(mut client: C, mut server: C, count: usize) -> Duration {
    let begun = Instant::now();
    let server = spawn_local(async move {
        for _ in 0..count {
            let mut stream = server.accept().await;
            let mut byte = [0];
            stream.read_exact(&mut byte).await.expect("to read");
            assert_eq!(stream.read(&mut byte).await.expect("to read"), 0);
            stream.shutdown().await.expect("to close");
        }
        server
    });
    for _ in 0..count {
        let mut stream = client.open().await;
        stream.write_all(&[7]).await.expect("to write");
        stream.shutdown().await.expect("to close");
        assert_eq!(stream.read(&mut [0]).await.expect("to read"), 0);
    }
    server.await.expect("the server does not fail");
    begun.elapsed()
}
