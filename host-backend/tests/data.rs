//! Bytes over the device's rings, both ways.

mod frontend;

use std::path::Path;
use std::thread;
use std::time::Duration;

use frontend::guest::{DEVICE_ADD, MAX_WRITE, PAGE, PORT_NAME, PORT_OPEN};
use frontend::{Guest, Host, NAME, Pattern, Setup, connected, device, log, socket_path};
use virtproxy_engine::channel::{Channel, Progress};
use virtproxy_host::device::{Device, PortSpec};
use vm_memory::{Bytes, GuestAddress};

/// The guest writes and reads so many bytes of the patterns at once.
fn exchange(
    guest: &mut Guest,
    port: usize,
    out: (&mut Pattern, usize),
    inn: (&mut Pattern, usize),
) {
    let (mut to_write, mut to_read) = (out.1, inn.1);
    let mut chunk: Vec<u8> = Vec::new();
    while to_write > 0 || to_read > 0 {
        let mut idle = true;
        if to_write > 0 {
            if chunk.is_empty() {
                chunk = out.0.take(to_write.min(MAX_WRITE - 7));
            }
            let written = guest.write(port, &chunk);
            chunk.drain(..written);
            to_write -= written;
            idle &= written == 0;
        }
        let read = guest.take(port, 64 * 1024);
        inn.0.expect(&read);
        to_read = to_read.checked_sub(read.len()).expect("too many bytes");
        idle &= read.is_empty();
        if idle && (to_read > 0 || to_write > 0) {
            guest.wait(port, to_write > 0);
        }
    }
}

#[test]
fn the_port_appears_with_its_exact_name() {
    let path = socket_path();
    let (_handle, port) = device(&path);
    assert_eq!(port.name(), format!("vhost-user:{}", path.display()));
    let mut guest = Guest::boot(&path, Setup::default());
    guest.wait_host_connected(0, true);
    assert_eq!(guest.ports[0].name.as_deref(), Some(NAME.as_bytes()));
    let order: Vec<u16> = guest.heard.iter().map(|message| message.event).collect();
    assert_eq!(order, [DEVICE_ADD, PORT_NAME, PORT_OPEN]);
}

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
            let (_handle, _port, mut guest, mut host) = connected(setup);
            let guest = thread::spawn(move || {
                let out = (&mut Pattern::new(1), TOTAL);
                exchange(&mut guest, 0, out, (&mut Pattern::new(2), TOTAL));
                guest
            });
            host.exchange((&mut Pattern::new(2), TOTAL), (&mut Pattern::new(1), TOTAL));
            guest.join().unwrap();
        }
    }
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
