//! Where two sessions, their streams and the channel between them stand, and whether that adds up.

use std::fmt::Write as _;

use virtproxy_mux::frame::{PEER_OPENED, kind};
use virtproxy_mux::session::CreditView;
use virtproxy_mux::sim::Side;

use super::bounds::{Allowed, Bounds, Reads};
use super::end::{End, Local, Phase, Wrong, counts};
use super::pipe::{Pipe, Role};
use crate::world;

/// How a stream was over at one end.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(super) enum Ending {
    /// Both halves ended, all bytes read.
    Whole,
    Refused,
    Reset,
    SessionOver,
}

/// What is true of a stream, whatever the ends believe.
#[derive(Clone, Debug, Default, Hash)]
pub(super) struct Record {
    /// The opener's session, once it has opened it.
    pub(super) epoch: Option<u64>,
    /// Its number in the opener's frames.
    pub(super) wire: Option<u32>,
    pub(super) asked: bool,
    /// Bytes each role has sent, whether it has ended, and how it was over there.
    pub(super) sent: [u32; 2],
    pub(super) finished: [bool; 2],
    pub(super) ended: [Option<Ending>; 2],
    /// Somebody refused or reset it.
    pub(super) cut_short: bool,
}

/// A state of the world.
#[derive(Clone, Hash)]
pub struct Scene {
    pub(super) ends: [End; 2],
    /// From A, and from B.
    pub(super) pipes: [Pipe; 2],
    pub(super) records: Vec<Record>,
    pub(super) left: Allowed,
    pub(super) wrong: Option<Wrong>,
}

impl Scene {
    pub(super) fn new(bounds: &Bounds) -> Self {
        Scene {
            ends: [Side::A, Side::B].map(|side| End::new(side, bounds)),
            pipes: [Pipe::default(), Pipe::default()],
            records: vec![Record::default(); bounds.streams.len()],
            left: bounds.allowed,
            wrong: None,
        }
    }

    /// Whether both ends are in one and the same session.
    pub(super) fn is_joined(&self) -> bool {
        let [a, b] = &self.ends;
        let knows =
            |one: &End, other: &End| one.session.peer().map(|peer| peer.epoch) == Some(other.epoch);
        knows(a, b) && knows(b, a)
    }

    /// Whether some end may have lost or got bytes without knowing it yet.
    pub(super) fn is_disturbed(&self) -> bool {
        self.ends.iter().any(|end| end.disturbed)
    }

    /// Whether it is known of every frame whether it has arrived.
    fn is_clear(&self) -> bool {
        self.is_joined() && !self.is_disturbed() && !self.pipes.iter().any(Pipe::is_begun)
    }

    /// Bytes that frames of a kind under way from end `from` stand for, on one wire stream.
    fn under_way(&self, from: usize, kinds: &[u8], stream: Option<u32>) -> u32 {
        let frames = self.pipes[from].frames().filter_map(counts);
        frames
            .filter(|(kind, at, _)| kinds.contains(kind) && stream.is_none_or(|it| it == *at))
            .map(|(_, _, bytes)| bytes)
            .sum()
    }

    /// Whether all credit is at one end, at the other, or under way.
    pub(super) fn is_conserved(&self) -> bool {
        !self.is_clear()
            || [(0, 1), (1, 0)].iter().all(|(from, to)| {
                let [sender, receiver] = [&self.ends[*from], &self.ends[*to]];
                let [mine, theirs] = [sender, receiver].map(|end| end.session.session_credit());
                let data = self.under_way(*from, &[kind::DATA], None);
                let grants = self.under_way(*to, &[kind::SESSION_CREDIT], None);
                theirs.granted == mine.send + data + grants
                    && (0u8..)
                        .zip(&self.records)
                        .all(|(key, record)| self.is_stream_conserved(key, record, *from, *to))
            })
    }

    fn is_stream_conserved(&self, key: u8, record: &Record, from: usize, to: usize) -> bool {
        let (Some(one), Some(other)) = (
            self.ends[from].locals.get(&key),
            self.ends[to].locals.get(&key),
        ) else {
            return true;
        };
        let open = one.phase == Phase::Open && other.phase == Phase::Open;
        if !open || one.finished {
            return true;
        }
        let wire = record.wire.unwrap_or(0);
        let sent_as = |role: Role| Some(if role == 0 { wire } else { wire ^ PEER_OPENED });
        let data = self.under_way(from, &[kind::DATA], sent_as(one.role));
        let grants = self.under_way(to, &[kind::CREDIT], sent_as(other.role));
        let credit = |end: usize, local: &Local| self.ends[end].session.stream_credit(local.id);
        match (credit(from, one), credit(to, other)) {
            (Some(mine), Some(theirs)) => theirs.granted == mine.send + data + grants,
            _ => false,
        }
    }

    /// Whether some stream could send if it had credit.
    pub(super) fn is_dry(&self, bounds: &Bounds) -> bool {
        self.ends.iter().any(|end| {
            end.locals.iter().any(|(key, local)| {
                let key = usize::from(*key);
                let left =
                    self.records[key].sent[local.role] < bounds.streams[key].sends[local.role];
                let credit = end.session.stream_credit(local.id).unwrap_or_default();
                left && local.phase == Phase::Open && credit.send == 0
            })
        })
    }

    /// Nothing is under way or due: whether all is done that can be.
    pub(super) fn is_done(&self, bounds: &Bounds) -> Result<(), Wrong> {
        if !self.pipes.iter().all(Pipe::is_empty) {
            return Err("each waits for the other to take what it sends".to_owned());
        }
        if !self.is_joined() || self.is_disturbed() {
            return Err("the ends do not find each other".to_owned());
        }
        for (one, other) in [(0, 1), (1, 0)] {
            let [mine, theirs] = [one, other].map(|end| self.ends[end].session.session_credit());
            if mine.send + theirs.returnable != bounds.session_window * super::bounds::UNIT {
                return Err("the session's window has shrunk".to_owned());
            }
        }
        for (key, record) in (0u8..).zip(&self.records) {
            self.is_stream_done(key, record, bounds)
                .map_err(|wrong| format!("stream {key}: {wrong}"))?;
        }
        Ok(())
    }

    fn is_stream_done(&self, key: u8, record: &Record, bounds: &Bounds) -> Result<(), Wrong> {
        let stream = bounds.streams[usize::from(key)];
        if record.epoch.is_none() {
            return Err("it was never opened".to_owned());
        }
        let sessions_ended = bounds.allowed.restarts > self.left.restarts
            || bounds.allowed.faults > self.left.faults;
        let asked = record.asked || record.ended[0].is_some();
        if !asked {
            return Err("nobody was asked for it".to_owned());
        }
        for role in 0..2 {
            match record.ended[role] {
                Some(Ending::Whole) => continue,
                Some(Ending::Refused | Ending::Reset) if record.cut_short => continue,
                Some(Ending::SessionOver) if sessions_ended => continue,
                Some(ending) => return Err(format!("it ended without a cause: {ending:?}")),
                None if role == 1 && !record.asked => continue,
                None => {}
            }
            let end = if role == 0 {
                stream.opener
            } else {
                stream.opener.other()
            };
            let (here, there) = (&self.ends[end as usize], &self.ends[end.other() as usize]);
            let (Some(local), Some(across)) = (here.locals.get(&key), there.locals.get(&key))
            else {
                return Err("one end alone knows it".to_owned());
            };
            let credit = |end: &End, local: &Local| {
                let credit: Option<CreditView> = end.session.stream_credit(local.id);
                credit.unwrap_or_default()
            };
            // It may only be that somebody does not read.
            let unread = |role: Role, held: u32| held > 0 && stream.reads[role] == Reads::Never;
            let sends =
                local.finished || (credit(here, local).send == 0 && unread(1 - role, across.held));
            let receives = local.peer_finished
                || (credit(there, across).send == 0 && unread(role, local.held));
            if !(sends && receives) {
                return Err(format!("{:?} waits in vain", end));
            }
            if local.held > 0 && stream.reads[role] != Reads::Never {
                return Err("bytes were not read".to_owned());
            }
        }
        Ok(())
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
        let mut text = String::new();
        for (end, pipe) in self.ends.iter().zip(&self.pipes) {
            let credit = end.session.session_credit();
            let under_way = pipe.frames().count();
            _ = write!(text, "{:?}: may send {}", end.side, credit.send);
            for (key, local) in &end.locals {
                let credit = end.session.stream_credit(local.id).unwrap_or_default();
                let (phase, held, send) = (local.phase, local.held, credit.send);
                _ = write!(text, ", {key} {phase:?} holds {held} may send {send}");
            }
            _ = write!(text, ", {under_way} frames under way; ");
        }
        text
    }
}
