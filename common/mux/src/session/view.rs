//! Shows where a session stands, to whoever watches over it; nothing here changes anything.

use super::{Config, MIN_WINDOW, Session};
use crate::stream::StreamId;

/// Where the credit of a stream, or of the whole session, stands at one end, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CreditView {
    /// What this end may still send.
    pub send: u32,
    /// What the peer may still send.
    pub granted: u32,
    /// What arrived and the local side has not taken.
    pub held: u32,
    /// What the local side has taken and was not granted anew.
    pub returnable: u32,
}

impl Config {
    /// The bytes of [`Config::memory`] that are set aside, as the least window of every stream there may be.
    pub fn set_aside(&self) -> u64 {
        u64::from(self.max_streams) * 2 * u64::from(MIN_WINDOW)
    }
}

impl Session {
    /// The credit of a stream that lives.
    pub fn stream_credit(&self, id: StreamId) -> Option<CreditView> {
        let stream = self.streams.get(id)?;
        Some(CreditView {
            send: stream.send.bytes(),
            granted: stream.receive.granted.bytes(),
            held: stream.receive.held,
            returnable: stream.receive.returnable,
        })
    }

    /// The credit of the session as a whole.
    pub fn session_credit(&self) -> CreditView {
        CreditView {
            send: self.send.bytes(),
            granted: self.receive.granted.bytes(),
            held: self.receive.held,
            returnable: self.receive.returnable,
        }
    }

    /// Whether there is something to send that only room in the channel is missing for.
    pub fn wants_room(&self) -> bool {
        let data = self.is_established() && self.send.bytes() > 0 && !self.schedule.is_empty();
        data || self.owes_control() || self.owes_session_credit()
    }
}
