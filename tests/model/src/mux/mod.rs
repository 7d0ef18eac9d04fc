//! Two sessions over a channel: [`virtproxy_mux::Session`] itself, at both ends.
//!
//! # Theory of operation
//!
//! A [`Scene`] holds two sessions with the local sides of their streams, and the frames under way between them. A [`Step`] is
//! the least that can happen: one frame goes out, one arrives, one local side reads, ends or says something. Any step
//! may be taken whenever it is possible, so the search sees every order of them: every delay and stall of either end and of the
//! channel, each way by itself.
//!
//! What only *may* happen (a restart, a reset, half a frame that arrives alone, a fault) is counted down from
//! [`Allowed`]; that keeps the search finite, and is where it is bounded. So are the streams and what they carry ([`Bounds`]).
//!
//! A channel that frames are not sealed for loses whole frames only, when an end restarts, as a virtio port does
//! (`PROTOCOL.md`, "Cut frames"). One they are sealed for loses, doubles and adds what it likes. Then an end may have missed
//! something and not know it (it is *disturbed*) until somebody asks: so where all is quiet, the drivers ask for a
//! sign of life ([`Step::Ask`]), as real ones do every few seconds.

mod bounds;
mod end;
mod pipe;
mod scene;

use stateright::Property;
use virtproxy_mux::frame::kind;
use virtproxy_mux::sim::Side;

pub use bounds::{Allowed, Bounds, Flaw, Reads, Stream, UNIT};
use end::{Phase, Sent};
pub use pipe::Fault;
pub use scene::Scene;

use crate::world::{Search, Seen, Sight, World};

/// One thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// This end sends the next frame.
    Send(Side),
    /// The next frame arrives at this end, or the rest of it.
    Arrive(Side),
    /// It opens this stream.
    Open(Side, u8),
    /// It accepts it.
    Accept(Side, u8),
    /// Its local side takes what it can.
    Read(Side, u8),
    /// Its local side has something to send after all.
    Wake(Side, u8),
    /// All is quiet, and the drivers ask for a sign of life.
    Ask,
    /// A part of the next frame arrives at this end.
    ArrivePart(Side),
    /// It has a turn to send data, and its local side says that it has none now.
    Nap(Side),
    /// It refuses this stream.
    Refuse(Side, u8),
    /// It resets it.
    Reset(Side, u8),
    /// It starts anew; all that it had sent and that is under way is lost or not.
    Restart(Side, bool),
    /// What would arrive at this end next suffers.
    Fault(Side, Fault),
}

/// What is searched.
#[derive(Clone, Debug)]
pub struct Mux(pub Bounds);

impl Mux {
    fn drives(&self, scene: &mut Scene, step: &Step) -> Result<bool, String> {
        let bounds = &self.0;
        let Scene {
            ends,
            pipes,
            records,
            left,
            ..
        } = scene;
        let excuses =
            bounds.allowed.restarts > left.restarts || bounds.allowed.faults > left.faults;
        let done = match *step {
            Step::Send(side) | Step::Nap(side) => {
                let (end, pipe) = (&mut ends[side as usize], &mut pipes[side as usize]);
                let naps = matches!(step, Step::Nap(_));
                let room = pipe.room(bounds.capacity);
                let sent = end.transmit(room, naps, bounds, records)?;
                left.naps -= u8::from(naps);
                let lost = |kind: u8| bounds.flaw == Some(Flaw::CreditLost) && kind == kind::CREDIT;
                match sent {
                    Sent::Frame(frame) if frame.frame().is_some_and(|(kind, ..)| lost(kind)) => {
                        true
                    }
                    Sent::Frame(frame) => {
                        pipe.push(frame);
                        !naps
                    }
                    Sent::Nothing => false,
                    Sent::Nap => true,
                    Sent::End => !naps,
                }
            }
            Step::Arrive(side) | Step::ArrivePart(side) => {
                let (end, pipe) = (&mut ends[side as usize], &mut pipes[side.other() as usize]);
                let bytes = if matches!(step, Step::Arrive(_)) {
                    pipe.deliver()
                } else {
                    left.parts -= 1;
                    pipe.deliver_part()
                };
                let Some(bytes) = bytes else {
                    return Ok(false);
                };
                end.receive(bytes, bounds, records, excuses)?;
                end.serve(bounds);
                true
            }
            Step::Open(side, key) => ends[side as usize].open(key, &mut records[usize::from(key)]),
            Step::Accept(side, key) => ends[side as usize].accept(key),
            Step::Read(side, key) => ends[side as usize].read(key, UNIT, bounds),
            Step::Wake(side, key) => ends[side as usize].wake(key),
            Step::Ask => {
                for end in ends.iter_mut() {
                    end.asks = true;
                    end.session.ping();
                }
                true
            }
            Step::Refuse(side, key) => {
                left.refusals -= 1;
                let record = &mut records[usize::from(key)];
                record.cut_short = true;
                ends[side as usize].refuse(key, record)
            }
            Step::Reset(side, key) => {
                left.resets -= 1;
                let record = &mut records[usize::from(key)];
                record.cut_short = true;
                ends[side as usize].reset(key, record)
            }
            Step::Restart(side, loses) => {
                left.restarts -= 1;
                ends[side as usize].renew(bounds, records);
                if loses {
                    pipes[side as usize].lose(!bounds.sealed);
                    if bounds.sealed {
                        ends[side.other() as usize].disturb();
                    }
                }
                true
            }
            Step::Fault(side, fault) => {
                left.faults -= 1;
                ends[side as usize].disturb();
                pipes[side.other() as usize].suffer(fault)
            }
        };
        for end in ends {
            end.tidy(bounds, records)?;
            end.session.check_invariants();
        }
        Ok(done)
    }

    /// Whether nothing is under way and neither end would send anything.
    fn is_quiet(&self, scene: &Scene) -> bool {
        let mut scene = scene.clone();
        scene.pipes.iter().all(pipe::Pipe::is_empty)
            && [Side::A, Side::B]
                .iter()
                .all(|side| !self.drives(&mut scene, &Step::Send(*side)).unwrap_or(true))
    }

    fn steps_of(&self, scene: &Scene, side: Side, steps: &mut Vec<Step>) {
        let (bounds, left) = (&self.0, scene.left);
        let end = &scene.ends[side as usize];
        let [out, back] = [side, side.other()].map(|side| &scene.pipes[side as usize]);
        let room = out.room(bounds.capacity);
        let reads = bounds.flaw != Some(Flaw::ReaderWaitsForWriter) || room > 0;
        if room > 0 {
            steps.push(Step::Send(side));
            if left.naps > 0 {
                steps.push(Step::Nap(side));
            }
        }
        if !back.is_empty() && reads {
            steps.push(Step::Arrive(side));
            if left.parts > 0 {
                steps.push(Step::ArrivePart(side));
            }
            if left.faults > 0 && bounds.sealed {
                steps.extend(Fault::ALL.map(|fault| Step::Fault(side, fault)));
            }
        }
        if end.session.is_established() {
            let next = (0u8..).zip(&bounds.streams).find(|(key, stream)| {
                stream.opener == side && scene.records[usize::from(*key)].epoch.is_none()
            });
            steps.extend(next.map(|(key, _)| Step::Open(side, key)));
        }
        for (key, local) in &end.locals {
            if local.phase == Phase::Asked {
                steps.push(Step::Accept(side, *key));
                if left.refusals > 0 {
                    steps.push(Step::Refuse(side, *key));
                }
            }
            if local.held > 0
                && bounds.streams[usize::from(*key)].reads[local.role] == Reads::AnyTime
            {
                steps.push(Step::Read(side, *key));
            }
            if local.napping {
                steps.push(Step::Wake(side, *key));
            }
            if left.resets > 0 {
                steps.push(Step::Reset(side, *key));
            }
        }
        if left.restarts > 0 {
            steps.push(Step::Restart(side, false));
            if !out.is_empty() {
                steps.push(Step::Restart(side, true));
            }
        }
    }
}

impl World for Mux {
    type Scene = Scene;
    type Step = Step;

    fn starts(&self) -> Vec<Scene> {
        let mut scene = Scene::new(&self.0);
        if !self.0.from_nothing {
            let handshake = [Side::A, Side::B].map(|side| [Step::Send(side), Step::Arrive(side)]);
            let mut shakes = |step| self.drives(&mut scene, step).unwrap_or(false);
            while handshake.iter().flatten().any(&mut shakes) {}
        }
        vec![scene]
    }

    fn steps(&self, scene: &Scene) -> Vec<Step> {
        let mut steps = Vec::new();
        for side in [Side::A, Side::B] {
            self.steps_of(scene, side, &mut steps);
        }
        let lost = self.0.sealed && (!scene.is_joined() || scene.is_disturbed());
        if lost && self.is_quiet(scene) {
            steps.push(Step::Ask);
        }
        steps
    }

    fn is_due(step: &Step) -> bool {
        match step {
            Step::Send(_) | Step::Arrive(_) | Step::Open(..) | Step::Accept(..) => true,
            Step::Read(..) | Step::Wake(..) | Step::Ask => true,
            Step::ArrivePart(_) | Step::Nap(_) | Step::Refuse(..) | Step::Reset(..) => false,
            Step::Restart(..) | Step::Fault(..) => false,
        }
    }

    fn take(&self, scene: &mut Scene, step: &Step) -> bool {
        self.drives(scene, step).unwrap_or_else(|wrong| {
            scene.wrong.get_or_insert(wrong);
            true
        })
    }

    fn conserved(&self, scene: &Scene) -> bool {
        scene.is_conserved()
    }

    fn done(&self, scene: &Scene) -> Result<(), String> {
        scene.is_done(&self.0)
    }

    fn sights(&self) -> Vec<Sight<Self>> {
        let full = |search: &Search<Mux>, seen: &Seen<Scene>| {
            let capacity = search.world().0.capacity;
            seen.0.pipes.iter().any(|pipe| pipe.room(capacity) == 0)
        };
        let over = |_: &Search<Mux>, seen: &Seen<Scene>| {
            let mut endings = seen.0.records.iter().flat_map(|record| record.ended);
            endings.all(|ending| ending.is_some())
        };
        let dry = |search: &Search<Mux>, seen: &Seen<Scene>| seen.0.is_dry(&search.world().0);
        let mut sights = vec![Property::sometimes("a channel is full", full)];
        let streams = &self.0.streams;
        let unread = |stream: &Stream| stream.reads.contains(&Reads::Never);
        if !streams.iter().any(unread) {
            sights.push(Property::sometimes("all streams are over", over));
        }
        let fills = |stream: &Stream| stream.sends.iter().max() > Some(&(self.0.window[1] * UNIT));
        if streams.iter().any(fills) {
            sights.push(Property::sometimes("a stream waits for credit", dry));
        }
        sights
    }
}
