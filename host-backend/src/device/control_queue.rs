//! Carries the control messages between the [`Machine`] and its two rings, and their effects to the ports.
//!
//! The guest's driver spins in its kernel until a message is given back, so this runs on a thread of its own that
//! never waits for more than the transaction a link may be in. A message is given back after its effect, and when that is
//! saved.

use tracing::{info, warn};
use vhost_user_backend::VringT;
use virtproxy_engine::segment::Cursor;
use vm_memory::GuestAddressSpace;

use super::Shared;
use super::chains::{Batch, Direction, Limits};
use super::control::{Effect, MESSAGE_LEN, Machine, Misuse};
use super::port::{Cell, Rings};
use super::quiet::Quiet;
use super::ring::{Fault, Ring};
use super::saved::{Current, Saved, Saver};
use super::vring::is_running;
use crate::keeper::Leash;

/// Messages handled at once, each way; then others have their turn.
const MAX_MESSAGES: usize = 256;

/// One chain holds one message.
const ONE: Limits = Limits {
    chains: 1,
    bytes: usize::MAX,
};

/// The control queues with one frontend, and what their driver was told.
pub(super) struct Control {
    pub(super) machine: Machine,
    rings: Option<Rings>,
    heard: bool,
    /// The most buffers that the driver had left for messages: when they are all there, it has taken all it was told.
    most: u16,
    quiet: Quiet,
    /// For the process after this one.
    saver: Option<Saver>,
}

impl Control {
    pub(super) fn new(machine: Machine) -> Self {
        Control {
            machine,
            rings: None,
            heard: false,
            most: 0,
            quiet: Quiet::default(),
            saver: None,
        }
    }

    /// The same, known to the process after this one; after the process before this one, if that left word. Whether its
    /// driver is still there.
    pub(super) fn kept(
        machine: Machine,
        saved: Option<Saved>,
        resumed: bool,
        leash: Leash,
    ) -> Self {
        let mut control = Control::new(machine);
        if let Some(saved) = saved {
            control.machine = saved.machine;
            control.heard = saved.heard;
            control.most = saved.most;
        }
        if resumed {
            control.machine.take_over();
        } else {
            control.restart();
        }
        control.saver = Some(Saver::new(leash));
        control
    }

    /// Saves what the process after this one must know. The keeper takes it for the word that QEMU may come.
    pub(super) fn save(&mut self) {
        if let Some(saver) = &mut self.saver {
            saver.save(&Current {
                machine: &self.machine,
                heard: self.heard,
                most: self.most,
            });
        }
    }

    /// What happens from now on is of no interest to the process after this one.
    pub(super) fn leave(&mut self) {
        self.saver = None;
    }

    /// A frontend is connected, and these are its rings.
    pub(super) fn attach(&mut self, rings: Option<Rings>) {
        self.rings = rings;
    }

    /// There is no driver any more.
    pub(super) fn restart(&mut self) {
        self.machine.reset();
        self.heard = false;
        self.most = 0;
        self.save();
    }

    /// The frontend is gone.
    pub(super) fn detach(&mut self) {
        self.restart();
        self.rings = None;
    }

    /// Whether the frontend has set the queues up at all.
    pub(super) fn configured(&self) -> bool {
        self.rings
            .as_ref()
            .is_some_and(|rings| rings.from_guest.configured())
    }

    /// Whether the driver has said anything.
    pub(super) fn heard(&self) -> bool {
        self.heard
    }

    /// Takes what the guest said, tells it what it is owed. Whether there is more to do at once.
    pub(super) fn serve(&mut self, ports: &[Cell]) -> bool {
        let more = self.exchange(ports);
        self.save();
        more
    }

    fn exchange(&mut self, ports: &[Cell]) -> bool {
        let Some(rings) = &self.rings else {
            return false;
        };
        let memory = rings.memory.memory();
        let mut more = false;
        {
            let mut vring = rings.from_guest.get_mut();
            if is_running(&vring) {
                // The guest may close a port or open it: what belongs to nobody must be known by then.
                more |= ports.iter().any(Cell::is_stale);
                if ports.iter().filter(|port| !port.settle()).count() > 0 {
                    return false;
                }
                let mut listener = Listener {
                    machine: &mut self.machine,
                    quiet: &self.quiet,
                    heard: &mut self.heard,
                    most: &mut self.most,
                    saver: &mut self.saver,
                    ports,
                };
                more |= Ring::new(&mut vring, &memory)
                    .and_then(|ring| listener.listen(ring))
                    .unwrap_or_else(|fault| complain(&self.quiet, &fault));
            }
        }
        for (index, port) in ports.iter().enumerate() {
            self.machine.set_host_side(index, port.host_side());
        }
        let mut vring = rings.to_guest.get_mut();
        if is_running(&vring) {
            let (machine, most) = (&mut self.machine, &mut self.most);
            more |= Ring::new(&mut vring, &memory)
                .and_then(|mut ring| {
                    *most = ring.available()?.max(*most);
                    let more = tell(machine, &self.quiet, &mut ring)?;
                    Ok(more | look_for_taken(machine, *most, &ring))
                })
                .unwrap_or_else(|fault| complain(&self.quiet, &fault));
        }
        more
    }
}

/// Notes when the guest has taken everything it was told, if that matters; else asks for a kick when it has. Whether
/// that made a slot vacant.
fn look_for_taken(machine: &mut Machine, most: u16, ring: &Ring<'_, '_>) -> bool {
    machine.is_any_left() && ring.arm(most.max(1)) && machine.all_was_taken()
}

struct Listener<'c> {
    machine: &'c mut Machine,
    quiet: &'c Quiet,
    heard: &'c mut bool,
    most: &'c mut u16,
    saver: &'c mut Option<Saver>,
    ports: &'c [Cell],
}

impl Listener<'_> {
    fn listen(&mut self, mut ring: Ring<'_, '_>) -> Result<bool, Fault> {
        ring.disarm();
        for _ in 0..MAX_MESSAGES {
            let before = ring.next();
            let mut batch = Batch::default();
            let report = |fault| {
                complain(self.quiet, &fault);
            };
            batch.fill(&mut ring, Direction::FromGuest, ONE, report)?;
            if ring.next() == before {
                break;
            }
            if !batch.is_empty() {
                let mut bytes = [0; MESSAGE_LEN];
                let len = Cursor::new(&batch.segments).read(&mut bytes);
                self.handle(&bytes[..len]);
                batch.give_back_read(&mut ring);
            }
        }
        // Before the driver sees what was given back.
        if let Some(saver) = self.saver {
            saver.save(&Current {
                machine: self.machine,
                heard: *self.heard,
                most: *self.most,
            });
        }
        Ok(ring.arm(1))
    }

    fn handle(&mut self, message: &[u8]) {
        *self.heard = true;
        match self.machine.handle(message) {
            Ok(None) => {}
            Ok(Some(Effect::Started)) => {
                info!("guest driver started");
                *self.most = 0;
                self.ports.iter().for_each(Cell::driver_started);
            }
            Ok(Some(Effect::Opened(port))) => self.ports[port].guest_opened(),
            Ok(Some(Effect::Resumed(port))) => self.ports[port].guest_resumed(),
            Ok(Some(Effect::Closed(port))) => self.ports[port].guest_closed(),
            Err(misuse) => self.refuse(misuse),
        }
    }

    fn refuse(&self, misuse: Misuse) {
        if let Some(held_back) = self.quiet.permit() {
            warn!("ignored: {misuse}{held_back}");
        }
    }
}

/// Puts the messages that are owed in the buffers there are.
fn tell(machine: &mut Machine, quiet: &Quiet, ring: &mut Ring<'_, '_>) -> Result<bool, Fault> {
    let mut message = Vec::new();
    let mut more = false;
    for _ in 0..MAX_MESSAGES {
        more = machine.next_message(&mut message);
        if !more {
            break;
        }
        let before = ring.next();
        let mut batch = Batch::default();
        let report = |fault| {
            complain(quiet, &fault);
        };
        batch.fill(ring, Direction::ToGuest, ONE, report)?;
        if ring.next() == before {
            more = ring.arm(1);
            if !more {
                break;
            }
        } else if batch.len() >= message.len() {
            Cursor::new(&batch.segments).write(&message);
            batch.give_back_written(ring, message.len());
            machine.message_sent();
        } else if !batch.is_empty() {
            complain(quiet, &Fault::Empty);
            batch.give_back_read(ring);
        }
    }
    Ok(more)
}

fn complain(quiet: &Quiet, fault: &Fault) -> bool {
    if let Some(held_back) = quiet.permit() {
        warn!("guest misuses a control ring: {fault}{held_back}");
    }
    false
}

impl Shared {
    /// The control thread's work: something came, or something changed.
    pub(super) fn serve_control(&self) {
        if self.control().serve(&self.ports) {
            self.poke();
        }
        self.vacated.notify_all();
    }
}
