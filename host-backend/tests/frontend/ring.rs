//! The driver's side of a split virtqueue, as Linux does it: free list, indirect tables, event indices.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// How long an interrupt may take before it is called lost: longer than a test stalls the other side for.
pub const PATIENCE: Duration = Duration::from_secs(75);

/// A buffer: address and length.
pub type Buffer = (u64, u32);

#[derive(Clone, Copy)]
pub struct RingSetup {
    pub size: u16,
    pub event_idx: bool,
    pub indirect: bool,
}

pub struct Ring {
    pub setup: RingSetup,
    memory: Arc<GuestMemoryMmap>,
    base: u64,
    free: VecDeque<u16>,
    /// Of each head in use, the rest of its chain.
    chains: Vec<Option<Vec<u16>>>,
    /// Heads are used in turn, and so all buffers that belong to them; else, as in Linux, the last one freed is the first.
    pub in_turn: bool,
    /// Whether the driver has a callback for interrupts (all of virtio_console's queues but the control one to the device).
    pub callback: bool,
    avail: u16,
    kicked: u16,
    used: u16,
    pub kick: EventFd,
    pub call: EventFd,
    pub kicks: u64,
    pub interrupts: u64,
}

impl Ring {
    /// A ring in the `Ring::space` bytes at `base`.
    pub fn new(memory: Arc<GuestMemoryMmap>, base: u64, setup: RingSetup) -> Self {
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap();
        let mut ring = Ring {
            setup,
            memory,
            base,
            free: VecDeque::new(),
            chains: Vec::new(),
            in_turn: false,
            callback: true,
            avail: 0,
            kicked: 0,
            used: 0,
            kick: eventfd(),
            call: eventfd(),
            kicks: 0,
            interrupts: 0,
        };
        ring.reset();
        ring
    }

    /// Bytes that a ring takes: descriptors, rings, and one indirect table of 64 descriptors for each head.
    pub fn space(size: u16) -> u64 {
        (u64::from(size) * (16 + 2 + 8 + 64 * 16) + 0x3000) & !0xfff
    }

    /// As after a reset of the device: nothing in it.
    pub fn reset(&mut self) {
        let len = usize::try_from(Self::space(self.setup.size)).unwrap();
        self.memory
            .write_slice(&vec![0; len], GuestAddress(self.base))
            .unwrap();
        self.free = (0..self.setup.size).collect();
        self.chains = vec![None; usize::from(self.setup.size)];
        (self.avail, self.kicked, self.used) = (0, 0, 0);
        self.kick = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap();
        let _ = self.call.read();
    }

    /// As if so many chains (modulo 65,536) had come and gone.
    pub fn begin_at(&mut self, position: u16) {
        (self.avail, self.kicked, self.used) = (position, position, position);
        self.set_avail_index(position);
        let used = GuestAddress(self.used_at() + 2);
        self.memory
            .store(position.to_le(), used, Ordering::Release)
            .unwrap();
        self.expect_interrupt();
    }

    pub fn descriptors_at(&self) -> u64 {
        self.base
    }

    pub fn avail_at(&self) -> u64 {
        self.base + 16 * u64::from(self.setup.size)
    }

    pub fn used_at(&self) -> u64 {
        (self.avail_at() + 2 * u64::from(self.setup.size) + 6 + 0xfff) & !0xfff
    }

    fn table_at(&self, head: u16) -> u64 {
        self.used_at() + 8 * u64::from(self.setup.size) + 16 + u64::from(head) * 64 * 16
    }

    pub fn write_descriptor(&self, table: u64, index: u16, buffer: Buffer, flags: u16, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&buffer.0.to_le_bytes());
        raw[8..12].copy_from_slice(&buffer.1.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.memory
            .write_slice(&raw, GuestAddress(table + 16 * u64::from(index)))
            .unwrap();
    }

    /// A head that nobody uses, for a chain made by hand.
    pub fn take_head(&mut self) -> Option<u16> {
        let head = self.free.pop_front()?;
        self.chains[usize::from(head)] = Some(Vec::new());
        Some(head)
    }

    /// It is in no chain any more.
    pub fn put_head(&mut self, head: u16) {
        self.chains[usize::from(head)] = None;
        self.free.push_front(head);
    }

    /// The head that the next chain will get.
    pub fn next_head(&self) -> Option<u16> {
        self.free.front().copied()
    }

    /// Heads not in use.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Makes a chain available; `None` if there are too few descriptors.
    pub fn add(&mut self, buffers: &[Buffer], writable: bool) -> Option<u16> {
        let write = if writable { WRITE } else { 0 };
        let count = buffers.len();
        if count == 0 || self.free.len() < if self.setup.indirect { 1 } else { count } {
            return None;
        }
        let head = self.free.pop_front()?;
        let mut rest = Vec::new();
        if self.setup.indirect && count > 1 {
            let table = self.table_at(head);
            for (index, &buffer) in (0u16..).zip(buffers) {
                let next = if usize::from(index) + 1 < count {
                    NEXT
                } else {
                    0
                };
                self.write_descriptor(table, index, buffer, write | next, index + 1);
            }
            let len = 16 * u32::try_from(count).unwrap();
            self.write_descriptor(self.base, head, (table, len), INDIRECT, 0);
        } else {
            rest.extend(self.free.drain(..count - 1));
            let mut at = head;
            for (index, &buffer) in buffers.iter().enumerate() {
                let next = rest.get(index).copied();
                let flags = write | if next.is_some() { NEXT } else { 0 };
                self.write_descriptor(self.base, at, buffer, flags, next.unwrap_or(0));
                at = next.unwrap_or(at);
            }
        }
        self.chains[usize::from(head)] = Some(rest);
        self.publish(head);
        Some(head)
    }

    /// Puts a head in the available ring.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.avail % self.setup.size);
        let at = GuestAddress(self.avail_at() + 4 + 2 * slot);
        self.memory.write_obj(head.to_le(), at).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.set_avail_index(self.avail);
    }

    /// What a rogue driver may do at any time.
    pub fn set_avail_index(&self, index: u16) {
        let at = GuestAddress(self.avail_at() + 2);
        self.memory
            .store(index.to_le(), at, Ordering::Release)
            .unwrap();
    }

    pub fn avail_index(&self) -> u16 {
        self.avail
    }

    /// Tells the device about new chains, if it wants to know.
    pub fn notify(&mut self) {
        fence(Ordering::SeqCst);
        let (old, new) = (self.kicked, self.avail);
        self.kicked = new;
        let wanted = if self.setup.event_idx {
            let event = self.load(self.used_at() + 4 + 8 * u64::from(self.setup.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.load(self.used_at()) & 1 == 0
        };
        if wanted && new != old {
            self.kick_always();
        }
    }

    pub fn kick_always(&mut self) {
        self.kicks += 1;
        self.kick.write(1).unwrap();
    }

    fn load(&self, at: u64) -> u16 {
        u16::from_le(
            self.memory
                .load(GuestAddress(at), Ordering::Acquire)
                .unwrap(),
        )
    }

    fn used_index(&self) -> u16 {
        self.load(self.used_at() + 2)
    }

    /// Whether the device has given chains back.
    pub fn has_used(&self) -> bool {
        self.used_index() != self.used
    }

    /// Takes the next chain that the device gave back, and the bytes it wrote. Asks to be interrupted for the one behind it,
    /// as Linux does (`virtqueue_get_buf`).
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        let slot = u64::from(self.used % self.setup.size);
        let mut raw = [0; 8];
        let at = GuestAddress(self.used_at() + 4 + 8 * slot);
        self.memory.read_slice(&mut raw, at).unwrap();
        let head = u16::try_from(u32::from_le_bytes(raw[..4].try_into().unwrap())).unwrap();
        let len = u32::from_le_bytes(raw[4..].try_into().unwrap());
        self.used = self.used.wrapping_add(1);
        self.expect_interrupt();
        let rest = self.chains[usize::from(head)]
            .take()
            .expect("the device used a chain it was not given");
        for freed in rest.into_iter().rev().chain([head]) {
            match self.in_turn {
                true => self.free.push_back(freed),
                false => self.free.push_front(freed),
            }
        }
        Some((head, len))
    }

    /// Asks for an interrupt at the next chain; true if one is there already.
    pub fn enable_interrupts(&self) -> bool {
        self.expect_interrupt();
        self.has_used()
    }

    /// Takes chains back without an interrupt, as a driver does that cannot sleep.
    pub fn spin(&mut self, complaint: &str) {
        let end = Instant::now() + PATIENCE;
        while self.pop().is_none() {
            assert!(Instant::now() < end, "{complaint}");
            std::thread::yield_now();
        }
    }

    /// Asks for an interrupt at the next chain, as `virtqueue_get_buf` does each time.
    fn expect_interrupt(&self) {
        if self.setup.event_idx && self.callback {
            let at = GuestAddress(self.avail_at() + 4 + 2 * u64::from(self.setup.size));
            self.memory
                .store(self.used.to_le(), at, Ordering::SeqCst)
                .unwrap();
            fence(Ordering::SeqCst);
        }
    }

    /// Says with the flag that no interrupts are wanted (without EVENT_IDX).
    pub fn set_interrupts_off(&self, off: bool) {
        let at = GuestAddress(self.avail_at());
        self.memory
            .store(u16::from(off).to_le(), at, Ordering::SeqCst)
            .unwrap();
    }

    /// Waits, as a driver does, for an interrupt that says that the device gave chains back.
    pub fn wait_used(&mut self) {
        wait_any(&mut [self]);
    }

    /// Waits for an interrupt, whatever there is in the ring.
    pub fn wait_interrupted(&mut self) {
        wait_interrupted(&mut [self]);
    }
}

/// Waits until the device has given chains back in one of the rings, as an interrupt says, and panics if there is none in time.
pub fn wait_any(rings: &mut [&mut Ring]) {
    while !rings.iter().any(|ring| ring.enable_interrupts()) {
        wait_interrupted(rings);
    }
}

/// The same, but waits whether or not there is anything in the rings.
fn wait_interrupted(rings: &mut [&mut Ring]) {
    let mut fds: Vec<libc::pollfd> = rings
        .iter()
        .map(|ring| libc::pollfd {
            fd: ring.call.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let timeout = i32::try_from(PATIENCE.as_millis()).unwrap();
    // SAFETY: `fds` is a valid array of its length.
    let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
    assert!(ready > 0, "no interrupt came");
    for (ring, fd) in rings.iter_mut().zip(&fds) {
        if fd.revents != 0 {
            ring.interrupts += 1;
            ring.call.read().unwrap();
        }
    }
}
