//! One direction of the channel between two sessions: frames under way.
//!
//! The payload of a DATA frame never goes through a [`Session`](virtproxy_mux::Session), which only learns its length. So it
//! is kept as what it is (bytes of one stream from one place on), not as bytes: that makes states small, and a byte
//! out of place impossible to miss. Where a session does look at such bytes, because it takes them for something else, it
//! gets some.

use std::collections::VecDeque;

use virtproxy_mux::frame::MAX_CONTROL_FRAME;

/// The opener's part of a stream, or the acceptor's.
pub(super) type Role = usize;

/// Bytes of one kind.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub(super) enum Run {
    /// These.
    Bytes(Vec<u8>),
    /// What `role` sends on stream `key`, from `at` on.
    Data {
        key: u8,
        role: Role,
        at: u32,
        len: u32,
    },
}

impl Run {
    pub(super) fn len(&self) -> usize {
        match self {
            Run::Bytes(bytes) => bytes.len(),
            Run::Data { len, .. } => *len as usize,
        }
    }

    /// Takes its first `n` bytes away.
    fn split(&mut self, n: usize) -> Run {
        match self {
            Run::Bytes(bytes) => {
                let rest = bytes.split_off(n);
                Run::Bytes(std::mem::replace(bytes, rest))
            }
            Run::Data { key, role, at, len } => {
                let cut = u32::try_from(n).unwrap_or(*len);
                let first = Run::Data {
                    key: *key,
                    role: *role,
                    at: *at,
                    len: cut,
                };
                (*at, *len) = (*at + cut, *len - cut);
                first
            }
        }
    }
}

/// Bytes in a row: a frame, or what is left of one.
#[derive(Clone, Debug, Default, Hash, PartialEq, Eq)]
pub(super) struct Runs(VecDeque<Run>);

impl Runs {
    pub(super) fn of(runs: impl IntoIterator<Item = Run>) -> Self {
        Runs(runs.into_iter().filter(|run| run.len() > 0).collect())
    }

    pub(super) fn len(&self) -> usize {
        self.0.iter().map(Run::len).sum()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Run> {
        self.0.iter()
    }

    /// Takes the first `n` bytes away.
    pub(super) fn take(&mut self, n: usize) -> Runs {
        let (mut taken, mut left) = (VecDeque::new(), n);
        while left > 0
            && let Some(mut run) = self.0.pop_front()
        {
            if run.len() > left {
                taken.push_back(run.split(left));
                self.0.push_front(run);
                break;
            }
            left -= run.len();
            taken.push_back(run);
        }
        Runs(taken)
    }

    pub(super) fn append(&mut self, more: Runs) {
        self.0.extend(more.0);
    }

    /// The first bytes, as somebody sees them who takes them for bytes.
    pub(super) fn first(&self) -> Vec<u8> {
        match self.0.front() {
            Some(Run::Bytes(bytes)) => bytes.clone(),
            Some(Run::Data { key, len, .. }) => vec![b'a' + key; *len as usize],
            None => Vec::new(),
        }
    }

    /// The last bytes, likewise.
    pub(super) fn last<const N: usize>(&self) -> [u8; N] {
        let mut tail = self.clone();
        tail.take(self.len() - N);
        let bytes = tail
            .0
            .iter()
            .flat_map(|run| Runs::of([run.clone()]).first());
        let mut last = [0; N];
        last.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        last
    }

    /// The header that these begin with, if they do: type and stream, and the bytes that go with it.
    pub(super) fn frame(&self) -> Option<(u8, u32, &[u8])> {
        let Some(Run::Bytes(bytes)) = self.0.front() else {
            return None;
        };
        let (head, rest) = bytes.split_first_chunk::<8>()?;
        let [kind, _, _, _, stream @ ..] = *head;
        Some((kind, u32::from_le_bytes(stream), rest))
    }
}

/// What a channel that nobody watches does to the frame that it would deliver next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Loses it.
    Lose,
    /// Loses its first half.
    LoseHead,
    /// Loses its second half.
    LoseTail,
    /// Delivers it twice.
    Double,
    /// Puts some bytes before it.
    Insert,
}

impl Fault {
    pub(super) const ALL: [Fault; 5] = [
        Fault::Lose,
        Fault::LoseHead,
        Fault::LoseTail,
        Fault::Double,
        Fault::Insert,
    ];
}

#[derive(Clone, Debug, Default, Hash, PartialEq, Eq)]
pub(super) struct Pipe {
    frames: VecDeque<Runs>,
    /// A part of the first one has been delivered.
    begun: bool,
}

impl Pipe {
    /// Bytes that a driver is offered room for, where `capacity` frames may be under way: the last place is too small for
    /// data, as the end of a ring or socket buffer is.
    pub(super) fn room(&self, capacity: usize) -> usize {
        match capacity.saturating_sub(self.frames.len()) {
            0 => 0,
            1 => MAX_CONTROL_FRAME,
            _ => 1 << 20,
        }
    }

    pub(super) fn push(&mut self, frame: Runs) {
        self.frames.push_back(frame);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub(super) fn is_begun(&self) -> bool {
        self.begun
    }

    pub(super) fn frames(&self) -> impl Iterator<Item = &Runs> {
        self.frames.iter()
    }

    /// What arrives next: a frame or the rest of one.
    pub(super) fn deliver(&mut self) -> Option<Runs> {
        self.begun = false;
        self.frames.pop_front()
    }

    /// Half of that: of a header, or of what is behind it.
    pub(super) fn deliver_part(&mut self) -> Option<Runs> {
        let frame = self.frames.front_mut()?;
        let half = match (self.begun, frame.len()) {
            (_, 0..2) => return None,
            (false, _) => 5,
            (true, len) => len / 2,
        };
        self.begun = true;
        Some(frame.take(half))
    }

    /// Loses all that is under way, but what is left of a frame that has begun to arrive if those stay `whole`.
    pub(super) fn lose(&mut self, whole: bool) {
        self.frames.truncate(usize::from(whole && self.begun));
        self.begun &= whole;
    }

    pub(super) fn suffer(&mut self, fault: Fault) -> bool {
        let Some(mut frame) = self.frames.pop_front() else {
            return false;
        };
        let half = frame.len() / 2;
        match fault {
            Fault::Lose => self.begun = false,
            Fault::LoseHead => {
                frame.take(half);
                self.frames.push_front(frame);
            }
            Fault::LoseTail => self.frames.push_front(frame.take(half)),
            Fault::Double => {
                self.frames.push_front(frame.clone());
                self.frames.push_front(frame);
            }
            Fault::Insert => {
                let noise = Run::Bytes(vec![4, 0, 0, 0, 0]);
                let mut noisy = Runs::of([noise]);
                noisy.append(frame);
                self.frames.push_front(noisy);
            }
        }
        true
    }
}
