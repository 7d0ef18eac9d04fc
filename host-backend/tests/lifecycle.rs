//! Opening, closing, stopping, rebooting, and QEMUs that come and go.

mod frontend;

use std::io;
use std::thread;
use std::time::Duration;

use frontend::guest::PORT_OPEN;
use frontend::{Guest, Host, Pattern, Setup, connected, device, socket_path};
use virtproxy_engine::channel::Progress;
use virtproxy_engine::unix_socket::ListenError;
use virtproxy_host::device::{Device, PortSpec, StartError};

const SOON: Duration = Duration::from_millis(100);

#[test]
fn nothing_is_sent_before_the_guest_opens_the_port() {
    let path = socket_path();
    let (_handle, mut port) = device(&path);
    assert!(Host::try_open(&mut port, SOON).is_none(), "no QEMU");
    let mut guest = Guest::boot(&path, Setup::default());
    guest.wait_host_connected(0, true);
    assert!(Host::try_open(&mut port, SOON).is_none(), "not open");
    guest.open(0);
    Host::open(&mut port).send(b"now");
    assert_eq!(guest.read(0, 3), b"now");
}

#[test]
fn what_was_written_before_a_close_is_received_and_nothing_else() {
    let (_handle, mut port, mut guest, mut first) = connected(Setup::default());
    guest.write_all(0, b"tail of the first");
    guest.close(0);
    guest.open(0);
    guest.write_all(0, b"head of the second");
    assert!(
        Host::try_open(&mut port, SOON).is_none(),
        "the first link is still there"
    );
    assert_eq!(first.receive_to_end(), b"tail of the first");
    drop(first);
    let mut second = Host::open(&mut port);
    assert_eq!(second.receive(18), b"head of the second");
    second.send(b"answer");
    assert_eq!(guest.read(0, 6), b"answer");
    assert!(guest.ports[0].host_connected, "the host never hung up");
}

#[test]
fn what_a_dropped_link_did_not_receive_is_not_the_next_links() {
    let (_handle, mut port, mut guest, first) = connected(Setup::default());
    guest.write_all(0, &[1; 100_000]);
    guest.close(0);
    drop(first);
    guest.open(0);
    guest.write_all(0, b"mine");
    let mut second = Host::open(&mut port);
    assert_eq!(second.receive(4), b"mine");
}

#[test]
fn nothing_goes_into_the_ring_of_a_closed_port() {
    let (_handle, mut port, mut guest, mut host) = connected(Setup::default());
    for _ in 0..200 {
        // The guest closes in the middle of a flood; from then on its ring must stay as it is.
        let (mut guest_back, closed) = thread::scope(|scope| {
            let thread = scope.spawn(move || {
                guest.read(0, 4096);
                guest.close(0);
                let stale = guest.discard(0);
                thread::sleep(Duration::from_millis(1));
                let late = guest.discard(0);
                (guest, (stale, late))
            });
            loop {
                let sent = host
                    .link
                    .send(&mut |segments| segments.iter().map(|s| s.len()).sum());
                let received = host.receive_now();
                match (sent, received) {
                    (_, Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                    (Ok(Progress::Again), Ok(_)) => {}
                    (Ok(Progress::Wait), Ok(_)) => assert!(host.wait(Duration::from_secs(10))),
                    (sent, received) => panic!("{sent:?} {received:?}"),
                }
            }
            thread.join().unwrap()
        });
        assert_eq!(closed, (0, 0), "bytes came after the close was taken");
        drop(host);
        guest_back.open(0);
        host = Host::open(&mut port);
        guest = guest_back;
    }
}

#[test]
fn a_close_in_mid_flood_leaves_each_session_its_own_bytes() {
    let (_handle, mut port, mut guest, mut host) = connected(Setup::default());
    let mut random = Pattern::new(30);
    for round in 0..150 {
        let mut expected = Pattern::new(100 + round);
        let chunks = random.take(1)[0] % 64;
        let flood = thread::spawn(move || {
            let (mut pattern, mut written) = (Pattern::new(100 + round), 0);
            for _ in 0..chunks {
                match guest.write(0, &pattern.take(9999)) {
                    0 => break,
                    len => written += len,
                }
            }
            guest.close(0);
            (guest, written)
        });
        // Received under way, all of it after the end, or not at all.
        let received = (round % 3 == 0).then(|| host.receive_to_end());
        let (back, written) = flood.join().unwrap();
        guest = back;
        if round % 3 == 2 {
            drop(host);
        } else {
            let bytes = received.unwrap_or_else(|| host.receive_to_end());
            assert_eq!(bytes.len(), written);
            expected.expect(&bytes);
            drop(host);
        }
        guest.open(0);
        host = Host::open(&mut port);
    }
}

#[test]
fn quick_openings_are_links_of_their_own() {
    let (_handle, mut port, mut guest, mut first) = connected(Setup::default());
    guest.close(0);
    for number in 0..10u8 {
        guest.open(0);
        guest.write_all(0, &[number; 10]);
        guest.close(0);
        guest.open(0);
        guest.close(0);
    }
    guest.open(0);
    assert!(first.receive_to_end().is_empty());
    drop(first);
    for number in 0..10u8 {
        assert_eq!(Host::open(&mut port).receive_to_end(), [number; 10]);
    }
    let mut last = Host::open(&mut port);
    last.send(b"open");
    assert_eq!(guest.read(0, 4), b"open");
}

#[test]
fn a_thousand_openings_with_bytes_each_way() {
    let (_handle, mut port, mut guest, mut host) = connected(Setup::default());
    let mut pattern = Pattern::new(6);
    for _ in 0..1000 {
        let bytes = pattern.take(5000);
        guest.write_all(0, &bytes);
        host.send(&bytes);
        assert!(guest.read(0, 5000) == bytes);
        guest.close(0);
        assert!(host.receive_to_end() == bytes);
        drop(host);
        guest.open(0);
        host = Host::open(&mut port);
    }
}

#[test]
fn dropping_a_link_hangs_up_until_the_guest_has_reopened() {
    let (_handle, mut port, mut guest, host) = connected(Setup::default());
    drop(host);
    guest.wait_host_connected(0, false);
    assert!(
        Host::try_open(&mut port, SOON).is_none(),
        "not before the guest has closed"
    );
    assert_eq!(guest.write(0, b"no"), 0, "the guest sees a hang-up");
    guest.close(0);
    guest.wait_host_connected(0, true);
    assert!(
        Host::try_open(&mut port, SOON).is_none(),
        "not before the guest has opened"
    );
    guest.open(0);
    let mut host = Host::open(&mut port);
    guest.write_all(0, b"again");
    assert_eq!(host.receive(5), b"again");
}

#[test]
fn a_guest_that_has_not_seen_the_hang_up_is_never_blocked_by_it() {
    let (_handle, mut port, mut guest, host) = connected(Setup::default());
    drop(host);
    guest.wait_host_connected(0, false);
    // As if it had not heard, it goes on writing, many times the ring.
    guest.ports[0].host_connected = true;
    for _ in 0..2000 {
        guest.write_all(0, &[7; 32_768]);
    }
    guest.close(0);
    guest.wait_host_connected(0, true);
    guest.open(0);
    guest.write_all(0, b"fresh");
    assert_eq!(Host::open(&mut port).receive(5), b"fresh");
}

#[test]
fn dropping_a_link_that_has_ended_does_not_hang_up() {
    let (_handle, mut port, mut guest, mut host) = connected(Setup::default());
    guest.close(0);
    host.receive_to_end();
    drop(host);
    guest.open(0);
    let host = Host::open(&mut port);
    guest.handle_control();
    assert!(guest.ports[0].host_connected);
    let opens = guest
        .heard
        .iter()
        .filter(|message| message.event == PORT_OPEN)
        .count();
    assert_eq!(opens, 1, "the host opened once and never closed");
    drop(host);
    guest.wait_host_connected(0, false);
}

#[test]
fn dropping_the_port_closes_the_hosts_side() {
    let (_handle, port, mut guest, host) = connected(Setup::default());
    drop(host);
    drop(port);
    guest.wait_host_connected(0, false);
    guest.close(0);
    guest.open(0);
    thread::sleep(SOON);
    guest.handle_control();
    assert!(!guest.ports[0].host_connected);
}

#[test]
fn a_paused_machine_loses_nothing() {
    const TOTAL: usize = 3 << 20;
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    let thread = thread::spawn(move || {
        let out = (&mut Pattern::new(7), TOTAL);
        guest.exchange(0, out, (&mut Pattern::new(8), TOTAL), |guest, turn| {
            if turn % 50 == 49 {
                guest.pause_and_resume(|_| thread::sleep(Duration::from_millis(2)));
            }
        });
        guest
    });
    host.exchange((&mut Pattern::new(8), TOTAL), (&mut Pattern::new(7), TOTAL));
    let mut guest = thread.join().unwrap();
    guest.close(0);
    assert!(host.receive_to_end().is_empty());
}

#[test]
fn a_link_waits_while_the_machine_is_paused() {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    guest.write_all(0, b"before");
    let bases = guest.stop();
    assert_eq!(host.receive_once().unwrap(), (Vec::new(), Progress::Wait));
    assert_eq!(host.send_now(b"kept").unwrap(), 0);
    while host.wait(SOON) {}
    guest.start(&bases);
    assert!(
        host.wait(Duration::from_secs(5)),
        "told that the machine goes on"
    );
    assert_eq!(host.receive(6), b"before");
    host.send(b"kept");
    assert_eq!(guest.read(0, 4), b"kept");
    guest.control(0, PORT_OPEN, 0);
    assert!(
        host.receive_to_end().is_empty(),
        "the control queue goes on, too"
    );
}

#[test]
fn a_tail_survives_a_pause() {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    guest.write_all(0, b"tail");
    guest.close(0);
    guest.pause_and_resume(|_| {
        assert_eq!(host.receive_once().unwrap(), (Vec::new(), Progress::Wait));
    });
    assert_eq!(host.receive_to_end(), b"tail");
}

#[test]
fn a_reboot_ends_the_link_and_the_port_comes_back() {
    let (_handle, mut port, mut guest, mut host) = connected(Setup::default());
    for round in 0..20 {
        guest.write_all(0, b"lost with the old kernel");
        if round % 2 == 0 {
            guest.close(0);
        }
        guest.reboot();
        assert!(host.receive_to_end().is_empty());
        assert!(host.link.send(&mut |_| panic!("no room any more")).is_err());
        guest.wait_host_connected(0, true);
        assert!(Host::try_open(&mut port, Duration::from_millis(5)).is_none());
        drop(host);
        guest.open(0);
        host = Host::open(&mut port);
        guest.write_all(0, b"new kernel");
        assert_eq!(host.receive(10), b"new kernel");
        host.send(b"hello");
        assert_eq!(guest.read(0, 5), b"hello");
        guest.handle_control();
        assert!(
            guest.ports[0].host_connected,
            "no hang-up for the new kernel"
        );
    }
}

#[test]
fn a_hang_up_does_not_outlive_the_kernel_that_saw_it() {
    let (_handle, mut port, mut guest, host) = connected(Setup::default());
    drop(host);
    guest.wait_host_connected(0, false);
    guest.reboot();
    guest.wait_host_connected(0, true);
    guest.open(0);
    guest.write_all(0, b"here");
    assert_eq!(Host::open(&mut port).receive(4), b"here");
}

#[test]
fn a_guest_that_wakes_from_suspension_begins_a_new_session() {
    let (_handle, mut port, mut guest, mut host) = connected(Setup::default());
    guest.write_all(0, b"lost");
    guest.heard.clear();
    guest.suspend_and_resume();
    assert!(host.receive_to_end().is_empty());
    drop(host);
    // The program in the guest is in the middle of a frame that will not go on.
    guest.wait_host_closes(0);
    guest.close(0);
    guest.wait_host_connected(0, true);
    guest.open(0);
    let mut host = Host::open(&mut port);
    guest.write_all(0, b"awake");
    assert_eq!(host.receive(5), b"awake");
}

#[test]
fn the_end_of_qemu_ends_the_link_and_the_next_one_is_served() {
    let path = socket_path();
    let (_handle, mut port) = device(&path);
    for round in 0..5 {
        let mut guest = Guest::boot(&path, Setup::default());
        guest.wait_host_connected(0, true);
        guest.open(0);
        let mut host = Host::open(&mut port);
        guest.write_all(0, b"hello");
        assert_eq!(host.receive(5), b"hello");
        if round % 2 == 0 {
            // QEMU waits to be served while the last one ends.
            let next = thread::spawn({
                let path = path.clone();
                move || Guest::boot(&path, Setup::default())
            });
            thread::sleep(Duration::from_millis(20));
            drop(guest);
            assert!(host.receive_to_end().is_empty());
            drop(next.join().unwrap());
        } else {
            drop(guest);
            assert!(host.receive_to_end().is_empty());
        }
    }
}

#[test]
fn dropping_the_handle_ends_everything() {
    let (handle, mut port, _guest, mut host) = connected(Setup::default());
    drop(handle);
    assert!(host.receive_to_end().is_empty());
    assert!(Host::try_open(&mut port, SOON).is_none());
}

#[test]
fn one_path_one_device() {
    let path = socket_path();
    let (handle, _port) = device(&path);
    let specs = || vec![PortSpec::generic("x")];
    let second = Device::start(&path, specs(), 1);
    assert!(matches!(
        second,
        Err(StartError::Listen(ListenError::InUse(_)))
    ));
    let guest = Guest::boot(&path, Setup::default());
    assert!(matches!(
        Device::start(&path, specs(), 1),
        Err(StartError::Listen(ListenError::InUse(_)))
    ));
    drop(guest);
    drop(handle);
    assert!(!path.exists());
    assert!(Device::start(&path, specs(), 1).is_ok());
}

#[test]
fn a_bad_specification_is_refused() {
    let path = socket_path();
    let start = |specs| Device::start(&path, specs, 1).map(|_| ());
    assert!(matches!(start(vec![]), Err(StartError::Ports(0))));
    assert!(matches!(
        start(vec![PortSpec::generic("x"); 32]),
        Err(StartError::Ports(32))
    ));
    for name in ["", "a/b", "a b", "a\n"] {
        assert!(matches!(
            start(vec![PortSpec::generic(name)]),
            Err(StartError::Name(_))
        ));
    }
    assert!(!path.exists());
}
