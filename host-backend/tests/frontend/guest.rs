//! QEMU's generic vhost-user device and Linux's virtio_console in one: the order of requests of the first, the
//! habits of the second (drivers/char/virtio_console.c).
//!
//! What the driver does, and so does [`Guest`], each named after the driver's function where it is done:
//!
//! * it leaves one page in each receive buffer, fills the ring with them, and gives each back, with a kick if one is
//!   wanted, as soon as it was read to its end;
//! * it writes at most 32 KiB at once, in one descriptor, and takes back what was used before it writes again;
//! * it spins until a control message was taken, and so does a console with each of its writes;
//! * it asks for the next interrupt whenever it takes a chain back, and not at all for control messages it sends;
//! * it throws away what it finds in the ring of a port that is not open, for as long as it finds something.

use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::Pattern;
use super::ring::{PATIENCE, Ring, RingSetup, wait_any};

pub const DEVICE_READY: u16 = 0;
pub const DEVICE_ADD: u16 = 1;
pub const DEVICE_REMOVE: u16 = 2;
pub const PORT_READY: u16 = 3;
pub const CONSOLE_PORT: u16 = 4;
pub const RESIZE: u16 = 5;
pub const PORT_OPEN: u16 = 6;
pub const PORT_NAME: u16 = 7;

/// One page: the size of a receive buffer.
pub const PAGE: usize = 4096;
const PAGE_LEN: u32 = 4096;
/// The most one `write` sends.
pub const MAX_WRITE: usize = 32 * 1024;

const EVENT_IDX: u64 = 1 << 29;
const INDIRECT_DESC: u64 = 1 << 28;

const CONTROL_IN: usize = 2;
const CONTROL_OUT: usize = 3;

/// Where the guest's memory is: in QEMU's address space, any number will do.
const QEMU_OFFSET: u64 = 0x7000_0000_0000;
const BUFFERS: u64 = 0x10_0000 * 16;

#[derive(Clone, Copy)]
pub struct Setup {
    pub size: u16,
    pub event_idx: bool,
    pub indirect: bool,
    pub ports: usize,
    /// Room for further ports.
    pub spare: usize,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            size: 256,
            event_idx: true,
            indirect: true,
            ports: 1,
            spare: 0,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Control {
    pub id: u32,
    pub event: u16,
    pub value: u16,
    pub rest: Vec<u8>,
}

/// What the guest's driver knows of a port.
#[derive(Default)]
pub struct GuestPort {
    pub added: bool,
    pub name: Option<Vec<u8>>,
    pub host_connected: bool,
    pub guest_connected: bool,
    /// The buffer that a reader has read a part of: its head, where to go on, and its end.
    inbuf: Option<(u16, u64, u64)>,
}

/// Memory beside the one that the guest started with.
pub struct Dimm {
    pub memory: GuestMemoryMmap,
    pub region: VhostUserMemoryRegionInfo,
    _file: std::fs::File,
}

pub struct Guest {
    pub frontend: Frontend,
    pub memory: Arc<GuestMemoryMmap>,
    pub rings: Vec<Ring>,
    pub ports: Vec<GuestPort>,
    pub setup: Setup,
    pub features: u64,
    /// Control messages that came, oldest first.
    pub heard: Vec<Control>,
    region: VhostUserMemoryRegionInfo,
    _file: std::fs::File,
}

impl Guest {
    /// QEMU starts: connects, and asks what it asks when it makes the device.
    pub fn connect(path: &Path, setup: Setup) -> Self {
        let room = setup.ports + setup.spare;
        let queues = 2 * (room + 1);
        let mut frontend = Frontend::connect(path, queues as u64).unwrap();
        let offered = frontend.get_features().unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        frontend.set_protocol_features(protocol & wanted).unwrap();
        assert_eq!(frontend.get_queue_num().unwrap(), queues as u64);
        frontend.set_owner().unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);

        let buffers = (PAGE + MAX_WRITE) as u64 * u64::from(setup.size) * (room as u64 + 1);
        let dimm = Dimm::new(0, BUFFERS + buffers);
        let memory = Arc::new(dimm.memory);
        let ring_setup = RingSetup {
            size: setup.size,
            event_idx: setup.event_idx,
            indirect: setup.indirect,
        };
        let mut base = 0x1000;
        let mut rings: Vec<Ring> = (0..queues)
            .map(|_| {
                let ring = Ring::new(memory.clone(), base, ring_setup);
                base += Ring::space(setup.size);
                ring
            })
            .collect();
        assert!(base < BUFFERS);
        rings[CONTROL_OUT].callback = false;
        for index in 0..queues {
            // Masked: nobody listens.
            frontend
                .set_vring_call(index, &EventFd::new(libc::EFD_NONBLOCK).unwrap())
                .unwrap();
        }
        let mut features = offered;
        if !setup.event_idx {
            features &= !EVENT_IDX;
        }
        if !setup.indirect {
            features &= !INDIRECT_DESC;
        }
        Guest {
            frontend,
            memory,
            rings,
            ports: (0..room).map(|_| GuestPort::default()).collect(),
            setup,
            features,
            heard: Vec::new(),
            region: dimm.region,
            _file: dimm._file,
        }
    }

    /// QEMU starts and its guest boots, up to a port that is announced, named and ready.
    pub fn boot(path: &Path, setup: Setup) -> Self {
        let mut guest = Self::connect(path, setup);
        guest.start(&vec![0; guest.rings.len()]);
        guest.probe();
        guest
    }

    /// The same, as if so many chains had gone through each ring before.
    pub fn boot_at(path: &Path, setup: Setup, position: u16) -> Self {
        let mut guest = Self::connect(path, setup);
        for ring in &mut guest.rings {
            ring.begin_at(position);
        }
        guest.start(&vec![position; guest.rings.len()]);
        guest.probe();
        guest
    }

    /// QMP `stop` and `cont`.
    pub fn pause_and_resume(&mut self, between: impl FnOnce(&mut Self)) {
        let bases = self.stop();
        between(self);
        self.start(&bases);
    }

    /// Starts all rings at these positions.
    pub fn start(&mut self, bases: &[u16]) {
        self.frontend.set_features(self.features).unwrap();
        self.frontend.set_mem_table(&[self.region]).unwrap();
        self.enable(true);
        for (index, base) in bases.iter().enumerate() {
            self.start_ring(index, *base);
        }
        for (index, ring) in self.rings.iter().enumerate() {
            self.frontend.set_vring_call(index, &ring.call).unwrap();
        }
    }

    /// SET_VRING_ENABLE for all rings.
    pub fn enable(&mut self, on: bool) {
        for index in 0..self.rings.len() {
            self.frontend.set_vring_enable(index, on).unwrap();
        }
    }

    /// `vhost_virtqueue_start`, but for the interrupts.
    pub fn start_ring(&mut self, index: usize, base: u16) {
        let ring = &self.rings[index];
        let config = VringConfigData {
            queue_max_size: 1024,
            queue_size: self.setup.size,
            flags: 0,
            desc_table_addr: QEMU_OFFSET + ring.descriptors_at(),
            used_ring_addr: QEMU_OFFSET + ring.used_at(),
            avail_ring_addr: QEMU_OFFSET + ring.avail_at(),
            log_addr: None,
        };
        self.frontend.set_vring_num(index, self.setup.size).unwrap();
        self.frontend.set_vring_base(index, base).unwrap();
        self.frontend.set_vring_addr(index, &config).unwrap();
        self.frontend.set_vring_kick(index, &ring.kick).unwrap();
    }

    /// Where the memory ends that the guest started with.
    pub fn memory_len(&self) -> u64 {
        self.region.memory_size
    }

    /// More memory is plugged in.
    pub fn plug(&mut self, at: u64, len: u64) -> Dimm {
        let dimm = Dimm::new(at, len);
        self.frontend.add_mem_region(&dimm.region).unwrap();
        dimm
    }

    /// And out again.
    pub fn unplug(&mut self, dimm: &Dimm) {
        self.frontend.remove_mem_region(&dimm.region).unwrap();
    }

    /// The whole table of memory anew, as a frontend without slots sends it.
    pub fn replace_memory(&mut self, dimms: &[&Dimm]) {
        let mut table = vec![self.region];
        table.extend(dimms.iter().map(|dimm| dimm.region));
        self.frontend.set_mem_table(&table).unwrap();
    }

    /// Stops all rings; returns where they stopped.
    pub fn stop(&mut self) -> Vec<u16> {
        self.enable(false);
        (0..self.rings.len())
            .map(|index| u16::try_from(self.frontend.get_vring_base(index).unwrap()).unwrap())
            .collect()
    }

    /// The driver goes and a new one comes: a reboot, or unbind and bind.
    pub fn reboot(&mut self) {
        self.stop();
        self.start_anew();
        self.probe();
    }

    /// All rings empty and at 0, the driver knows nothing.
    pub fn start_anew(&mut self) {
        self.rings.iter_mut().for_each(Ring::reset);
        self.ports
            .iter_mut()
            .for_each(|port| *port = GuestPort::default());
        self.heard.clear();
        self.start(&vec![0; self.rings.len()]);
    }

    /// `virtcons_freeze` and `virtcons_restore`: new rings and no DEVICE_READY; what was open is opened again.
    pub fn suspend_and_resume(&mut self) {
        self.stop();
        self.rings.iter_mut().for_each(Ring::reset);
        self.start(&vec![0; self.rings.len()]);
        self.fill(CONTROL_IN);
        for index in 0..self.ports.len() {
            if !self.ports[index].added {
                continue;
            }
            self.ports[index].host_connected = false;
            self.ports[index].inbuf = None;
            self.fill(Self::ring_in(index));
            let id = u32::try_from(index).unwrap();
            self.control(id, PORT_READY, 1);
            if self.ports[index].guest_connected {
                self.control(id, PORT_OPEN, 1);
            }
        }
    }

    /// `virtcons_probe`, and what follows until every port is known.
    pub fn probe(&mut self) {
        self.fill(CONTROL_IN);
        self.control(u32::MAX, DEVICE_READY, 1);
        self.wait_control("all ports were added", |guest| {
            guest.ports[..guest.setup.ports]
                .iter()
                .all(|port| port.added && port.name.is_some())
        });
    }

    pub fn ring_in(port: usize) -> usize {
        if port == 0 { 0 } else { 2 * port + 2 }
    }

    pub fn ring_out(port: usize) -> usize {
        Self::ring_in(port) + 1
    }

    /// The buffer that belongs to a head of a ring.
    pub fn buffer(&self, ring: usize, head: u16) -> u64 {
        let each = (PAGE + MAX_WRITE) as u64 * u64::from(self.setup.size);
        let start = BUFFERS + (ring / 2) as u64 * each;
        if ring.is_multiple_of(2) {
            start + u64::from(head) * PAGE as u64
        } else {
            start + u64::from(self.setup.size) * PAGE as u64 + u64::from(head) * MAX_WRITE as u64
        }
    }

    /// Gives the device all the receive buffers it can have.
    pub fn fill(&mut self, ring: usize) {
        while let Some(head) = self.rings[ring].next_head() {
            let buffer = self.buffer(ring, head);
            self.rings[ring].add(&[(buffer, PAGE_LEN)], true).unwrap();
        }
        self.rings[ring].notify();
    }

    /// Sends a control message and spins until it is taken, as the kernel does.
    pub fn control(&mut self, id: u32, event: u16, value: u16) {
        let message = [
            &id.to_le_bytes()[..],
            &event.to_le_bytes(),
            &value.to_le_bytes(),
        ]
        .concat();
        self.control_raw(&message);
    }

    pub fn control_raw(&mut self, message: &[u8]) {
        self.send_and_spin(CONTROL_OUT, message, "a control message was not taken");
    }

    /// Puts bytes in a ring and spins until the device has taken them.
    fn send_and_spin(&mut self, ring: usize, bytes: &[u8], complaint: &str) {
        let head = self.rings[ring].next_head().unwrap();
        let buffer = self.buffer(ring, head);
        self.memory
            .write_slice(bytes, GuestAddress(buffer))
            .unwrap();
        let ring = &mut self.rings[ring];
        ring.add(&[(buffer, u32::try_from(bytes.len()).unwrap())], false)
            .unwrap();
        ring.notify();
        ring.spin(complaint);
    }

    /// Handles the control messages that have come.
    pub fn handle_control(&mut self) {
        while let Some((head, len)) = self.rings[CONTROL_IN].pop() {
            let mut bytes = vec![0; len as usize];
            let buffer = self.buffer(CONTROL_IN, head);
            self.memory
                .read_slice(&mut bytes, GuestAddress(buffer))
                .unwrap();
            let message = Control {
                id: u32::from_le_bytes(bytes[..4].try_into().unwrap()),
                event: u16::from_le_bytes(bytes[4..6].try_into().unwrap()),
                value: u16::from_le_bytes(bytes[6..8].try_into().unwrap()),
                rest: bytes[8..].to_vec(),
            };
            self.heard.push(message.clone());
            let index = message.id as usize;
            match message.event {
                DEVICE_ADD => {
                    self.fill(Self::ring_in(index));
                    self.ports[index].added = true;
                    self.control(message.id, PORT_READY, 1);
                }
                // `init_port_console`: a console is opened by the driver itself.
                CONSOLE_PORT if !self.ports[index].guest_connected => {
                    self.ports[index].guest_connected = true;
                    self.control(message.id, PORT_OPEN, 1);
                }
                PORT_NAME => self.ports[index].name = Some(message.rest),
                // `unplug_port` says nothing to the device, and its buffers stay in the ring.
                DEVICE_REMOVE => {
                    self.discard(index);
                    self.ports[index] = GuestPort::default();
                }
                PORT_OPEN => self.ports[index].host_connected = message.value != 0,
                _ => {}
            }
            // The buffer goes back only now: `control_work_handler`.
            self.rings[CONTROL_IN]
                .add(&[(buffer, PAGE_LEN)], true)
                .unwrap();
            self.rings[CONTROL_IN].notify();
        }
    }

    /// Handles control messages until the condition holds.
    pub fn wait_control(&mut self, what: &str, condition: impl Fn(&Guest) -> bool) {
        let end = Instant::now() + PATIENCE;
        loop {
            self.handle_control();
            if condition(self) {
                return;
            }
            assert!(Instant::now() < end, "it never happened that {what}");
            self.rings[CONTROL_IN].wait_used();
        }
    }

    /// Waits until it has been told that the host closed its side, which it may have thought of as closed.
    pub fn wait_host_closes(&mut self, port: usize) {
        let told = |message: &Control| {
            message.id as usize == port && message.event == PORT_OPEN && message.value == 0
        };
        self.wait_control("the host closes the port", |guest| {
            guest.heard.iter().any(told)
        });
    }

    pub fn wait_host_connected(&mut self, port: usize, connected: bool) {
        let what = if connected {
            "the host opened the port"
        } else {
            "the host closed the port"
        };
        self.wait_control(what, |guest| guest.ports[port].host_connected == connected);
    }

    /// `port_fops_open`.
    pub fn open(&mut self, port: usize) {
        self.ports[port].guest_connected = true;
        self.reclaim(port);
        self.control(u32::try_from(port).unwrap(), PORT_OPEN, 1);
    }

    /// `port_fops_release`.
    pub fn close(&mut self, port: usize) {
        self.control(u32::try_from(port).unwrap(), PORT_OPEN, 0);
        self.ports[port].guest_connected = false;
        self.discard(port);
        self.reclaim(port);
    }

    /// `discard_port_data`: throws away what is in the receive ring; returns how many bytes that were.
    pub fn discard(&mut self, port: usize) -> usize {
        let rest = self.ports[port].inbuf.take();
        if let Some((head, _, _)) = rest {
            self.give_back(port, head);
        }
        rest.map_or(0, |(_, at, end)| usize::try_from(end - at).unwrap())
            + self.take(port, usize::MAX).len()
    }

    /// `in_intr`, if there was an interrupt: how many bytes came that nobody is there for.
    pub fn interrupt(&mut self, port: usize) -> usize {
        let raised = self.rings[Self::ring_in(port)].call.read().is_ok();
        if raised && !self.ports[port].guest_connected {
            return self.discard(port);
        }
        0
    }

    fn reclaim(&mut self, port: usize) {
        while self.rings[Self::ring_out(port)].pop().is_some() {}
    }

    /// A non-blocking `write`: 0 is `EAGAIN`.
    pub fn write(&mut self, port: usize, bytes: &[u8]) -> usize {
        self.handle_control();
        self.reclaim(port);
        if !self.ports[port].host_connected {
            return 0;
        }
        let ring = Self::ring_out(port);
        let len = bytes.len().min(MAX_WRITE);
        // Several descriptors, as `splice` does, when the ring is to have indirect ones.
        let pieces = if self.setup.indirect { len.min(3) } else { 1 };
        let Some(head) = self.rings[ring].next_head().filter(|_| len > 0) else {
            return 0;
        };
        let buffer = self.buffer(ring, head);
        self.memory
            .write_slice(&bytes[..len], GuestAddress(buffer))
            .unwrap();
        let mut at = 0;
        let buffers: Vec<(u64, u32)> = (0..pieces)
            .map(|piece| {
                let end = len * (piece + 1) / pieces;
                let start = std::mem::replace(&mut at, end);
                (buffer + start as u64, u32::try_from(end - start).unwrap())
            })
            .collect();
        self.rings[ring].add(&buffers, false).unwrap();
        self.rings[ring].notify();
        len
    }

    /// Writes all of it, waiting for room.
    pub fn write_all(&mut self, port: usize, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let written = self.write(port, bytes);
            bytes = &bytes[written..];
            if written == 0 {
                self.rings[Self::ring_out(port)].wait_used();
            }
        }
    }

    /// `put_chars`, with which a console is written to: spins until the device has taken it.
    pub fn put_chars(&mut self, port: usize, bytes: &[u8]) {
        self.reclaim(port);
        let ring = Self::ring_out(port);
        self.send_and_spin(ring, bytes, "a console's characters were not taken");
    }

    /// A non-blocking `read` (`fill_readbuf`): at most `max` bytes, of one buffer; it goes back when it was read to its
    /// end.
    pub fn read_some(&mut self, port: usize, max: usize) -> Vec<u8> {
        let ring = Self::ring_in(port);
        if self.ports[port].inbuf.is_none()
            && let Some((head, len)) = self.rings[ring].pop()
        {
            let at = self.buffer(ring, head);
            self.ports[port].inbuf = Some((head, at, at + u64::from(len)));
        }
        let Some((head, at, end)) = self.ports[port].inbuf.take() else {
            return Vec::new();
        };
        let len = (end - at).min(max as u64);
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        match at + len == end {
            true => self.give_back(port, head),
            false => self.ports[port].inbuf = Some((head, at + len, end)),
        }
        bytes
    }

    /// `add_inbuf`.
    fn give_back(&mut self, port: usize, head: u16) {
        let ring = Self::ring_in(port);
        let buffer = self.buffer(ring, head);
        self.rings[ring].add(&[(buffer, PAGE_LEN)], true).unwrap();
        self.rings[ring].notify();
    }

    /// A non-blocking `readv` of whole buffers: what there is, up to about `max`.
    pub fn take(&mut self, port: usize, max: usize) -> Vec<u8> {
        let ring = Self::ring_in(port);
        let mut bytes = Vec::new();
        while bytes.len() < max
            && let Some((head, len)) = self.rings[ring].pop()
        {
            let at = bytes.len();
            bytes.resize(at + len as usize, 0);
            let buffer = self.buffer(ring, head);
            self.memory
                .read_slice(&mut bytes[at..], GuestAddress(buffer))
                .unwrap();
            self.give_back(port, head);
        }
        bytes
    }

    /// Reads until there are `len` bytes.
    pub fn read(&mut self, port: usize, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let more = self.take(port, len - bytes.len());
            if more.is_empty() {
                self.rings[Self::ring_in(port)].wait_used();
            }
            bytes.extend(more);
        }
        assert_eq!(bytes.len(), len, "too many bytes");
        bytes
    }

    /// Writes and reads so many bytes of the patterns at once. `turn` is called between the calls, with their number.
    pub fn exchange(
        &mut self,
        port: usize,
        out: (&mut Pattern, usize),
        inn: (&mut Pattern, usize),
        mut turn: impl FnMut(&mut Self, usize),
    ) {
        let (mut to_write, mut to_read) = (out.1, inn.1);
        let mut chunk: Vec<u8> = Vec::new();
        for number in 0.. {
            if chunk.is_empty() {
                chunk = out.0.take(to_write.min(MAX_WRITE - 7));
            }
            let written = self.write(port, &chunk);
            chunk.drain(..written);
            to_write -= written;
            let read = self.take(port, 64 * 1024);
            inn.0.expect(&read);
            to_read = to_read.checked_sub(read.len()).expect("too many bytes");
            if to_write == 0 && to_read == 0 {
                return;
            }
            turn(self, number);
            if written == 0 && read.is_empty() {
                self.wait(port, to_write > 0);
            }
        }
    }

    /// Waits for an interrupt: something to read, or room to write again if that is wanted.
    pub fn wait(&mut self, port: usize, writing: bool) {
        let (ins, outs) = self.rings.split_at_mut(Self::ring_out(port));
        let ring_in = ins.last_mut().unwrap();
        if writing {
            wait_any(&mut [ring_in, &mut outs[0]]);
        } else {
            ring_in.wait_used();
        }
    }

    /// What QEMU does when the driver writes to the configuration: it hands over all of it.
    pub fn set_config(&mut self, bytes: &[u8]) {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.frontend.set_config(0, flags, bytes).unwrap();
    }

    pub fn config(&mut self, offset: u32, size: u32) -> Vec<u8> {
        let zeros = vec![0; size as usize];
        let flags = VhostUserConfigFlags::WRITABLE;
        self.frontend
            .get_config(offset, size, flags, &zeros)
            .unwrap()
            .1
    }
}

impl Dimm {
    fn new(at: u64, len: u64) -> Self {
        let file = memfd(len);
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let range = (
            GuestAddress(at),
            usize::try_from(len).unwrap(),
            Some(offset),
        );
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: at,
            memory_size: len,
            userspace_addr: QEMU_OFFSET + at,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        Dimm {
            memory,
            region,
            _file: file,
        }
    }
}

fn memfd(len: u64) -> std::fs::File {
    // SAFETY: the name is a C string; the result is a new file descriptor or an error.
    let file = unsafe {
        let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        std::fs::File::from_raw_fd(fd)
    };
    file.set_len(len).unwrap();
    file
}
