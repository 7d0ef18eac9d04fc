//! Finding, waiting and pausing, with folders for `/dev` and `/sys` and a terminal for the port.
//! What only a virtio port does is tested in a real guest.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::symlink;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicUsize, Ordering};

use virtproxy_engine::channel::Progress;
use virtproxy_engine::segment::{Cursor, Segment};

use super::*;

/// A folder with a `dev` and a `sys`, gone when dropped.
struct Machine(PathBuf);

impl Machine {
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("virtproxy-port-{}-{count}", std::process::id());
        let root = std::env::temp_dir().join(name);
        fs::create_dir_all(root.join("dev/virtio-ports")).unwrap();
        fs::create_dir_all(root.join("sys")).unwrap();
        Machine(root)
    }

    fn roots(&self) -> Roots {
        Roots {
            dev: self.0.join("dev"),
            sys: self.0.join("sys"),
        }
    }

    fn dev(&self, name: &str) -> PathBuf {
        self.0.join("dev").join(name)
    }

    fn add_to_sys(&self, device: &str, name: &str) {
        let port = self.0.join("sys/class/virtio-ports").join(device);
        fs::create_dir_all(&port).unwrap();
        fs::write(port.join("dev"), "246:1\n").unwrap();
        fs::write(port.join("name"), format!("{name}\n")).unwrap();
    }

    fn remove_from_sys(&self, device: &str) {
        fs::remove_dir_all(self.0.join("sys/class/virtio-ports").join(device)).unwrap();
    }

    fn add_file(&self, name: &str) -> PathBuf {
        File::create(self.dev(name)).unwrap();
        self.dev(name)
    }

    fn channel(&self, addr: &str) -> PortChannel {
        let spec = format!("virtserial-open:{addr}:-").parse().unwrap();
        PortChannel::with_roots(&spec, self.roots())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().unwrap().block_on(future)
}

/// A raw terminal: our side, and the path of the one that stands for the port.
fn terminal() -> (File, PathBuf) {
    let (mut master, mut slave) = (-1, -1);
    // SAFETY: the two descriptors are valid places, and the rest may be null; the descriptors are new.
    unsafe {
        let opened = libc::openpty(
            &raw mut master,
            &raw mut slave,
            null_mut(),
            null_mut(),
            null_mut(),
        );
        assert_eq!(opened, 0);
        let mut mode = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(slave, &raw mut mode), 0);
        libc::cfmakeraw(&raw mut mode);
        assert_eq!(libc::tcsetattr(slave, libc::TCSANOW, &raw const mode), 0);
        let slave = OwnedFd::from_raw_fd(slave);
        let path = fs::read_link(format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&slave)
        ));
        (File::from_raw_fd(master), path.unwrap())
    }
}

const NAME: &str = "org.virtproxy.0";

#[test]
fn a_name_is_found_through_udevs_link_or_without_udev() {
    let machine = Machine::new();
    let roots = machine.roots();
    let link = machine.dev("virtio-ports").join(NAME);
    let by_path = link.to_str().unwrap();

    machine.add_to_sys("vport1p1", "org.qemu.guest_agent.0");
    machine.add_to_sys("vport1p2", NAME);
    let node = machine.add_file("vport1p2");
    assert_eq!(find(&roots, NAME), Ok(node.clone()));
    assert_eq!(find(&roots, by_path), Ok(node.clone()));

    symlink(&node, &link).unwrap();
    assert_eq!(find(&roots, NAME), Ok(link.clone()));
    assert_eq!(find(&roots, by_path), Ok(link.clone()));

    // The link of a port that has moved.
    fs::remove_file(&node).unwrap();
    machine.remove_from_sys("vport1p2");
    machine.add_to_sys("vport3p1", NAME);
    let node = machine.add_file("vport3p1");
    assert_eq!(find(&roots, NAME), Ok(node));
}

#[test]
fn any_other_path_is_taken_as_it_is() {
    let machine = Machine::new();
    let node = machine.add_file("vport1p1");
    assert_eq!(find(&machine.roots(), node.to_str().unwrap()), Ok(node));

    machine.add_to_sys("vport2p1", "vport9p9");
    machine.add_file("vport2p1");
    let absent = machine.dev("vport9p9");
    assert!(find(&machine.roots(), absent.to_str().unwrap()).is_err());
}

#[test]
fn of_two_ports_with_one_name_it_is_always_the_same() {
    let machine = Machine::new();
    for device in ["vport2p1", "vport1p1", "vport3p1"] {
        machine.add_to_sys(device, NAME);
        machine.add_file(device);
    }
    assert_eq!(find(&machine.roots(), NAME), Ok(machine.dev("vport1p1")));
}

#[test]
fn a_message_says_what_is_there_and_what_is_missing() {
    let machine = Machine::new();
    let message = || find(&machine.roots(), NAME).unwrap_err().to_string();
    assert_eq!(
        message(),
        "there is no port org.virtproxy.0 yet (nor any other: is the device there, and virtio_console loaded?)"
    );
    machine.add_to_sys("vport1p1", "org.qemu.guest_agent.0");
    assert_eq!(
        message(),
        "there is no port org.virtproxy.0 yet (there is org.qemu.guest_agent.0)"
    );
    machine.add_to_sys("vport1p2", NAME);
    let message = message();
    assert!(
        message.contains("dev/vport1p2, but that file does not exist"),
        "{message}"
    );
    assert!(message.contains("246:1"), "{message}");
}

#[test]
fn the_holder_of_a_node_is_named() {
    let machine = Machine::new();
    let node = machine.add_file("vport1p1");
    assert_eq!(holder(&node), None);
    let link = machine.dev("link");
    symlink(&node, &link).unwrap();
    let _open = File::open(&node).unwrap();
    let holder = holder(&link).unwrap();
    assert!(
        holder.contains(&format!("(pid {})", std::process::id())),
        "{holder}"
    );
}

#[test]
fn the_host_is_connected_away_or_the_port_is_gone() {
    assert_eq!(Host::of(libc::POLLOUT), Host::Connected);
    assert_eq!(Host::of(libc::POLLIN | libc::POLLOUT), Host::Connected);
    assert_eq!(Host::of(0), Host::Connected);
    assert_eq!(Host::of(libc::POLLIN | libc::POLLHUP), Host::Away);
    assert_eq!(Host::of(libc::POLLHUP), Host::Unplugged);
}

#[test]
fn each_error_of_open_has_its_meaning() {
    let node = Path::new("/dev/vport1p1");
    let of = |errno| Obstacle::from_open(node, &io::Error::from_raw_os_error(errno));
    assert_eq!(of(libc::EBUSY), Obstacle::Busy(node.into()));
    assert_eq!(of(libc::EACCES), Obstacle::Denied(node.into()));
    assert_eq!(of(libc::EPERM), Obstacle::Denied(node.into()));
    assert_eq!(of(libc::ENODEV), Obstacle::Unplugged(node.into()));
    assert_eq!(of(libc::ENOENT), Obstacle::Unplugged(node.into()));
    assert_eq!(of(libc::ENXIO), Obstacle::Hollow(node.into()));
    assert!(of(libc::EMFILE).to_string().contains("Too many open files"));
}

#[test]
fn refusal_is_final_only_after_a_while() {
    let machine = Machine::new();
    let mut channel = machine.channel(NAME);
    let denied = || Obstacle::Denied("/dev/vport1p1".into());
    assert!(channel.report(denied()).is_ok());
    channel.denied_since = Instant::now().checked_sub(DENIED_GRACE);
    let error = channel.report(denied()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    assert!(error.to_string().contains("udev rule"), "{error}");

    // Something else in between: counted anew.
    assert!(
        channel
            .report(Obstacle::Busy("/dev/vport1p1".into()))
            .is_ok()
    );
    assert!(channel.report(denied()).is_ok());
}

#[test]
fn what_is_no_device_is_refused_at_once() {
    let machine = Machine::new();
    let file = machine.add_file("vport1p1");
    for path in [
        file.to_str().unwrap(),
        machine.0.to_str().unwrap(),
        "/dev/null",
    ] {
        let error = run(machine.channel(path).open()).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(error.to_string().contains("is not a port"), "{error}");
    }
}

#[test]
fn a_port_that_comes_later_is_opened_and_carries_bytes() {
    let machine = Machine::new();
    let (host, port) = terminal();
    let mut channel = machine.channel(NAME);
    assert_eq!(channel.name(), "virtserial-open:org.virtproxy.0:-");
    run(async {
        let early = timeout(Duration::from_millis(200), channel.open()).await;
        assert!(early.is_err(), "there is no port yet");

        machine.add_to_sys("vport1p1", NAME);
        let early = timeout(Duration::from_millis(200), channel.open()).await;
        assert!(early.is_err(), "there is no node yet");

        symlink(&port, machine.dev("vport1p1")).unwrap();
        let link = timeout(Duration::from_secs(5), channel.open()).await;
        let mut link = link.unwrap().unwrap();
        // A terminal is taken for a console, on which the link layer is spoken.
        let host = FdLink::new(host.into()).unwrap();
        let mut host = LossyLink::new(Box::new(host), None).unwrap();
        let (mut to_guest, mut from_guest) = (Vec::new(), Vec::new());
        let exchange = async {
            let (mut there, mut back) = (Some("to guest"), Some("from guest"));
            while to_guest != b"to guest" || from_guest != b"from guest" {
                turn(&mut host, &mut there, &mut from_guest);
                turn(&mut *link, &mut back, &mut to_guest);
                tokio::select! {
                    () = poll_fn(|cx| host.poll_ready(cx)) => {}
                    () = poll_fn(|cx| link.poll_ready(cx)) => {}
                }
            }
        };
        timeout(Duration::from_secs(5), exchange).await.unwrap();
    });
}

/// Receives what has come and sends `words`, once.
fn turn(link: &mut dyn Link, words: &mut Option<&str>, got: &mut Vec<u8>) {
    let mut sink = |segments: &[Segment<'_>]| {
        let mut cursor = Cursor::new(segments);
        let old = got.len();
        got.resize(old + cursor.remaining(), 0);
        cursor.read(&mut got[old..]);
    };
    while link.receive(&mut sink).unwrap() == Progress::Again {}
    let mut source = |segments: &[Segment<'_>]| match words.take() {
        Some(words) => {
            Cursor::new(segments).write(words.as_bytes());
            words.len()
        }
        None => 0,
    };
    while link.send(&mut source).unwrap() == Progress::Again {}
}

#[test]
fn links_that_end_at_once_are_opened_ever_more_slowly() {
    let machine = Machine::new();
    let (_host, port) = terminal();
    let mut channel = machine.channel(port.to_str().unwrap());
    run(async {
        let start = Instant::now();
        for _ in 0..4 {
            drop(channel.open().await.unwrap());
        }
        let took = start.elapsed();
        let expected = Duration::from_millis(50 + 100 + 200);
        assert!(took >= expected && took < 3 * expected, "{took:?}");
    });
}

#[test]
fn a_cancelled_open_does_not_shorten_the_pause() {
    let machine = Machine::new();
    let (_host, port) = terminal();
    let mut channel = machine.channel(port.to_str().unwrap());
    run(async {
        // After four links that ended at once the pause is 400 ms.
        for _ in 0..4 {
            drop(channel.open().await.unwrap());
        }
        let start = Instant::now();
        for _ in 0..3 {
            let early = timeout(Duration::from_millis(50), channel.open()).await;
            assert!(early.is_err());
        }
        drop(channel.open().await.unwrap());
        let took = start.elapsed();
        assert!((400..800).contains(&took.as_millis()), "{took:?}");
    });
}
