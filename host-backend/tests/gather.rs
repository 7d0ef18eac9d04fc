//! When the guest is asked to kick for what it writes.

mod frontend;

use frontend::ring::PATIENCE;
use frontend::{Guest, Host, Setup, connected};

const OUT: usize = 1;
const MUCH: usize = 32 * 1024;

/// What the guest writes and the host finds at once; whether the guest had to kick for it.
fn write(guest: &mut Guest, host: &mut Host, len: usize) -> bool {
    let before = guest.rings[OUT].kicks;
    guest.write_all(0, &vec![7; len]);
    let kicked = guest.rings[OUT].kicks != before;
    assert_eq!(host.receive_now().unwrap().len(), len);
    kicked
}

/// The host looks as often as it is woken, and finds nothing.
fn look(host: &mut Host) {
    assert!(host.wait(PATIENCE), "it does not look by itself");
    assert!(host.receive_now().unwrap().is_empty());
}

#[test]
fn what_a_busy_guest_writes_is_found_without_a_kick() {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    assert!(host.receive_now().unwrap().is_empty());
    assert!(write(&mut guest, &mut host, MUCH));
    for _ in 0..100 {
        let before = guest.rings[OUT].kicks;
        guest.write_all(0, &[7; 4 * MUCH]);
        assert_eq!(guest.rings[OUT].kicks, before);
        assert_eq!(host.receive(4 * MUCH).len(), 4 * MUCH);
        assert!(host.receive_now().unwrap().is_empty());
    }
    look(&mut host);
    assert!(write(&mut guest, &mut host, 1), "it is not busy any more");
    assert!(write(&mut guest, &mut host, 1), "nor after little");
}

#[test]
fn a_fast_guest_kicks_before_the_ring_is_full() {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    assert!(host.receive_now().unwrap().is_empty());
    assert!(write(&mut guest, &mut host, MUCH));
    assert!(write(&mut guest, &mut host, 16 * MUCH));
}

#[test]
fn a_guest_that_waits_for_each_write_is_not_kept_waiting() {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    assert!(host.receive_now().unwrap().is_empty());
    let unkicked = (0..1000).filter(|_| !write(&mut guest, &mut host, MUCH));
    assert!(unkicked.count() <= 10);
}

#[test]
fn who_cannot_be_told_how_many_to_wait_for_kicks_each_time() {
    let (_handle, _port, mut guest, mut host) = connected(Setup {
        event_idx: false,
        ..Setup::default()
    });
    assert!(host.receive_now().unwrap().is_empty());
    for _ in 0..10 {
        assert!(write(&mut guest, &mut host, MUCH));
    }
}
