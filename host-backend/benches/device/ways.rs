//! The ways over the device.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use virtproxy_engine::channel::{Channel, Link, Progress};
use virtproxy_engine::driver::{Driver, Settings};
use virtproxy_engine::limits::Limits;
use virtproxy_engine::segment::Segment;
use virtproxy_host::device::{DeviceHandle, Port};
use virtproxy_mux::Config;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::Way;
use crate::ends::{End, Mux, Payload};
use crate::frontend::guest::{MAX_WRITE, PAGE};
use crate::frontend::{Guest, Setup, device, socket_path};
use crate::guest::{GuestThread, Orders};
use crate::plain::{MEMORY, Peer};

/// As large as QEMU allows.
const RING: u16 = 1024;
/// What the far end of a socket writes at once.
const WRITE: usize = 256 * 1024;

/// A device whose guest has opened its port.
fn boot() -> (DeviceHandle, Port, Guest) {
    let path = socket_path();
    let (handle, port) = device(&path);
    let setup = Setup {
        size: RING,
        ..Setup::default()
    };
    let mut guest = Guest::boot(&path, setup);
    guest.wait_host_connected(0, true);
    guest.open(0);
    (handle, port, guest)
}

/// Measures what `carry` does, and what the guest does meanwhile.
async fn timed(orders: &Orders, carry: impl Future<Output = ()>) -> (Duration, Duration) {
    let (start, work) = (Instant::now(), orders.work());
    carry.await;
    (start.elapsed(), orders.work() - work)
}

async fn wait_for(orders: &Orders, condition: impl Fn(&Orders) -> bool) {
    while !condition(orders) {
        orders.news.notified().await;
    }
}

/// The device's link with memory behind it.
pub(crate) struct Memory {
    link: Box<dyn Link>,
    end: Box<dyn End>,
    guest: GuestThread,
    memory: Arc<GuestMemoryMmap>,
    /// Where the guest's buffers are.
    starts: [u64; 2],
    _device: (DeviceHandle, Port),
}

impl Memory {
    /// The link alone.
    pub(crate) async fn device() -> Self {
        Self::new(Payload::copied(MEMORY), Payload::default()).await
    }

    /// The link and a session.
    pub(crate) async fn mux() -> Self {
        let near = Mux::new(false, Payload::copied(MEMORY));
        let mut memory = Self::new(near, Mux::new(true, Payload::default())).await;
        memory
            .run(|end, orders| end.is_ready() && orders.is_ready())
            .await;
        memory
    }

    async fn new(near: impl End + 'static, far: impl End + 'static) -> Self {
        let (handle, mut port, guest) = boot();
        let link = port.open().await.unwrap();
        let starts = [0, 1].map(|ring| guest.buffer(ring, 0));
        Memory {
            link,
            end: Box::new(near),
            memory: guest.memory.clone(),
            starts,
            guest: GuestThread::start(guest, far),
            _device: (handle, port),
        }
    }

    /// The guest's buffers for one direction, and whether it is that to the guest.
    pub(crate) fn buffers(&self, way: Way) -> (bool, Vec<Segment<'static>>) {
        let (start, len) = match way {
            Way::ToGuest => (self.starts[0], PAGE),
            Way::FromGuest => (self.starts[1], MAX_WRITE),
        };
        let segments = (0..u64::from(RING)).map(|index| {
            let at = GuestAddress(start + index * len as u64);
            let at = self.memory.get_host_address(at).unwrap();
            // SAFETY: it is in the guest's memory, which lives as long as this, and this to the end of the program.
            unsafe { Segment::from_raw_parts(at, len) }
        });
        (way == Way::ToGuest, segments.collect())
    }

    pub(crate) async fn carry(&mut self, way: Way, bytes: usize) -> (Duration, Duration) {
        let orders = self.guest.orders.clone();
        orders.poll(true);
        let figures = timed(&orders, async {
            match way {
                Way::FromGuest => {
                    let target = self.end.received() + bytes;
                    orders.send(bytes);
                    self.run(|end, _| end.received() >= target).await;
                }
                Way::ToGuest => {
                    let target = orders.received() + bytes;
                    self.end.send_more(bytes);
                    self.run(|_, orders| orders.received() >= target).await;
                }
            }
        })
        .await;
        orders.poll(false);
        figures
    }

    /// What a driver does, until `done`.
    async fn run(&mut self, done: impl Fn(&dyn End, &Orders) -> bool) {
        let (link, end) = (&mut self.link, &mut self.end);
        while !done(&**end, &self.guest.orders) {
            let received = link.receive(&mut |segments| end.on_bytes(segments));
            let sent = link.send(&mut |segments| end.fill(segments));
            if [received.unwrap(), sent.unwrap()] == [Progress::Wait; 2] {
                tokio::select! {
                    () = std::future::poll_fn(|cx| link.poll_ready(cx)) => {}
                    () = self.guest.orders.news.notified() => {}
                }
            }
        }
    }
}

/// The driver, with a UNIX socket behind it.
pub(crate) struct Sockets {
    guest: GuestThread,
    peer: Peer,
    _stop: watch::Sender<Option<Duration>>,
    _device: DeviceHandle,
}

impl Sockets {
    /// With a device that polls for so long before it sleeps.
    pub(crate) async fn start(busy_poll: Duration) -> Self {
        let (handle, mut port, guest) = boot();
        port.set_busy_poll(busy_poll);
        let path = socket_path();
        let listener = UnixListener::bind(&path).unwrap();
        let peer = Peer::start(move || listener.accept().unwrap().0);
        let settings = Settings {
            connect_timeout: Duration::from_secs(10),
            wait_for_peer: Duration::from_secs(10),
            udp_timeout: Duration::from_secs(60),
            limits: Limits::default(),
            session: Config::default(),
        };
        let serve = format!("bulk:{}:-", path.display()).parse().unwrap();
        let driver = Driver::new(settings, &[], &[serve]).unwrap();
        let (stop, stopped) = watch::channel(None);
        tokio::task::spawn_local(driver.run(Box::new(port) as Box<dyn Channel>, stopped));
        let guest = GuestThread::start(guest, Mux::new(true, Payload::default()));
        wait_for(&guest.orders, Orders::is_ready).await;
        let _ = std::fs::remove_file(&path);
        Sockets {
            guest,
            peer,
            _stop: stop,
            _device: handle,
        }
    }

    pub(crate) async fn carry(&mut self, way: Way, bytes: usize) -> (Duration, Duration) {
        let orders = &self.guest.orders;
        timed(orders, async {
            match way {
                Way::FromGuest => {
                    let read = self.peer.read(bytes);
                    orders.send(bytes);
                    read.await.unwrap();
                }
                Way::ToGuest => {
                    let target = orders.received() + bytes;
                    let _written = self.peer.write(bytes, WRITE);
                    wait_for(orders, |orders| orders.received() >= target).await;
                }
            }
        })
        .await
    }

    /// How long each of so many calls takes, with the guest to answer them.
    pub(crate) async fn call(&mut self, count: usize) -> Vec<Duration> {
        self.guest.orders.answer(true);
        let calls = self.peer.call(count).await.unwrap();
        self.guest.orders.answer(false);
        calls
    }
}
