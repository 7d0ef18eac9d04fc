//! The control queues: who is announced how, what of the guest's messages counts, and that each is taken soon.

mod frontend;

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use frontend::guest::{
    Control, DEVICE_ADD, DEVICE_READY, MAX_WRITE, PAGE, PORT_NAME, PORT_OPEN, PORT_READY,
};
use frontend::ring::WRITE;
use frontend::{Guest, Host, NAME, Setup, assert_alive, connected, device, log, socket_path};
use virtproxy_engine::channel::Channel;
use virtproxy_host::device::{Device, MAX_PORTS, PortSpec};
use vm_memory::{Bytes, GuestAddress};

const CONTROL_OUT: usize = 3;
const FAR: u64 = 1 << 40;

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
fn each_port_gets_its_name_before_it_is_opened() {
    log();
    let path = socket_path();
    let name = |index| format!("org.example.{index}");
    let specs = (0..MAX_PORTS).map(|index| PortSpec::generic(name(index)));
    let (_handle, _ports) = Device::start(Path::new(&path), specs.collect(), MAX_PORTS).unwrap();
    let setup = Setup {
        size: 8,
        ports: MAX_PORTS,
        ..Setup::default()
    };
    let mut guest = Guest::boot(&path, setup);
    for index in 0..MAX_PORTS {
        guest.wait_host_connected(index, true);
        let id = u32::try_from(index).unwrap();
        let heard: Vec<&Control> = guest.heard.iter().filter(|m| m.id == id).collect();
        let order: Vec<u16> = heard.iter().map(|message| message.event).collect();
        assert_eq!(order, [DEVICE_ADD, PORT_NAME, PORT_OPEN], "port {index}");
        assert_eq!(heard[1].rest, name(index).as_bytes());
    }
}

#[test]
fn a_driver_that_says_ready_again_begins_anew() {
    let (_handle, mut port, mut guest, mut host) = connected(Setup::default());
    for _ in 0..10 {
        guest.write_all(0, b"before");
        guest.ports[0] = Default::default();
        guest.heard.clear();
        guest.control(u32::MAX, DEVICE_READY, 1);
        assert!(host.receive_to_end().is_empty(), "no byte counts any more");
        drop(host);
        guest.wait_host_connected(0, true);
        let order: Vec<u16> = guest.heard.iter().map(|message| message.event).collect();
        assert_eq!(order, [DEVICE_ADD, PORT_NAME, PORT_OPEN]);
        guest.open(0);
        host = Host::open(&mut port);
        guest.write_all(0, b"after");
        assert_eq!(host.receive(5), b"after");
    }
}

#[test]
fn a_driver_that_never_says_ready_is_told_nothing() {
    let path = socket_path();
    let (_handle, mut port) = device(&path);
    let mut guest = Guest::connect(&path, Setup::default());
    guest.start(&[0; 4]);
    guest.fill(2);
    // A driver that could not set up the device.
    guest.control(u32::MAX, DEVICE_READY, 0);
    thread::sleep(Duration::from_millis(50));
    guest.handle_control();
    assert_eq!(guest.heard, []);
    // One that was told everything by an earlier process is taken at its word.
    guest.fill(Guest::ring_in(0));
    guest.control(0, PORT_READY, 1);
    guest.wait_host_connected(0, true);
    guest.open(0);
    assert_alive(&mut guest, &mut Host::open(&mut port));
}

#[test]
fn a_port_that_the_driver_could_not_set_up_is_not_open() {
    let (_handle, mut port, mut guest, mut host) = connected(Setup::default());
    guest.control(0, PORT_READY, 0);
    assert!(host.receive_to_end().is_empty());
    drop(host);
    assert!(Host::try_open(&mut port, Duration::from_millis(20)).is_none());
    guest.control(0, PORT_READY, 1);
    guest.open(0);
    assert_alive(&mut guest, &mut Host::open(&mut port));
}

#[test]
fn a_message_may_lie_in_any_number_of_descriptors() {
    let (_handle, mut port, mut guest, mut host) = connected(Setup::default());
    let message = |open: u8| [0, 0, 0, 0, PORT_OPEN.to_le_bytes()[0], 0, open, 0];
    for pieces in [1, 2, 3, 8] {
        for open in [0, 1] {
            let buffer = guest.buffer(CONTROL_OUT, guest.rings[CONTROL_OUT].next_head().unwrap());
            // Spread out, so that only the descriptors tell what belongs together.
            let mut buffers = Vec::new();
            for (index, piece) in message(open).chunks(8usize.div_ceil(pieces)).enumerate() {
                let at = buffer + 64 * index as u64;
                guest.memory.write_slice(piece, GuestAddress(at)).unwrap();
                buffers.push((at, u32::try_from(piece.len()).unwrap()));
            }
            guest.rings[CONTROL_OUT].add(&buffers, false).unwrap();
            guest.rings[CONTROL_OUT].notify();
            guest.rings[CONTROL_OUT].spin("the message was not taken");
            guest.ports[0].guest_connected = open == 1;
        }
        assert!(host.receive_to_end().is_empty());
        drop(host);
        host = Host::open(&mut port);
        assert_alive(&mut guest, &mut host);
    }
}

#[test]
fn a_port_may_be_opened_and_closed_a_thousand_times_while_nobody_looks() {
    let (_handle, mut port, mut guest, mut host) = connected(Setup::default());
    guest.close(0);
    for _ in 0..1000 {
        guest.open(0);
        guest.close(0);
    }
    guest.open(0);
    assert!(host.receive_to_end().is_empty());
    drop(host);
    assert_alive(&mut guest, &mut Host::open(&mut port));
}

/// The slowest of some control messages, and how long half of them took.
fn control_latency(guest: &mut Guest) -> (Duration, Duration) {
    let mut times: Vec<Duration> = (0..500)
        .map(|_| {
            let begin = Instant::now();
            guest.control(0, 99, 0);
            begin.elapsed()
        })
        .collect();
    times.sort();
    (times[times.len() - 1], times[times.len() / 2])
}

#[test]
fn control_messages_are_taken_while_data_is_stuck_both_ways() {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    let idle = control_latency(&mut guest);
    // The host does not receive, the guest does not read, and the link tries again without end.
    while guest.write(0, &[1; MAX_WRITE]) > 0 {}
    while host.send_now(&[2; PAGE]).unwrap() > 0 {}
    let stuck = thread::scope(|scope| {
        let control = scope.spawn(|| control_latency(&mut guest));
        while !control.is_finished() {
            assert_eq!(host.send_now(&[2; PAGE]).unwrap(), 0);
            host.wait(Duration::from_micros(50));
        }
        control.join().unwrap()
    });
    // And while both move as fast as they can.
    let busy = thread::scope(|scope| {
        let control = scope.spawn(|| {
            let mut worst = Duration::ZERO;
            for _ in 0..300 {
                let begin = Instant::now();
                guest.control(0, 99, 0);
                worst = worst.max(begin.elapsed());
                guest.take(0, 64 * PAGE);
                while guest.write(0, &[1; MAX_WRITE]) > 0 {}
            }
            worst
        });
        while !control.is_finished() {
            host.receive_now().unwrap();
            host.send_now(&[2; 64 * PAGE]).unwrap();
            host.wait(Duration::from_micros(50));
        }
        control.join().unwrap()
    });
    println!("worst and median: idle {idle:?}, data stuck {stuck:?}; worst in a flood {busy:?}");
}

#[test]
fn control_messages_that_make_no_sense_are_taken_and_ignored() {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    for len in [1, 2, 7] {
        guest.control_raw(&vec![0xff; len]);
    }
    guest.control_raw(&[0xff; 4096]);
    for event in [1, 2, 4, 5, 7, 8, 99, u16::MAX] {
        guest.control(0, event, 1);
    }
    for id in [1, 2, 1000, u32::MAX] {
        for event in [PORT_READY, PORT_OPEN] {
            guest.control(id, event, 1);
        }
    }
    assert_alive(&mut guest, &mut host);
}

#[test]
fn control_chains_that_are_malformed_are_given_back() {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    let ring = &mut guest.rings[3];
    let table = ring.descriptors_at();
    for (addr, len, flags) in [(FAR, 8, 0), (0x80_0000, 8, WRITE), (0x80_0000, 0, 0)] {
        let head = ring.take_head().unwrap();
        ring.write_descriptor(table, head, (addr, len), flags, 0);
        ring.publish(head);
        ring.notify();
        let end = Instant::now() + Duration::from_secs(5);
        while ring.pop().is_none() {
            assert!(Instant::now() < end, "not given back");
        }
    }
    assert_alive(&mut guest, &mut host);
}

#[test]
fn a_guest_that_asks_without_end_and_never_listens_is_owed_little() {
    let path = socket_path();
    let (_handle, mut port) = device(&path);
    let mut guest = Guest::connect(&path, Setup::default());
    guest.start(&[0; 4]);
    for _ in 0..10_000 {
        guest.control(0, DEVICE_READY, 1);
        guest.control(0, PORT_READY, 1);
    }
    // Now it gives one buffer after the other: name and open, and nothing more.
    guest.fill(2);
    guest.wait_host_connected(0, true);
    thread::sleep(Duration::from_millis(50));
    guest.handle_control();
    let heard: Vec<u16> = guest.heard.iter().map(|message| message.event).collect();
    assert_eq!(heard, [PORT_NAME, PORT_OPEN]);
    assert_eq!(guest.ports[0].name.as_deref(), Some(NAME.as_bytes()));
    guest.fill(0);
    guest.open(0);
    assert_alive(&mut guest, &mut Host::open(&mut port));
}

#[test]
fn control_buffers_too_small_for_the_message_are_passed_over() {
    let path = socket_path();
    let (_handle, _port) = device(&path);
    let mut guest = Guest::connect(&path, Setup::default());
    guest.start(&[0; 4]);
    for len in [1, 7, 8, 9] {
        let buffer = guest.buffer(2, 0);
        guest.rings[2].add(&[(buffer, len)], true).unwrap();
    }
    guest.rings[2].notify();
    guest.control(0, DEVICE_READY, 1);
    guest.control(0, PORT_READY, 1);
    for want in [0, 0, 8] {
        guest.rings[2].wait_used();
        assert_eq!(guest.rings[2].pop().unwrap().1, want);
    }
    guest.fill(2);
    guest.rings[2].wait_used();
    assert_eq!(
        guest.rings[2].pop().unwrap().1,
        0,
        "9 bytes are too few for the name"
    );
    guest.wait_host_connected(0, true);
}

#[test]
fn openings_without_end_are_bounded() {
    let (_handle, mut port, mut guest, host) = connected(Setup::default());
    drop(host);
    for _ in 0..2000 {
        guest.control(0, PORT_OPEN, 1);
    }
    guest.control(0, PORT_OPEN, 0);
    guest.wait_host_connected(0, true);
    guest.control(0, PORT_OPEN, 1);
    assert_alive(&mut guest, &mut Host::open(&mut port));
}
