//! The other end, made by hand: it says what a test likes, at the worst moment.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use virtproxy_mux::Hello;
use virtproxy_mux::frame::{HEADER_LEN, Header, kind};

use super::ends::{End, tokio_socket};

/// The stream field, as the peer writes it, of a stream that the end under test opened.
pub(crate) const YOURS: u32 = 1 << 31;
const EPOCH: u64 = 0x5555_6666_7777_8888;

/// A frame: its kind, its stream and its payload.
pub(crate) type Frame = (u8, u32, Vec<u8>);

pub(crate) struct Peer {
    pub(crate) socket: UnixStream,
    received: Vec<u8>,
}

impl Peer {
    /// One that has shaken hands with `end`, and takes so much over all streams.
    pub(crate) async fn of(end: &End, session_window: u32) -> Self {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        end.link(ours);
        let mut peer = Peer {
            socket: tokio_socket(theirs),
            received: Vec::new(),
        };
        let hello = loop {
            peer.read_some().await;
            if let Some(hello) = Hello::find(&peer.received) {
                break hello;
            }
        };
        peer.received.drain(..hello.encode().len());
        let answer = Hello {
            epoch: EPOCH,
            ack: hello.epoch,
            session_window,
            max_streams: 1024,
            product: "peer".to_owned(),
            ..hello
        };
        peer.socket.write_all(&answer.encode()).await.unwrap();
        peer
    }

    async fn read_some(&mut self) {
        let n = self.socket.read_buf(&mut self.received).await.unwrap();
        assert!(n > 0, "the link ended");
    }

    /// The next frame that is not of the handshake; sound ones are answered by nothing.
    pub(crate) async fn next(&mut self) -> Frame {
        loop {
            if self.received.first() == Some(&kind::HELLO) {
                if let Some(hello) = Hello::find(&self.received) {
                    self.received.drain(..hello.encode().len());
                    continue;
                }
            } else if let Some(head) = self.received.first_chunk::<HEADER_LEN>() {
                let header = Header::decode(*head);
                let len = HEADER_LEN + header.len as usize;
                if self.received.len() >= len {
                    let payload = self.received[HEADER_LEN..len].to_vec();
                    self.received.drain(..len);
                    return (header.kind, header.stream, payload);
                }
            }
            self.read_some().await;
        }
    }

    /// The next frame of this kind; others are passed over.
    pub(crate) async fn wait(&mut self, kind: u8) -> (u32, Vec<u8>) {
        loop {
            let (found, stream, payload) = self.next().await;
            if found == kind {
                return (stream, payload);
            }
        }
    }

    pub(crate) async fn say(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).await.unwrap();
    }

    /// Opens a stream of its own and waits until it is accepted; the credit that it gets.
    pub(crate) async fn opened(&mut self, slot: u32, service: &str) -> u32 {
        self.say(&open(slot, service)).await;
        let (kind, stream, payload) = self.next_of(slot).await;
        assert_eq!((kind, stream), (kind::ACCEPT, slot | YOURS));
        word_of(&payload)
    }

    /// The next frame for this stream of its own.
    pub(crate) async fn next_of(&mut self, slot: u32) -> Frame {
        loop {
            let frame = self.next().await;
            if frame.1 == slot | YOURS {
                return frame;
            }
        }
    }

    /// Sends bytes on a stream that echoes, and takes them back.
    pub(crate) async fn echo(&mut self, slot: u32, text: &[u8]) {
        self.say(&frame(kind::DATA, slot, text)).await;
        let mut back = Vec::new();
        while back.len() < text.len() {
            let (kind, _, payload) = self.next_of(slot).await;
            if kind == kind::DATA {
                back.extend(payload);
            }
        }
        assert_eq!(back, text);
        let granted = u32::try_from(text.len()).unwrap();
        for (kind, stream) in [(kind::CREDIT, slot), (kind::SESSION_CREDIT, 0)] {
            self.say(&frame(kind, stream, &granted.to_le_bytes())).await;
        }
    }
}

/// A frame of any kind.
pub(crate) fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    let header = Header { kind, len, stream };
    [&header.encode()[..], payload].concat()
}

/// Opens a stream of the peer's, with some credit.
pub(crate) fn open(slot: u32, service: &str) -> Vec<u8> {
    let payload = [&65536u32.to_le_bytes()[..], service.as_bytes()].concat();
    frame(kind::OPEN, slot, &payload)
}

/// Accepts a stream that the end under test opened, with so much credit.
pub(crate) fn accept(stream: u32, credit: u32) -> Vec<u8> {
    frame(kind::ACCEPT, stream, &credit.to_le_bytes())
}

/// Resets a stream.
pub(crate) fn reset(stream: u32) -> Vec<u8> {
    frame(kind::RESET, stream, &8u16.to_le_bytes())
}

/// The number in a frame about credit.
pub(crate) fn word_of(payload: &[u8]) -> u32 {
    u32::from_le_bytes(*payload.first_chunk().unwrap())
}

/// The code in a frame that tells of an end.
pub(crate) fn code_of(payload: &[u8]) -> u16 {
    u16::from_le_bytes(*payload.first_chunk().unwrap())
}
