//! The figures of a run, as `results.json` has them. All that the report says is made from this.

use serde::{Deserialize, Serialize};

/// One run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Results {
    /// When it began, as `date -u +%FT%RZ` prints it.
    pub(crate) begun: String,
    /// The version of the project: `git describe --always --dirty`.
    pub(crate) version: String,
    /// What it ran on, each a line for people: processor, cores, memory, kernel, QEMU, acceleration, guest kernel.
    pub(crate) machine: Vec<String>,
    /// Whether it was a quick one, of fewer ways, cases and bytes.
    pub(crate) quick: bool,
    /// The ways, in the order of the report.
    pub(crate) ways: Vec<WayInfo>,
    /// The cases, in the order of the report.
    pub(crate) cases: Vec<CaseInfo>,
    /// What each way gave in each case.
    pub(crate) cells: Vec<Cell>,
}

impl Results {
    /// Whether there is any figure.
    pub(crate) fn measured(&self) -> bool {
        self.cells.iter().any(|cell| match &cell.outcome {
            Outcome::Figures { figures, .. } => figures.iter().any(Option::is_some),
            Outcome::Cannot(_) => false,
        })
    }
}

/// A way into the guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct WayInfo {
    /// Names it: `virtproxy`, `passt`, ...
    pub(crate) key: String,
    /// For people, with the version of what is not ours: `passt 2025_05_03 (vhost-user)`.
    pub(crate) title: String,
    /// What it is in the comparison.
    pub(crate) kind: Kind,
}

/// What a way is in the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// What this project makes.
    Ours,
    /// A bare relay over a link: one stream, no mux, nothing else to do.
    Floor,
    /// What a user would pick instead.
    Peer,
}

/// A case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CaseInfo {
    /// Names it: `to-guest-1`, `call-p50-idle`, ...
    pub(crate) key: String,
    /// For people: `bulk to the guest, 1 stream`.
    pub(crate) title: String,
    /// The unit of its figures: `MB/s`, `us`, `1/s`, `s/GB`, `KiB`.
    pub(crate) unit: String,
    /// Whether more is better.
    pub(crate) more_is_better: bool,
}

/// One way in one case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Cell {
    /// The way's key.
    pub(crate) way: String,
    /// The case's key.
    pub(crate) case: String,
    /// What came of it.
    pub(crate) outcome: Outcome,
}

/// What came of a cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Outcome {
    /// A figure a round. Figures of two ways at the same place were measured in the same round, and make a ratio.
    /// `None` is a round in which this way failed; why is in `failures`.
    Figures {
        /// One a round.
        figures: Vec<Option<f64>>,
        /// Why some failed.
        failures: Vec<String>,
    },
    /// The way cannot do that, and why.
    Cannot(String),
}
