//! The guest: a thread that has the rings of a port, and an [`End`] that leaves payloads where they lie.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use virtproxy_engine::segment::Segment;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use crate::ends::End;
use crate::frontend::Guest;
use crate::frontend::guest::{MAX_WRITE, PAGE};

/// Pages read in one go.
const BATCH: usize = 64;
const RING_IN: usize = 0;
const RING_OUT: usize = 1;

/// What the guest is told, and what it tells.
pub(crate) struct Orders {
    to_send: AtomicUsize,
    /// Answer whatever comes with as much.
    answer: AtomicBool,
    /// Poll the rings instead of waiting for interrupts.
    poll: AtomicBool,
    stop: AtomicBool,
    wake: EventFd,
    received: AtomicUsize,
    ready: AtomicBool,
    /// Nanoseconds in which something was done.
    work: AtomicU64,
    /// `received` or `ready` changed.
    pub(crate) news: Notify,
}

impl Orders {
    pub(crate) fn send(&self, bytes: usize) {
        self.to_send.fetch_add(bytes, Ordering::SeqCst);
        self.wake.write(1).unwrap();
    }

    pub(crate) fn answer(&self, on: bool) {
        self.answer.store(on, Ordering::SeqCst);
    }

    pub(crate) fn poll(&self, on: bool) {
        self.poll.store(on, Ordering::SeqCst);
        self.wake.write(1).unwrap();
    }

    pub(crate) fn received(&self) -> usize {
        self.received.load(Ordering::SeqCst)
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::SeqCst)
    }

    /// How long it has worked so far.
    pub(crate) fn work(&self) -> Duration {
        Duration::from_nanos(self.work.load(Ordering::SeqCst))
    }
}

/// The thread. Dropping it ends it.
pub(crate) struct GuestThread {
    pub(crate) orders: Arc<Orders>,
    thread: Option<JoinHandle<()>>,
}

impl GuestThread {
    pub(crate) fn start(mut guest: Guest, end: impl End + 'static) -> Self {
        let orders = Arc::new(Orders {
            to_send: AtomicUsize::new(0),
            answer: AtomicBool::new(false),
            poll: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            wake: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            received: AtomicUsize::new(0),
            ready: AtomicBool::new(false),
            work: AtomicU64::new(0),
            news: Notify::new(),
        });
        for ring in [RING_IN, RING_OUT] {
            guest.rings[ring].in_turn = true;
        }
        let theirs = orders.clone();
        let thread = thread::spawn(move || run(&mut guest, end, &theirs));
        GuestThread {
            orders,
            thread: Some(thread),
        }
    }
}

impl Drop for GuestThread {
    fn drop(&mut self) {
        self.orders.stop.store(true, Ordering::SeqCst);
        self.orders.wake.write(1).unwrap();
        let _ = self.thread.take().unwrap().join();
    }
}

fn run(guest: &mut Guest, mut end: impl End, orders: &Orders) {
    while !orders.stop.load(Ordering::SeqCst) {
        let start = Instant::now();
        match orders.to_send.swap(0, Ordering::SeqCst) {
            0 => {}
            more => end.send_more(more),
        }
        let before = end.received();
        let mut moved = receive(guest, &mut end);
        if orders.answer.load(Ordering::SeqCst) && end.received() > before {
            end.send_more(end.received() - before);
        }
        moved |= send(guest, &mut end);
        if moved {
            let nanos = u64::try_from(start.elapsed().as_nanos()).unwrap();
            orders.work.fetch_add(nanos, Ordering::SeqCst);
            orders.received.store(end.received(), Ordering::SeqCst);
            orders.ready.store(end.is_ready(), Ordering::SeqCst);
            orders.news.notify_one();
        } else if orders.poll.load(Ordering::SeqCst) {
            std::hint::spin_loop();
        } else {
            wait(guest, orders);
        }
    }
}

/// The host's view of a buffer.
fn segment(guest: &Guest, ring: usize, head: u16, len: usize) -> Segment<'static> {
    let at = GuestAddress(guest.buffer(ring, head));
    let at = guest.memory.get_host_address(at).unwrap();
    // SAFETY: it is within the guest's memory, which lives as long as the guest; segments do not outlive a batch.
    unsafe { Segment::from_raw_parts(at, len) }
}

/// `readv` of many pages.
fn receive(guest: &mut Guest, end: &mut impl End) -> bool {
    let mut segments = Vec::with_capacity(BATCH);
    while segments.len() < BATCH
        && let Some((head, len)) = guest.rings[RING_IN].pop()
    {
        segments.push(segment(guest, RING_IN, head, len as usize));
    }
    if segments.is_empty() {
        return false;
    }
    end.on_bytes(&segments);
    while let Some(head) = guest.rings[RING_IN].next_head() {
        let buffer = (guest.buffer(RING_IN, head), u32::try_from(PAGE).unwrap());
        guest.rings[RING_IN].add(&[buffer], true).unwrap();
    }
    guest.rings[RING_IN].notify();
    true
}

/// `write` after `write`, as large as Linux passes them on.
fn send(guest: &mut Guest, end: &mut impl End) -> bool {
    while guest.rings[RING_OUT].pop().is_some() {}
    let mut moved = false;
    for _ in 0..BATCH {
        let Some(head) = guest.rings[RING_OUT].next_head() else {
            break;
        };
        let len = end.fill(&[segment(guest, RING_OUT, head, MAX_WRITE)]);
        if len == 0 {
            break;
        }
        let buffer = guest.buffer(RING_OUT, head);
        let len = u32::try_from(len).unwrap();
        guest.rings[RING_OUT].add(&[(buffer, len)], false).unwrap();
        guest.rings[RING_OUT].notify();
        moved = true;
    }
    moved
}

/// Until there is something to read, room to write again, or an order.
fn wait(guest: &mut Guest, orders: &Orders) {
    let full = guest.rings[RING_OUT].next_head().is_none();
    let rings = [Some(RING_IN), full.then_some(RING_OUT)];
    let mut fds = vec![orders.wake.as_raw_fd()];
    for ring in rings.into_iter().flatten() {
        let ring = &guest.rings[ring];
        if ring.has_used() {
            return;
        }
        fds.push(ring.call.as_raw_fd());
    }
    let mut fds: Vec<_> = fds
        .into_iter()
        .map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    // SAFETY: `fds` is a valid array of its length.
    let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 10_000) };
    assert!(ready >= 0);
    let _ = orders.wake.read();
    for ring in rings.into_iter().flatten() {
        let _ = guest.rings[ring].call.read();
    }
}
