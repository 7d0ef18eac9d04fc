//! Whose bytes are those in the ring? Pure bookkeeping, no I/O.
//!
//! # Theory of operation
//!
//! The guest opens and closes its port with control messages, and it waits for each of them to be taken
//! before it goes on. So the ring's position at that moment is an exact boundary: what the guest wrote before
//! it belongs to the session that it closes, what it writes later to the next. Bytes may lie in the ring long
//! after the session ended, and sessions may come and go without the host looking; each keeps its own, and no
//! two are ever merged.
//!
//! At the front is the session that the next bytes of the ring belong to. Each session has an owner:
//!
//! ```text
//!             claim                    release
//!   Nobody ----------> Link(the one) ----------> Gone  (its bytes are discarded)
//!      |                                          ^
//!      '------------------------------------------'  too many sessions wait
//! ```
//!
//! A session that is `Gone` but not closed by the guest is *hung up*: the guest is to be told (the port's host
//! side closes) and no new session begins until it has closed its side. One that began with a process before this one is
//! `Gone` from the start, since its link died with that; it ends where the ring is then, and another one begins there.

use std::collections::VecDeque;

use super::ring::distance;

/// How many sessions may wait to be claimed. The guest hangs up on itself with one more.
const MAX_SESSIONS: usize = 64;

/// The guest's openings of one port that still matter, oldest first.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    newest: u64,
    list: VecDeque<Session>,
}

#[derive(Debug)]
struct Session {
    generation: u64,
    /// The ring position where it ended; `None` while the guest has the port open.
    end: Option<u16>,
    owner: Owner,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Nobody,
    Link,
    Gone,
}

/// How a link's session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// The guest has the port open.
    Open,
    /// The guest closed it; bytes up to here are still the link's.
    Closed { end: u16 },
    /// Nothing more will come.
    Over,
}

impl Sessions {
    /// The guest opened the port.
    pub(super) fn open(&mut self) {
        self.newest += 1;
        let owner = if self.list.len() < MAX_SESSIONS {
            Owner::Nobody
        } else {
            Owner::Gone
        };
        self.list.push_back(Session {
            generation: self.newest,
            end: None,
            owner,
        });
    }

    /// The guest opened the port to a process before this one, or before it slept.
    pub(super) fn open_before(&mut self) {
        self.open();
        if let Some(last) = self.list.back_mut() {
            last.owner = Owner::Gone;
        }
    }

    /// The guest closed the port, having made chains available up to `end`; `next` is the next to be taken.
    pub(super) fn close(&mut self, end: u16, next: u16) {
        let start = match self.list.len().checked_sub(2) {
            Some(before) => self.list[before].end.unwrap_or(next),
            None => next,
        };
        let Some(last) = self.list.back_mut().filter(|last| last.end.is_none()) else {
            return;
        };
        last.end = Some(end);
        if last.owner != Owner::Link && start == end {
            // Nobody saw it and it left nothing behind.
            self.list.pop_back();
            return;
        }
        // Two in a row whose bytes nobody wants are as good as one; this keeps the list short.
        let both_gone = self
            .list
            .iter()
            .rev()
            .take(2)
            .filter(|s| s.owner == Owner::Gone);
        if both_gone.count() == 2 {
            self.list.pop_back();
            if let Some(last) = self.list.back_mut() {
                last.end = Some(end);
            }
        }
    }

    /// Gives the session at the front to a link, if it is free.
    pub(super) fn claim(&mut self) -> Option<u64> {
        let front = self
            .list
            .front_mut()
            .filter(|front| front.owner == Owner::Nobody)?;
        front.owner = Owner::Link;
        Some(front.generation)
    }

    /// The link is gone.
    pub(super) fn release(&mut self, generation: u64) {
        if let Some(front) = self.list.front_mut()
            && front.generation == generation
        {
            front.owner = Owner::Gone;
        }
    }

    /// How the link's session is.
    pub(super) fn standing(&self, generation: u64) -> Standing {
        match self.list.front() {
            Some(front) if front.generation == generation => match front.end {
                None => Standing::Open,
                Some(end) => Standing::Closed { end },
            },
            _ => Standing::Over,
        }
    }

    /// The session whose bytes are to be discarded now, if there is one.
    pub(super) fn abandoned(&self) -> Option<Standing> {
        let front = self
            .list
            .front()
            .filter(|front| front.owner == Owner::Gone)?;
        Some(self.standing(front.generation))
    }

    /// All bytes of the abandoned session are discarded and it is closed: on to the next.
    pub(super) fn forget_abandoned(&mut self) {
        if matches!(self.abandoned(), Some(Standing::Closed { .. })) {
            self.list.pop_front();
        }
    }

    /// Whether the host's side is to look closed, until the guest has closed its own.
    pub(super) fn is_hung_up(&self) -> bool {
        self.list
            .back()
            .is_some_and(|last| last.end.is_none() && last.owner == Owner::Gone)
    }

    /// Whether the guest has the port open.
    pub(super) fn is_open(&self) -> bool {
        self.list.back().is_some_and(|last| last.end.is_none())
    }

    /// The ring starts from nothing: every session is over.
    pub(super) fn clear(&mut self) {
        self.list.clear();
    }
}

/// Chains that are still the session's, given the ring's next position and size. A driver that takes back what
/// it has made available loses it.
pub(super) fn chains_left(next: u16, end: u16, size: u16) -> u16 {
    let left = distance(next, end);
    if left <= size { left } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_opening_is_a_session_of_its_own_with_exact_ends() {
        let mut sessions = Sessions::default();
        sessions.open();
        let first = sessions.claim().unwrap();
        sessions.close(5, 0);
        sessions.open();
        assert_eq!(sessions.standing(first), Standing::Closed { end: 5 });
        assert_eq!(
            sessions.claim(),
            None,
            "the first still has bytes in the ring"
        );
        sessions.release(first);
        assert_eq!(sessions.abandoned(), Some(Standing::Closed { end: 5 }));
        assert!(!sessions.is_hung_up(), "the second is not concerned");
        sessions.forget_abandoned();
        let second = sessions.claim().unwrap();
        assert_ne!(first, second);
        assert_eq!(sessions.standing(first), Standing::Over);
        assert_eq!(sessions.standing(second), Standing::Open);
    }

    #[test]
    fn a_link_that_ends_first_hangs_up_until_the_guest_closes() {
        let mut sessions = Sessions::default();
        sessions.open();
        let link = sessions.claim().unwrap();
        sessions.release(link);
        assert!(sessions.is_hung_up());
        assert_eq!(sessions.claim(), None);
        sessions.forget_abandoned();
        assert!(sessions.is_hung_up(), "an open session is not forgotten");
        sessions.close(9, 7);
        assert!(!sessions.is_hung_up());
        sessions.open();
        assert_eq!(sessions.claim(), None, "chains 7 and 8 are in front");
        sessions.forget_abandoned();
        assert!(sessions.claim().is_some());
    }

    #[test]
    fn unseen_sessions_keep_their_bytes_and_leave_no_trace_without() {
        let mut sessions = Sessions::default();
        for _ in 0..10_000 {
            sessions.open();
            sessions.close(3, 3);
        }
        assert!(sessions.list.is_empty());
        sessions.open();
        sessions.close(4, 3);
        sessions.open();
        sessions.close(4, 3);
        let link = sessions.claim().unwrap();
        assert_eq!(sessions.standing(link), Standing::Closed { end: 4 });
        assert_eq!(sessions.list.len(), 1);
    }

    #[test]
    fn too_many_waiting_sessions_are_hung_up() {
        let mut sessions = Sessions::default();
        for end in 1..10_000 {
            sessions.open();
            assert_eq!(sessions.is_hung_up(), usize::from(end) > MAX_SESSIONS);
            sessions.close(end, 0);
            // A guest may lie about its positions; the list must not grow for it.
            assert!(sessions.list.len() <= MAX_SESSIONS + 1);
        }
    }

    #[test]
    fn positions_wrap() {
        assert_eq!(chains_left(65_530, 4, 1024), 10);
        assert_eq!(chains_left(4, 65_530, 1024), 0, "taken back");
    }
}
