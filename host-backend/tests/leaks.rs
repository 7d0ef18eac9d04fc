//! What a device holds does not grow with the QEMUs it has served. Alone in its program: it counts the process's
//! file descriptors and threads.

mod frontend;

use std::fs;
use std::time::{Duration, Instant};

use frontend::{Guest, Host, Setup, device, socket_path};

fn held() -> (usize, usize) {
    let count = |path| fs::read_dir(path).unwrap().count();
    (count("/proc/self/fd"), count("/proc/self/task"))
}

#[test]
fn a_hundred_qemus_in_a_row_leave_nothing_behind() {
    let path = socket_path();
    let (handle, mut port) = device(&path);
    let setup = Setup {
        size: 64,
        ..Setup::default()
    };
    let mut baseline = None;
    for round in 0..100 {
        let mut guest = Guest::boot(&path, setup);
        guest.wait_host_connected(0, true);
        guest.open(0);
        let mut host = Host::open(&mut port);
        guest.write_all(0, b"ping");
        assert_eq!(host.receive(4), b"ping");
        host.send(b"pong");
        assert_eq!(guest.read(0, 4), b"pong");
        if round % 3 == 0 {
            guest.stop();
        }
        drop(guest);
        assert!(host.receive_to_end().is_empty());
        drop(host);
        if round == 9 {
            baseline = Some(held());
        }
    }
    assert_eq!(Some(held()), baseline);

    drop(handle);
    drop(port);
    let end = Instant::now() + Duration::from_secs(5);
    while held().1 > 2 {
        assert!(Instant::now() < end, "threads were left: {}", held().1);
    }
    assert!(!path.exists());
}
