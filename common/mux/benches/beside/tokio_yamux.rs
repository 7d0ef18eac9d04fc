//! The crate `tokio-yamux`: its session is a stream of streams that a task takes from.
//!
//! A stream hears of new credit only while it is read ("if the user only writes but does not read, the entire stream will
//! be stuck"), so one that cannot be written is read here for nothing.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::StreamExt;
use futures::future::LocalBoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_yamux::{Config, Control, Session, StreamHandle};

use crate::pipe::Pipe;
use crate::theirs::Connection;
use crate::{LARGE_WINDOW, Windows};

pub(crate) struct TokioYamux {
    control: Control,
    asked: mpsc::UnboundedReceiver<StreamHandle>,
}

impl Connection for TokioYamux {
    type Stream = Stream;

    fn new(pipe: Pipe, client: bool, windows: Windows) -> Self {
        let mut config = Config::default();
        if windows == Windows::Large {
            config.max_stream_window_size = LARGE_WINDOW;
        }
        let mut session = match client {
            true => Session::new_client(pipe, config),
            false => Session::new_server(pipe, config),
        };
        let control = session.control();
        let (asking, asked) = mpsc::unbounded_channel();
        tokio::task::spawn_local(async move {
            while let Some(stream) = session.next().await {
                drop(asking.send(stream.expect("a sound session")));
            }
        });
        TokioYamux { control, asked }
    }

    fn open(&mut self) -> LocalBoxFuture<'_, Self::Stream> {
        Box::pin(async { Stream(self.control.open_stream().await.expect("a stream")) })
    }

    fn accept(&mut self) -> LocalBoxFuture<'_, Self::Stream> {
        Box::pin(async { Stream(self.asked.recv().await.expect("a stream")) })
    }
}

/// A stream that may be written without being read.
pub(crate) struct Stream(StreamHandle);

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.0).poll_write(cx, bytes);
        if written.is_pending() {
            let _ = Pin::new(&mut self.0).poll_read(cx, &mut ReadBuf::new(&mut []));
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
