//! The engine's side of a port, in the test's own thread.

use std::future::{Future, poll_fn};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use virtproxy_engine::channel::{Channel, Link, Progress};
use virtproxy_engine::segment::{Cursor, Segment};
use virtproxy_host::device::Port;

use super::Pattern;
use super::ring::PATIENCE;

pub struct Host {
    pub link: Box<dyn Link>,
    runtime: Rc<Runtime>,
}

thread_local! {
    /// One for all hosts of a test.
    static RUNTIME: Rc<Runtime> =
        Rc::new(Builder::new_current_thread().enable_all().build().unwrap());
}

impl Host {
    /// Waits for the guest to open the port.
    pub fn open(port: &mut Port) -> Self {
        Self::try_open(port, PATIENCE).expect("the port never opened")
    }

    /// The same, with less patience.
    pub fn try_open(port: &mut Port, patience: Duration) -> Option<Self> {
        let runtime = RUNTIME.with(Rc::clone);
        let link = complete(&runtime, port.open(), patience)?.unwrap();
        Some(Host { link, runtime })
    }

    /// Waits until something may be done; false if nothing came.
    pub fn wait(&mut self, patience: Duration) -> bool {
        let ready = poll_fn(|cx| self.link.poll_ready(cx));
        complete(&self.runtime, ready, patience).is_some()
    }

    /// Lets the reactor and other tasks have a turn, without waiting for the link.
    pub fn wait_for_others(&mut self) {
        self.runtime.block_on(tokio::task::yield_now());
    }

    /// What one call receives.
    pub fn receive_once(&mut self) -> io::Result<(Vec<u8>, Progress)> {
        let mut bytes = Vec::new();
        let progress = self
            .link
            .receive(&mut |segments| copy_out(segments, &mut bytes))?;
        Ok((bytes, progress))
    }

    /// All there is now.
    pub fn receive_now(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while self
            .link
            .receive(&mut |segments| copy_out(segments, &mut bytes))?
            == Progress::Again
        {}
        Ok(bytes)
    }

    /// Waits for `len` bytes.
    pub fn receive(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            match self
                .link
                .receive(&mut |segments| copy_out(segments, &mut bytes))
            {
                Ok(Progress::Again) => {}
                Ok(Progress::Wait) => {
                    assert!(self.wait(PATIENCE), "{} of {len} bytes came", bytes.len())
                }
                Err(error) => panic!("{} of {len} bytes came, then: {error}", bytes.len()),
            }
        }
        assert_eq!(bytes.len(), len, "too many bytes");
        bytes
    }

    /// All bytes until the link ends, which it must.
    pub fn receive_to_end(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        loop {
            match self
                .link
                .receive(&mut |segments| copy_out(segments, &mut bytes))
            {
                Ok(Progress::Again) => {}
                Ok(Progress::Wait) => assert!(self.wait(PATIENCE), "the link did not end"),
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
                    return bytes;
                }
            }
        }
    }

    /// Sends what there is room for now; returns how much that was.
    pub fn send_now(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut sent = 0;
        loop {
            let mut written = 0;
            let progress = self.link.send(&mut |segments| {
                let mut cursor = Cursor::new(segments);
                written = cursor.remaining().min(bytes.len() - sent);
                cursor.write(&bytes[sent..sent + written]);
                written
            })?;
            sent += written;
            if progress == Progress::Wait || sent == bytes.len() {
                return Ok(sent);
            }
        }
    }

    /// Sends all of it, waiting for room.
    pub fn send(&mut self, bytes: &[u8]) {
        let mut sent = 0;
        while sent < bytes.len() {
            sent += self.send_now(&bytes[sent..]).unwrap();
            if sent < bytes.len() {
                assert!(self.wait(PATIENCE), "{sent} of {} bytes sent", bytes.len());
            }
        }
    }

    /// Sends and receives so many bytes of the patterns at once.
    pub fn exchange(&mut self, out: (&mut Pattern, usize), inn: (&mut Pattern, usize)) {
        self.exchange_with(out, inn, |_| ());
    }

    /// The same. `turn` is called between the calls, with their number.
    pub fn exchange_with(
        &mut self,
        out: (&mut Pattern, usize),
        inn: (&mut Pattern, usize),
        mut turn: impl FnMut(usize),
    ) {
        let (mut to_send, mut to_receive) = (out.1, inn.1);
        for number in 0.. {
            if to_send == 0 && to_receive == 0 {
                return;
            }
            turn(number);
            let mut expect = |segments: &[Segment<'_>]| {
                let mut bytes = Vec::new();
                copy_out(segments, &mut bytes);
                to_receive = to_receive.checked_sub(bytes.len()).expect("too many bytes");
                inn.0.expect(&bytes);
            };
            let received = self.link.receive(&mut expect).unwrap();
            let sent = self
                .link
                .send(&mut |segments| {
                    let mut cursor = Cursor::new(segments);
                    let len = cursor.remaining().min(to_send);
                    cursor.write(&out.0.take(len));
                    to_send -= len;
                    len
                })
                .unwrap();
            let idle = received == Progress::Wait && sent == Progress::Wait;
            if idle && (to_send > 0 || to_receive > 0) {
                assert!(
                    self.wait(PATIENCE),
                    "{to_send} to send and {to_receive} to receive"
                );
            }
        }
    }
}

/// Runs a future to its end, or gives up.
fn complete<T>(
    runtime: &Runtime,
    future: impl Future<Output = T>,
    patience: Duration,
) -> Option<T> {
    runtime
        .block_on(async { tokio::time::timeout(patience, future).await })
        .ok()
}

fn copy_out(segments: &[Segment<'_>], bytes: &mut Vec<u8>) {
    let mut cursor = Cursor::new(segments);
    let at = bytes.len();
    bytes.resize(at + cursor.remaining(), 0);
    cursor.read(&mut bytes[at..]);
}
