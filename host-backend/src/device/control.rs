//! The control queue's protocol (virtio 1.3, 5.3.6.2): messages in, effects and messages out. No I/O.
//!
//! # Theory of operation
//!
//! The guest learns of its ports in three steps: it says DEVICE_READY, gets a DEVICE_ADD for each port, answers
//! each with PORT_READY and gets the port's name and whether its host side is open. From then on PORT_OPEN goes
//! either way, whenever a side opens or closes.
//!
//! What each port has been told:
//!
//! ```text
//!             DEVICE_ADD           PORT_READY(1)          PORT_OPEN(1)
//!   Unknown -------------> Added ----------------> Closed <===========> Open
//!      ^                                                  PORT_OPEN(0)
//!      '--- from anywhere: DEVICE_READY, PORT_READY(0), a new frontend
//! ```
//!
//! A guest that skips a step (its driver was told everything by an earlier process of ours) is taken at its word.
//! PORT_READY of a port that is ready means that the driver set the port up anew (Linux does so when it wakes from
//! suspension, and then opens what was open): the port is closed first. So is a port that is opened twice.
//!
//! The guest need not have given us buffers to answer in, and a rogue one can ask for ever. So there is no queue of
//! answers: each port notes what it *owes* the guest, at most one message of each kind, and
//! [`Machine::next_message`] makes the next of them when there is room.

use thiserror::Error;

use super::{PortKind, PortSpec};

/// `struct virtio_console_control`.
pub(super) const MESSAGE_LEN: usize = 8;

const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What a message of the guest means for the ports. To be carried out before the guest is told that its message
/// was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// The driver starts: no port is open, and no byte in any ring counts.
    Started,
    /// The guest opened the port. If it is open already, the guest closed it without saying so.
    Opened(usize),
    /// The guest closed the port.
    Closed(usize),
}

/// A message that was ignored, and why.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub(super) enum Misuse {
    #[error("control message of {0} bytes, {MESSAGE_LEN} are needed")]
    Short(usize),
    #[error("control message for port {0}, which does not exist")]
    NoSuchPort(u32),
    #[error("unknown control message {event} (port {id}, value {value})")]
    Unknown { id: u32, event: u16, value: u16 },
    #[error("the guest's driver could not set up the device")]
    DeviceFailed,
    #[error("the guest's driver could not set up port {0}")]
    PortFailed(usize),
}

/// The state of the control protocol with one driver.
pub(super) struct Machine {
    ports: Vec<Port>,
}

struct Port {
    spec: PortSpec,
    stage: Stage,
    owes: Owes,
    /// Whether our side is open, and whether the guest was told so.
    host_open: bool,
    told_open: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Unknown,
    Added,
    Closed,
    Open,
}

#[derive(Clone, Copy, Debug, Default)]
struct Owes {
    add: bool,
    console: bool,
    resize: bool,
    name: bool,
}

impl Machine {
    /// No driver yet.
    pub(super) fn new(specs: &[PortSpec]) -> Self {
        let ports = specs.iter().cloned().map(Port::new).collect();
        Machine { ports }
    }

    /// There is another frontend: nothing that was said counts.
    pub(super) fn reset(&mut self) {
        self.ports.iter_mut().for_each(Port::reset);
    }

    /// Our side of a port is open or closed from now on.
    pub(super) fn set_host_open(&mut self, port: usize, open: bool) {
        self.ports[port].host_open = open;
    }

    /// Takes a message of the guest.
    pub(super) fn handle(&mut self, bytes: &[u8]) -> Result<Option<Effect>, Misuse> {
        let Some(&[a, b, c, d, e, f, g, h]) = bytes.first_chunk::<MESSAGE_LEN>() else {
            return Err(Misuse::Short(bytes.len()));
        };
        let id = u32::from_le_bytes([a, b, c, d]);
        let event = u16::from_le_bytes([e, f]);
        let value = u16::from_le_bytes([g, h]);
        if event == DEVICE_READY {
            return self.device_ready(value);
        }
        let (index, port) = usize::try_from(id)
            .ok()
            .and_then(|index| Some((index, self.ports.get_mut(index)?)))
            .ok_or(Misuse::NoSuchPort(id))?;
        match (event, value) {
            (PORT_READY, 0) => {
                let was = std::mem::replace(&mut port.stage, Stage::Unknown);
                port.owes = Owes::default();
                match was {
                    Stage::Open => Ok(Some(Effect::Closed(index))),
                    _ => Err(Misuse::PortFailed(index)),
                }
            }
            (PORT_READY, _) => {
                let was = std::mem::replace(&mut port.stage, Stage::Closed);
                port.introduce();
                Ok((was == Stage::Open).then_some(Effect::Closed(index)))
            }
            (PORT_OPEN, 0) => {
                let was = std::mem::replace(&mut port.stage, Stage::Closed);
                Ok((was == Stage::Open).then_some(Effect::Closed(index)))
            }
            (PORT_OPEN, _) => {
                port.stage = Stage::Open;
                Ok(Some(Effect::Opened(index)))
            }
            _ => Err(Misuse::Unknown { id, event, value }),
        }
    }

    fn device_ready(&mut self, value: u16) -> Result<Option<Effect>, Misuse> {
        self.reset();
        if value == 0 {
            return Err(Misuse::DeviceFailed);
        }
        for port in &mut self.ports {
            port.owes.add = true;
        }
        Ok(Some(Effect::Started))
    }

    /// Makes the next message that the guest is owed, in `out`; `false` if there is none. It counts as sent when
    /// [`Machine::message_sent`] is called, and is the same until then.
    pub(super) fn next_message(&self, out: &mut Vec<u8>) -> bool {
        out.clear();
        let Some((id, port)) = self
            .ports
            .iter()
            .enumerate()
            .find(|(_, p)| p.due().is_some())
        else {
            return false;
        };
        let event = port.due().unwrap_or_default();
        let value = match event {
            CONSOLE_PORT => 1,
            PORT_OPEN => u16::from(port.host_open),
            _ => 0,
        };
        out.extend(u32::try_from(id).unwrap_or(u32::MAX).to_le_bytes());
        out.extend(event.to_le_bytes());
        out.extend(value.to_le_bytes());
        match (event, port.spec.kind) {
            // The driver takes the name's length from the used length: no terminator.
            (PORT_NAME, _) => out.extend(port.spec.name.as_bytes()),
            (RESIZE, PortKind::Console { columns, rows }) => {
                out.extend(columns.to_le_bytes());
                out.extend(rows.to_le_bytes());
            }
            _ => {}
        }
        true
    }

    /// The message that [`Machine::next_message`] made is on its way.
    pub(super) fn message_sent(&mut self) {
        let Some(port) = self.ports.iter_mut().find(|port| port.due().is_some()) else {
            return;
        };
        match port.due() {
            Some(DEVICE_ADD) => {
                port.owes.add = false;
                if port.stage == Stage::Unknown {
                    port.stage = Stage::Added;
                }
            }
            Some(CONSOLE_PORT) => port.owes.console = false,
            Some(RESIZE) => port.owes.resize = false,
            Some(PORT_NAME) => port.owes.name = false,
            _ => port.told_open = port.host_open,
        }
    }
}

impl Port {
    fn new(spec: PortSpec) -> Self {
        Port {
            spec,
            stage: Stage::Unknown,
            owes: Owes::default(),
            host_open: false,
            told_open: false,
        }
    }

    fn reset(&mut self) {
        self.stage = Stage::Unknown;
        self.owes = Owes::default();
        self.told_open = false;
    }

    /// The driver has the port and knows nothing about it.
    fn introduce(&mut self) {
        let console = matches!(self.spec.kind, PortKind::Console { .. });
        self.owes = Owes {
            add: false,
            console,
            resize: console,
            name: !self.spec.name.is_empty(),
        };
        self.told_open = false;
    }

    /// The first message that is owed, in the order in which QEMU's own device sends them.
    fn due(&self) -> Option<u16> {
        let known = matches!(self.stage, Stage::Closed | Stage::Open);
        let owed = [
            (self.owes.add, DEVICE_ADD),
            (self.owes.console, CONSOLE_PORT),
            (self.owes.resize, RESIZE),
            (self.owes.name, PORT_NAME),
            (known && self.told_open != self.host_open, PORT_OPEN),
        ];
        owed.into_iter()
            .find_map(|(owed, event)| owed.then_some(event))
    }
}

#[cfg(test)]
mod tests {
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

    fn machine() -> Machine {
        let console = PortKind::Console {
            columns: 80,
            rows: 25,
        };
        let mut machine = Machine::new(&[
            PortSpec::generic("org.example.0"),
            PortSpec {
                name: String::new(),
                kind: console,
            },
        ]);
        machine.set_host_open(0, true);
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
    fn the_host_side_is_told_by_level() {
        let mut machine = machine();
        machine.handle(&message(0, PORT_READY, 1)).unwrap();
        sent(&mut machine);
        machine.set_host_open(0, false);
        machine.set_host_open(0, true);
        assert!(
            sent(&mut machine).is_empty(),
            "nothing changed for the guest"
        );
        machine.set_host_open(0, false);
        assert_eq!(sent(&mut machine), [(0, PORT_OPEN, 0, vec![])]);
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
}
