//! What a vhost-user frontend may ask, and what it should not: features, configuration, rings, memory.

mod frontend;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use frontend::guest::{DEVICE_READY, MAX_WRITE};
use frontend::ring::{NEXT, PATIENCE};
use frontend::{Guest, Host, Pattern, Setup, assert_alive, connected, device, socket_path};
use vhost::{VhostBackend, VringConfigData};
use vm_memory::{Bytes, GuestAddress};

const OUT: usize = 1;

/// Requests, by their numbers.
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const SET_CONFIG: u32 = 25;
const GET_INFLIGHT_FD: u32 = 31;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;

/// A frontend that checks nothing of what it sends.
struct Raw(UnixStream);

impl Raw {
    /// One that has negotiated all there is.
    fn negotiated(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut raw = Raw(stream);
        let offered = raw.ask(GET_FEATURES, &[]).unwrap();
        // MQ, REPLY_ACK, CONFIG, CONFIGURE_MEM_SLOTS.
        let protocol = 1u64 | 1 << 3 | 1 << 9 | 1 << 15;
        raw.ask(SET_PROTOCOL_FEATURES, &protocol.to_le_bytes())
            .unwrap();
        raw.ask(SET_OWNER, &[]).unwrap();
        raw.ask(SET_FEATURES, &offered).unwrap();
        raw
    }

    /// A request that wants an answer.
    fn send(&mut self, request: u32, payload: &[u8]) {
        let len = u32::try_from(payload.len()).unwrap();
        let head = [request, 1 | 1 << 3, len].map(u32::to_le_bytes).concat();
        // It may have been disconnected already.
        let _ = self.0.write_all(&[&head, payload].concat());
    }

    /// A request, and its answer; `None` if the connection ended.
    fn ask(&mut self, request: u32, payload: &[u8]) -> Option<Vec<u8>> {
        self.send(request, payload);
        let mut head = [0; 12];
        self.0.read_exact(&mut head).ok()?;
        let len = u32::from_le_bytes(head[8..].try_into().unwrap());
        let mut answer = vec![0; len as usize];
        self.0.read_exact(&mut answer).ok()?;
        Some(answer)
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[test]
fn the_configuration_is_always_as_long_as_asked() {
    let path = socket_path();
    let (_handle, _port) = device(&path);
    let mut guest = Guest::connect(&path, Setup::default());
    let whole = guest.config(0, 12);
    assert_eq!(whole, [80, 0, 25, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.config(4, 4), [1, 0, 0, 0]);
    assert_eq!(guest.config(0, 4), whole[..4]);
    assert_eq!(guest.config(0, 256)[..12], whole);
    assert_eq!(guest.config(0, 256)[12..], [0; 244]);
    assert_eq!(guest.config(4095, 1), [0]);
}

#[test]
fn exactly_these_features_are_offered() {
    let path = socket_path();
    let (_handle, _port) = device(&path);
    let guest = Guest::connect(&path, Setup::default());
    let expected = [0, 1, 28, 29, 30, 32]
        .iter()
        .fold(0, |bits, bit| bits | 1u64 << bit);
    assert_eq!(guest.features, expected);
}

#[test]
fn connections_that_say_nothing_or_nonsense_do_no_harm() {
    let path = socket_path();
    let (_handle, mut port) = device(&path);
    for bytes in [&b""[..], b"GET / HTTP/1.0\r\n\r\n", &[0xff; 4096]] {
        let mut stream = UnixStream::connect(&path).unwrap();
        let _ = stream.write_all(bytes);
    }
    let mut guest = Guest::boot(&path, Setup::default());
    guest.wait_host_connected(0, true);
    guest.open(0);
    assert_alive(&mut guest, &mut Host::open(&mut port));
}

#[test]
fn features_that_are_not_offered_are_refused() {
    let path = socket_path();
    let (_handle, port) = device(&path);
    for bit in (0..64).filter(|bit| ![0, 1, 28, 29, 30, 32].contains(bit)) {
        let mut raw = Raw::negotiated(&path);
        let features = 1u64 << bit | 1 << 32;
        let answer = raw.ask(SET_FEATURES, &features.to_le_bytes());
        assert_eq!(answer, Some(1u64.to_le_bytes().to_vec()), "bit {bit}");
        assert_eq!(raw.ask(GET_FEATURES, &[]), None, "the connection ends");
    }
    assert_serves(&path, port);
}

/// The next frontend finds the device as it should be.
fn assert_serves(path: &Path, mut port: virtproxy_host::device::Port) {
    let mut guest = Guest::boot(path, Setup::default());
    guest.wait_host_connected(0, true);
    guest.open(0);
    assert_alive(&mut guest, &mut Host::open(&mut port));
}

#[test]
fn requests_that_make_no_sense_end_their_own_connection_only() {
    let path = socket_path();
    let (_handle, port) = device(&path);
    let config = |offset, size, len| [words(&[offset, size, 1]), vec![0; len]].concat();
    let region = |at: u64, len: u64| {
        let words = [0, at, len, at, 0];
        words.map(u64::to_le_bytes).concat()
    };
    let cases = [
        ("configuration of no length", GET_CONFIG, config(0, 0, 0)),
        ("configuration far away", GET_CONFIG, config(4097, 1, 1)),
        (
            "configuration over the end",
            GET_CONFIG,
            config(4000, 97, 97),
        ),
        ("configuration around", GET_CONFIG, config(u32::MAX, 2, 2)),
        ("configuration of a lie", GET_CONFIG, config(0, 12, 4)),
        ("configuration cut off", GET_CONFIG, words(&[0])),
        ("nothing to configure", SET_CONFIG, config(0, 0, 0)),
        ("configure far away", SET_CONFIG, config(4097, 1, 1)),
        ("configure around", SET_CONFIG, config(u32::MAX, 2, 2)),
        ("a ring too many", SET_VRING_NUM, words(&[4, 256])),
        ("a ring of none", SET_VRING_NUM, words(&[0, 0])),
        ("a ring too large", SET_VRING_NUM, words(&[0, 1025])),
        (
            "a ring much too large",
            SET_VRING_NUM,
            words(&[0, 65_536 + 256]),
        ),
        ("a ring nowhere", SET_VRING_ADDR, vec![0; 40]),
        ("a base too many", SET_VRING_BASE, words(&[u32::MAX, 0])),
        ("a stop too many", GET_VRING_BASE, words(&[4, 0])),
        ("a kick without an eventfd", SET_VRING_KICK, words(&[0, 0])),
        (
            "a call for a ring too many",
            SET_VRING_CALL,
            words(&[0x104, 0]),
        ),
        ("half enabled", SET_VRING_ENABLE, words(&[0, 2])),
        ("enabled too many", SET_VRING_ENABLE, words(&[4, 1])),
        ("memory without a file", SET_MEM_TABLE, words(&[1, 0])),
        ("no memory at all", SET_MEM_TABLE, words(&[0, 0])),
        ("one region without a file", ADD_MEM_REG, region(0, 4096)),
        ("a region that is not there", REM_MEM_REG, region(0, 4096)),
        ("what was not offered", GET_INFLIGHT_FD, vec![0; 24]),
        ("a second owner", SET_OWNER, vec![]),
        ("an unknown request", 4711, vec![]),
        ("a request without end", GET_FEATURES, vec![0; 5000]),
    ];
    for (what, request, payload) in cases {
        let mut raw = Raw::negotiated(&path);
        let refused = match raw.ask(request, &payload) {
            None => true,
            Some(answer) => answer == 1u64.to_le_bytes(),
        };
        assert!(refused, "{what} was not refused");
        assert_eq!(raw.ask(GET_FEATURES, &[]), None, "after {what}");
    }
    assert_serves(&path, port);
}

#[test]
fn rings_of_other_sizes_than_powers_of_two_do_no_harm() {
    let path = socket_path();
    let (_handle, port) = device(&path);
    for size in [1, 3, 100, 1000, 1023] {
        let mut guest = Guest::connect(&path, Setup::default());
        guest.setup.size = size;
        guest.start(&[0; 4]);
        for ring in 0..4 {
            guest.setup.size = 256;
            guest.fill(ring);
            guest.rings[ring].kick_always();
        }
        guest.stop();
    }
    assert_serves(&path, port);
}

#[test]
fn rings_outside_memory_are_refused() {
    let path = socket_path();
    let (_handle, port) = device(&path);
    let mut guest = Guest::connect(&path, Setup::default());
    guest.start(&[0; 4]);
    let bases = guest.stop();
    let config = VringConfigData {
        queue_max_size: 1024,
        queue_size: 256,
        flags: 0,
        desc_table_addr: 1 << 60,
        used_ring_addr: 1 << 60,
        avail_ring_addr: 1 << 60,
        log_addr: None,
    };
    assert!(guest.frontend.set_vring_addr(0, &config).is_err());
    assert_eq!(bases, [0; 4]);
    drop(guest);
    assert_serves(&path, port);
}

#[test]
fn what_came_before_a_ring_was_enabled_is_served_when_it_is() {
    let path = socket_path();
    let (_handle, mut port) = device(&path);
    let mut guest = Guest::connect(&path, Setup::default());
    // The features, the memory and the rings, but enabled by nobody.
    guest.start(&[0; 4]);
    guest.enable(false);
    guest.fill(2);
    let head = guest.rings[3].next_head().unwrap();
    let buffer = guest.buffer(3, head);
    let ready = [
        &u32::MAX.to_le_bytes()[..],
        &DEVICE_READY.to_le_bytes(),
        &[1, 0],
    ]
    .concat();
    guest
        .memory
        .write_slice(&ready, GuestAddress(buffer))
        .unwrap();
    guest.rings[3].add(&[(buffer, 8)], false).unwrap();
    guest.rings[3].notify();
    thread::sleep(Duration::from_millis(50));
    assert!(
        !guest.rings[3].has_used(),
        "it was served before it was enabled"
    );
    guest.enable(true);
    guest.rings[3].spin("what came before was not served");
    guest.wait_host_connected(0, true);
    guest.open(0);
    let mut host = Host::open(&mut port);
    assert_alive(&mut guest, &mut host);
    // The same under way, on a ring whose kicks a link hears itself.
    for _ in 0..100 {
        assert!(host.receive_now().unwrap().is_empty());
        host.wait(Duration::from_micros(100));
        guest.enable(false);
        guest.write_all(0, b"held");
        host.wait(Duration::from_micros(100));
        assert!(host.receive_now().unwrap().is_empty());
        guest.enable(true);
        assert_eq!(host.receive(4), b"held");
    }
}

#[test]
fn no_kick_is_lost_when_the_machine_stops_at_it() {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    let mut random = Pattern::new(20);
    for round in 0..300 {
        // A message to the control thread, and bytes to a link; both right before the rings stop.
        let head = guest.rings[3].next_head().unwrap();
        let buffer = guest.buffer(3, head);
        guest
            .memory
            .write_slice(&[0, 0, 0, 0, 99, 0, 0, 0], GuestAddress(buffer))
            .unwrap();
        guest.rings[3].add(&[(buffer, 8)], false).unwrap();
        guest.rings[3].notify();
        guest.write_all(0, b"kick");
        if round % 2 == 0 {
            let spin = u32::from(random.take(1)[0]) * 20;
            (0..spin).for_each(|_| std::hint::spin_loop());
        }
        guest.pause_and_resume(|_| ());
        guest.rings[3].spin("the control thread missed a kick");
        assert_eq!(host.receive(4), b"kick");
    }
}

/// Where memory is plugged in, and how much.
const DIMM: (u64, u64) = (1 << 32, 1 << 20);

#[test]
fn memory_comes_and_goes_under_load() {
    const TOTAL: usize = 16 << 20;
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    let guest = thread::spawn(move || {
        let (mut dimm, mut changes) = (None, 0);
        let out = (&mut Pattern::new(21), TOTAL);
        guest.exchange(0, out, (&mut Pattern::new(22), TOTAL), |guest, turn| {
            if turn % 8 != 0 {
                return;
            }
            changes += 1;
            match dimm.take() {
                None => dimm = Some(guest.plug(DIMM.0, DIMM.1)),
                Some(dimm) if changes % 3 == 0 => guest.unplug(&dimm),
                Some(there) => {
                    guest.replace_memory(&[&there]);
                    dimm = Some(there);
                }
            }
        });
        assert!(changes > 50, "{changes} changes");
        guest
    });
    host.exchange(
        (&mut Pattern::new(22), TOTAL),
        (&mut Pattern::new(21), TOTAL),
    );
    guest.join().unwrap();
}

#[test]
fn memory_that_was_plugged_in_is_used_and_what_was_unplugged_is_not() {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    for _ in 0..20 {
        let dimm = guest.plug(DIMM.0, DIMM.1);
        let text = b"from the other memory";
        let far = DIMM.0 + DIMM.1 - text.len() as u64;
        dimm.memory.write_slice(text, GuestAddress(far)).unwrap();
        let len = u32::try_from(text.len()).unwrap();
        guest.rings[OUT].add(&[(far, len)], false).unwrap();
        guest.rings[OUT].notify();
        assert_eq!(host.receive(text.len()), text);
        guest.unplug(&dimm);
        // As it was, but nobody's any more: given back unread, and so is one that is there in part.
        guest.rings[OUT].add(&[(far, len)], false).unwrap();
        let head = guest.rings[OUT].take_head().unwrap();
        let (near, table) = (guest.buffer(OUT, head), guest.rings[OUT].descriptors_at());
        let rest = guest.rings[OUT].take_head().unwrap();
        guest.rings[OUT].write_descriptor(table, head, (near, 8), NEXT, rest);
        guest.rings[OUT].write_descriptor(table, rest, (far, len), 0, 0);
        guest.rings[OUT].publish(head);
        guest.rings[OUT].notify();
        assert_alive(&mut guest, &mut host);
        while guest.rings[OUT].pop().is_some() {}
        assert_eq!(
            guest.rings[OUT].free(),
            255,
            "all but the one without a chain"
        );
        guest.rings[OUT].put_head(rest);
    }
}

#[test]
fn a_chain_may_lie_in_several_regions() {
    let (_handle, _port, mut guest, mut host) = connected(Setup::default());
    let end = guest.memory_len();
    // Right behind the other, so that one buffer crosses the border.
    let dimm = guest.plug(end, DIMM.1);
    let text = Pattern::new(23).take(MAX_WRITE);
    let (near, far) = text.split_at(MAX_WRITE / 2 + 5);
    let at = end - near.len() as u64;

    guest.memory.write_slice(near, GuestAddress(at)).unwrap();
    dimm.memory.write_slice(far, GuestAddress(end)).unwrap();
    let len = u32::try_from(text.len()).unwrap();
    guest.rings[OUT].add(&[(at, len)], false).unwrap();
    guest.rings[OUT].notify();
    assert!(host.receive(text.len()) == text);
    assert_alive(&mut guest, &mut host);
}
