//! The control queue's protocol (virtio 1.3, 5.3.6.2): messages in, effects and messages out. No I/O.
//!
//! # Theory of operation
//!
//! The guest learns of its ports in three steps: it says DEVICE_READY, gets a DEVICE_ADD for each port, answers
//! each with PORT_READY and gets the port's name and whether its host side is open. From then on PORT_OPEN goes
//! either way, whenever a side opens or closes.
//!
//! There is a slot for each port that there may be; its number is the port's id. What the guest has been told of it:
//!
//! ```text
//!             DEVICE_ADD           PORT_READY(1)          PORT_OPEN(1)
//!   Unknown -------------> Added ----------------> Closed <===========> Open
//!    ^ ^                     ^                            PORT_OPEN(0)
//!    | '--- from each: DEVICE_READY, PORT_READY(0), a new frontend
//!    |                       |
//!    | no driver yet         | a driver is there
//!    '------- add() ---------'
//!                |                     remove()              DEVICE_REMOVE        the guest took all it was told
//!             Vacant           from each --------> Leaving ---------------> Left -------------------> Vacant
//! ```
//!
//! A guest that skips a step (its driver was told everything by an earlier process of ours) is taken at its word, but
//! not with a port that it was just given: what it says before PORT_READY is about the one before.
//!
//! **Letting go.** The guest does not answer a DEVICE_REMOVE. But Linux takes its messages one after the other and gives
//! each buffer back only when it has done what was said. So when all its buffers are there again
//! ([`Machine::all_was_taken`]) it has let go of what was removed; before that, a slot is not used again. Nothing
//! that the guest says of such a slot meanwhile counts.
//!
//! PORT_READY of a port that is ready means that the driver set the port up anew (Linux does so when it wakes from
//! suspension, and then opens what was open): the port is closed first. So is a port that is opened twice. A program that
//! had it open before the guest slept is in the middle of something that our end knows nothing of any more: unless it can
//! live with that, it is hung up on. But of a port that was added twice, because nobody knows whether a process that is
//! gone still said so, Linux says PORT_READY twice: then the second closes nothing.
//!
//! The guest need not have given us buffers to answer in, and a rogue one can ask for ever. So there is no queue of
//! answers: each port notes what it *owes* the guest, at most one message of each kind, and
//! [`Machine::next_message`] makes the next of them when there is room.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{PortKind, PortSpec};

/// `struct virtio_console_control`.
pub(super) const MESSAGE_LEN: usize = 8;

const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const DEVICE_REMOVE: u16 = 2;
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
    /// The guest's driver opened the port anew for a program that had it open, and that has to begin anew.
    Resumed(usize),
    /// The guest closed the port.
    Closed(usize),
}

/// What the host's side of a port looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HostSide {
    pub(super) open: bool,
    /// It was closed for a moment since the last time, of which the guest is to be told too.
    pub(super) blinked: bool,
}

/// A message that was ignored, and why.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub(super) enum Misuse {
    #[error("control message of {0} bytes, {MESSAGE_LEN} are needed")]
    Short(usize),
    #[error("control message for port {0}, which does not exist")]
    NoSuchPort(u32),
    #[error("port {0} opened before it was ready")]
    NotReady(usize),
    #[error("unknown control message {event} (port {id}, value {value})")]
    Unknown { id: u32, event: u16, value: u16 },
    #[error("the guest's driver could not set up the device")]
    DeviceFailed,
    #[error("the guest's driver could not set up port {0}")]
    PortFailed(usize),
}

/// The state of the control protocol with one driver.
#[derive(Deserialize, Serialize)]
pub(super) struct Machine {
    slots: Vec<Port>,
    /// There is a driver that knows of the ports.
    driver: bool,
}

#[derive(Deserialize, Serialize)]
struct Port {
    /// Means nothing in a vacant slot.
    spec: PortSpec,
    stage: Stage,
    owes: Owes,
    /// Whether our side is open, and whether the guest was told so.
    host_open: bool,
    told_open: bool,
    /// The driver has set the port up anew under a program that has it open, and is about to say so.
    #[serde(default)]
    woken: bool,
    /// The guest may be told of the port twice: by another process, and by this one.
    #[serde(default)]
    added_twice: bool,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
enum Stage {
    Vacant,
    Unknown,
    Added,
    Closed,
    Open,
    Leaving,
    Left,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
struct Owes {
    add: bool,
    console: bool,
    resize: bool,
    name: bool,
    hang_up: bool,
}

impl Machine {
    /// No driver yet, and room for `slots` ports.
    pub(super) fn new(specs: &[PortSpec], slots: usize) -> Self {
        let ports = specs.iter().cloned().map(Port::new);
        let vacant = std::iter::repeat_with(Port::vacant);
        Machine {
            slots: ports.chain(vacant).take(slots).collect(),
            driver: false,
        }
    }

    /// There is another frontend: nothing that was said counts.
    pub(super) fn reset(&mut self) {
        self.driver = false;
        self.slots.iter_mut().for_each(Port::reset);
    }

    /// Another process told the guest all this and is gone, and its links with it. Of the last message nobody knows whether
    /// it was still sent, so the guest is told again what our side looks like, and that it was closed in between. (Whether or
    /// not a program there looks in time, and closes its port for that, the next session begins.) That would be no good to a
    /// console, which nobody opens anew.
    pub(super) fn take_over(&mut self) {
        for port in &mut self.slots {
            port.added_twice |= port.owes.add;
        }
        for port in self.slots.iter_mut().filter(|port| port.is_known()) {
            match port.is_console() {
                true => port.told_open = false,
                false => port.owes.hang_up = true,
            }
        }
    }

    /// How many ports there may be.
    pub(super) fn room(&self) -> usize {
        self.slots.len()
    }

    /// The port in a slot, and whether the guest has it open.
    pub(super) fn port(&self, slot: usize) -> Option<(&PortSpec, bool)> {
        let port = self.slots.get(slot).filter(|port| port.is_there())?;
        Some((&port.spec, port.stage == Stage::Open))
    }

    /// What our side of a port looks like from now on.
    pub(super) fn set_host_side(&mut self, slot: usize, side: HostSide) {
        let port = &mut self.slots[slot];
        port.host_open = side.open;
        port.owes.hang_up |= side.blinked && port.told_open;
    }

    /// One more port, in the slot that is returned; `None` if there is no room.
    pub(super) fn add(&mut self, spec: PortSpec) -> Option<usize> {
        let slot = self.slots.iter().position(Port::is_vacant)?;
        let port = &mut self.slots[slot];
        *port = Port::new(spec);
        if self.driver {
            port.stage = Stage::Added;
            port.owes.add = true;
        }
        Some(slot)
    }

    /// The port is no more; its slot is vacant once the guest knows.
    pub(super) fn remove(&mut self, slot: usize) {
        let port = &mut self.slots[slot];
        let told = self.driver && !port.owes.add;
        match port.stage {
            Stage::Vacant | Stage::Leaving | Stage::Left => {}
            _ if told => {
                port.owes = Owes::default();
                port.stage = Stage::Leaving;
            }
            _ => *port = Port::vacant(),
        }
    }

    /// The guest has taken everything it was told: it has let go of the ports that it was told are gone. Whether a slot
    /// became vacant.
    pub(super) fn all_was_taken(&mut self) -> bool {
        let left = self
            .slots
            .iter_mut()
            .filter(|port| port.stage == Stage::Left);
        left.map(|port| *port = Port::vacant()).count() > 0
    }

    /// Whether it matters that the guest has taken everything.
    pub(super) fn is_any_left(&self) -> bool {
        self.slots.iter().any(|port| port.stage == Stage::Left)
    }

    /// Whether the guest knows nothing of what may have been in the slot.
    pub(super) fn is_vacant(&self, slot: usize) -> bool {
        self.slots[slot].is_vacant()
    }

    /// Whether a port has this name.
    pub(super) fn has_name(&self, name: &str) -> bool {
        let mut there = self.slots.iter().filter(|port| port.is_there());
        there.any(|port| port.spec.name == name)
    }

    /// The size of the first console's terminal.
    pub(super) fn console_size(&self) -> Option<(u16, u16)> {
        self.slots
            .iter()
            .filter(|port| port.is_there())
            .find_map(|port| match port.spec.kind {
                PortKind::Console { columns, rows } => Some((columns, rows)),
                PortKind::Generic => None,
            })
    }

    /// The slot of the first console.
    pub(super) fn console(&self) -> Option<usize> {
        self.slots
            .iter()
            .position(|port| port.is_there() && port.is_console())
    }

    /// The terminal of a console has another size; of no meaning to other ports.
    pub(super) fn resize(&mut self, slot: usize, columns: u16, rows: u16) {
        let port = &mut self.slots[slot];
        let size = PortKind::Console { columns, rows };
        if port.is_console() && port.spec.kind != size {
            port.spec.kind = size;
            port.owes.resize |= port.is_known();
        }
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
            .and_then(|index| Some((index, self.slots.get_mut(index)?)))
            .filter(|(_, port)| !port.is_vacant())
            .ok_or(Misuse::NoSuchPort(id))?;
        if !port.is_there() {
            return Ok(None);
        }
        self.driver = true;
        match (event, value) {
            (PORT_READY, 0) => {
                let was = std::mem::replace(&mut port.stage, Stage::Unknown);
                port.owes = Owes::default();
                match was {
                    Stage::Open => Ok(Some(Effect::Closed(index))),
                    _ => Err(Misuse::PortFailed(index)),
                }
            }
            (PORT_READY, _) if port.is_known() && std::mem::take(&mut port.added_twice) => {
                port.introduce_again();
                Ok(None)
            }
            (PORT_READY, _) => {
                let was = std::mem::replace(&mut port.stage, Stage::Closed);
                // What we have not said again yet, we need not say again.
                port.added_twice &= !port.owes.add;
                port.introduce();
                port.woken = was == Stage::Open && !port.spec.resumable;
                Ok((was == Stage::Open).then_some(Effect::Closed(index)))
            }
            (PORT_OPEN, 0) if port.stage == Stage::Added => Ok(None),
            (PORT_OPEN, _) if port.stage == Stage::Added => Err(Misuse::NotReady(index)),
            (PORT_OPEN, 0) => {
                let was = std::mem::replace(&mut port.stage, Stage::Closed);
                Ok((was == Stage::Open).then_some(Effect::Closed(index)))
            }
            (PORT_OPEN, _) => {
                port.stage = Stage::Open;
                if std::mem::take(&mut port.woken) {
                    port.owes.hang_up = true;
                    return Ok(Some(Effect::Resumed(index)));
                }
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
        self.driver = true;
        for port in self.slots.iter_mut().filter(|port| port.is_there()) {
            port.owes.add = true;
        }
        Ok(Some(Effect::Started))
    }

    /// Makes the next message that the guest is owed, in `out`; `false` if there is none. It counts as sent when
    /// [`Machine::message_sent`] is called, and is the same until then.
    pub(super) fn next_message(&self, out: &mut Vec<u8>) -> bool {
        out.clear();
        let Some((id, port)) = self
            .slots
            .iter()
            .enumerate()
            .find(|(_, p)| p.due().is_some())
        else {
            return false;
        };
        let event = port.due().unwrap_or_default();
        let value = match event {
            CONSOLE_PORT => 1,
            PORT_OPEN => u16::from(port.host_open && !port.owes.hang_up),
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
        let Some(port) = self.slots.iter_mut().find(|port| port.due().is_some()) else {
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
            Some(DEVICE_REMOVE) => port.stage = Stage::Left,
            _ => port.told_open = !std::mem::take(&mut port.owes.hang_up) && port.host_open,
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
            woken: false,
            added_twice: false,
        }
    }

    fn vacant() -> Self {
        Port {
            stage: Stage::Vacant,
            ..Self::new(PortSpec::generic(""))
        }
    }

    fn is_vacant(&self) -> bool {
        self.stage == Stage::Vacant
    }

    /// Whether it is a port still.
    fn is_there(&self) -> bool {
        !matches!(self.stage, Stage::Vacant | Stage::Leaving | Stage::Left)
    }

    fn is_console(&self) -> bool {
        matches!(self.spec.kind, PortKind::Console { .. })
    }

    /// Whether the driver has it.
    fn is_known(&self) -> bool {
        matches!(self.stage, Stage::Closed | Stage::Open)
    }

    /// The driver is gone, and with it what it had to let go of.
    fn reset(&mut self) {
        if !self.is_there() {
            *self = Self::vacant();
            return;
        }
        self.stage = Stage::Unknown;
        self.owes = Owes::default();
        self.told_open = false;
        self.woken = false;
        self.added_twice = false;
    }

    /// The driver has the port and knows nothing about it.
    fn introduce(&mut self) {
        let console = self.is_console();
        self.owes = Owes {
            add: false,
            console,
            resize: console,
            name: !self.spec.name.is_empty(),
            hang_up: false,
        };
        self.told_open = false;
    }

    /// The same to a driver that may have it open.
    fn introduce_again(&mut self) {
        let unheard = self.owes.hang_up || self.told_open && !self.host_open;
        self.introduce();
        self.owes.hang_up = unheard;
    }

    /// The first message that is owed, in the order in which QEMU's own device sends them.
    fn due(&self) -> Option<u16> {
        let open = self.told_open != self.host_open || self.owes.hang_up;
        let owed = [
            (self.stage == Stage::Leaving, DEVICE_REMOVE),
            (self.owes.add, DEVICE_ADD),
            (self.owes.console, CONSOLE_PORT),
            (self.owes.resize, RESIZE),
            (self.owes.name, PORT_NAME),
            (self.is_known() && open, PORT_OPEN),
        ];
        owed.into_iter()
            .find_map(|(owed, event)| owed.then_some(event))
    }
}

#[cfg(test)]
mod tests;
