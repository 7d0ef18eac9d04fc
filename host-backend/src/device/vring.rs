//! A virtqueue as the vhost-user server hands it to us, with four cures for what the server does to it.
//!
//! [`VringMutex`] is used as it comes, but:
//!
//! * **A kick that is not there is no error.** The server ends a worker thread, silently and for ever, when
//!   reading a kick fails. Between the worker's `epoll_wait` and its read the frontend may stop the ring and
//!   start it again with a new eventfd, on which nothing was written yet: `EAGAIN`, and the port is dead.
//! * **A new call fd is signalled at once.** QEMU starts a ring with `SET_VRING_KICK` and only then tells
//!   where interrupts go. What the guest was told in between went to the old eventfd, or none, and a driver
//!   that waits for it would wait for ever. An interrupt without cause costs nothing (libvhost-user does the
//!   same).
//! * **A ring that starts is looked at once.** It may have been served by a process that died before it asked for the
//!   next kick. So the kick's eventfd is written when it comes.
//! * **A ring that was never told a position goes on where its used ring ends.** That is where the process before this
//!   one was ([`keeper`](crate::keeper)): buffers are given back in the order in which they are taken, in every ring.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard};

use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// The guest's memory; the frontend may replace the map at any time.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A virtqueue shared with the vhost-user server. A clone is the same queue.
#[derive(Clone)]
pub(super) struct Vring {
    inner: VringMutex<Memory>,
    configured: Arc<AtomicBool>,
    kicks: Arc<AtomicU64>,
    /// The frontend has said where it is to start.
    placed: Arc<AtomicBool>,
}

impl Vring {
    /// How often another eventfd for kicks came, or the one there was went.
    pub(super) fn kicks(&self) -> u64 {
        self.kicks.load(Ordering::Acquire)
    }

    /// The eventfd for kicks, if there is one now.
    pub(super) fn kick(&self) -> io::Result<Option<OwnedFd>> {
        let ring = self.get_ref();
        let duplicate = |fd| {
            // SAFETY: it is open as long as `ring` is held.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            fd.try_clone_to_owned()
        };
        let kick = ring.get_kick().as_ref().map(AsRawFd::as_raw_fd);
        kick.map(duplicate).transpose()
    }

    /// Whether the frontend has said where it is to start.
    pub(super) fn is_placed(&self) -> bool {
        self.placed.load(Ordering::Relaxed)
    }

    /// Whether the frontend ever gave it an eventfd: a frontend with fewer queues never does.
    pub(super) fn configured(&self) -> bool {
        self.configured.load(Ordering::Relaxed)
    }
}

/// Whether the frontend has started the ring and not stopped it since.
pub(super) fn is_running(ring: &VringState<Memory>) -> bool {
    use virtio_queue::QueueT;
    ring.get_queue().ready() && ring.is_enabled()
}

impl<'a> VringStateGuard<'a, Memory> for Vring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl<'a> VringStateMutGuard<'a, Memory> for Vring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl VringT<Memory> for Vring {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, Error> {
        Ok(Vring {
            inner: VringMutex::new(memory, max_queue_size)?,
            configured: Arc::default(),
            kicks: Arc::default(),
            placed: Arc::default(),
        })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        self.inner.get_mut()
    }

    fn read_kick(&self) -> io::Result<bool> {
        match self.inner.read_kick() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Ok(self.get_ref().is_enabled())
            }
            result => result,
        }
    }

    fn set_call(&self, file: Option<File>) {
        let given = file.is_some();
        self.inner.set_call(file);
        if given {
            self.configured.store(true, Ordering::Relaxed);
            // Fails only when the eventfd's counter is full, and then it is signalled already.
            let _ = self.inner.signal_used_queue();
        }
    }

    fn add_used(&self, head: u16, len: u32) -> Result<(), Error> {
        self.inner.add_used(head, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.inner.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.inner.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.inner.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc_table: u64, avail: u64, used: u64) -> Result<(), Error> {
        self.inner.set_queue_info(desc_table, avail, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.placed.store(true, Ordering::Relaxed);
        self.inner.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, index: u16) {
        if !self.placed.load(Ordering::Relaxed) {
            self.inner.set_queue_next_avail(index);
        }
        self.inner.set_queue_next_used(index);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.inner.queue_used_idx()
    }

    fn set_queue_size(&self, size: u16) {
        self.inner.set_queue_size(size);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.inner.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.inner.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        if let Some(mut kick) = file.as_ref() {
            // Fails only when the eventfd's counter is full, and then it is signalled already.
            let _ = kick.write(&1u64.to_ne_bytes());
        }
        self.inner.set_kick(file);
        // Only now: who sees the number finds the eventfd that it is for, or a later one.
        self.kicks.fetch_add(1, Ordering::Release);
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(file);
    }
}
