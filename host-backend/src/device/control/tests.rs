//! The protocol as a guest sees it.

use super::*;

fn message(id: u32, event: u16, value: u16) -> Vec<u8> {
    [
        &id.to_le_bytes()[..],
        &event.to_le_bytes(),
        &value.to_le_bytes(),
    ]
    .concat()
}

fn sent(machine: &mut Machine) -> Vec<(u32, u16, u16, Vec<u8>)> {
    let (mut all, mut out) = (Vec::new(), Vec::new());
    while machine.next_message(&mut out) {
        machine.message_sent();
        all.push((
            u32::from_le_bytes(out[..4].try_into().unwrap()),
            u16::from_le_bytes(out[4..6].try_into().unwrap()),
            u16::from_le_bytes(out[6..8].try_into().unwrap()),
            out[8..].to_vec(),
        ));
    }
    all
}

fn host_open(machine: &mut Machine, slot: usize, open: bool) {
    let blinked = false;
    machine.set_host_side(slot, HostSide { open, blinked });
}

fn machine() -> Machine {
    let console = PortKind::Console {
        columns: 80,
        rows: 25,
    };
    let specs = [
        PortSpec::generic("org.example.0"),
        PortSpec {
            kind: console,
            resumable: true,
            ..PortSpec::generic("")
        },
    ];
    let mut machine = Machine::new(&specs, 3);
    host_open(&mut machine, 0, true);
    machine
}

#[test]
fn the_driver_is_led_through_the_handshake() {
    let mut machine = machine();
    assert!(sent(&mut machine).is_empty());
    let started = machine.handle(&message(0, DEVICE_READY, 1));
    assert_eq!(started, Ok(Some(Effect::Started)));
    assert_eq!(
        sent(&mut machine),
        [(0, DEVICE_ADD, 0, vec![]), (1, DEVICE_ADD, 0, vec![])]
    );
    assert_eq!(machine.handle(&message(0, PORT_READY, 1)), Ok(None));
    assert_eq!(
        sent(&mut machine),
        [
            (0, PORT_NAME, 0, b"org.example.0".to_vec()),
            (0, PORT_OPEN, 1, vec![])
        ]
    );
    assert_eq!(machine.handle(&message(1, PORT_READY, 1)), Ok(None));
    assert_eq!(
        sent(&mut machine),
        [
            (1, CONSOLE_PORT, 1, vec![]),
            (1, RESIZE, 0, vec![80, 0, 25, 0])
        ]
    );
}

#[test]
fn opening_and_closing_have_effects_once() {
    let mut machine = machine();
    let open = message(0, PORT_OPEN, 1);
    let close = message(0, PORT_OPEN, 0);
    assert_eq!(
        machine.handle(&open),
        Ok(Some(Effect::Opened(0))),
        "no PORT_READY before"
    );
    assert_eq!(machine.handle(&open), Ok(Some(Effect::Opened(0))));
    assert_eq!(machine.handle(&close), Ok(Some(Effect::Closed(0))));
    assert_eq!(machine.handle(&close), Ok(None));
    machine.handle(&open).unwrap();
    let ready = machine.handle(&message(0, PORT_READY, 1));
    assert_eq!(ready, Ok(Some(Effect::Closed(0))), "set up anew");
}

#[test]
fn who_slept_with_the_port_open_is_hung_up_on() {
    let mut machine = machine();
    for id in [0, 1] {
        machine.handle(&message(id, PORT_READY, 1)).unwrap();
        machine.handle(&message(id, PORT_OPEN, 1)).unwrap();
        machine.handle(&message(id, PORT_READY, 1)).unwrap();
    }
    sent(&mut machine);
    let open = |id| message(id, PORT_OPEN, 1);
    assert_eq!(machine.handle(&open(0)), Ok(Some(Effect::Resumed(0))));
    assert_eq!(sent(&mut machine)[0], (0, PORT_OPEN, 0, vec![]));
    assert_eq!(machine.handle(&open(0)), Ok(Some(Effect::Opened(0))));
    let console = machine.handle(&open(1));
    assert_eq!(console, Ok(Some(Effect::Opened(1))), "it goes on");
}

#[test]
fn the_host_side_is_told_by_level() {
    let mut machine = machine();
    machine.handle(&message(0, PORT_READY, 1)).unwrap();
    sent(&mut machine);
    host_open(&mut machine, 0, false);
    host_open(&mut machine, 0, true);
    assert!(
        sent(&mut machine).is_empty(),
        "nothing changed for the guest"
    );
    host_open(&mut machine, 0, false);
    assert_eq!(sent(&mut machine), [(0, PORT_OPEN, 0, vec![])]);
}

#[test]
fn a_moment_without_a_client_is_told() {
    let mut machine = machine();
    machine.handle(&message(0, PORT_READY, 1)).unwrap();
    sent(&mut machine);
    let blink = HostSide {
        open: true,
        blinked: true,
    };
    machine.set_host_side(0, blink);
    assert_eq!(
        sent(&mut machine),
        [(0, PORT_OPEN, 0, vec![]), (0, PORT_OPEN, 1, vec![])]
    );
    let gone = HostSide {
        open: false,
        blinked: true,
    };
    machine.set_host_side(0, gone);
    assert_eq!(sent(&mut machine), [(0, PORT_OPEN, 0, vec![])]);
}

#[test]
fn a_port_comes_and_goes_and_its_slot_is_used_again_only_when_the_guest_has_let_go() {
    let mut machine = machine();
    machine.handle(&message(0, DEVICE_READY, 1)).unwrap();
    sent(&mut machine);
    let spec = PortSpec::generic("org.example.2");
    assert_eq!(machine.add(spec.clone()), Some(2));
    assert_eq!(machine.add(spec.clone()), None, "no room");
    let early = machine.handle(&message(2, PORT_OPEN, 1));
    assert_eq!(early, Err(Misuse::NotReady(2)));
    assert_eq!(sent(&mut machine), [(2, DEVICE_ADD, 0, vec![])]);
    machine.handle(&message(2, PORT_READY, 1)).unwrap();
    machine.handle(&message(2, PORT_OPEN, 1)).unwrap();
    sent(&mut machine);

    machine.remove(2);
    assert!(!machine.all_was_taken(), "it was not told yet");
    assert_eq!(sent(&mut machine), [(2, DEVICE_REMOVE, 0, vec![])]);
    assert_eq!(machine.handle(&message(2, PORT_OPEN, 0)), Ok(None));
    assert_eq!(machine.add(spec.clone()), None);
    assert!(machine.all_was_taken());
    assert_eq!(
        machine.handle(&message(2, PORT_OPEN, 1)),
        Err(Misuse::NoSuchPort(2))
    );
    assert_eq!(machine.add(spec), Some(2));
    machine.remove(2);
    assert!(machine.is_vacant(2), "the guest never heard of it");
    assert!(sent(&mut machine).is_empty());
}

#[test]
fn another_size_is_told_to_who_knows_the_console() {
    let mut machine = machine();
    machine.resize(1, 100, 30);
    assert!(sent(&mut machine).is_empty());
    assert_eq!(machine.console_size(), Some((100, 30)));
    machine.handle(&message(1, PORT_READY, 1)).unwrap();
    sent(&mut machine);
    machine.resize(1, 120, 40);
    machine.resize(1, 120, 40);
    machine.resize(0, 120, 40);
    assert_eq!(sent(&mut machine), [(1, RESIZE, 0, vec![120, 0, 40, 0])]);
}

#[test]
fn what_makes_no_sense_is_refused_and_what_is_owed_is_bounded() {
    let mut machine = machine();
    for _ in 0..1000 {
        machine.handle(&message(0, DEVICE_READY, 1)).unwrap();
        machine.handle(&message(0, PORT_READY, 1)).unwrap();
    }
    assert_eq!(
        sent(&mut machine).len(),
        3,
        "add of port 1, name and open of port 0"
    );
    assert_eq!(machine.handle(&[0; 7]), Err(Misuse::Short(7)));
    assert_eq!(
        machine.handle(&message(2, PORT_OPEN, 1)),
        Err(Misuse::NoSuchPort(2))
    );
    let unknown = Misuse::Unknown {
        id: 0,
        event: 99,
        value: 7,
    };
    assert_eq!(machine.handle(&message(0, 99, 7)), Err(unknown));
    assert_eq!(
        machine.handle(&message(0, DEVICE_READY, 0)),
        Err(Misuse::DeviceFailed)
    );
    assert_eq!(
        machine.handle(&message(1, PORT_READY, 0)),
        Err(Misuse::PortFailed(1))
    );
}

/// Saved by one process, read by the next.
fn handed_over(machine: &Machine) -> Machine {
    let saved = serde_json::to_vec(machine).unwrap();
    assert!(saved.len() < crate::keeper::MAX_STATE / 40);
    let mut machine: Machine = serde_json::from_slice(&saved).unwrap();
    machine.take_over();
    machine
}

#[test]
fn another_process_hangs_up_on_ports_but_not_on_consoles() {
    let mut machine = machine();
    machine.handle(&message(0, DEVICE_READY, 1)).unwrap();
    sent(&mut machine);
    for slot in 0..2 {
        host_open(&mut machine, slot, true);
        let id = u32::try_from(slot).unwrap();
        machine.handle(&message(id, PORT_READY, 1)).unwrap();
        machine.handle(&message(id, PORT_OPEN, 1)).unwrap();
    }
    sent(&mut machine);
    let mut next = handed_over(&machine);
    assert_eq!(next.port(0).map(|(_, open)| open), Some(true));
    host_open(&mut next, 0, false);
    host_open(&mut next, 1, true);
    assert_eq!(
        sent(&mut next),
        [(0, PORT_OPEN, 0, vec![]), (1, PORT_OPEN, 1, vec![])]
    );
    let closed = next.handle(&message(0, PORT_OPEN, 0));
    assert_eq!(closed, Ok(Some(Effect::Closed(0))));
}

#[test]
fn another_process_tells_what_was_not_told() {
    let mut machine = machine();
    machine.handle(&message(0, DEVICE_READY, 1)).unwrap();
    let mut next = handed_over(&machine);
    assert_eq!(
        sent(&mut next),
        [(0, DEVICE_ADD, 0, vec![]), (1, DEVICE_ADD, 0, vec![])]
    );
    next.remove(0);
    assert!(!next.is_vacant(0));
    let mut third = handed_over(&next);
    assert_eq!(sent(&mut third), [(0, DEVICE_REMOVE, 0, vec![])]);
}

/// What the process after this one has of it.
fn taken_over(machine: &Machine) -> Machine {
    let saved = serde_json::to_vec(machine).unwrap();
    let mut next: Machine = serde_json::from_slice(&saved).unwrap();
    next.take_over();
    next
}

#[test]
fn a_port_that_was_added_twice_says_so_twice_and_stays_open() {
    let mut machine = machine();
    machine.handle(&message(0, DEVICE_READY, 1)).unwrap();
    // The one before died when it had added the port, and before it had saved that.
    let mut machine = taken_over(&machine);
    assert_eq!(sent(&mut machine)[0], (0, DEVICE_ADD, 0, vec![]));
    let ready = message(0, PORT_READY, 1);
    assert_eq!(machine.handle(&ready), Ok(None));
    let open = machine.handle(&message(0, PORT_OPEN, 1));
    assert_eq!(open, Ok(Some(Effect::Opened(0))));
    sent(&mut machine);
    host_open(&mut machine, 0, false);
    assert_eq!(machine.handle(&ready), Ok(None), "the other one");
    assert!(matches!(machine.port(0), Some((_, true))), "it is open");
    let told = sent(&mut machine);
    assert!(told.contains(&(0, PORT_OPEN, 0, vec![])), "it missed that");
    let again = machine.handle(&ready);
    assert_eq!(again, Ok(Some(Effect::Closed(0))), "set up anew");
}

#[test]
fn a_port_that_was_known_is_not_added_twice() {
    let mut machine = machine();
    machine.handle(&message(0, DEVICE_READY, 1)).unwrap();
    sent(&mut machine);
    let ready = message(0, PORT_READY, 1);
    machine.handle(&ready).unwrap();
    machine.handle(&message(0, PORT_OPEN, 1)).unwrap();
    let mut machine = taken_over(&machine);
    let again = machine.handle(&ready);
    assert_eq!(again, Ok(Some(Effect::Closed(0))), "set up anew");
}
