//! What a program counts, for whoever asks it: the admin socket's `counters` (docs/admin.md names each).
//!
//! A driver has one set and never resets it. All run on one thread, so a counter is a plain integer; whoever shows them reads
//! what the last turn left.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;

use serde_json::{Map, Value, json};
use virtproxy_mux::{End, Reason, Stats};

use crate::driver::On;
use crate::limits::Limits;

/// One number.
#[derive(Debug, Default)]
pub struct Count(Cell<u64>);

impl Count {
    /// One more.
    pub fn inc(&self) {
        self.add(1);
    }

    /// So many more.
    pub fn add(&self, n: u64) {
        self.0.set(self.0.get().wrapping_add(n));
    }

    /// What it is.
    pub fn get(&self) -> u64 {
        self.0.get()
    }

    pub(crate) fn set(&self, n: usize) {
        self.0.set(u64::try_from(n).unwrap_or(u64::MAX));
    }

    fn show(&self) -> Value {
        self.get().into()
    }
}

/// A quota: how much of it is in use, and how often it held something up.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Quota {
    pub limit: Count,
    pub now: Count,
    pub reached: Count,
}

impl Quota {
    fn of(limit: u64) -> Self {
        Quota {
            limit: Count(Cell::new(limit)),
            ..Quota::default()
        }
    }

    /// With what is in use.
    fn show(&self) -> Value {
        json!({"limit": self.limit.get(), "now": self.now.get(), "reached": self.reached.get()})
    }

    /// Of a rate, or of each stream: nothing is in use of it as a whole.
    fn show_each(&self) -> Value {
        json!({"limit": self.limit.get(), "reached": self.reached.get()})
    }
}

/// The quotas, by the names of their flags.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "docs/limits.md tells what each is")]
pub struct Quotas {
    pub streams: Quota,
    pub connecting: Quota,
    pub open_rate: Quota,
    pub reset_rate: Quota,
    pub stream_buffer: Quota,
    pub buffer: Quota,
    pub waiting: Quota,
}

/// A number for each member of a small set.
#[derive(Debug)]
pub struct Table<const N: usize>([Count; N]);

impl<const N: usize> Default for Table<N> {
    fn default() -> Self {
        Table([const { Count(Cell::new(0)) }; N])
    }
}

impl<const N: usize> Table<N> {
    fn show(&self, names: [&str; N]) -> Value {
        let pairs = names.into_iter().zip(&self.0);
        pairs
            .map(|(name, count)| (name.to_owned(), count.show()))
            .collect::<Map<_, _>>()
            .into()
    }

    /// All of them together.
    pub fn total(&self) -> u64 {
        self.0.iter().map(Count::get).sum()
    }
}

const REASONS: [&str; 10] = [
    "other",
    "no_such_service",
    "target_refused",
    "target_unreachable",
    "timeout",
    "limit",
    "shutting_down",
    "connection_broken",
    "cancelled",
    "protocol_error",
];

/// A number for each reason of the wire.
pub type Reasons = Table<{ REASONS.len() }>;

impl Reasons {
    /// The one for `reason`: those that this version does not know share one.
    pub fn of(&self, reason: Reason) -> &Count {
        let at = match reason {
            Reason::Other(_) => 0,
            known => usize::from(known.code()),
        };
        self.0.get(at).unwrap_or(&self.0[0])
    }
}

/// A number for everything that a stall waits for.
pub type Stalls = Table<{ On::ALL.len() }>;

impl Stalls {
    pub(crate) fn of(&self, on: On) -> &Count {
        &self.0[on as usize]
    }
}

/// How a stream ended. What is displayed is for the log.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ended<'a> {
    /// Both directions, in order.
    Finished,
    /// Refused here, which no local socket ever saw.
    Refused(Reason, &'a str),
    RefusedByPeer(Reason, &'a str),
    Reset(Reason, &'a str),
    ResetByPeer(Reason, &'a str),
    /// With the link or the session.
    CutOff(&'a str),
}

impl fmt::Display for Ended<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, reason, text) = match self {
            Ended::Finished => return f.write_str("both directions ended"),
            Ended::CutOff(why) => return f.write_str(why),
            Ended::Refused(reason, text) => ("refused", reason, text),
            Ended::RefusedByPeer(reason, text) => ("refused by the other end", reason, text),
            Ended::Reset(reason, text) => ("reset", reason, text),
            Ended::ResetByPeer(reason, text) => ("reset by the other end", reason, text),
        };
        write!(f, "{what}: {reason}")?;
        if !text.is_empty() {
            write!(f, ": {text}")?;
        }
        Ok(())
    }
}

/// How streams ended, and how many.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Ends {
    pub finished: Count,
    pub cut_off: Count,
    pub refused: Reasons,
    pub refused_by_peer: Reasons,
    pub reset: Reasons,
    pub reset_by_peer: Reasons,
}

/// How sessions ended, and how many.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Sessions {
    pub established: Count,
    pub link_down: Count,
    pub peer_restarted: Count,
    pub peer_aborted: Count,
    pub damaged: Count,
    pub violated: Count,
}

/// What a driver counts.
#[derive(Debug, Default)]
pub struct Counters {
    /// Links of the channel that came up.
    pub links: Count,
    /// Whether there is one now (1 or 0), and whether a session is established over it.
    pub up: Count,
    /// See [`Counters::up`].
    pub established: Count,
    /// Sessions, and how they ended.
    pub sessions: Sessions,
    /// Times that the other end gave no sign of life when it was asked for one.
    pub silences: Count,
    /// Streams that are open now, or being opened.
    pub streams: Count,
    /// Streams that this end opened for a client, over all time.
    pub opened: Count,
    /// Streams that the other end asked for, over all time.
    pub asked: Count,
    /// How they ended.
    pub ends: Ends,
    /// Clients that were turned away before they had a stream.
    pub clients_refused: Count,
    /// Bytes of data sent to the other end.
    pub data_sent: Count,
    /// Bytes of data received from it.
    pub data_received: Count,
    /// Bytes of frames put into the channel.
    pub link_sent: Count,
    /// Bytes taken from the channel.
    pub link_received: Count,
    /// The quotas.
    pub limits: Quotas,
    /// What does not move now, by what it waits for.
    pub stalled: Stalls,
    /// The same, over all time.
    pub stalls: Stalls,
    /// Of the sessions before the present one.
    past: Cell<Stats>,
}

impl Counters {
    pub(crate) fn new(limits: &Limits, max_waiting: usize) -> Self {
        let counters = Counters {
            limits: Quotas {
                streams: Quota::of(limits.max_streams.into()),
                connecting: Quota::of(limits.max_connecting.into()),
                open_rate: Quota::of(limits.max_open_rate.into()),
                reset_rate: Quota::of(limits.max_reset_rate.into()),
                buffer: Quota::of(limits.max_buffer),
                ..Quotas::default()
            },
            ..Counters::default()
        };
        counters.limits.waiting.limit.set(max_waiting);
        counters
    }

    /// A stream ended.
    pub(crate) fn ended(&self, how: Ended<'_>) {
        let ends = &self.ends;
        match how {
            Ended::Finished => &ends.finished,
            Ended::CutOff(_) => &ends.cut_off,
            Ended::Refused(reason, _) => ends.refused.of(reason),
            Ended::RefusedByPeer(reason, _) => ends.refused_by_peer.of(reason),
            Ended::Reset(reason, _) => ends.reset.of(reason),
            Ended::ResetByPeer(reason, _) => ends.reset_by_peer.of(reason),
        }
        .inc();
    }

    /// A session ended by what arrived.
    pub(crate) fn session_ended(&self, end: &End) {
        match end {
            End::PeerRestarted => &self.sessions.peer_restarted,
            End::PeerAborted(_) => &self.sessions.peer_aborted,
            End::Damaged => &self.sessions.damaged,
            End::Violation(_) => &self.sessions.violated,
        }
        .inc();
    }

    /// Where the present session stands.
    pub(crate) fn session(&self, stats: Stats) {
        let all = sum(self.past.get(), stats);
        self.data_sent.0.set(all.data_sent);
        self.data_received.0.set(all.data_received);
        let short = all.memory_refused + all.growth_denied;
        self.limits.buffer.reached.0.set(short);
    }

    /// The session that stood there is thrown away.
    pub(crate) fn session_over(&self, stats: Stats) {
        self.session(stats);
        self.past.set(sum(self.past.get(), stats));
    }

    /// All of them, as the admin socket shows them.
    pub fn show(&self) -> Value {
        let (sessions, ends, limits) = (&self.sessions, &self.ends, &self.limits);
        let reasons = |table: &Reasons| table.show(REASONS);
        let stalls = |table: &Stalls| table.show(On::ALL.map(On::name));
        json!({
            "up": self.up.get() > 0,
            "established": self.established.get() > 0,
            "links": self.links.show(),
            "silences": self.silences.show(),
            "sessions": {
                "established": sessions.established.show(),
                "link_down": sessions.link_down.show(),
                "peer_restarted": sessions.peer_restarted.show(),
                "peer_aborted": sessions.peer_aborted.show(),
                "damaged": sessions.damaged.show(),
                "violated": sessions.violated.show(),
            },
            "streams": {
                "open": self.streams.show(),
                "opened": self.opened.show(),
                "asked": self.asked.show(),
                "finished": ends.finished.show(),
                "cut_off": ends.cut_off.show(),
                "refused": reasons(&ends.refused),
                "refused_by_peer": reasons(&ends.refused_by_peer),
                "reset": reasons(&ends.reset),
                "reset_by_peer": reasons(&ends.reset_by_peer),
            },
            "clients_refused": self.clients_refused.show(),
            "bytes": {
                "data_sent": self.data_sent.show(),
                "data_received": self.data_received.show(),
                "link_sent": self.link_sent.show(),
                "link_received": self.link_received.show(),
            },
            "limits": {
                "streams": limits.streams.show(),
                "connecting": limits.connecting.show(),
                "open_rate": limits.open_rate.show_each(),
                "reset_rate": limits.reset_rate.show_each(),
                "stream_buffer": limits.stream_buffer.show_each(),
                "buffer": limits.buffer.show(),
                "waiting": limits.waiting.show(),
            },
            "stalls": {"now": stalls(&self.stalled), "total": stalls(&self.stalls)},
        })
    }
}

fn sum(a: Stats, b: Stats) -> Stats {
    Stats {
        skipped: a.skipped + b.skipped,
        late_frames: a.late_frames + b.late_frames,
        data_sent: a.data_sent + b.data_sent,
        data_received: a.data_received + b.data_received,
        memory_refused: a.memory_refused + b.memory_refused,
        growth_denied: a.growth_denied + b.growth_denied,
    }
}

/// The counters of all channels of a program, by their names.
#[derive(Clone, Debug, Default)]
pub struct Channels(Rc<RefCell<Vec<Named>>>);

#[derive(Debug)]
struct Named {
    channel: String,
    counters: Rc<Counters>,
}

impl Channels {
    /// One more.
    pub fn add(&self, channel: String, counters: Rc<Counters>) {
        self.0.borrow_mut().push(Named { channel, counters });
    }

    /// All of them, in the order of their `-c`.
    pub fn show(&self) -> Value {
        let show = |Named { channel, counters }: &Named| {
            let mut shown = counters.show();
            shown["channel"] = channel.clone().into();
            shown
        };
        self.0.borrow().iter().map(show).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_own_counter() {
        let reasons = Reasons::default();
        for code in 0..20 {
            reasons.of(Reason::from_code(code)).inc();
        }
        let shown = reasons.show(REASONS);
        assert_eq!(shown["other"], 11, "{shown}");
        for name in &REASONS[1..] {
            assert_eq!(shown[*name], 1, "{name}: {shown}");
        }
        reasons.of(Reason::Limit).inc();
        assert_eq!(reasons.show(REASONS)["limit"], 2);
    }

    #[test]
    fn what_past_sessions_moved_stays_counted() {
        let counters = Counters::default();
        let moved = |data_sent| Stats {
            data_sent,
            ..Stats::default()
        };
        counters.session_over(moved(5));
        counters.session(moved(2));
        counters.session(moved(3));
        assert_eq!(counters.data_sent.get(), 8);
    }
}
