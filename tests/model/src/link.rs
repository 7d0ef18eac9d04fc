//! Two ends of a bad line: [`virtproxy_link::Endpoint`] itself, at both ends.
//!
//! # Theory of operation
//!
//! A [`Scene`] holds two endpoints, what each has yet to say, the frames under way between them, and the time. Each message is one
//! byte that follows from both incarnations and its place, so that a lost, doubled, swapped or stale one shows at once.
//!
//! Time stands still while anything can be done, and then goes to the next timer ([`Step::Tick`]). A timer that runs out while
//! something is still under way, as on a line or machine that stalls, is a [`Step::Late`], and counted down like every other
//! mishap ([`Allowed`]). What is under way suffers only when it would arrive next: nobody could tell whether it did so earlier.
//! A frame that is dropped on the way out is one that is dropped on arrival.

use std::collections::VecDeque;
use std::fmt::Write as _;

use stateright::Property;

use virtproxy_link::{Config, End as Over, Endpoint, Time};
use virtproxy_mux::sim::Side;

use crate::world::{self, Search, Seen, Sight, World};

/// How often what is not due may happen, in one run.
#[derive(Clone, Copy, Debug, Default, Hash, PartialEq, Eq)]
pub struct Allowed {
    /// The line drops, cuts, doubles, changes or adds something.
    pub faults: u8,
    /// A timer runs out although what it waits for is still under way.
    pub late: u8,
    /// An end starts anew.
    pub restarts: u8,
    /// Half of a frame arrives alone.
    pub parts: u8,
}

/// How far a search goes.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Messages that each end has to send.
    pub messages: [u8; 2],
    /// Messages that each end has sent before the search starts, without a mishap: none means that the ends have not heard each
    /// other yet; 250 lets numbers start over.
    pub before: u8,
    /// Frames that may be under way each way.
    pub capacity: usize,
    /// What else may happen.
    pub allowed: Allowed,
    /// A driver that breaks its contract: an end that cannot write does not read.
    pub reader_waits_for_writer: bool,
    /// A driver that breaks its contract: it does not look at the timers.
    pub no_timers: bool,
}

/// What a line does to the frame that would arrive next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Loses it.
    Lose,
    /// Loses its last byte, the border, so that it runs into the next one.
    LoseBorder,
    /// Loses its first half.
    LoseHead,
    /// Delivers it twice.
    Double,
    /// Changes a bit in its middle.
    Flip,
    /// Puts somebody else's words before it.
    Insert,
}

const FAULTS: [Fault; 6] = [
    Fault::Lose,
    Fault::LoseBorder,
    Fault::LoseHead,
    Fault::Double,
    Fault::Flip,
    Fault::Insert,
];

/// One thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// This end sends the next frame.
    Send(Side),
    /// The next frame arrives at this end.
    Arrive(Side),
    /// Nothing else can be done: time goes to the next timer.
    Tick,
    /// A part of the next frame arrives at this end.
    ArrivePart(Side),
    /// Time goes to the next timer all the same.
    Late,
    /// What would arrive at this end next suffers.
    Fault(Side, Fault),
    /// This end starts anew.
    Restart(Side),
}

#[derive(Clone, Hash)]
struct End {
    endpoint: Endpoint,
    id: u64,
    /// Messages it has yet to send, and has sent and taken in this incarnation.
    to_send: u32,
    sent: u32,
    taken: u32,
}

/// A state of the world.
#[derive(Clone, Hash)]
pub struct Scene {
    now: Time,
    ends: [End; 2],
    /// From A, and from B.
    lines: [VecDeque<Vec<u8>>; 2],
    left: Allowed,
    wrong: Option<String>,
}

/// What is searched.
#[derive(Clone, Copy, Debug)]
pub struct Link(pub Bounds);

/// What `from` says to `to` at a place.
fn truth(from: u64, to: u64, place: u32) -> u8 {
    let [byte, ..] = (from * 83 + to * 29 + u64::from(place) * 7 + 1).to_le_bytes();
    byte
}

impl End {
    fn new(side: Side, id: u64) -> Self {
        let speed = (side == Side::A).then_some(115_200);
        End {
            endpoint: Endpoint::new(Config { id, speed }),
            id,
            to_send: 0,
            sent: 0,
            taken: 0,
        }
    }

    /// Another incarnation, which sends what is left.
    fn renew(&mut self, side: Side) {
        let to_send = self.to_send;
        *self = End {
            to_send,
            ..End::new(side, self.id + 2)
        };
    }

    fn can_push(&self) -> bool {
        self.to_send > 0 && self.endpoint.wants_data()
    }

    fn send(&mut self, now: Time, line: &mut VecDeque<Vec<u8>>) -> bool {
        let mut frame = Vec::new();
        if !self.endpoint.poll_transmit(now, &mut frame) && self.can_push() {
            let peer = self.endpoint.peer().unwrap_or(0);
            self.endpoint.push(&[truth(self.id, peer, self.sent)]);
            self.sent += 1;
            self.to_send -= 1;
            self.endpoint.poll_transmit(now, &mut frame);
        }
        let any = !frame.is_empty();
        if any {
            line.push_back(frame);
        }
        any
    }

    fn receive(
        &mut self,
        now: Time,
        bytes: &[u8],
        side: Side,
        restarts: bool,
    ) -> Result<(), String> {
        let mut taken = Vec::new();
        self.endpoint.handle_bytes(now, bytes, &mut taken);
        let peer = self.endpoint.peer().unwrap_or(0);
        for byte in taken {
            if byte != truth(peer, self.id, self.taken) {
                return Err(format!("{side:?} gets a wrong message at {}", self.taken));
            }
            self.taken += 1;
        }
        match self.endpoint.end() {
            None => {}
            Some(Over::PeerRestarted) if restarts => self.renew(side),
            Some(end) => return Err(format!("a sound peer was blamed: {end}")),
        }
        Ok(())
    }
}

impl Scene {
    /// When the next timer runs out.
    fn timer(&self) -> Option<Time> {
        let timers = self
            .ends
            .iter()
            .filter_map(|end| end.endpoint.next_timeout());
        timers.min()
    }

    fn has_something_to_do(&self) -> bool {
        let ready = |end: &End| {
            let due = end.endpoint.next_timeout();
            end.can_push() || due.is_some_and(|due| due <= self.now)
        };
        self.lines.iter().any(|line| !line.is_empty()) || self.ends.iter().any(ready)
    }

    fn suffer(&mut self, side: Side, fault: Fault) -> bool {
        let line = &mut self.lines[side.other() as usize];
        let Some(mut frame) = line.pop_front() else {
            return false;
        };
        let half = frame.len() / 2;
        match fault {
            Fault::Lose => return true,
            Fault::LoseBorder => _ = frame.pop(),
            Fault::LoseHead => _ = frame.drain(..half),
            Fault::Double => line.push_front(frame.clone()),
            Fault::Flip => frame[half] ^= 4,
            Fault::Insert => _ = frame.splice(0..0, *b"login: "),
        }
        line.push_front(frame);
        true
    }
}

impl Link {
    fn drives(&self, scene: &mut Scene, step: &Step) -> Result<bool, String> {
        let now = scene.now;
        let restarts = self.0.allowed.restarts > scene.left.restarts;
        let done = match *step {
            Step::Send(side) => {
                scene.ends[side as usize].send(now, &mut scene.lines[side as usize])
            }
            Step::Arrive(side) | Step::ArrivePart(side) => {
                let line = &mut scene.lines[side.other() as usize];
                let Some(mut bytes) = line.pop_front() else {
                    return Ok(false);
                };
                if matches!(step, Step::ArrivePart(_)) {
                    scene.left.parts -= 1;
                    line.push_front(bytes.split_off(bytes.len() / 2));
                }
                scene.ends[side as usize].receive(now, &bytes, side, restarts)?;
                true
            }
            Step::Tick | Step::Late => {
                scene.left.late -= u8::from(matches!(step, Step::Late));
                let timer = scene.timer().filter(|timer| *timer > now);
                scene.now = timer.unwrap_or(now);
                timer.is_some()
            }
            Step::Fault(side, fault) => {
                scene.left.faults -= 1;
                scene.suffer(side, fault)
            }
            Step::Restart(side) => {
                scene.left.restarts -= 1;
                scene.ends[side as usize].renew(side);
                true
            }
        };
        for end in &scene.ends {
            end.endpoint.check_invariants();
        }
        Ok(done)
    }
}

impl World for Link {
    type Scene = Scene;
    type Step = Step;

    fn starts(&self) -> Vec<Scene> {
        let mut scene = Scene {
            now: 1,
            ends: [End::new(Side::A, 1), End::new(Side::B, 2)],
            lines: [VecDeque::new(), VecDeque::new()],
            left: Allowed::default(),
            wrong: None,
        };
        let both = [Side::A, Side::B];
        let exchange = both.map(|side| [Step::Send(side), Step::Arrive(side)]);
        let steps = exchange.iter().flatten().chain(&[Step::Tick]);
        for end in &mut scene.ends {
            end.to_send = self.0.before.into();
        }
        while self.0.before > 0 && steps.clone().any(|step| self.take(&mut scene, step)) {}
        for (end, messages) in scene.ends.iter_mut().zip(self.0.messages) {
            end.to_send = messages.into();
        }
        scene.left = self.0.allowed;
        vec![scene]
    }

    fn steps(&self, scene: &Scene) -> Vec<Step> {
        let mut steps = Vec::new();
        let left = scene.left;
        for side in [Side::A, Side::B] {
            let [out, back] = [side, side.other()].map(|side| &scene.lines[side as usize]);
            let room = out.len() < self.0.capacity;
            if room {
                steps.push(Step::Send(side));
            }
            if !back.is_empty() && (room || !self.0.reader_waits_for_writer) {
                steps.push(Step::Arrive(side));
                if left.parts > 0 && back[0].len() > 1 {
                    steps.push(Step::ArrivePart(side));
                }
                if left.faults > 0 {
                    steps.extend(FAULTS.map(|fault| Step::Fault(side, fault)));
                }
            }
            if left.restarts > 0 {
                steps.push(Step::Restart(side));
            }
        }
        let timers = !self.0.no_timers && scene.timer() > Some(scene.now);
        if timers && !scene.has_something_to_do() {
            steps.push(Step::Tick);
        } else if timers && left.late > 0 {
            steps.push(Step::Late);
        }
        steps
    }

    fn is_due(step: &Step) -> bool {
        matches!(step, Step::Send(_) | Step::Arrive(_) | Step::Tick)
    }

    fn take(&self, scene: &mut Scene, step: &Step) -> bool {
        self.drives(scene, step).unwrap_or_else(|wrong| {
            scene.wrong.get_or_insert(wrong);
            true
        })
    }

    /// No more is taken than was sent.
    fn conserved(&self, scene: &Scene) -> bool {
        let [a, b] = &scene.ends;
        let hears = |one: &End, other: &End| one.endpoint.peer() == Some(other.id);
        let joined = hears(a, b) && hears(b, a);
        !joined || (a.taken <= b.sent && b.taken <= a.sent)
    }

    fn done(&self, scene: &Scene) -> Result<(), String> {
        let [a, b] = &scene.ends;
        if scene.lines.iter().any(|line| !line.is_empty()) {
            return Err("each waits for the other to take what it sends".to_owned());
        }
        if a.endpoint.peer() != Some(b.id) || b.endpoint.peer() != Some(a.id) {
            return Err("the ends do not find each other".to_owned());
        }
        let missing = [(a, b), (b, a)].map(|(from, to)| from.to_send + from.sent - to.taken);
        match missing {
            [0, 0] => Ok(()),
            _ => Err(format!("messages are missing: {missing:?}")),
        }
    }

    fn sights(&self) -> Vec<Sight<Self>> {
        let full = |search: &Search<Link>, seen: &Seen<Scene>| {
            let mut lines = seen.0.lines.iter();
            lines.any(|line| line.len() == search.world().0.capacity)
        };
        let again = |_: &Search<Link>, seen: &Seen<Scene>| {
            let mut ends = seen.0.ends.iter();
            ends.any(|end| end.endpoint.stats().retransmissions > 0)
        };
        let mut sights = vec![Property::sometimes("a line is full", full)];
        if self.0.allowed.faults > 0 {
            sights.push(Property::sometimes("a frame is sent again", again));
        }
        sights
    }
}

impl world::Scene for Scene {
    fn wrong(&self) -> Option<&str> {
        self.wrong.as_deref()
    }

    fn blame(&mut self, what: String) {
        self.wrong.get_or_insert(what);
    }

    fn tell(&self) -> String {
        let mut text = format!("{} us", self.now);
        for (end, line) in self.ends.iter().zip(&self.lines) {
            let (id, to_send, sent, taken) = (end.id, end.to_send, end.sent, end.taken);
            _ = write!(
                text,
                "; {id}: to send {to_send}, sent {sent}, taken {taken}, {} frames under way",
                line.len()
            );
        }
        text
    }
}
