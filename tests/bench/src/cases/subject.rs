//! A way that is up, with the client's side of it.
//!
//! Connections stay open from one measurement to the next: the service asks for another request on each, and a bare relay
//! has but one connection for all its life. When something goes wrong on one of them the way is ended, since nobody knows
//! what is still on its way in them.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use virtproxy_tests::measure::cpu_by_thread;

use super::bulk::Direction;
use crate::ways::Running;

/// What one connection may take to be made, and its first answer to come.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// A request that is answered at once.
pub(super) const NOTHING: &str = "TAKE 0";

/// A way that is up, with the client's side of it.
pub(crate) struct Subject {
    // Dropped in this order: the connections before what they go through.
    streams: Vec<TcpStream>,
    running: Box<dyn Running>,
    /// How many bytes a bulk measurement moves, once that is known.
    pub(super) sizes: BTreeMap<(Direction, usize), u64>,
}

/// CPU time used so far, by thread id.
pub(super) struct Cpu {
    host: BTreeMap<u32, Duration>,
    guest: BTreeMap<u32, Duration>,
}

impl Subject {
    pub(crate) fn new(running: Box<dyn Running>) -> Self {
        Subject {
            streams: Vec::new(),
            running,
            sizes: BTreeMap::new(),
        }
    }

    /// The way.
    pub(crate) fn running(&self) -> &dyn Running {
        &*self.running
    }

    /// `count` open connections, on which nothing is going on. After an error in what they are used for, this is
    /// of no use any more.
    pub(super) fn streams(&mut self, count: usize) -> Result<&[TcpStream]> {
        while self.streams.len() < count {
            self.streams.push(connect(self.running.address(), NOTHING)?);
        }
        Ok(&self.streams[..count])
    }

    /// What the programs have used until now: on the host, they and QEMU without its virtual processors; in the guest,
    /// the virtual processors.
    pub(super) fn cpu(&self) -> Result<Cpu> {
        let guest = self.running.guest();
        let processors = guest.vcpu_threads()?;
        let (guest, mut host): (BTreeMap<_, _>, BTreeMap<_, _>) = cpu_by_thread(guest.pid())?
            .into_iter()
            .partition(|(thread, _)| processors.contains(thread));
        for process in self.running.processes() {
            host.extend(cpu_by_thread(process)?);
        }
        Ok(Cpu { host, guest })
    }
}

impl Cpu {
    /// Seconds used on the host and by the guest since `before`.
    pub(super) fn since(&self, before: &Cpu) -> [f64; 2] {
        [(&self.host, &before.host), (&self.guest, &before.guest)].map(|(now, before)| {
            let used = now.iter().map(|(thread, time)| {
                let before = before.get(thread).copied().unwrap_or_default();
                time.saturating_sub(before)
            });
            used.sum::<Duration>().as_secs_f64()
        })
    }
}

/// A new connection to `address`, on which the service has answered the `first` request, with one byte.
pub(super) fn connect(address: &str, first: &str) -> Result<TcpStream> {
    let target: SocketAddr = address.parse().context("not an address of this host")?;
    let stream = TcpStream::connect_timeout(&target, CONNECT_LIMIT)
        .with_context(|| format!("cannot connect to {address}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(CONNECT_LIMIT))?;
    request(&stream, first)?;
    answer(&stream).map_err(|error| match error.downcast_ref().map(io::Error::kind) {
        Some(io::ErrorKind::WouldBlock) => {
            anyhow!("a new connection gives no answer within {CONNECT_LIMIT:?}")
        }
        _ => error.context("a new connection gives no answer"),
    })?;
    stream.set_read_timeout(None)?;
    Ok(stream)
}

/// Makes a request, in one piece.
pub(super) fn request(mut stream: impl Write, line: &str) -> Result<()> {
    Ok(stream.write_all(format!("{line}\n").as_bytes())?)
}

/// Reads the byte that says that the service has done what it was asked.
pub(super) fn answer(mut stream: impl Read) -> Result<()> {
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    ensure!(byte == *b"!", "the service answered {byte:?}");
    Ok(())
}

/// Does `work` over `streams`. When that takes longer than `limit` they are shut down, which ends it.
pub(super) fn within<T>(
    limit: Duration,
    streams: &[TcpStream],
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let (done, end) = channel::<()>();
    let watch = move || {
        let late = end.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
        if late {
            for stream in streams {
                // One that the other side has ended is shut down already.
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        late
    };
    thread::scope(|scope| {
        let watch = scope.spawn(watch);
        let result = work();
        drop(done);
        if watch.join().expect("the watch does not panic") {
            bail!("not done within {limit:?}");
        }
        result
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::time::Instant;

    #[test]
    fn a_stall_is_an_error_with_a_reason() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let streams = [stream];
        let begun = Instant::now();
        let limit = Duration::from_millis(50);
        let error = within(limit, &streams, || answer(&streams[0])).unwrap_err();
        assert_eq!(error.to_string(), "not done within 50ms");
        assert!(begun.elapsed() >= limit);
    }

    #[test]
    fn an_error_before_the_limit_is_told_as_it_is() {
        let error = within(CONNECT_LIMIT, &[], || -> Result<()> { bail!("refused") });
        assert_eq!(error.unwrap_err().to_string(), "refused");
    }

    #[test]
    fn cpu_time_is_counted_by_thread() {
        let of = |host: &[(u32, u64)]| Cpu {
            host: host
                .iter()
                .map(|(id, ms)| (*id, Duration::from_millis(*ms)))
                .collect(),
            guest: BTreeMap::new(),
        };
        // One thread has ended, one is new.
        let (before, now) = (of(&[(1, 9000), (2, 500)]), of(&[(2, 750), (3, 250)]));
        assert_eq!(now.since(&before), [0.5, 0.0]);
    }
}
