//! Bytes over the device's rings, both ways.

mod frontend;

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use frontend::guest::{MAX_WRITE, PAGE, PORT_OPEN, PORT_READY};
use frontend::ring::PATIENCE;
use frontend::{Guest, Host, Pattern, Setup, connected, device, log, socket_path};
use virtproxy_engine::channel::Progress;
use virtproxy_engine::segment::Cursor;
use virtproxy_host::device::{Device, PortSpec};
use vm_memory::{Bytes, GuestAddress};

#[test]
fn bytes_go_both_ways_at_once_over_every_kind_of_ring() {
    const TOTAL: usize = 6 << 20;
    for size in [8, 16, 64, 256, 1024] {
        for (event_idx, indirect) in [(true, true), (true, false), (false, true), (false, false)] {
            let setup = Setup {
                size,
                event_idx,
                indirect,
                ports: 1,
                spare: 0,
            };
            let (_handle, _port, guest, mut host) = connected(setup);
            exchange(guest, &mut host, TOTAL);
        }
    }
}

/// Moves so many bytes each way at once.
fn exchange(mut guest: Guest, host: &mut Host, total: usize) {
    let guest = thread::spawn(move || {
        let out = (&mut Pattern::new(1), total);
        guest.exchange(0, out, (&mut Pattern::new(2), total), |_, _| ());
        guest
    });
    host.exchange((&mut Pattern::new(2), total), (&mut Pattern::new(1), total));
    guest.join().unwrap();
}

#[test]
fn indices_wrap_without_a_byte_lost() {
    // More than 65,536 chains each way.
    const TOTAL: usize = 70_000 * PAGE;
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    let guest = thread::spawn(move || {
        let (mut out, mut expected) = (Pattern::new(3), Pattern::new(4));
        let mut chunk = Vec::new();
        let (mut to_write, mut to_read) = (70_000 * 8, TOTAL);
        while to_write > 0 || to_read > 0 {
            if chunk.is_empty() {
                chunk = out.take(8.min(to_write));
            }
            let written = guest.write(0, &chunk);
            chunk.drain(..written);
            to_write -= written;
            let read = guest.take(0, 64 * 1024);
            expected.expect(&read);
            to_read -= read.len();
            if written == 0 && read.is_empty() && (to_read > 0 || to_write > 0) {
                guest.wait(0, to_write > 0);
            }
        }
        guest
    });
    host.exchange(
        (&mut Pattern::new(4), TOTAL),
        (&mut Pattern::new(3), 70_000 * 8),
    );
    guest.join().unwrap();
}

#[test]
fn every_kind_of_ring_wraps() {
    const TOTAL: usize = 1 << 20;
    for size in [8, 32, 128, 512, 1024] {
        for (event_idx, indirect) in [(true, true), (true, false), (false, true), (false, false)] {
            let setup = Setup {
                size,
                event_idx,
                indirect,
                ..Setup::default()
            };
            let path = socket_path();
            let (_handle, mut port) = device(&path);
            // Indices are close to their end, and slots not at theirs.
            let mut guest = Guest::boot_at(&path, setup, u16::MAX - 2);
            guest.wait_host_connected(0, true);
            guest.open(0);
            exchange(guest, &mut Host::open(&mut port), TOTAL);
        }
    }
}

#[test]
fn chains_of_any_layout_are_read_in_order() {
    let setup = |indirect| Setup {
        indirect,
        ..Setup::default()
    };
    for indirect in [true, false] {
        let (_handle, _port, mut guest, mut host) = connected(setup(indirect));
        let ring = Guest::ring_out(0);
        let mut pattern = Pattern::new(13);
        for pieces in [1usize, 2, 7, 33, 64] {
            for len in [1, 3, 509] {
                let bytes = pattern.take(pieces * len);
                let buffer = guest.buffer(ring, guest.rings[ring].next_head().unwrap());
                let mut buffers = Vec::new();
                // From the last to the first, and an empty one between any two.
                for (index, piece) in bytes.chunks(len).enumerate() {
                    let at = buffer + (512 * (pieces - 1 - index)) as u64;
                    guest.memory.write_slice(piece, GuestAddress(at)).unwrap();
                    buffers.push((at, u32::try_from(len).unwrap()));
                    if pieces <= 32 {
                        buffers.push((at, 0));
                    }
                }
                buffers.truncate(64);
                guest.rings[ring].add(&buffers, false).unwrap();
                guest.rings[ring].notify();
                assert!(host.receive(bytes.len()) == bytes, "{pieces} x {len}");
                while guest.rings[ring].pop().is_some() {}
            }
        }
    }
}

#[test]
fn buffers_of_any_layout_are_filled_in_order() {
    for indirect in [true, false] {
        let setup = Setup {
            indirect,
            ..Setup::default()
        };
        let path = socket_path();
        let (_handle, mut port) = device(&path);
        let mut guest = Guest::connect(&path, setup);
        guest.start(&[0; 4]);
        guest.fill(2);
        guest.control(0, PORT_READY, 1);
        guest.control(0, PORT_OPEN, 1);
        let mut host = Host::open(&mut port);
        let mut pattern = Pattern::new(14);
        for lens in [
            &[1u32, 4095][..],
            &[4000, 1, 1, 94],
            &[0, 5000, 0, 3],
            &[64; 64],
        ] {
            let start = guest.buffer(1, 0);
            let mut at = start;
            let buffers: Vec<(u64, u32)> = lens
                .iter()
                .map(|len| {
                    let buffer = (at, *len);
                    // A gap behind each.
                    at += u64::from(*len) + 16;
                    buffer
                })
                .collect();
            guest
                .memory
                .write_slice(
                    &vec![0xee; usize::try_from(at - start).unwrap()],
                    GuestAddress(start),
                )
                .unwrap();
            guest.rings[0].add(&buffers, true).unwrap();
            guest.rings[0].notify();
            let room: usize = lens.iter().map(|len| *len as usize).sum();
            let bytes = pattern.take(room - 1);
            host.send(&bytes);
            guest.rings[0].wait_used();
            let (_, used) = guest.rings[0].pop().unwrap();
            assert_eq!(used as usize, bytes.len());
            let mut left = &bytes[..];
            for (at, len) in buffers {
                let mut got = vec![0; len as usize + 16];
                guest.memory.read_slice(&mut got, GuestAddress(at)).unwrap();
                let (expected, rest) = left.split_at(left.len().min(len as usize));
                assert!(got.starts_with(expected));
                assert!(got[expected.len()..].iter().all(|byte| *byte == 0xee));
                left = rest;
            }
            assert!(left.is_empty());
        }
    }
}

#[test]
fn a_reader_may_take_a_buffer_bit_by_bit() {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    let (mut out, mut expected) = (Pattern::new(15), Pattern::new(15));
    for len in [1, 100, 4095, 4097, 20_000] {
        host.send(&out.take(len));
        let mut left = len;
        while left > 0 {
            let bytes = guest.read_some(0, 997);
            expected.expect(&bytes);
            left -= bytes.len();
        }
    }
    // What was read in part is discarded with the rest.
    host.send(&[1; 5000]);
    guest.read_some(0, 10);
    guest.close(0);
    assert!(host.receive_to_end().is_empty());
    assert_eq!(
        guest.rings[Guest::ring_in(0)].free(),
        0,
        "all buffers are back"
    );
}

#[test]
fn nothing_comes_before_the_port_is_open() {
    let path = socket_path();
    let (_handle, mut port) = device(&path);
    let mut guest = Guest::boot(&path, Setup::default());
    guest.wait_host_connected(0, true);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.interrupt(0), 0);
    guest.open(0);
    Host::open(&mut port).send(b"now");
    assert_eq!(guest.read(0, 3), b"now");
}

/// Bulk both ways, while one side pauses for so long in between.
fn stall(host_stalls: bool, pause: Duration) {
    const TOTAL: usize = 8 << 20;
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    let guest = thread::spawn(move || {
        let out = (&mut Pattern::new(16), TOTAL);
        guest.exchange(0, out, (&mut Pattern::new(17), TOTAL), |_, turn| {
            if !host_stalls && turn == 20 {
                thread::sleep(pause);
            }
        });
        guest
    });
    let out = (&mut Pattern::new(17), TOTAL);
    host.exchange_with(out, (&mut Pattern::new(16), TOTAL), |turn| {
        if host_stalls && turn == 20 {
            thread::sleep(pause);
        }
    });
    guest.join().unwrap();
}

#[test]
fn a_stalled_host_costs_no_byte() {
    stall(true, Duration::from_millis(300));
}

#[test]
fn a_stalled_guest_costs_no_byte() {
    stall(false, Duration::from_millis(300));
}

#[test]
#[ignore = "takes a minute: cargo test -p virtproxy-host --test data -- --ignored"]
fn a_host_stalled_for_a_minute_costs_no_byte() {
    stall(true, Duration::from_secs(61));
}

#[test]
#[ignore = "takes a minute: cargo test -p virtproxy-host --test data -- --ignored"]
fn a_guest_stalled_for_a_minute_costs_no_byte() {
    stall(false, Duration::from_secs(61));
}

#[test]
fn sizes_around_pages_and_writes_arrive_whole() {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    let mut pattern = Pattern::new(5);
    for size in [1, 2, 3, 4095, 4096, 4097, 32_767, 32_768, 32_769, 65_536] {
        let bytes = pattern.take(size);
        guest.write_all(0, &bytes);
        assert!(host.receive(size) == bytes, "{size} bytes from the guest");
        host.send(&bytes);
        assert!(guest.read(0, size) == bytes, "{size} bytes to the guest");
    }
}

/// Bulk both ways; each end compares what comes with what was sent.
fn bulk(total: u64) {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    let block = Cycle::new();
    let (mut out, mut expected) = (block.clone(), block.clone());
    let guest = thread::spawn(move || {
        let (mut to_write, mut to_read) = (total, total);
        while to_write > 0 || to_read > 0 {
            let len = to_write.min(MAX_WRITE as u64);
            let written = guest.write(0, out.peek(usize::try_from(len).unwrap()));
            out.advance(written);
            to_write -= written as u64;
            let read = guest.take(0, 64 * PAGE);
            expected.expect(&read);
            to_read -= read.len() as u64;
            if written == 0 && read.is_empty() && (to_read > 0 || to_write > 0) {
                guest.wait(0, to_write > 0);
            }
        }
        guest
    });
    let (mut out, mut expected) = (block.clone(), block);
    let (mut to_send, mut to_receive) = (total, total);
    let mut buffer = vec![0; 4 << 20];
    while to_send > 0 || to_receive > 0 {
        let received = host.link.receive(&mut |segments| {
            let mut cursor = Cursor::new(segments);
            let bytes = &mut buffer[..cursor.remaining()];
            cursor.read(bytes);
            expected.expect(bytes);
            to_receive = to_receive.checked_sub(bytes.len() as u64).unwrap();
        });
        let sent = host.link.send(&mut |segments| {
            let mut cursor = Cursor::new(segments);
            let room = cursor.remaining().min(MAX_WRITE);
            let len = usize::try_from(to_send.min(room as u64)).unwrap();
            cursor.write(out.peek(len));
            out.advance(len);
            to_send -= len as u64;
            len
        });
        let idle = (received.unwrap(), sent.unwrap()) == (Progress::Wait, Progress::Wait);
        if idle && (to_send > 0 || to_receive > 0) {
            assert!(
                host.wait(PATIENCE),
                "{to_send} to send, {to_receive} to receive"
            );
        }
    }
    guest.join().unwrap();
}

#[test]
fn bulk_arrives_whole_each_way() {
    bulk(64 << 20);
}

#[test]
#[ignore = "moves 9 GiB: cargo test --release -p virtproxy-host --test data -- --ignored"]
fn more_than_4_gib_arrive_whole_each_way() {
    bulk((4 << 30) + (512 << 20));
}

/// Bytes of a length that fits nothing, again and again: as good a check as any pattern, at the speed of `memcmp`.
#[derive(Clone)]
struct Cycle {
    /// One round, and as much of the next as one write may need.
    bytes: Arc<[u8]>,
    at: usize,
}

impl Cycle {
    const ROUND: usize = 1_000_003;

    fn new() -> Self {
        let mut bytes = Pattern::new(18).take(Self::ROUND);
        bytes.extend_from_within(..MAX_WRITE);
        Cycle {
            bytes: bytes.into(),
            at: 0,
        }
    }

    /// The next bytes, at most [`MAX_WRITE`].
    fn peek(&self, len: usize) -> &[u8] {
        &self.bytes[self.at..][..len]
    }

    fn advance(&mut self, len: usize) {
        self.at = (self.at + len) % Self::ROUND;
    }

    fn expect(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(MAX_WRITE) {
            assert!(
                part == self.peek(part.len()),
                "bytes were lost, repeated or changed"
            );
            self.advance(part.len());
        }
    }
}

#[test]
fn a_source_is_offered_its_least_room_or_nothing() {
    let setup = Setup {
        size: 8,
        ..Setup::default()
    };
    let (_handle, _port, mut guest, mut host) = connected(setup);
    let mut rooms = Vec::new();
    while rooms.len() < 8 {
        let progress = host.link.send(&mut |segments| {
            rooms.push(segments.iter().map(|segment| segment.len()).sum::<usize>());
            1
        });
        assert_eq!(progress.unwrap(), Progress::Again);
    }
    assert!(
        rooms.iter().all(|room| *room >= host.link.min_room()),
        "{rooms:?}"
    );
    let full = host.link.send(&mut |_| panic!("offered no room"));
    assert_eq!(full.unwrap(), Progress::Wait);
    while host.wait(Duration::from_millis(50)) {}
    assert_eq!(
        guest.take(0, usize::MAX).len(),
        8,
        "one byte in each buffer"
    );
    assert!(host.wait(Duration::from_secs(5)), "there is room again");
}

#[test]
fn an_idle_link_neither_wakes_nor_kicks() {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    host.send(b"x");
    guest.read(0, 1);
    guest.write_all(0, b"y");
    host.receive(1);
    loop {
        let nothing = host.receive_now().unwrap().is_empty() && host.send_now(b"").unwrap() == 0;
        if nothing && !host.wait(Duration::from_millis(200)) {
            break;
        }
    }
    let before: u64 = guest.rings.iter().map(|ring| ring.kicks).sum();
    guest.write_all(0, b"z");
    assert!(host.wait(Duration::from_secs(5)), "woken by one byte");
    assert_eq!(host.receive(1), b"z");
    let after: u64 = guest.rings.iter().map(|ring| ring.kicks).sum();
    assert_eq!(after - before, 1, "one kick for one byte");
}

#[test]
fn a_full_ring_is_worth_a_kick_when_a_quarter_is_free() {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    let ring = Guest::ring_in(0);
    assert_eq!(host.send_now(&[1; 300 * PAGE]).unwrap(), 256 * PAGE);
    while host.wait(Duration::from_millis(50)) {
        assert_eq!(host.send_now(&[2; PAGE]).unwrap(), 0, "the ring is full");
    }
    let before = guest.rings[ring].kicks;
    for _ in 0..63 {
        assert_eq!(guest.take(0, PAGE).len(), PAGE);
    }
    assert_eq!(guest.rings[ring].kicks, before);
    assert_eq!(guest.take(0, PAGE).len(), PAGE);
    assert_eq!(guest.rings[ring].kicks, before + 1);
    assert!(host.wait(Duration::from_secs(5)));
    assert_eq!(host.send_now(&[3; 300 * PAGE]).unwrap(), 64 * PAGE);
}

#[test]
fn a_driver_with_few_or_small_buffers_is_not_waited_for_in_vain() {
    // Three buffers in a ring of 256; then buffers that make up the least room only together.
    for (count, len) in [(3, 4096), (8, 520), (64, 100)] {
        let path = socket_path();
        let (_handle, mut port) = device(&path);
        let mut guest = Guest::connect(&path, Setup::default());
        guest.start(&[0; 4]);
        guest.fill(2);
        for _ in 0..count {
            let buffer = guest.buffer(0, guest.rings[0].next_head().unwrap());
            guest.rings[0].add(&[(buffer, len)], true).unwrap();
        }
        guest.rings[0].notify();
        guest.control(0, PORT_OPEN, 1);
        let mut host = Host::open(&mut port);
        const TOTAL: usize = 1 << 20;
        let thread = thread::spawn(move || {
            let (mut pattern, mut left) = (Pattern::new(9), TOTAL);
            while left > 0 {
                let Some((head, used)) = guest.rings[0].pop() else {
                    guest.rings[0].wait_used();
                    continue;
                };
                let buffer = guest.buffer(0, head);
                let mut bytes = vec![0; used as usize];
                guest
                    .memory
                    .read_slice(&mut bytes, GuestAddress(buffer))
                    .unwrap();
                pattern.expect(&bytes);
                left -= bytes.len();
                guest.rings[0].add(&[(buffer, len)], true).unwrap();
                guest.rings[0].notify();
            }
        });
        host.send(&Pattern::new(9).take(TOTAL));
        thread.join().unwrap();
    }
}

#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    let setup = Setup {
        event_idx: false,
        ..Setup::default()
    };
    let (_handle, _port, mut guest, mut host) = connected(setup);
    let ring = Guest::ring_in(0);
    let _ = guest.rings[ring].call.read();
    guest.rings[ring].set_interrupts_off(true);
    host.send(b"quiet");
    assert!(guest.rings[ring].call.read().is_err());
    guest.rings[ring].set_interrupts_off(false);
    host.send(b"loud");
    assert!(guest.rings[ring].call.read().is_ok());
    assert_eq!(guest.read(0, 9), b"quietloud");
}

#[test]
fn a_link_that_polls_before_it_sleeps_misses_nothing() {
    const CALLS: usize = 500;
    let path = socket_path();
    let (_handle, mut port) = device(&path);
    port.set_busy_poll(Duration::from_millis(1));
    let mut guest = Guest::boot(&path, Setup::default());
    guest.wait_host_connected(0, true);
    guest.open(0);
    let mut host = Host::open(&mut port);
    let guest = thread::spawn(move || {
        for call in 0..CALLS {
            let bytes = guest.read(0, 64);
            // Sometimes sooner than the host would sleep, sometimes later.
            if call % 50 == 0 {
                thread::sleep(Duration::from_millis(3));
            }
            guest.write_all(0, &bytes);
        }
        guest
    });
    let mut pattern = Pattern::new(10);
    for _ in 0..CALLS {
        let bytes = pattern.take(64);
        host.send(&bytes);
        assert_eq!(host.receive(64), bytes);
    }
    guest.join().unwrap();
}

#[test]
fn ports_do_not_mix() {
    log();
    let path = socket_path();
    let names = ["org.example.a", "org.example.b", "org.example.c"];
    let specs = names.map(PortSpec::generic).to_vec();
    let (_handle, mut ports) = Device::start(Path::new(&path), specs, 3).unwrap();
    let setup = Setup {
        ports: 3,
        ..Setup::default()
    };
    let mut guest = Guest::boot(&path, setup);
    let mut hosts: Vec<Host> = Vec::new();
    for (index, port) in ports.iter_mut().enumerate() {
        guest.wait_host_connected(index, true);
        assert_eq!(
            guest.ports[index].name.as_deref(),
            Some(names[index].as_bytes())
        );
        assert!(Host::try_open(port, Duration::from_millis(20)).is_none());
        guest.open(index);
        hosts.push(Host::open(port));
    }
    for (index, host) in hosts.iter_mut().enumerate() {
        guest.write_all(index, names[index].as_bytes());
        host.send(names[index].as_bytes());
    }
    for (index, host) in hosts.iter_mut().enumerate() {
        assert_eq!(host.receive(names[index].len()), names[index].as_bytes());
        assert_eq!(
            guest.read(index, names[index].len()),
            names[index].as_bytes()
        );
    }
    guest.close(1);
    assert!(hosts[1].receive_to_end().is_empty());
    guest.write_all(2, b"still here");
    assert_eq!(hosts[2].receive(10), b"still here");
}
