//! The crate `yamux`: its connection is polled by a task, which takes requests for streams over a channel.

use std::future::poll_fn;
use std::task::Poll;

use futures::future::LocalBoxFuture;
use tokio::sync::{mpsc, oneshot};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};
use yamux::{Config, Mode, Stream};

use crate::pipe::Pipe;
use crate::theirs::Connection;
use crate::{PIECE, Windows};

pub(crate) struct Yamux {
    wanted: mpsc::UnboundedSender<oneshot::Sender<Stream>>,
    asked: mpsc::UnboundedReceiver<Stream>,
}

impl Connection for Yamux {
    type Stream = Compat<Stream>;

    fn new(pipe: Pipe, client: bool, windows: Windows) -> Self {
        let mut config = Config::default();
        if windows == Windows::Large {
            config.set_max_connection_receive_window(None);
            config.set_split_send_size(PIECE);
        }
        let mode = if client { Mode::Client } else { Mode::Server };
        let mut connection = yamux::Connection::new(pipe, config, mode);
        let (wanted, mut wishes) = mpsc::unbounded_channel::<oneshot::Sender<Stream>>();
        let (asking, asked) = mpsc::unbounded_channel();
        tokio::task::spawn_local(poll_fn(move |cx| {
            while let Poll::Ready(Some(wish)) = wishes.poll_recv(cx) {
                if let Poll::Ready(stream) = connection.poll_new_outbound(cx) {
                    let _ = wish.send(stream.expect("a stream"));
                }
            }
            while let Poll::Ready(stream) = connection.poll_next_inbound(cx) {
                match stream {
                    Some(stream) => drop(asking.send(stream.expect("a sound connection"))),
                    None => return Poll::Ready(()),
                }
            }
            Poll::Pending
        }));
        Yamux { wanted, asked }
    }

    fn open(&mut self) -> LocalBoxFuture<'_, Self::Stream> {
        Box::pin(async {
            let (wish, stream) = oneshot::channel();
            self.wanted.send(wish).expect("the driver runs");
            stream.await.expect("a stream").compat()
        })
    }

    fn accept(&mut self) -> LocalBoxFuture<'_, Self::Stream> {
        Box::pin(async { self.asked.recv().await.expect("a stream").compat() })
    }
}
