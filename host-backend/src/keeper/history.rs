//! What became of the workers so far: told to the next one, which can tell others.

use std::process::ExitStatus;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How many workers ended, by how they did. The first one is told of none.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct History {
    /// By a signal, by a panic, or by itself though it was not asked to.
    pub died: u64,
    /// As it was asked to: another one took over.
    pub replaced: u64,
    /// Before it had begun: of its file, or of an address that was taken.
    pub failed: u64,
    /// How the last of all ended, and how long it had served.
    pub last: Option<String>,
}

/// How a worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Died,
    Replaced,
    Failed,
}

impl History {
    pub(super) fn note(&mut self, ending: Ending, status: ExitStatus, lasted: Duration) {
        *match ending {
            Ending::Died => &mut self.died,
            Ending::Replaced => &mut self.replaced,
            Ending::Failed => &mut self.failed,
        } += 1;
        self.last = Some(match ending {
            Ending::Replaced => format!("replaced after {lasted:.1?}"),
            _ => format!("{status} after {lasted:.1?}"),
        });
    }
}
