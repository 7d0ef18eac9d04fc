//! Who hears the guest's kicks. Alone in its program: it counts how often the process's threads woke up.

mod frontend;

use std::fs;

use frontend::ring::PATIENCE;
use frontend::{Guest, Host, Setup, connected};

/// How often the library's threads have slept so far.
fn sleeps() -> u64 {
    let threads = fs::read_dir("/proc/self/task").unwrap();
    threads
        .map(|thread| thread.unwrap().path())
        .filter(|thread| {
            let name = fs::read_to_string(thread.join("comm"));
            name.is_ok_and(|name| name.trim() == "vring_worker")
        })
        .map(|thread| {
            let status = fs::read_to_string(thread.join("status")).unwrap();
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            line.unwrap().trim().parse::<u64>().unwrap()
        })
        .sum()
}

/// Calls back and forth, each of which the host waits for; how often the library's threads slept meanwhile.
fn call(guest: &mut Guest, host: &mut Host, count: usize) -> u64 {
    let before = sleeps();
    for _ in 0..count {
        assert!(host.receive_now().unwrap().is_empty());
        guest.write_all(0, b"ping");
        assert!(host.wait(PATIENCE));
        assert_eq!(host.receive(4), b"ping");
        host.send(b"pong");
        assert_eq!(guest.read(0, 4), b"pong");
    }
    sleeps() - before
}

#[test]
fn a_link_hears_the_kicks_and_the_data_thread_those_for_nobody() {
    const CALLS: usize = 1000;
    let setup = Setup {
        size: 16,
        ..Setup::default()
    };
    let (_handle, mut port, mut guest, mut host) = connected(setup);
    call(&mut guest, &mut host, 10);
    let slept = call(&mut guest, &mut host, CALLS);
    assert!(slept < 100, "the data thread woke up {slept} times");

    // Rings that stop and start have eventfds of their own.
    guest.pause_and_resume(|_| ());
    call(&mut guest, &mut host, 10);
    let slept = call(&mut guest, &mut host, CALLS);
    assert!(slept < 100, "after a pause it woke up {slept} times");

    // A guest that has not seen the hang-up yet writes more than the ring holds: it is taken again and again.
    drop(host);
    let ring = Guest::ring_out(0);
    for _ in 0..100 {
        while guest.rings[ring].pop().is_some() {}
        let Some(head) = guest.rings[ring].next_head() else {
            guest.rings[ring].wait_used();
            continue;
        };
        let buffer = guest.buffer(ring, head);
        guest.rings[ring].add(&[(buffer, 10)], false).unwrap();
        guest.rings[ring].notify();
    }
    guest.close(0);
    guest.wait_host_connected(0, true);
    guest.open(0);
    let mut host = Host::open(&mut port);
    let slept = call(&mut guest, &mut host, CALLS);
    assert!(slept < 100, "with the next link it woke up {slept} times");
}
