//! How far a search over two sessions goes.

use virtproxy_mux::Config;
use virtproxy_mux::session::MIN_WINDOW;
use virtproxy_mux::sim::Side;

/// Bytes of the smallest thing that is sent here: half the smallest window there is.
pub const UNIT: u32 = MIN_WINDOW / 2;

/// When a local side takes what has arrived for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// As it arrives.
    AtOnce,
    /// At any time later, unit by unit.
    AnyTime,
    /// Not at all.
    Never,
}

/// A stream, and what both ends want of it.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    /// Who opens it.
    pub opener: Side,
    /// Bytes that the opener sends, and the acceptor; then each ends its half.
    pub sends: [u32; 2],
    /// When the opener reads, and the acceptor.
    pub reads: [Reads; 2],
    /// Whether it is accepted as it is asked for, not at any time later.
    pub at_once: bool,
}

impl Stream {
    /// One that is read, with so many units each way.
    pub const fn new(opener: Side, units: [u32; 2]) -> Self {
        Stream {
            opener,
            sends: [units[0] * UNIT, units[1] * UNIT],
            reads: [Reads::AtOnce; 2],
            at_once: true,
        }
    }

    /// The same, read like this by the end that accepts it.
    #[must_use]
    pub const fn read(mut self, reads: Reads) -> Self {
        self.reads[1] = reads;
        self
    }

    /// The same, accepted or refused at any time.
    #[must_use]
    pub const fn hesitating(mut self) -> Self {
        self.at_once = false;
        self
    }
}

/// How often what is not due may happen, in one run.
#[derive(Clone, Copy, Debug, Default, Hash, PartialEq, Eq)]
pub struct Allowed {
    /// Half of what would arrive arrives alone.
    pub parts: u8,
    /// A local side says that it has nothing to send for now.
    pub naps: u8,
    /// The target of a stream refuses.
    pub refusals: u8,
    /// An end resets a stream.
    pub resets: u8,
    /// An end starts anew.
    pub restarts: u8,
    /// The channel loses, doubles or adds bytes (where frames are sealed).
    pub faults: u8,
}

/// A driver that breaks its contract; for showing that the search would find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// Local sides take bytes, but nobody says so to the session.
    NoCredit,
    /// An end that cannot write does not read.
    ReaderWaitsForWriter,
    /// The channel swallows what grants a stream credit.
    CreditLost,
}

/// How far a search goes.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// The streams, in the order in which each end opens its own.
    pub streams: Vec<Stream>,
    /// A stream's window at first and at last, in units.
    pub window: [u32; 2],
    /// The session's window, in units.
    pub session_window: u32,
    /// Streams that each end may open at once.
    pub at_once: u32,
    /// Frames that may be under way each way; the last place takes no data.
    pub capacity: usize,
    /// Whether A asks for sealed frames.
    pub sealed: bool,
    /// Whether the search starts before the handshake, not behind it.
    pub from_nothing: bool,
    /// What else may happen.
    pub allowed: Allowed,
    /// What the driver does wrong.
    pub flaw: Option<Flaw>,
}

impl Bounds {
    /// The tightest there are, with nothing but these streams.
    pub fn of(streams: &[Stream]) -> Self {
        Bounds {
            streams: streams.to_vec(),
            window: [2, 2],
            session_window: 2,
            at_once: 2,
            capacity: 2,
            sealed: false,
            from_nothing: false,
            allowed: Allowed::default(),
            flaw: None,
        }
    }

    pub(super) fn config(&self, side: Side) -> Config {
        let [initial, most] = self.window.map(|units| units * UNIT);
        Config {
            max_streams: self.at_once,
            initial_window: initial,
            max_window: most,
            session_window: self.session_window * UNIT,
            memory: 1 << 20,
            max_frame: MIN_WINDOW,
            turn: UNIT,
            seal: self.sealed && side == Side::A,
            product: String::new(),
            ..Config::default()
        }
    }
}
