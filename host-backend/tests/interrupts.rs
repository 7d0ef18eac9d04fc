//! When the guest is interrupted for what it wrote.

mod frontend;

use std::thread;
use std::time::{Duration, Instant};

use frontend::ring::{PATIENCE, Ring};
use frontend::{Guest, Host, Setup, connected};
use virtproxy_host::device::{DeviceHandle, Port};

const OUT: usize = 1;

/// Sixteen descriptors, one in each chain of one buffer.
const SMALL: Setup = Setup {
    size: 16,
    event_idx: true,
    indirect: false,
    ports: 1,
    spare: 0,
};

/// [`connected`], with a guest that was not interrupted yet.
fn quiet(setup: Setup) -> (DeviceHandle, Port, Guest, Host) {
    let all = connected(setup);
    let _ = all.2.rings[OUT].call.read();
    all
}

fn is_interrupted(ring: &Ring) -> bool {
    ring.call.read().is_ok()
}

/// Lets the host idle until the guest is interrupted.
fn wait_interrupted(host: &mut Host, ring: &Ring) {
    let end = Instant::now() + PATIENCE;
    while !is_interrupted(ring) {
        assert!(Instant::now() < end, "no interrupt came");
        host.wait(Duration::from_millis(5));
    }
}

#[test]
fn an_interrupt_that_can_wait_comes_though_nothing_follows() {
    let (_handle, _port, mut guest, mut host) = quiet(SMALL);
    guest.write_all(0, b"one");
    assert_eq!(host.receive(3), b"one");
    assert!(!is_interrupted(&guest.rings[OUT]), "it can wait");
    wait_interrupted(&mut host, &guest.rings[OUT]);
    host.wait(Duration::from_millis(20));
    assert!(!is_interrupted(&guest.rings[OUT]), "once is enough");
}

#[test]
fn who_sends_and_sends_interrupts_too() {
    let (_handle, _port, mut guest, mut host) = quiet(SMALL);
    guest.write_all(0, b"one");
    assert_eq!(host.receive(3), b"one");
    let end = Instant::now() + PATIENCE;
    while !is_interrupted(&guest.rings[OUT]) {
        assert!(Instant::now() < end, "no interrupt came");
        // Other tasks have their turn, but the link is never waited for.
        host.wait_for_others();
        host.send_now(b"x").unwrap();
        guest.discard(0);
    }
}

#[test]
fn half_a_ring_in_use_is_told_of_at_once() {
    for (chains, pieces, at_once) in [(7, 1, false), (8, 1, true), (1, 7, false), (2, 4, true)] {
        let (_handle, _port, mut guest, mut host) = quiet(SMALL);
        for _ in 0..chains {
            let buffer = guest.buffer(OUT, guest.rings[OUT].next_head().unwrap());
            let buffers = vec![(buffer, 1); pieces];
            guest.rings[OUT].add(&buffers, false).unwrap();
        }
        guest.rings[OUT].notify();
        host.receive(chains * pieces);
        assert_eq!(
            is_interrupted(&guest.rings[OUT]),
            at_once,
            "{chains} chains of {pieces}"
        );
    }
}

#[test]
fn a_guest_that_goes_on_by_itself_is_left_alone() {
    const ROUNDS: u32 = 500;
    let (_handle, _port, mut guest, mut host) = quiet(SMALL);
    let mut interrupts = 0;
    for _ in 0..ROUNDS {
        // Takes back what it wrote before.
        guest.write_all(0, b"bytes");
        assert_eq!(host.receive(5), b"bytes");
        interrupts += u32::from(is_interrupted(&guest.rings[OUT]));
    }
    assert!(interrupts < ROUNDS / 2, "interrupted {interrupts} times");
}

#[test]
fn a_guest_that_waits_for_each_buffer_goes_on() {
    const WRITES: usize = 600;
    for event_idx in [true, false] {
        let (_handle, _port, mut guest, mut host) = quiet(Setup { event_idx, ..SMALL });
        let guest = thread::spawn(move || {
            for _ in 0..WRITES {
                let buffer = guest.buffer(OUT, guest.rings[OUT].next_head().unwrap());
                let ring = &mut guest.rings[OUT];
                ring.add(&[(buffer, 1)], false).unwrap();
                ring.notify();
                ring.wait_interrupted();
                ring.pop().expect("interrupted without cause");
            }
        });
        host.receive(WRITES);
        // The last one.
        while !guest.is_finished() {
            host.wait(Duration::from_millis(5));
        }
        guest.join().unwrap();
    }
}

#[test]
fn what_is_owed_is_told_of_when_the_link_ends() {
    let (_handle, _port, mut guest, mut host) = quiet(SMALL);
    guest.write_all(0, b"last");
    assert_eq!(host.receive(4), b"last");
    assert!(!is_interrupted(&guest.rings[OUT]));
    drop(host);
    assert!(is_interrupted(&guest.rings[OUT]));
}

#[test]
fn what_is_owed_is_told_of_after_a_pause() {
    let (_handle, _port, mut guest, mut host) = quiet(SMALL);
    guest.write_all(0, b"last");
    assert_eq!(host.receive(4), b"last");
    assert!(!is_interrupted(&guest.rings[OUT]));
    guest.pause_and_resume(|guest| {
        host.wait(Duration::from_millis(20));
        let _ = is_interrupted(&guest.rings[OUT]);
    });
    wait_interrupted(&mut host, &guest.rings[OUT]);
}
