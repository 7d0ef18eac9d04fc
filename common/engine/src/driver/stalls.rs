//! The stall watchdog: tells of what has work and makes no progress, and of whom it waits for.
//!
//! # Theory of operation
//!
//! Nothing is noted when bytes move but their number. A few times within the patience all that could move is looked at;
//! what has work, and has moved nothing since it was first seen so, for as long as the patience, is told of once, and
//! again when it goes on. What idles has no work and is not kept. Whoever has nothing to do is not woken for this, except
//! while there are streams.
//!
//! ```text
//!   client --[socket]--> stream --[credit]--> link --[room]--> the other end     Credit, Answer; SessionCredit, Room
//!   client <-[reads?]--- backlog <----------- link <-[rest]--- the other end     Client, Target; Rest
//! ```

use std::collections::HashMap;
use std::fmt;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};
use virtproxy_mux::{StreamId, Time};

use super::Driver;
use super::local::{Local, Phase};
use crate::log_limit::LogLimit;

/// How often all is looked at within the patience.
const LOOKS: u32 = 4;

/// What something that does not move waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// The local socket takes no bytes: its other side does not read.
    Client,
    /// A target has not been connected to.
    Target,
    /// The other end has not answered the request to open a stream.
    Answer,
    /// The other end gives a stream no credit: what is at its other side does not read.
    Credit,
    /// The other end gives the session no credit: it takes nothing from the channel.
    SessionCredit,
    /// The channel takes no bytes: a guest gives no buffers.
    Room,
    /// The rest of a frame does not come.
    Rest,
}

impl On {
    /// All there are, in order.
    pub const ALL: [On; 7] = [
        On::Client,
        On::Target,
        On::Answer,
        On::Credit,
        On::SessionCredit,
        On::Room,
        On::Rest,
    ];

    /// Its name among the counters.
    pub fn name(self) -> &'static str {
        match self {
            On::Client => "client",
            On::Target => "target",
            On::Answer => "answer",
            On::Credit => "credit",
            On::SessionCredit => "session_credit",
            On::Room => "room",
            On::Rest => "rest",
        }
    }

    /// Whether a program that takes its time is enough to cause it.
    fn is_usual(self) -> bool {
        matches!(self, On::Client | On::Credit)
    }
}

impl fmt::Display for On {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            On::Client => "the program at its local socket does not read",
            On::Target => "its target does not answer",
            On::Answer => "the other end does not answer the request to open it",
            On::Credit => "the other end gives no credit: the program at its side does not read",
            On::SessionCredit => "the other end gives no credit: it takes nothing from the channel",
            On::Room => "the channel takes nothing: the other end does not read it",
            On::Rest => "the rest of a frame does not come from the other end",
        })
    }
}

/// What may stall.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum What {
    ToSocket(StreamId),
    FromSocket(StreamId),
    ToPeer,
    FromPeer,
}

/// Something that has work.
#[derive(Clone, Copy, Debug)]
struct Work {
    what: What,
    on: On,
    /// Changes with every byte that it moves.
    moved: u64,
}

struct Seen {
    work: Work,
    since: Time,
    told: bool,
}

/// What is to be told of.
#[derive(Debug, PartialEq, Eq)]
enum News {
    Stuck(What, On, Time),
    /// It moves again, or has no more work, or is gone.
    Over(What, Time),
}

/// See the [module](self).
pub(super) struct Watchdog {
    /// In microseconds; 0: nothing is watched.
    patience: Time,
    next: Time,
    seen: HashMap<What, Seen>,
    log: LogLimit,
}

impl Watchdog {
    pub(super) fn new(patience: Duration) -> Self {
        Watchdog {
            patience: Time::try_from(patience.as_micros()).unwrap_or(Time::MAX),
            next: 0,
            seen: HashMap::new(),
            log: LogLimit::default(),
        }
    }

    /// Whether it is time to look; if so, it is a while until it is again.
    fn is_due(&mut self, now: Time) -> bool {
        let due = self.patience > 0 && now >= self.next;
        if due {
            self.next = now + (self.patience / Time::from(LOOKS)).max(1000);
        }
        due
    }

    fn look(&mut self, now: Time, all: impl Iterator<Item = Work>) -> Vec<News> {
        let mut news = Vec::new();
        let mut before = std::mem::take(&mut self.seen);
        for work in all {
            let mut seen = Seen {
                work,
                since: now,
                told: false,
            };
            match before.remove(&work.what) {
                Some(old) if old.work.moved == work.moved => {
                    (seen.since, seen.told) = (old.since, old.told);
                }
                Some(old) if old.told => news.push(News::Over(work.what, now - old.since)),
                _ => {}
            }
            let waited = now - seen.since;
            if !seen.told && waited >= self.patience {
                seen.told = true;
                news.push(News::Stuck(work.what, work.on, waited));
            }
            self.seen.insert(work.what, seen);
        }
        let over = before.into_values().filter(|seen| seen.told);
        news.extend(over.map(|seen| News::Over(seen.work.what, now - seen.since)));
        news
    }

    /// How many are stuck on this.
    fn stuck(&self, on: On) -> usize {
        let told = self.seen.values().filter(|seen| seen.told);
        told.filter(|seen| seen.work.on == on).count()
    }
}

impl Driver {
    /// When to look whether anything is stuck, if anything could be.
    pub(super) fn stall_deadline(&self) -> Option<Instant> {
        let idle = self.locals.is_empty()
            && self.watchdog.seen.is_empty()
            && !self.session.wants_room()
            && !self.session.is_mid_frame();
        let watched = self.watchdog.patience > 0 && !idle;
        watched.then(|| self.started + Duration::from_micros(self.watchdog.next))
    }

    /// Looks whether anything is stuck, if it is time.
    pub(super) fn look_for_stalls(&mut self) {
        let now = self.now();
        if self.watchdog.is_due(now) {
            let work: Vec<_> = self.work().collect();
            let news = self.watchdog.look(now, work.into_iter());
            self.tell(news);
        }
    }

    /// The session is over, and with it what was stuck in it.
    pub(super) fn forget_stalls(&mut self) {
        let news = self.watchdog.look(self.now(), std::iter::empty());
        self.tell(news);
    }

    fn work(&self) -> impl Iterator<Item = Work> {
        let counters = &self.counters;
        let broke = self.session.is_established() && self.session.session_credit().send == 0;
        let to_peer = if broke {
            Some((On::SessionCredit, &counters.data_sent))
        } else {
            let full = self.session.wants_room();
            full.then_some((On::Room, &counters.link_sent))
        };
        let to_peer = to_peer.map(|(on, moved)| Work {
            what: What::ToPeer,
            on,
            moved: moved.get(),
        });
        let from_peer = self.session.is_mid_frame().then(|| Work {
            what: What::FromPeer,
            on: On::Rest,
            moved: counters.link_received.get(),
        });
        let streams = self.locals.iter().filter_map(|(_, local)| {
            let stream = local.stream?;
            Some(self.work_of(local, stream))
        });
        let link = to_peer.into_iter().chain(from_peer);
        link.chain(streams.flatten().flatten())
    }

    /// What a stream has to do, each way.
    fn work_of(&self, local: &Local, stream: StreamId) -> [Option<Work>; 2] {
        let (to, from) = (What::ToSocket(stream), What::FromSocket(stream));
        let [taken, given] = local.moved;
        let work = |what, on, moved| Some(Work { what, on, moved });
        match local.phase {
            Phase::Waiting(_) => [None, None],
            Phase::Opening => [work(from, On::Answer, 0), None],
            Phase::Connecting(_) => [work(to, On::Target, 0), None],
            Phase::Open => {
                let credit = self.session.stream_credit(stream);
                let broke = credit.is_some_and(|credit| credit.send == 0);
                let full = !local.backlog.is_empty();
                [
                    full.then(|| work(to, On::Client, taken)).flatten(),
                    (broke && local.has_bytes())
                        .then(|| work(from, On::Credit, given))
                        .flatten(),
                ]
            }
        }
    }

    fn tell(&mut self, news: Vec<News>) {
        for item in news {
            match item {
                News::Stuck(what, on, waited) => {
                    self.counters.stalls.of(on).inc();
                    let (who, waited) = (self.who(what), Duration::from_micros(waited));
                    match self.watchdog.log.pass(Instant::now()) {
                        Some(more) if on.is_usual() => {
                            info!("{who}: nothing has moved for {waited:.1?}: {on}{more}");
                        }
                        Some(more) => {
                            warn!("{who}: nothing has moved for {waited:.1?}: {on}{more}");
                        }
                        None => debug!("{who}: nothing has moved for {waited:.1?}: {on}"),
                    }
                }
                News::Over(what, waited) => {
                    let (who, waited) = (self.who(what), Duration::from_micros(waited));
                    match self.watchdog.log.pass(Instant::now()) {
                        Some(more) => info!("{who}: no longer stuck, after {waited:.1?}{more}"),
                        None => debug!("{who}: no longer stuck, after {waited:.1?}"),
                    }
                }
            }
        }
        for on in On::ALL {
            self.counters.stalled.of(on).set(self.watchdog.stuck(on));
        }
    }

    fn who(&self, what: What) -> String {
        match what {
            What::ToSocket(stream) | What::FromSocket(stream) => {
                let key = self.key_of(stream);
                let service = key.map_or("ended", |key| &*self.locals[key].service);
                format!("stream {stream} ({service})")
            }
            What::ToPeer => "the way to the other end".to_owned(),
            What::FromPeer => "the way from the other end".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Time = 1_000_000;

    fn watchdog() -> Watchdog {
        Watchdog::new(Duration::from_secs(30))
    }

    fn room(moved: u64) -> Work {
        Work {
            what: What::ToPeer,
            on: On::Room,
            moved,
        }
    }

    #[test]
    fn it_looks_a_few_times_within_the_patience_and_never_without_any() {
        let mut watchdog = watchdog();
        let looks = (0..=30).filter(|n| watchdog.is_due(n * SECOND)).count();
        assert_eq!(looks, 4);
        assert!(!Watchdog::new(Duration::ZERO).is_due(Time::MAX));
    }

    #[test]
    fn what_does_not_move_is_told_of_once_and_again_when_it_goes_on() {
        let mut watchdog = watchdog();
        for second in 0..30 {
            assert_eq!(watchdog.look(second * SECOND, [room(7)].into_iter()), []);
        }
        let stuck = News::Stuck(What::ToPeer, On::Room, 30 * SECOND);
        assert_eq!(watchdog.look(30 * SECOND, [room(7)].into_iter()), [stuck]);
        assert_eq!(watchdog.stuck(On::Room), 1);
        assert_eq!(watchdog.look(90 * SECOND, [room(7)].into_iter()), []);
        let over = || News::Over(What::ToPeer, 100 * SECOND);
        assert_eq!(watchdog.look(100 * SECOND, [room(8)].into_iter()), [over()]);
        assert_eq!(watchdog.stuck(On::Room), 0);
        assert_eq!(watchdog.look(129 * SECOND, [room(8)].into_iter()), []);
        assert_eq!(watchdog.look(130 * SECOND, [room(8)].into_iter()).len(), 1);
        assert_eq!(watchdog.look(200 * SECOND, std::iter::empty()), [over()]);
        assert!(watchdog.seen.is_empty());
    }

    #[test]
    fn what_moves_or_rests_in_between_is_not_stuck() {
        let mut watchdog = watchdog();
        for second in 0..100 {
            assert_eq!(
                watchdog.look(second * SECOND, [room(second / 20)].into_iter()),
                []
            );
        }
        for second in 100..200 {
            let work = (second % 20 > 0).then(|| room(7));
            assert_eq!(watchdog.look(second * SECOND, work.into_iter()), []);
        }
    }

    #[test]
    fn each_name_stands_at_its_place() {
        for (at, on) in On::ALL.into_iter().enumerate() {
            assert_eq!(on as usize, at, "{on:?}");
        }
    }
}
