//! One end: a session, the driver it needs, and the local sides of its streams.

use std::collections::BTreeMap;

use virtproxy_mux::frame::{HEADER_LEN, kind};
use virtproxy_mux::seal::SEAL_LEN;
use virtproxy_mux::sim::Side;
use virtproxy_mux::{End as Over, Event, Reason, Session, StreamId, Time, Transmit};

use super::bounds::{Bounds, Flaw, Reads};
use super::pipe::{Role, Run, Runs};
use super::scene::{Ending, Record};

/// The moment at which everything happens: only windows that grow and round trips look at the time.
const NOW: Time = 1;

/// Room for any control frame; filler comes in one piece.
const BUFFER: usize = 8192;

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(super) enum Phase {
    Opening,
    Asked,
    Open,
}

/// The local side of a stream.
#[derive(Clone, Debug, Hash)]
pub(super) struct Local {
    pub(super) id: StreamId,
    pub(super) role: Role,
    pub(super) phase: Phase,
    pub(super) held: u32,
    pub(super) received: u32,
    pub(super) finished: bool,
    pub(super) peer_finished: bool,
    /// Said that it had nothing to send although it had.
    pub(super) napping: bool,
}

#[derive(Clone, Hash)]
pub(super) struct End {
    pub(super) side: Side,
    pub(super) session: Session,
    pub(super) epoch: u64,
    pub(super) locals: BTreeMap<u8, Local>,
    /// Bytes were lost or added on the way here, and it is not known yet: the session may end.
    pub(super) disturbed: bool,
    /// A sign of life was asked for when nothing was under way: whoever has it has got all that came before.
    pub(super) asks: bool,
    /// The part that is here of a payload whose seal is not.
    pub(super) staged: Runs,
}

/// What goes wrong.
pub(super) type Wrong = String;

impl End {
    pub(super) fn new(side: Side, bounds: &Bounds) -> Self {
        let epoch = 1 + side as u64;
        End {
            side,
            session: Session::new(bounds.config(side), epoch),
            epoch,
            locals: BTreeMap::new(),
            disturbed: false,
            asks: false,
            staged: Runs::default(),
        }
    }

    /// Starts over with a new session; every stream of the old one is over.
    pub(super) fn renew(&mut self, bounds: &Bounds, records: &mut [Record]) {
        for (key, local) in std::mem::take(&mut self.locals) {
            records[usize::from(key)].ended[local.role] = Some(Ending::SessionOver);
        }
        let epoch = self.epoch + 2;
        *self = End {
            session: Session::new(bounds.config(self.side), epoch),
            epoch,
            ..End::new(self.side, bounds)
        };
    }

    /// Something on the way here gets lost or added.
    pub(super) fn disturb(&mut self) {
        (self.disturbed, self.asks) = (true, false);
    }

    fn find(&mut self, id: StreamId) -> Result<(u8, &mut Local), Wrong> {
        let mut locals = self.locals.iter_mut();
        let found = locals.find(|(_, local)| local.id == id);
        let (key, local) = found.ok_or_else(|| format!("stream {id} is not there"))?;
        Ok((*key, local))
    }

    pub(super) fn open(&mut self, key: u8, record: &mut Record) -> bool {
        let Ok(id) = self.session.open(&format!("k{key}")) else {
            return false;
        };
        record.epoch = Some(self.epoch);
        self.locals.insert(key, local(id, 0, Phase::Opening));
        true
    }

    pub(super) fn accept(&mut self, key: u8) -> bool {
        let Some(local) = self.locals.get_mut(&key) else {
            return false;
        };
        local.phase = Phase::Open;
        self.session.accept(local.id);
        self.session.set_readable(local.id);
        true
    }

    pub(super) fn refuse(&mut self, key: u8, record: &mut Record) -> bool {
        let Some(local) = self.locals.remove(&key) else {
            return false;
        };
        self.session.refuse(local.id, Reason::TargetRefused, "");
        record.ended[local.role] = Some(Ending::Refused);
        true
    }

    pub(super) fn reset(&mut self, key: u8, record: &mut Record) -> bool {
        let Some(local) = self.locals.remove(&key) else {
            return false;
        };
        self.session.reset(local.id, Reason::Cancelled, "");
        self.session.consumed(NOW, local.id, local.held as usize);
        record.ended[local.role] = Some(Ending::Reset);
        true
    }

    /// The local side takes up to `most` bytes.
    pub(super) fn read(&mut self, key: u8, most: u32, bounds: &Bounds) -> bool {
        let Some(local) = self.locals.get_mut(&key).filter(|local| local.held > 0) else {
            return false;
        };
        let n = local.held.min(most);
        local.held -= n;
        if bounds.flaw != Some(Flaw::NoCredit) {
            self.session.consumed(NOW, local.id, n as usize);
        }
        true
    }

    /// What the local sides do at once.
    pub(super) fn serve(&mut self, bounds: &Bounds) {
        let keys: Vec<u8> = self.locals.keys().copied().collect();
        for key in keys {
            let (stream, local) = (&bounds.streams[usize::from(key)], &self.locals[&key]);
            let reads = stream.reads[local.role] == Reads::AtOnce;
            if local.phase == Phase::Asked && stream.at_once {
                self.accept(key);
            }
            if reads {
                self.read(key, u32::MAX, bounds);
            }
        }
    }

    pub(super) fn wake(&mut self, key: u8) -> bool {
        let Some(local) = self.locals.get_mut(&key).filter(|local| local.napping) else {
            return false;
        };
        local.napping = false;
        self.session.set_readable(local.id);
        true
    }

    /// Lets go of streams that are over both ways and read to their end.
    pub(super) fn tidy(&mut self, bounds: &Bounds, records: &mut [Record]) -> Result<(), Wrong> {
        let mut result = Ok(());
        self.locals.retain(|key, local| {
            let done = local.finished && local.peer_finished && local.held == 0;
            if done {
                let sends = bounds.streams[usize::from(*key)].sends[1 - local.role];
                if local.received != sends {
                    let received = local.received;
                    result = Err(format!("stream {key} ended after {received} of {sends}"));
                }
                records[usize::from(*key)].ended[local.role] = Some(Ending::Whole);
            }
            !done
        });
        result
    }

    /// The next frame, if there is one. An end that naps says of data that there is none.
    pub(super) fn transmit(
        &mut self,
        room: usize,
        naps: bool,
        bounds: &Bounds,
        records: &mut [Record],
    ) -> Result<Sent, Wrong> {
        let mut buf = [0; BUFFER];
        match self.session.poll_transmit(NOW, room, &mut buf) {
            None => Ok(Sent::Nothing),
            Some(Transmit::Control(len)) => {
                let frame = Runs::of([Run::Bytes(buf[..len].to_vec())]);
                if let Some((kind::OPEN, stream, rest)) = frame.frame() {
                    let key = rest.get(5).map_or(0, |digit| digit - b'0');
                    records[usize::from(key)].wire = Some(stream);
                }
                Ok(Sent::Frame(frame))
            }
            Some(Transmit::Data { stream, max }) => {
                let (key, local) = self.find(stream)?;
                let (role, id) = (local.role, local.id);
                if local.phase != Phase::Open || local.finished || max == 0 {
                    return Err(format!("a turn for stream {key}, which cannot send"));
                }
                let record = &mut records[usize::from(key)];
                let at = record.sent[role];
                let left = bounds.streams[usize::from(key)].sends[role] - at;
                let len = left.min(u32::try_from(max).unwrap_or(left));
                if naps {
                    local.napping = true;
                    self.session.blocked(id);
                    return Ok(Sent::Nap);
                }
                if len == 0 {
                    local.finished = true;
                    record.finished[role] = true;
                    self.session.finish(id);
                    return Ok(Sent::End);
                }
                record.sent[role] += len;
                let envelope = self.session.sent(id, len as usize);
                let seal = envelope.seal.map_or(Vec::new(), Vec::from);
                Ok(Sent::Frame(Runs::of([
                    Run::Bytes(envelope.header.to_vec()),
                    Run::Data { key, role, at, len },
                    Run::Bytes(seal),
                ])))
            }
        }
    }

    /// Takes bytes from the channel, as a driver does.
    pub(super) fn receive(
        &mut self,
        mut bytes: Runs,
        bounds: &Bounds,
        records: &mut [Record],
        excuses: bool,
    ) -> Result<(), Wrong> {
        while bytes.len() > 0 {
            let mut used = 1;
            if let Some(len) = self.session.unverified() {
                self.staged
                    .append(bytes.take(len + SEAL_LEN - self.staged.len()));
                if self.staged.len() == len + SEAL_LEN {
                    let mut staged = std::mem::take(&mut self.staged);
                    self.session.verify(staged.last());
                    staged.append(bytes);
                    bytes = staged;
                }
            } else if let Some(payload) = self.session.payload() {
                let taken = bytes.take(payload.remaining);
                let len = taken.len();
                if let Some(id) = payload.stream {
                    self.deliver(id, taken)?;
                }
                self.session.payload_taken(len);
            } else {
                used = self.session.handle_bytes(NOW, &bytes.first());
                bytes.take(used);
            }
            let mut events = false;
            while let Some(event) = self.session.poll_event() {
                events = true;
                self.handle(event, records, excuses)?;
            }
            if self.session.is_ended() {
                self.session.check_invariants();
                self.renew(bounds, records);
            } else if used == 0 && !events {
                return Err("input is neither used nor answered".to_owned());
            }
        }
        Ok(())
    }

    fn deliver(&mut self, id: StreamId, bytes: Runs) -> Result<(), Wrong> {
        if self.find(id).is_err() {
            self.session.consumed(NOW, id, bytes.len()); // reset here in mid-frame
            return Ok(());
        }
        let (own, local) = self.find(id)?;
        for run in bytes.iter() {
            let right = matches!(run, Run::Data { key, role, at, .. }
                if (*key, *role, *at) == (own, 1 - local.role, local.received));
            if !right || local.peer_finished {
                return Err(format!("stream {own} gets {run:?} at {}", local.received));
            }
            let len = u32::try_from(run.len()).unwrap_or(u32::MAX);
            local.held += len;
            local.received += len;
        }
        Ok(())
    }

    fn handle(&mut self, event: Event, records: &mut [Record], excuses: bool) -> Result<(), Wrong> {
        match event {
            Event::Established(_) | Event::GoingAway { .. } => {}
            Event::RoundTrip(_) => self.disturbed &= !std::mem::take(&mut self.asks),
            Event::Incompatible(_) => return Err("no common version".to_owned()),
            Event::Asked { stream, service } => {
                let key = service.strip_prefix('k').and_then(|key| key.parse().ok());
                let key: u8 = key.ok_or_else(|| format!("asked for {service:?}"))?;
                let peer = self.session.peer().map(|peer| peer.epoch);
                let record = &mut records[usize::from(key)];
                if record.asked || record.epoch != peer {
                    return Err(format!("a stale or repeated OPEN for {key}"));
                }
                record.asked = true;
                self.locals.insert(key, local(stream, 1, Phase::Asked));
            }
            Event::Accepted(id) => {
                let (_, local) = self.find(id)?;
                local.phase = Phase::Open;
                self.session.set_readable(id);
            }
            Event::Refused { stream, .. } => {
                let (key, local) = self.find(stream)?;
                if local.phase != Phase::Opening {
                    return Err(format!("stream {key} is refused, but was open"));
                }
                records[usize::from(key)].ended[0] = Some(Ending::Refused);
                self.locals.remove(&key);
            }
            Event::Finished(id) => {
                let (key, local) = self.find(id)?;
                local.peer_finished = true;
                let (record, role) = (&records[usize::from(key)], 1 - local.role);
                if !record.finished[role] || local.received != record.sent[role] {
                    return Err(format!("stream {key} ended before its end"));
                }
            }
            Event::Reset { stream, .. } => {
                // It may be over here already, but for a FIN that the session has yet to send.
                let Ok((key, local)) = self.find(stream) else {
                    return Ok(());
                };
                let (id, held, role) = (local.id, local.held, local.role);
                self.session.consumed(NOW, id, held as usize);
                self.locals.remove(&key);
                records[usize::from(key)].ended[role] = Some(Ending::Reset);
            }
            Event::Ended(Over::Damaged) if self.disturbed => {}
            Event::Ended(Over::PeerRestarted) if excuses => {}
            Event::Ended(end) => return Err(format!("a sound peer was blamed: {end}")),
        }
        Ok(())
    }
}

/// What became of a turn to send.
pub(super) enum Sent {
    /// This goes out.
    Frame(Runs),
    /// There was nothing to send.
    Nothing,
    /// A stream said that it had no data, although it had.
    Nap,
    /// A stream said that it has no more.
    End,
}

fn local(id: StreamId, role: Role, phase: Phase) -> Local {
    Local {
        id,
        role,
        phase,
        held: 0,
        received: 0,
        finished: false,
        peer_finished: false,
        napping: false,
    }
}

/// Payload of the DATA frame, or what the CREDIT of the frame grants, in `runs`; with its wire stream.
pub(super) fn counts(runs: &Runs) -> Option<(u8, u32, u32)> {
    let (kind, stream, rest) = runs.frame()?;
    let bytes = match kind {
        kind::DATA => runs
            .iter()
            .filter(|run| matches!(run, Run::Data { .. }))
            .map(Run::len)
            .sum::<usize>(),
        kind::CREDIT | kind::ACCEPT | kind::SESSION_CREDIT => {
            u32::from_le_bytes(*rest.first_chunk()?) as usize
        }
        _ => 0,
    };
    debug_assert_eq!(HEADER_LEN, 8);
    Some((kind, stream, u32::try_from(bytes).ok()?))
}
