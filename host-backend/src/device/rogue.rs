//! A guest and a QEMU out of a fuzzer's bytes, and the device between them without a thread or a socket.
//!
//! # Theory of operation
//!
//! [`run`] makes of its input a list of operations ([`Op`]) and carries them out one after the other, in the places of
//! all who take part: a guest's driver that writes anywhere in its memory, a frontend that stops, moves and starts rings and
//! takes memory away, the device's two worker threads ([`Backend::event`]), and the engine with its links. What others
//! would do *at the same time* is done from within a link's transaction ([`Touch`] in the sink or source), so each input
//! does the same whenever it is run.
//!
//! What must hold, besides that nothing panics:
//!
//! * what a link is shown lies in the guest's memory, and is no more than a transaction may have;
//! * no ring gets more chains back than were taken from it;
//! * everything comes to rest when the guest does: nobody spins;
//! * whatever happened, the next QEMU's guest is served.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};

use arbitrary::{Arbitrary, Unstructured};
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_queue::QueueT;
use virtproxy_engine::channel::{Link, Progress};
use virtproxy_engine::segment::{Cursor, MAX_IOV, Segment};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::backend::{Backend, CONTROL, DATA};
use super::ring::distance;
use super::vring::{Memory, Vring};
use super::{Port, PortKind, PortSpec, Shared};

/// Two ports.
const ROOM: usize = 2;
const RINGS: usize = 2 * (ROOM + 1);
const SIZE: u16 = 8;

/// Guest memory: one region with the rings and most of the buffers, and one that comes and goes.
const MAIN: usize = 0x1_0000;
const OTHER: (u64, usize) = (0x2_0000, 0x4000);

/// Where a ring's parts are, from its start.
const RING_SPACE: u64 = 0x400;
const AVAIL: u64 = 0x80;
const USED: u64 = 0x100;
const TABLE: u64 = 0x200;
const TABLE_LEN: u8 = 32;

const PAGE: u64 = 0x1000;
const PAGE_LEN: u32 = 0x1000;
const BUFFERS: u64 = 0x4000;
const FAR: u64 = 1 << 40;

const MOST_OPS: usize = 200;
/// The most bytes of one transaction: all but the last chain are less than 1 MiB, and that one is 4 MiB at most.
const MOST_BYTES: usize = 5 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const DEVICE_READY: u16 = 0;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;

/// Something that a guest writes into its memory, at any time.
#[derive(Debug, Clone, Copy, Arbitrary)]
enum Touch {
    Descriptor {
        ring: u8,
        indirect: bool,
        index: u8,
        place: Place,
        len: Len,
        flags: u8,
        next: u8,
    },
    /// Makes a head available.
    Publish {
        ring: u8,
        head: u8,
    },
    /// Writes an index that is no matter of course.
    Avail {
        ring: u8,
        by: i16,
    },
    /// Writes to where a ring says whether it wants to be told.
    Wish {
        ring: u8,
        flags: bool,
        value: u16,
    },
    /// Writes an index that is the device's own.
    Used {
        ring: u8,
        index: u16,
    },
    Byte {
        at: u16,
        byte: u8,
    },
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Place {
    Page(u8),
    Ring(u8),
    Table(u8),
    Other(u16),
    End(u8),
    Far,
    Last(u8),
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Len {
    Page,
    Small(u8),
    Any(u16),
    Table(u8),
    Most,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Op {
    Touch(Touch),
    /// A chain as a driver makes it.
    Chain {
        ring: u8,
        pieces: u8,
        len: Len,
    },
    /// A control message as a driver sends it, but for what it says.
    Message {
        id: u8,
        event: u8,
        value: u8,
        len: u8,
    },
    Kick(u8),
    /// Both worker threads look at everything.
    Poke,
    Tick,
    Claim(u8),
    Release(u8),
    Receive(u8, Option<Touch>),
    Send(u8, u16, Option<Touch>),
    Connected(u8, bool),
    Resize(u8, u8),
    Add,
    Remove,
    Stop(u8),
    Start {
        ring: u8,
        base: u16,
        moved: Option<Place>,
        event_idx: bool,
        size: u8,
    },
    Enable(u8, bool),
    /// Which regions there are from now on.
    Memory {
        main: bool,
        other: bool,
    },
    GetConfig {
        offset: u32,
        size: u16,
    },
    SetConfig {
        offset: u32,
        bytes: [u8; 12],
        len: u8,
    },
    Reset,
    Reconnect,
}

/// Does what the bytes say, and panics if something is as it must not be.
pub fn run(bytes: &[u8]) {
    let Ok(ops) = Vec::<Op>::arbitrary_take_rest(Unstructured::new(bytes)) else {
        return;
    };
    // Links have a timer, which wants a runtime. Nobody drives it, so that time stands still.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime needs three descriptors");
    let _inside = runtime.enter();
    let mut world = World::new();
    for op in ops.into_iter().take(MOST_OPS) {
        world.apply(op);
        world.check();
    }
    world.rest();
    world.check();
    world.reconnect();
    world.assert_serves();
}

/// All who take part.
struct World {
    shared: Arc<Shared>,
    ports: [Option<Port>; ROOM],
    links: [Option<Box<dyn Link>>; ROOM],
    backend: Arc<Backend>,
    memory: Memory,
    guest: Guest,
    /// In the order of the device's queues.
    rings: Vec<Vring>,
    /// Of each ring, where it was before the operation: the next chain to take, the next to give back.
    before: Vec<(u16, u16)>,
}

/// The guest's memory, whoever else can see it.
struct Guest {
    memory: GuestMemoryMmap,
    /// What the driver has made available.
    avail: [u16; RINGS],
}

impl World {
    fn new() -> Self {
        let specs = [PortSpec::generic("a"), console()];
        let shared = Shared::new("rogue".to_owned(), &specs, ROOM).expect("an eventfd");
        let shared = Arc::new(shared);
        let (backend, memory, guest, rings) = connect(&shared);
        let mut world = World {
            ports: [0, 1].map(|slot| Some(Port::new(&shared, slot))),
            links: [None, None],
            before: Vec::new(),
            shared,
            backend,
            memory,
            guest,
            rings,
        };
        world.start_all();
        world
    }

    /// One QEMU is gone, and the next one is here.
    fn reconnect(&mut self) {
        self.shared.detach();
        let (backend, memory, guest, rings) = connect(&self.shared);
        (self.backend, self.memory, self.guest, self.rings) = (backend, memory, guest, rings);
        self.start_all();
    }

    fn start_all(&mut self) {
        self.poke();
        for ring in 0..RINGS {
            self.start(ring, 0, None, true, SIZE);
        }
        self.poke();
        self.note();
    }

    /// What the library does when a ring starts.
    fn start(&self, index: usize, base: u16, moved: Option<Place>, event_idx: bool, size: u16) {
        let ring = &self.rings[index];
        let at = moved.map_or(ring_at(index), |place| place.address());
        ring.set_queue_event_idx(event_idx);
        ring.set_queue_size(size);
        ring.set_queue_next_avail(base);
        let parts = (at, at.wrapping_add(AVAIL), at.wrapping_add(USED));
        if ring.set_queue_info(parts.0, parts.1, parts.2).is_ok()
            && let Ok(used) = ring.queue_used_idx()
        {
            ring.set_queue_next_used(used);
            ring.set_queue_ready(true);
        }
        ring.set_enabled(true);
    }

    fn apply(&mut self, op: Op) {
        self.note();
        match op {
            Op::Touch(touch) => self.guest.touch(touch),
            Op::Chain { ring, pieces, len } => {
                let ring = usize::from(ring) % RINGS;
                self.guest.chain(ring, 1 + pieces % 4, len.bytes());
                self.kick(ring);
            }
            Op::Message {
                id,
                event,
                value,
                len,
            } => {
                let id = if id == u8::MAX { u32::MAX } else { id.into() };
                self.say(id, event.into(), value.into(), usize::from(len).min(16));
            }
            Op::Kick(ring) => self.kick(usize::from(ring) % RINGS),
            Op::Poke => self.poke(),
            Op::Tick => {
                let rings = self.rings_of(CONTROL);
                self.backend
                    .event(CONTROL, self.backend.timer_event(), &rings);
            }
            Op::Claim(port) => self.claim(usize::from(port) % ROOM),
            Op::Release(port) => self.links[usize::from(port) % ROOM] = None,
            Op::Receive(port, meanwhile) => {
                self.receive(usize::from(port) % ROOM, meanwhile);
            }
            Op::Send(port, len, meanwhile) => {
                self.send(usize::from(port) % ROOM, len.into(), meanwhile);
            }
            Op::Connected(port, connected) => {
                if let Some(port) = &self.ports[usize::from(port) % ROOM] {
                    port.set_connected(connected);
                }
            }
            Op::Resize(columns, rows) => {
                if let Some(port) = &self.ports[1] {
                    port.resize(columns.into(), rows.into());
                }
            }
            Op::Add => {
                if self.ports[1].is_none() {
                    self.ports[1] = self.shared.add(&console()).ok();
                }
            }
            Op::Remove => {
                self.ports[1] = None;
                self.shared.remove(1);
            }
            Op::Stop(ring) => {
                let index = usize::from(ring) % RINGS;
                self.rings[index].set_queue_ready(false);
                let index = u32::try_from(index).expect("few rings");
                self.backend.stop_vring(index).expect("never fails");
            }
            Op::Start {
                ring,
                base,
                moved,
                event_idx,
                size,
            } => {
                let ring = usize::from(ring) % RINGS;
                self.start(ring, base, moved, event_idx, 1 << (size % 6));
                self.note();
                self.kick(ring);
            }
            Op::Enable(ring, on) => self.rings[usize::from(ring) % RINGS].set_enabled(on),
            Op::Memory { main, other } => {
                let mut memory = self.guest.memory.clone();
                if !main {
                    memory = without(&memory, 0, MAIN);
                }
                if !other {
                    memory = without(&memory, OTHER.0, OTHER.1);
                }
                self.memory.lock().expect("not poisoned").replace(memory);
            }
            Op::GetConfig { offset, size } => {
                let config = self.backend.get_config(offset, size.into());
                let room = (u32::MAX - offset) as usize;
                assert_eq!(config.len(), usize::from(size).min(room));
            }
            Op::SetConfig { offset, bytes, len } => {
                let bytes = &bytes[..usize::from(len) % 13];
                self.backend.set_config(offset, bytes).expect("never fails");
                let mut characters = Vec::new();
                let mut cx = Context::from_waker(Waker::noop());
                if let Some(port) = &self.ports[1] {
                    let _ = port.poll_emergency(&mut cx, &mut characters);
                }
                assert!(characters.len() <= MOST_OPS);
            }
            Op::Reset => self.backend.reset_device(),
            Op::Reconnect => self.reconnect(),
        }
    }

    /// The rings that a worker thread has.
    fn rings_of(&self, thread: usize) -> Vec<Vring> {
        let mask = self.backend.queues_per_thread()[thread];
        let mine = |(index, _): &(usize, &Vring)| mask >> index & 1 == 1;
        let rings = self.rings.iter().enumerate().filter(mine);
        rings.map(|(_, ring)| ring.clone()).collect()
    }

    fn kick(&self, ring: usize) {
        if !self.rings[ring].get_ref().is_enabled() {
            return;
        }
        let (thread, event) = match ring {
            0 | 1 => (DATA, ring),
            2 | 3 => (CONTROL, ring - 2),
            _ => (DATA, ring - 2),
        };
        let event = u16::try_from(event).expect("few rings");
        self.backend.event(thread, event, &self.rings_of(thread));
        self.settle();
    }

    fn poke(&self) {
        self.shared.poke();
        self.settle();
    }

    /// The worker threads hear pokes until there is none.
    fn settle(&self) {
        for _ in 0..64 {
            if self.shared.poke.read().is_err() {
                return;
            }
            for thread in [CONTROL, DATA] {
                let rings = self.rings_of(thread);
                self.backend
                    .event(thread, self.backend.poke_event(), &rings);
            }
        }
        panic!("the worker threads poke each other without end");
    }

    fn claim(&mut self, slot: usize) {
        let mut cx = Context::from_waker(Waker::noop());
        if let (Some(port), None) = (&mut self.ports[slot], &self.links[slot])
            && let Poll::Ready(link) = port.poll_open(&mut cx)
        {
            self.links[slot] = Some(link);
        }
    }

    /// One transaction of a link, and what the guest does meanwhile.
    fn receive(&mut self, slot: usize, meanwhile: Option<Touch>) -> Option<Progress> {
        let guest = &mut self.guest;
        let link = self.links[slot].as_mut()?;
        let progress = link.receive(&mut |segments| {
            if let Some(touch) = meanwhile {
                guest.touch(touch);
            }
            guest.assert_holds(segments);
            let mut cursor = Cursor::new(segments);
            let mut bytes = vec![0; cursor.remaining()];
            cursor.read(&mut bytes);
        });
        self.after(slot, progress)
    }

    fn send(&mut self, slot: usize, len: usize, meanwhile: Option<Touch>) -> Option<Progress> {
        let guest = &mut self.guest;
        let link = self.links[slot].as_mut()?;
        let least = link.min_room();
        let progress = link.send(&mut |segments| {
            if let Some(touch) = meanwhile {
                guest.touch(touch);
            }
            guest.assert_holds(segments);
            let mut cursor = Cursor::new(segments);
            assert!(cursor.remaining() >= least, "offered too little");
            let written = len.min(cursor.remaining());
            cursor.write(&vec![0x55; written]);
            written
        });
        self.after(slot, progress)
    }

    fn after(&mut self, slot: usize, progress: std::io::Result<Progress>) -> Option<Progress> {
        match progress {
            Ok(progress) => Some(progress),
            Err(_) => {
                self.links[slot] = None;
                None
            }
        }
    }

    fn note(&mut self) {
        self.before = self.rings.iter().map(positions).collect();
    }

    /// What must hold after each operation.
    fn check(&self) {
        for (ring, before) in self.rings.iter().zip(&self.before) {
            let (next, used) = positions(ring);
            let (taken, given) = (distance(before.0, next), distance(before.1, used));
            assert!(
                given <= taken,
                "{given} chains were given back, but {taken} were taken"
            );
        }
    }

    /// All have their turns until nothing moves any more, as the guest does not.
    fn rest(&mut self) {
        self.poke();
        for slot in 0..ROOM {
            self.note();
            self.claim(slot);
            let most = 2 * usize::from(SIZE) * 64;
            let waits = (0..most).any(|_| self.receive(slot, None) != Some(Progress::Again));
            assert!(waits, "a link receives without end");
            let waits = (0..most).any(|_| self.send(slot, 1, None) != Some(Progress::Again));
            assert!(waits, "a link sends without end");
        }
        self.settle();
    }

    /// A well-behaved driver on new rings opens the first port, and bytes go both ways.
    fn assert_serves(&mut self) {
        self.links = [None, None];
        if let Some(port) = &self.ports[0] {
            port.set_connected(true);
        }
        for _ in 0..SIZE {
            self.guest.chain(2, 1, PAGE_LEN);
            self.guest.chain(0, 1, PAGE_LEN);
        }
        self.kick(2);
        self.say(u32::MAX, DEVICE_READY, 1, 8);
        self.say(0, PORT_READY, 1, 8);
        self.say(0, PORT_OPEN, 1, 8);
        self.claim(0);
        let link = self.links[0].as_mut().expect("the port is open");
        let sent = link.send(&mut |segments| {
            Cursor::new(segments).write(b"alive");
            5
        });
        assert_eq!(sent.ok(), Some(Progress::Again), "no room for the guest");
        assert_eq!(self.guest.used(0), (0, 5));
        self.guest.chain(1, 1, 5);
        let mut received = 0;
        let link = self.links[0].as_mut().expect("it is there");
        let progress = link.receive(&mut |segments| received = Cursor::new(segments).remaining());
        assert_eq!((progress.ok(), received), (Some(Progress::Again), 5));
        assert!(self.guest.used_index(2) >= 3, "the guest was not told");
    }

    /// The driver sends a control message. Returns when it was taken, if it was.
    fn say(&mut self, id: u32, event: u16, value: u16, len: usize) {
        let message = [
            &id.to_le_bytes()[..],
            &event.to_le_bytes(),
            &value.to_le_bytes(),
            &[0; 8],
        ]
        .concat();
        let buffer = self.guest.buffer(3, 0);
        self.guest.write(buffer, &message);
        let len = u32::try_from(len).expect("short");
        self.guest.chain(3, 1, len);
        self.kick(3);
    }
}

impl Guest {
    fn new() -> Self {
        let other = (GuestAddress(OTHER.0), OTHER.1);
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MAIN), other]);
        Guest {
            memory: memory.expect("memory"),
            avail: [0; RINGS],
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        // A rogue may write to where nothing is.
        let _ = self.memory.write_slice(bytes, GuestAddress(at));
    }

    fn buffer(&self, ring: usize, index: u64) -> u64 {
        BUFFERS + (2 * ring as u64 + index) % 12 * PAGE
    }

    fn descriptor(&self, at: u64, buffer: (u64, u32), flags: u16, next: u16) {
        let parts = [
            &buffer.0.to_le_bytes()[..],
            &buffer.1.to_le_bytes(),
            &flags.to_le_bytes(),
            &next.to_le_bytes(),
        ];
        self.write(at, &parts.concat());
    }

    /// Makes a head available.
    fn publish(&mut self, ring: usize, head: u16) {
        let slot = u64::from(self.avail[ring] % SIZE);
        self.write(ring_at(ring) + AVAIL + 4 + 2 * slot, &head.to_le_bytes());
        self.avail[ring] = self.avail[ring].wrapping_add(1);
        self.set_avail(ring, self.avail[ring]);
    }

    fn set_avail(&self, ring: usize, index: u16) {
        self.write(ring_at(ring) + AVAIL + 2, &index.to_le_bytes());
    }

    /// A sound chain of so many descriptors.
    fn chain(&mut self, ring: usize, pieces: u8, len: u32) {
        let write = if ring.is_multiple_of(2) { WRITE } else { 0 };
        let head = self.avail[ring] % SIZE;
        for piece in 0..u16::from(pieces) {
            let index = (head + piece) % SIZE;
            let next = if piece + 1 < u16::from(pieces) {
                NEXT
            } else {
                0
            };
            self.descriptor(
                ring_at(ring) + 16 * u64::from(index),
                (self.buffer(ring, piece.into()), len),
                write | next,
                (index + 1) % SIZE,
            );
        }
        self.publish(ring, head);
    }

    fn touch(&mut self, touch: Touch) {
        let ring_of = |ring: u8| usize::from(ring) % RINGS;
        match touch {
            Touch::Descriptor {
                ring,
                indirect,
                index,
                place,
                len,
                flags,
                next,
            } => {
                let ring = ring_at(ring_of(ring));
                let at = match indirect {
                    true => ring + TABLE + 16 * u64::from(index % TABLE_LEN),
                    false => ring + 16 * (u64::from(index) % u64::from(SIZE)),
                };
                let flags = u16::from(flags) & (NEXT | WRITE | INDIRECT);
                self.descriptor(at, (place.address(), len.bytes()), flags, next.into());
            }
            Touch::Publish { ring, head } => self.publish(ring_of(ring), head.into()),
            Touch::Avail { ring, by } => {
                let ring = ring_of(ring);
                self.set_avail(ring, self.avail[ring].wrapping_add_signed(by));
            }
            Touch::Wish { ring, flags, value } => {
                let at = ring_at(ring_of(ring)) + AVAIL;
                let at = if flags {
                    at
                } else {
                    at + 4 + 2 * u64::from(SIZE)
                };
                self.write(at, &value.to_le_bytes());
            }
            Touch::Used { ring, index } => {
                self.write(ring_at(ring_of(ring)) + USED + 2, &index.to_le_bytes());
            }
            Touch::Byte { at, byte } => self.write(at.into(), &[byte]),
        }
    }

    fn used_index(&self, ring: usize) -> u16 {
        let at = GuestAddress(ring_at(ring) + USED + 2);
        let index = self.memory.load(at, Ordering::Acquire);
        u16::from_le(index.expect("in memory"))
    }

    /// The first chain that the device gave back.
    fn used(&self, ring: usize) -> (u32, u32) {
        let read = |at| {
            let value = self
                .memory
                .read_obj(GuestAddress(ring_at(ring) + USED + at));
            u32::from_le(value.expect("in memory"))
        };
        (read(4), read(8))
    }

    /// All of a transaction lies in the guest's memory, and is not too much.
    fn assert_holds(&self, segments: &[Segment<'_>]) {
        assert!(segments.len() <= MAX_IOV, "{} pieces", segments.len());
        let len: usize = segments.iter().map(Segment::len).sum();
        assert!((1..=MOST_BYTES).contains(&len), "{len} bytes");
        for segment in segments {
            let start = segment.ptr().addr();
            let inside = self.memory.iter().any(|region| {
                let len = usize::try_from(region.len()).expect("it is mapped");
                let base = region.as_ptr().addr();
                start >= base && start + segment.len() <= base + len
            });
            assert!(inside, "a segment outside the guest's memory");
        }
    }
}

impl Place {
    fn address(self) -> u64 {
        match self {
            Place::Page(page) => BUFFERS + u64::from(page % 12) * PAGE,
            Place::Ring(ring) => ring_at(usize::from(ring) % RINGS),
            Place::Table(ring) => ring_at(usize::from(ring) % RINGS) + TABLE,
            Place::Other(offset) => OTHER.0 + u64::from(offset),
            Place::End(before) => MAIN as u64 - u64::from(before),
            Place::Far => FAR,
            Place::Last(before) => u64::MAX - u64::from(before),
        }
    }
}

impl Len {
    fn bytes(self) -> u32 {
        match self {
            Len::Page => PAGE_LEN,
            Len::Small(len) => len.into(),
            Len::Any(len) => len.into(),
            Len::Table(count) => 16 * u32::from(count % (TABLE_LEN + 1)),
            Len::Most => u32::MAX,
        }
    }
}

fn console() -> PortSpec {
    PortSpec {
        name: "b".to_owned(),
        kind: PortKind::Console {
            columns: 80,
            rows: 25,
        },
        connected: true,
        resumable: true,
        memo: String::new(),
    }
}

/// A frontend comes: memory and rings that nobody has started.
fn connect(shared: &Arc<Shared>) -> (Arc<Backend>, Memory, Guest, Vec<Vring>) {
    let guest = Guest::new();
    let memory = Memory::new(guest.memory.clone());
    let (backend, _) = Backend::new(shared.clone(), memory.clone()).expect("some eventfds");
    let ring = || Vring::new(memory.clone(), 1024).expect("a power of two");
    let rings = std::iter::repeat_with(ring).take(RINGS).collect();
    (Arc::new(backend), memory, guest, rings)
}

fn ring_at(ring: usize) -> u64 {
    ring as u64 * RING_SPACE
}

fn positions(ring: &Vring) -> (u16, u16) {
    let state = ring.get_ref();
    let queue = state.get_queue();
    (queue.next_avail(), queue.next_used())
}

fn without(memory: &GuestMemoryMmap, at: u64, len: usize) -> GuestMemoryMmap {
    let removed = memory.remove_region(GuestAddress(at), len as u64);
    removed.map_or_else(|_| memory.clone(), |(rest, _)| rest)
}
