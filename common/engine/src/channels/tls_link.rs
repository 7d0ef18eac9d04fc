//! A link over TLS.
//!
//! # Theory of operation
//!
//! rustls does no I/O: it takes and gives the bytes of records. So this is a layer over a socket's link, whose batches
//! bound everything here:
//!
//! * a batch received is deciphered piece by piece (rustls holds 16 KiB of plaintext at most) into one buffer, and
//!   handed on at once;
//! * a source is offered [`ROOM`] bytes, which with the headers of their records fit into what the socket's link offers
//!   in turn. Nothing is offered while rustls still has something of its own to send.

use std::io::{self, Read, Write};
use std::task::{Context, Poll};

use rustls::Connection;

use super::tcp_link::TcpLink;
use super::tls::explain;
use crate::channel::{Link, Needs, Progress, Sink, Source};
use crate::fd_link::CHUNK;
use crate::segment::{Cursor, Segment};

/// Plaintext offered at once: two records, the second a little short, so that both fit into [`CHUNK`] with 22 bytes of
/// overhead each.
const ROOM: usize = CHUNK - 1024;

/// See the [module](self).
pub(super) struct TlsLink {
    inner: TcpLink,
    tls: Connection,
    /// What was deciphered of the present batch.
    inbound: Vec<u8>,
    /// Room for one send.
    outbound: Box<[u8]>,
}

impl TlsLink {
    /// The link over `inner`, whose handshake `tls` has done.
    pub(super) fn new(inner: TcpLink, tls: Connection) -> Self {
        TlsLink {
            inner,
            tls,
            inbound: Vec::new(),
            outbound: vec![0; ROOM].into(),
        }
    }
}

impl Link for TlsLink {
    /// Sealed frames: TLS loses nothing, but QEMU, should it be the other end, may lose what it has deciphered.
    fn needs(&self) -> Needs {
        self.inner.needs()
    }

    fn min_room(&self) -> usize {
        ROOM
    }

    fn receive(&mut self, sink: &mut Sink<'_>) -> io::Result<Progress> {
        let TlsLink {
            inner,
            tls,
            inbound,
            ..
        } = self;
        inbound.clear();
        // What came with the end of the handshake.
        let mut deciphered = take_plaintext(tls, inbound);
        let received = inner.receive(&mut |segments| {
            deciphered = decipher(tls, Cursor::new(segments), inbound);
        });
        if !inbound.is_empty() {
            sink(&[Segment::from_slice(inbound)]);
        }
        if deciphered.is_err() {
            // Tells the other end why, if there is room.
            let _ = inner.send(&mut |segments| write_records(tls, segments));
        }
        deciphered?;
        received
    }

    fn send(&mut self, source: &mut Source<'_>) -> io::Result<Progress> {
        let TlsLink {
            inner,
            tls,
            outbound,
            ..
        } = self;
        let mut ciphered = Ok(());
        let sent = inner.send(&mut |segments| {
            if !tls.wants_write() {
                let filled = source(&[Segment::from_slice(outbound)]);
                ciphered = tls.writer().write_all(&outbound[..filled]);
            }
            write_records(tls, segments)
        });
        ciphered?;
        sent
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.inner.poll_ready(cx)
    }
}

/// Deciphers all that `cursor` has, onto the end of `plain`.
fn decipher(
    tls: &mut Connection,
    mut cursor: Cursor<'_, '_>,
    plain: &mut Vec<u8>,
) -> io::Result<()> {
    while cursor.remaining() > 0 {
        tls.read_tls(&mut Records(&mut cursor))?;
        take_plaintext(tls, plain)?;
    }
    Ok(())
}

/// Moves what is deciphered to the end of `plain`.
fn take_plaintext(tls: &mut Connection, plain: &mut Vec<u8>) -> io::Result<()> {
    let state = tls
        .process_new_packets()
        .map_err(|error| io::Error::other(explain(&error)))?;
    let at = plain.len();
    plain.resize(at + state.plaintext_bytes_to_read(), 0);
    tls.reader().read_exact(&mut plain[at..])?;
    match state.peer_has_closed() {
        true => Err(io::ErrorKind::UnexpectedEof.into()),
        false => Ok(()),
    }
}

/// Writes what records there are into `segments`, as much as fits.
fn write_records(tls: &mut Connection, segments: &[Segment<'_>]) -> usize {
    let mut cursor = Cursor::new(segments);
    let room = cursor.remaining();
    while tls.wants_write() && cursor.remaining() > 0 {
        tls.write_tls(&mut Records(&mut cursor))
            .expect("memory takes bytes");
    }
    room - cursor.remaining()
}

/// Segments as rustls wants them.
struct Records<'c, 's, 'a>(&'c mut Cursor<'s, 'a>);

impl Read for Records<'_, '_, '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(self.0.read(buf))
    }
}

impl Write for Records<'_, '_, '_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = buf.len().min(self.0.remaining());
        self.0.write(&buf[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
