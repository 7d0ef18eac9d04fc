//! The descriptor logic, over sockets and a terminal. What a virtio port does is tested in a real guest.

use std::future::poll_fn;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::ptr::null_mut;
use std::thread;
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use tokio::time::timeout;

use super::*;
use crate::segment::Cursor;

/// Nothing in these tests takes that long.
const LONG: Duration = Duration::from_secs(30);

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// A small, repeatable source of odd numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % n as u64).unwrap()
    }

    /// A length from 1 to `CHUNK`, as often small as large.
    fn length(&mut self) -> usize {
        let bits = self.below(16);
        1 + self.below(1 << bits)
    }
}

/// The byte at `at` of the one stream that all tests send.
fn byte(at: usize) -> u8 {
    (at ^ (at >> 8) ^ (at >> 16)).to_le_bytes()[0]
}

fn stream(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(byte).collect()
}

/// Stands for the engine's driver: moves `total` bytes each way, then waits for the end.
struct Driver {
    random: Random,
    total: usize,
    sent: usize,
    received: usize,
    wakes: usize,
}

impl Driver {
    fn new(total: usize) -> Self {
        Driver {
            random: Random(0x9e37_79b9_7f4a_7c15),
            total,
            sent: 0,
            received: 0,
            wakes: 0,
        }
    }

    /// Receives until `Wait`.
    fn drain(&mut self, link: &mut FdLink) -> io::Result<()> {
        let received = &mut self.received;
        let mut sink = |segments: &[Segment<'_>]| {
            let mut cursor = Cursor::new(segments);
            let mut bytes = vec![0; cursor.remaining()];
            cursor.read(&mut bytes);
            assert!(bytes == stream(*received, bytes.len()), "received garbage");
            *received += bytes.len();
        };
        while link.receive(&mut sink)? == Progress::Again {}
        Ok(())
    }

    /// Sends until `Wait`.
    fn fill(&mut self, link: &mut FdLink) -> io::Result<()> {
        let (sent, random) = (&mut self.sent, &mut self.random);
        let total = self.total;
        let mut source = |segments: &[Segment<'_>]| {
            let mut cursor = Cursor::new(segments);
            assert_eq!(cursor.remaining(), CHUNK, "every offer is a whole buffer");
            let n = random.length().min(total - *sent);
            cursor.write(&stream(*sent, n));
            *sent += n;
            n
        };
        while link.send(&mut source)? == Progress::Again {}
        Ok(())
    }

    async fn run(&mut self, link: &mut FdLink) -> io::Result<()> {
        loop {
            self.drain(link)?;
            self.fill(link)?;
            timeout(LONG, poll_fn(|cx| link.poll_ready(cx)))
                .await
                .expect("a wake-up was lost");
            self.wakes += 1;
        }
    }
}

/// The other end: writes and reads `total` bytes in odd pieces, each with its own pauses, then closes.
fn peer(
    mut reader: impl Read + Send + 'static,
    mut writer: impl Write + Send + 'static,
    total: usize,
) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let read = thread::spawn(move || {
            let (mut random, mut at) = (Random(7), 0);
            let mut buffer = vec![0; CHUNK];
            while at < total {
                let room = random.length();
                let n = reader.read(&mut buffer[..room]).unwrap();
                assert_ne!(n, 0, "the link ended early");
                assert!(buffer[..n] == stream(at, n), "the peer received garbage");
                at += n;
                if random.below(200) == 0 {
                    thread::sleep(Duration::from_millis(1));
                }
            }
        });
        let (mut random, mut at) = (Random(11), 0);
        while at < total {
            let n = random.length().min(total - at);
            writer.write_all(&stream(at, n)).unwrap();
            at += n;
            if random.below(200) == 0 {
                thread::sleep(Duration::from_millis(1));
            }
        }
        read.join().unwrap();
    })
}

fn transfer(total: usize, buffers: usize) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    socket2::SockRef::from(&ours)
        .set_send_buffer_size(buffers)
        .unwrap();
    let peer = peer(theirs.try_clone().unwrap(), theirs, total);
    transfer_over(|| FdLink::new(ours.into()), total);
    peer.join().unwrap();
}

fn transfer_over(link: impl FnOnce() -> io::Result<FdLink>, total: usize) {
    let mut driver = Driver::new(total);
    let error = runtime().block_on(async {
        let mut link = link().unwrap();
        driver.run(&mut link).await.unwrap_err()
    });
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!((driver.sent, driver.received), (total, total));
}

#[test]
fn bulk_both_ways_in_odd_pieces_arrives_whole() {
    transfer(32 << 20, 256 << 10);
}

#[test]
fn a_small_socket_buffer_makes_every_write_short() {
    transfer(4 << 20, 4 << 10);
}

#[test]
fn at_a_pace_bulk_still_arrives_whole() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let total = 4 << 20;
    let peer = peer(theirs.try_clone().unwrap(), theirs, total);
    let paced = || {
        let mut link = FdLink::new(ours.into())?;
        link.set_pace(Duration::from_micros(300));
        Ok(link)
    };
    transfer_over(paced, total);
    peer.join().unwrap();
}

#[test]
fn at_a_pace_single_bytes_gather() {
    const BYTES: usize = 200;
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut driver = Driver::new(BYTES);
    driver.sent = BYTES;
    let writer = thread::spawn(move || {
        for byte in stream(0, BYTES) {
            theirs.write_all(&[byte]).unwrap();
            thread::sleep(Duration::from_micros(100));
        }
    });
    runtime().block_on(async {
        let mut link = FdLink::new(ours.into()).unwrap();
        link.set_pace(Duration::from_millis(100));
        driver.run(&mut link).await.unwrap_err();
    });
    writer.join().unwrap();
    assert_eq!(driver.received, BYTES);
    assert!(driver.wakes < BYTES / 4, "{} wake-ups", driver.wakes);
}

#[test]
fn two_pipes_are_as_good_as_a_socket() {
    let (link_reads, peer_writes) = io::pipe().unwrap();
    let (peer_reads, link_writes) = io::pipe().unwrap();
    let total = 8 << 20;
    let peer = peer(peer_reads, peer_writes, total);
    transfer_over(
        || FdLink::pair(link_reads.into(), link_writes.into()),
        total,
    );
    peer.join().unwrap();
}

#[test]
fn each_offer_is_one_write() {
    let (ours, theirs) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).unwrap();
    let lengths = [1, 2, 4095, 4096, 4097, 10_000, CHUNK - 1, CHUNK];
    runtime().block_on(async {
        let mut link = FdLink::new(ours.into()).unwrap();
        for n in lengths {
            let progress = link.send(&mut |segments: &[Segment<'_>]| {
                Cursor::new(segments).write(&stream(0, n));
                n
            });
            assert_eq!(progress.unwrap(), Progress::Again);
        }
    });
    for n in lengths {
        let mut packet = vec![0; 2 * CHUNK];
        assert_eq!((&theirs).read(&mut packet).unwrap(), n);
        assert!(packet[..n] == stream(0, n));
    }
}

#[test]
fn a_full_peer_keeps_the_rest_and_makes_no_new_offer() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    runtime().block_on(async {
        let mut link = FdLink::new(ours.into()).unwrap();
        assert_eq!(
            link.send(&mut |_| 0).unwrap(),
            Progress::Wait,
            "idle at first"
        );
        let mut offered = 0;
        let mut source = |_: &[Segment<'_>]| {
            offered += CHUNK;
            CHUNK
        };
        while link.send(&mut source).unwrap() == Progress::Again {}
        let rest = link.pending.len();
        assert_ne!(rest, 0);
        for _ in 0..3 {
            assert_eq!(link.send(&mut source).unwrap(), Progress::Wait);
        }
        let before = offered;

        // The state is known, so nothing wakes us until there is room.
        settle(&mut link).await;
        assert_eq!(wakes(&mut link, 50).await, 0);
        let mut theirs = &theirs;
        theirs.read_exact(&mut vec![0; before - rest]).unwrap();
        assert!(wakes(&mut link, 50).await >= 1);
        assert_eq!(link.send(&mut |_| 0).unwrap(), Progress::Wait);
        theirs.read_exact(&mut vec![0; rest]).unwrap();
    });
}

#[test]
fn an_idle_link_is_not_woken_by_room_to_write() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    runtime().block_on(async {
        let mut link = FdLink::new(ours.into()).unwrap();
        let mut once = Some(1000);
        let mut source = |_: &[Segment<'_>]| once.take().unwrap_or(0);
        assert_eq!(link.send(&mut source).unwrap(), Progress::Again);
        assert_eq!(link.send(&mut source).unwrap(), Progress::Wait);
        settle(&mut link).await;
        (&theirs).read_exact(&mut [0; 1000]).unwrap();
        assert_eq!(wakes(&mut link, 100).await, 0);
        (&theirs).write_all(&[1]).unwrap();
        assert_eq!(wakes(&mut link, 100).await, 1);
    });
}

#[test]
fn the_end_of_a_socket_comes_after_its_last_bytes() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (&theirs).write_all(&stream(0, 5000)).unwrap();
    drop(theirs);
    runtime().block_on(async {
        let mut link = FdLink::new(ours.into()).unwrap();
        let mut driver = Driver::new(0);
        let error = driver.drain(&mut link).unwrap_err();
        assert_eq!(driver.received, 5000);
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let error = link.send(&mut |_| 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    });
}

#[test]
fn a_lasting_hang_up_wakes_once() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (master, terminal) = open_pty();
    runtime().block_on(async {
        let mut socket = FdLink::new(ours.into()).unwrap();
        let mut terminal = FdLink::new(terminal).unwrap();
        for link in [&mut socket, &mut terminal] {
            settle(link).await;
            assert_eq!(link.revents().unwrap(), libc::POLLOUT);
        }
        drop((theirs, master));
        for link in [&mut socket, &mut terminal] {
            // The state lasts, and nobody reads: that is how a port waits for its host.
            let woken = wakes(link, 200).await;
            assert!((1..=2).contains(&woken), "{woken} wake-ups");
            assert_ne!(link.revents().unwrap() & libc::POLLHUP, 0);
            assert_eq!(wakes(link, 200).await, 0);
        }
        let error = socket.receive(&mut |_| panic!("no bytes")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(terminal.receive(&mut |_| panic!("no bytes")).is_err());
    });
}

/// A hang-up comes and goes on a virtio port, and on a terminal's master: it sees one while nobody has its
/// other side open (opening it wakes nobody, unlike a port's host).
#[test]
fn a_hang_up_that_ended_does_not_linger() {
    let (master, terminal) = open_pty();
    let name = std::fs::read_link(format!("/proc/self/fd/{}", terminal.as_raw_fd())).unwrap();
    runtime().block_on(async {
        let mut link = FdLink::new(master).unwrap();
        drop(terminal);
        settle(&mut link).await;
        assert_ne!(link.revents().unwrap() & libc::POLLHUP, 0);

        let open = |options: &mut std::fs::OpenOptions| options.open(&name).unwrap();
        let mut terminal = open(std::fs::OpenOptions::new().read(true).write(true));
        assert_eq!(link.revents().unwrap() & libc::POLLHUP, 0);
        assert_eq!(wakes(&mut link, 50).await, 0);
        terminal.write_all(b"x").unwrap();
        assert_eq!(wakes(&mut link, 50).await, 1);
        let mut got = 0;
        let mut sink = |segments: &[Segment<'_>]| got += Cursor::new(segments).remaining();
        while link.receive(&mut sink).unwrap() == Progress::Again {}
        assert_eq!(got, 1);
    });
}

#[test]
fn a_busy_peer_costs_about_one_wake_up_a_write() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let writer = thread::spawn(move || {
        for at in 0..100 {
            (&theirs).write_all(&stream(at, 1)).unwrap();
            thread::sleep(Duration::from_millis(2));
        }
    });
    runtime().block_on(async {
        let mut driver = Driver::new(0);
        let mut link = FdLink::new(ours.into()).unwrap();
        let error = driver.run(&mut link).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(driver.received, 100);
        assert!(driver.wakes <= 110, "{} wake-ups", driver.wakes);
    });
    writer.join().unwrap();
}

#[test]
fn a_blocking_descriptor_is_made_non_blocking() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    runtime().block_on(async {
        let mut link = FdLink::new(ours.into()).unwrap();
        assert_eq!(link.receive(&mut |_| ()).unwrap(), Progress::Wait);
    });
}

#[test]
fn a_descriptor_without_readiness_is_refused() {
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    runtime().block_on(async {
        assert!(FdLink::new(file.into()).is_err());
    });
}

/// Takes the edges that are there already.
async fn settle(link: &mut FdLink) {
    wakes(link, 10).await;
}

/// How often `poll_ready` is ready within so many milliseconds, if nobody receives or sends.
async fn wakes(link: &mut FdLink, millis: u64) -> usize {
    let (mut wakes, mut polls) = (0, 0);
    let wake_up = async {
        loop {
            poll_fn(|cx| {
                polls += 1;
                link.poll_ready(cx)
            })
            .await;
            wakes += 1;
        }
    };
    let _: Result<(), _> = timeout(Duration::from_millis(millis), wake_up).await;
    // One that is ready, one that waits; a few more for what the kernel says in between.
    assert!(
        polls <= 2 * wakes + 4,
        "{polls} polls for {wakes} wake-ups: it spins"
    );
    wakes
}

/// Both sides of a terminal that changes no byte.
fn open_pty() -> (OwnedFd, OwnedFd) {
    use std::os::fd::FromRawFd;
    let (mut master, mut terminal) = (-1, -1);
    // SAFETY: the two descriptors are valid places, and the rest may be null; the descriptors are new.
    unsafe {
        let opened = libc::openpty(
            &raw mut master,
            &raw mut terminal,
            null_mut(),
            null_mut(),
            null_mut(),
        );
        assert_eq!(opened, 0);
        let mut mode = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(terminal, &raw mut mode), 0);
        libc::cfmakeraw(&raw mut mode);
        assert_eq!(libc::tcsetattr(terminal, libc::TCSANOW, &raw const mode), 0);
        (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(terminal))
    }
}
