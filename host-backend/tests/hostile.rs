//! Guests and frontends that do what they should not: the device stays alive, quiet and in order.

mod frontend;

use std::time::{Duration, Instant};

use frontend::ring::{INDIRECT, NEXT, WRITE};
use frontend::{Guest, Host, Setup, assert_alive, connected};
use virtproxy_engine::channel::Progress;
use vm_memory::{Bytes, GuestAddress};

const OUT: usize = 1;
const FAR: u64 = 1 << 40;

/// Writes the descriptors of a chain with this head.
type Make<'f> = &'f dyn Fn(&Guest, u16);

/// A chain made by hand is given back without a byte, and the next one is read.
fn assert_skipped(
    guest: &mut Guest,
    host: &mut Host,
    what: &str,
    make: impl FnOnce(&mut Guest, u16),
) {
    let head = guest.rings[OUT].take_head().unwrap();
    make(guest, head);
    guest.rings[OUT].publish(head);
    guest.rings[OUT].notify();
    guest.write_all(0, b"next");
    assert_eq!(host.receive(4), b"next", "after a chain {what}");
}

#[test]
fn malformed_chains_from_the_guest_are_skipped() {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    let table = guest.rings[OUT].descriptors_at();
    let good = guest.buffer(OUT, 0);
    let spare = 0x80_0000;
    let cases: [(&str, Make<'_>); 12] = [
        ("that is writable", &|g, h| {
            g.rings[OUT].write_descriptor(table, h, (good, 8), WRITE, 0)
        }),
        ("outside memory", &|g, h| {
            g.rings[OUT].write_descriptor(table, h, (FAR, 8), 0, 0)
        }),
        ("over the end of the address space", &|g, h| {
            g.rings[OUT].write_descriptor(table, h, (u64::MAX - 3, 8), 0, 0);
        }),
        ("over the end of memory", &|g, h| {
            g.rings[OUT].write_descriptor(table, h, (good, u32::MAX), 0, 0);
        }),
        ("without bytes", &|g, h| {
            g.rings[OUT].write_descriptor(table, h, (good, 0), 0, 0)
        }),
        ("that loops", &|g, h| {
            g.rings[OUT].write_descriptor(table, h, (good, 8), NEXT, h)
        }),
        ("that leads out of the table", &|g, h| {
            g.rings[OUT].write_descriptor(table, h, (good, 8), NEXT, 60_000);
        }),
        ("with an indirect table outside memory", &|g, h| {
            g.rings[OUT].write_descriptor(table, h, (FAR, 16), INDIRECT, 0);
        }),
        ("with an indirect table of a strange length", &|g, h| {
            g.rings[OUT].write_descriptor(table, h, (spare, 15), INDIRECT, 0);
        }),
        ("with an empty indirect table", &|g, h| {
            g.rings[OUT].write_descriptor(table, h, (spare, 0), INDIRECT, 0);
        }),
        ("with an indirect table in an indirect table", &|g, h| {
            g.rings[OUT].write_descriptor(spare, 0, (spare, 16), INDIRECT, 0);
            g.rings[OUT].write_descriptor(table, h, (spare, 16), INDIRECT, 0);
        }),
        ("of 65,535 descriptors", &|g, h| {
            for index in 0..u16::MAX {
                g.rings[OUT].write_descriptor(spare, index, (good, 1), NEXT, index + 1);
            }
            g.rings[OUT].write_descriptor(table, h, (spare, 65_535 * 16), INDIRECT, 0);
        }),
    ];
    for (what, make) in cases {
        assert_skipped(&mut guest, &mut host, what, |guest, head| make(guest, head));
    }
    assert_alive(&mut guest, &mut host);
}

#[test]
fn malformed_buffers_for_the_guest_are_skipped() {
    let setup = Setup {
        size: 8,
        ..Setup::default()
    };
    let (_handle, _port, mut guest, mut host) = connected(setup);
    let ring = Guest::ring_in(0);
    // Use up all good buffers, so that the bad ones come next, a good one last.
    host.send(&[1; 8 * 4096]);
    assert_eq!(guest.rings[ring].free(), 0);
    let mut heads = Vec::new();
    while let Some((head, _)) = guest.rings[ring].pop() {
        heads.push(head);
    }
    let table = guest.rings[ring].descriptors_at();
    let bad = [
        (FAR, 4096, WRITE),
        (0x80_0000, 4096, 0),
        (0x80_0000, 0, WRITE),
    ];
    for (addr, len, flags) in bad {
        let head = guest.rings[ring].take_head().unwrap();
        guest.rings[ring].write_descriptor(table, head, (addr, len), flags, 0);
        guest.rings[ring].publish(head);
    }
    guest.fill(ring);
    host.send(b"found its way");
    let mut bytes = Vec::new();
    while bytes.len() < 13 {
        while let Some((head, len)) = guest.rings[ring].pop() {
            let at = bytes.len();
            bytes.resize(at + len as usize, 0);
            let buffer = guest.buffer(ring, head);
            guest
                .memory
                .read_slice(&mut bytes[at..], GuestAddress(buffer))
                .unwrap();
        }
    }
    assert_eq!(bytes, b"found its way");
    guest.fill(ring);
    assert_alive(&mut guest, &mut host);
}

#[test]
fn heads_that_do_not_exist_are_ignored() {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    for _ in 0..100 {
        guest.rings[OUT].publish(256);
        guest.rings[OUT].publish(u16::MAX);
    }
    guest.rings[OUT].notify();
    assert_alive(&mut guest, &mut host);
}

#[test]
fn an_absurd_index_stops_the_ring_and_nothing_spins() {
    let (_handle, mut port, mut guest, mut host) = connected(Setup::default());
    assert_alive(&mut guest, &mut host);
    let index = guest.rings[OUT].avail_index();
    guest.rings[OUT].set_avail_index(index.wrapping_add(5000));
    for _ in 0..10_000 {
        guest.rings[OUT].kick_always();
    }
    let mut calls = 0;
    let end = Instant::now() + Duration::from_millis(300);
    while Instant::now() < end {
        assert_eq!(host.receive_once().unwrap(), (Vec::new(), Progress::Wait));
        calls += 1;
        host.wait(Duration::from_millis(100));
    }
    assert!(calls < 10_000, "{calls} calls: it spins");
    host.send(b"the other ring is fine");
    assert_eq!(guest.read(0, 22), b"the other ring is fine");
    guest.close(0);
    assert!(host.receive_to_end().is_empty());
    drop(host);
    guest.reboot();
    guest.open(0);
    assert_alive(&mut guest, &mut Host::open(&mut port));
}

#[test]
fn a_guest_that_takes_back_what_it_wrote_ends_its_session() {
    let (_handle, mut port, mut guest, mut host) = connected(Setup::default());
    let index = guest.rings[OUT].avail_index();
    guest.write_all(0, b"never was");
    guest.close(0);
    guest.rings[OUT].set_avail_index(index);
    assert!(host.receive_to_end().is_empty());
    drop(host);
    guest.reboot();
    guest.open(0);
    assert_alive(&mut guest, &mut Host::open(&mut port));
}

#[test]
fn a_guest_that_fills_its_ring_is_just_full() {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    let mut written = 0;
    loop {
        match guest.write(0, &[9; 32_768]) {
            0 => break,
            n => written += n,
        }
    }
    assert!(host.receive(written).iter().all(|byte| *byte == 9));
    assert_alive(&mut guest, &mut host);
}
