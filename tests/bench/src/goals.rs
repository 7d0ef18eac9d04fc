//! What the ratios are to be, and what they are.
//!
//! A goal is about `virtproxy`, in one case, against another way in the same case, or against itself in another case. It is
//! judged by the median of the rounds' ratios; the spread says how much that is worth. Goals for parts that need no
//! guest are `cargo bench`'s.

use std::fmt;

use anyhow::{Result, bail};

use crate::results::{Kind, Results};
use crate::spread::{Gap, Spread};

/// Whom the goals are about.
const OURS: &str = "virtproxy";

/// A goal.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Goal {
    /// The case.
    pub(crate) case: &'static str,
    /// Beside what.
    pub(crate) against: Against,
    /// What the relation is to be.
    pub(crate) limit: Limit,
}

/// What a figure of ours is put beside.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Against {
    /// Another way, in the same case: divided by its figure.
    Way(&'static str),
    /// Every peer that has a part in the run: the one that comes nearest counts.
    EveryPeer,
    /// Our own figure in another case: divided by it.
    OwnCase(&'static str),
    /// Our own figure without any stream: what was added to it, for each of so many streams.
    PerStream(&'static str, u32),
}

/// Where a goal's limit is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Limit {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
    /// Less than this.
    Below(f64),
}

const fn goal(case: &'static str, against: Against, limit: Limit) -> Goal {
    Goal {
        case,
        against,
        limit,
    }
}

/// The goals, in the order of the report.
pub(crate) const GOALS: &[Goal] = {
    use Against::{EveryPeer, OwnCase, PerStream, Way};
    use Limit::{AtLeast, AtMost, Below};
    &[
        goal("to-guest-1", Way("relay"), AtLeast(0.95)),
        goal("from-guest-1", Way("relay"), AtLeast(0.95)),
        goal("to-guest-1", Way("relay-chardev"), AtLeast(1.0)),
        goal("from-guest-1", Way("relay-chardev"), AtLeast(1.0)),
        goal("to-guest-1", Way("passt"), AtLeast(2.0)),
        goal("from-guest-1", Way("passt"), AtLeast(2.0)),
        goal("to-guest-1", Way("slirp"), AtLeast(5.0)),
        goal("from-guest-1", Way("slirp"), AtLeast(5.0)),
        goal("to-guest-1", Way("vsock"), AtLeast(5.0)),
        goal("from-guest-1", Way("vsock"), AtLeast(5.0)),
        goal("to-guest-1", Way("yamux"), AtLeast(2.0)),
        goal("from-guest-1", Way("yamux"), AtLeast(2.0)),
        goal("call-p50-idle", Way("relay"), AtMost(1.1)),
        goal("call-p50-idle", EveryPeer, Below(1.0)),
        goal("call-p99-bulk", OwnCase("call-p99-idle"), AtMost(2.0)),
        goal("connections", Way("passt"), AtLeast(3.0)),
        goal("host-cpu-to", EveryPeer, AtMost(0.5)),
        goal("host-cpu-from", EveryPeer, AtMost(0.5)),
        goal(
            "memory-host-10000",
            PerStream("memory-host-0", 10_000),
            Below(1.0),
        ),
        goal(
            "memory-guest-10000",
            PerStream("memory-guest-0", 10_000),
            Below(1.0),
        ),
    ]
};

impl Limit {
    /// How far from the limit: 0 on it, 0.1 for a tenth beyond on the good side, -0.1 on the bad one.
    fn margin(self, relation: f64) -> f64 {
        match self {
            Self::AtLeast(limit) => relation / limit - 1.0,
            Self::AtMost(limit) | Self::Below(limit) => 1.0 - relation / limit,
        }
    }

    /// Whether it is kept.
    fn kept(self, relation: f64) -> bool {
        match self {
            Self::AtLeast(limit) => relation >= limit,
            Self::AtMost(limit) => relation <= limit,
            Self::Below(limit) => relation < limit,
        }
    }

    /// The figure in it.
    pub(crate) fn value(self) -> f64 {
        match self {
            Self::AtLeast(limit) | Self::AtMost(limit) | Self::Below(limit) => limit,
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self {
            Self::AtLeast(_) => "at least",
            Self::AtMost(_) => "at most",
            Self::Below(_) => "below",
        };
        write!(f, "{word} {}", self.value())
    }
}

/// A goal and what came of it.
#[derive(Clone, Debug)]
pub(crate) struct Judged {
    /// The goal.
    pub(crate) goal: Goal,
    /// What was measured, and beside whom; of several the one that is worst for us.
    pub(crate) measured: Option<(String, Spread)>,
    /// Beside whom nothing was measured, and why.
    pub(crate) gaps: Vec<(String, Gap)>,
}

/// What came of a goal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Verdict {
    /// It is kept against all that were measured.
    Reached,
    /// It is missed by this share of the limit; `near` if one round at least kept it.
    Missed {
        /// The share.
        by: f64,
        /// Whether the limit lies within the spread.
        near: bool,
    },
    /// Nothing to judge by.
    NotMeasured,
}

impl Judged {
    /// The verdict.
    pub(crate) fn verdict(&self) -> Verdict {
        let limit = self.goal.limit;
        match &self.measured {
            None => Verdict::NotMeasured,
            Some((_, ratio)) if limit.kept(ratio.median) => Verdict::Reached,
            Some((_, ratio)) => Verdict::Missed {
                by: -limit.margin(ratio.median),
                near: limit.kept(ratio.min) || limit.kept(ratio.max),
            },
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reached => f.write_str("✓ reached"),
            Self::Missed { by, near } => {
                match by * 100.0 {
                    percent if percent < 1.0 => f.write_str("✗ missed by less than 1 %")?,
                    percent => write!(f, "✗ missed by {percent:.0} %")?,
                }
                f.write_str(if *near { ", within the spread" } else { "" })
            }
            Self::NotMeasured => f.write_str("– not measured"),
        }
    }
}

/// What came of every goal.
pub(crate) fn judge(results: &Results) -> Vec<Judged> {
    GOALS.iter().map(|goal| judge_one(results, *goal)).collect()
}

fn judge_one(results: &Results, goal: Goal) -> Judged {
    let own = (OURS, goal.case);
    let beside = |way: &str| (way.to_owned(), results.ratio(own, (way, goal.case)));
    let relations = match goal.against {
        Against::Way(way) => vec![beside(way)],
        Against::EveryPeer => results
            .ways_of(Kind::Peer)
            .map(|way| beside(&way.key))
            .collect(),
        Against::OwnCase(case) => vec![(case.to_owned(), results.ratio(own, (OURS, case)))],
        Against::PerStream(base, streams) => {
            let added = results.per_stream(OURS, (goal.case, base), streams);
            vec![(base.to_owned(), added)]
        }
    };
    let mut judged = Judged {
        goal,
        measured: None,
        gaps: Vec::new(),
    };
    for (name, relation) in relations {
        match relation {
            Err(gap) => judged.gaps.push((name, gap)),
            Ok(spread) => {
                let margin = |spread: &Spread| goal.limit.margin(spread.median);
                if judged
                    .measured
                    .as_ref()
                    .is_none_or(|(_, worst)| margin(&spread) < margin(worst))
                {
                    judged.measured = Some((name, spread));
                }
            }
        }
    }
    judged
}

/// What a quick run must keep. It is to catch a change that costs half of something, on a machine where other things run
/// too: when this was written the ratios were 0.84, 0.73 and 1.22.
const GUARD: &[Goal] = &[
    goal("to-guest-1", Against::Way("relay"), Limit::AtLeast(0.5)),
    goal("from-guest-1", Against::Way("relay"), Limit::AtLeast(0.5)),
    goal("call-p50-idle", Against::Way("relay"), Limit::AtMost(2.0)),
];

/// Fails when a ratio to the bare relay over the vhost-user port is far from what it was, or is missing.
pub(crate) fn quick_guard(results: &Results) -> Result<()> {
    let mut faults = Vec::new();
    for goal in GUARD {
        let judged = judge_one(results, *goal);
        match (judged.verdict(), &judged.measured) {
            (Verdict::Reached, _) => {}
            (_, Some((way, ratio))) => faults.push(format!(
                "{} is {:.2} x that of {way} ({:.2} to {:.2}), and must be {} x",
                goal.case, ratio.median, ratio.min, ratio.max, goal.limit
            )),
            (_, None) => {
                let why: Vec<String> = judged
                    .gaps
                    .iter()
                    .map(|(way, gap)| format!("beside {way}: {gap}"))
                    .collect();
                faults.push(format!(
                    "{} was not measured, {}",
                    goal.case,
                    why.join("; ")
                ));
            }
        }
    }
    if !faults.is_empty() {
        bail!(
            "{OURS} is much slower than it was, or was not measured: {}",
            faults.join("; ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    fn verdict(results: &Results, case: &str, against: &str) -> Judged {
        let found = judge(results).into_iter().find(|judged| {
            judged.goal.case == case && format!("{:?}", judged.goal.against).contains(against)
        });
        found.unwrap()
    }

    #[test]
    fn the_median_of_the_ratios_decides() {
        let mut results = sample::results();
        sample::set(
            &mut results,
            "relay",
            "to-guest-1",
            &[Some(100.0), Some(100.0), Some(100.0)],
        );
        for (median, expected) in [
            (95.0, Verdict::Reached),
            (
                76.0,
                Verdict::Missed {
                    by: 0.2,
                    near: true,
                },
            ),
        ] {
            sample::set(
                &mut results,
                "virtproxy",
                "to-guest-1",
                &[Some(99.0), Some(median), Some(50.0)],
            );
            match (
                verdict(&results, "to-guest-1", "\"relay\"").verdict(),
                expected,
            ) {
                (
                    Verdict::Missed { by, near },
                    Verdict::Missed {
                        by: expected,
                        near: expected_near,
                    },
                ) => {
                    assert!((by - expected).abs() < 1e-9, "{by}");
                    assert_eq!(near, expected_near);
                }
                (got, expected) => assert_eq!(got, expected),
            }
        }
    }

    #[test]
    fn against_every_peer_the_nearest_counts() {
        let mut results = sample::results();
        let set = |results: &mut Results, way, value| {
            sample::set(results, way, "host-cpu-to", &[Some(value)])
        };
        for (way, value) in [
            ("virtproxy", 1.0),
            ("passt", 4.0),
            ("slirp", 9.0),
            ("ssh", 5.0),
            ("yamux", 1.6),
        ] {
            set(&mut results, way, value);
        }
        let judged = verdict(&results, "host-cpu-to", "EveryPeer");
        assert_eq!(judged.measured.as_ref().unwrap().0, "yamux");
        assert!(
            matches!(judged.verdict(), Verdict::Missed { .. }),
            "{judged:?}"
        );
        assert_eq!(judged.gaps.len(), 1, "vsock could not: {:?}", judged.gaps);
        set(&mut results, "yamux", 2.0);
        assert_eq!(
            verdict(&results, "host-cpu-to", "EveryPeer").verdict(),
            Verdict::Reached
        );
    }

    #[test]
    fn below_is_not_at_most() {
        let mut results = sample::results();
        for way in ["virtproxy", "passt", "slirp", "vsock", "ssh", "yamux"] {
            sample::set(&mut results, way, "call-p50-idle", &[Some(100.0)]);
        }
        let equal = verdict(&results, "call-p50-idle", "EveryPeer");
        assert!(matches!(equal.verdict(), Verdict::Missed { .. }));
        assert_eq!(equal.verdict().to_string(), "✗ missed by less than 1 %");
    }

    #[test]
    fn streams_are_charged_for_what_they_add() {
        let mut results = sample::results();
        sample::set(
            &mut results,
            "virtproxy",
            "memory-host-0",
            &[Some(4000.0), Some(4100.0)],
        );
        sample::set(
            &mut results,
            "virtproxy",
            "memory-host-10000",
            &[Some(9000.0), Some(9100.0)],
        );
        let judged = verdict(&results, "memory-host-10000", "PerStream");
        assert_eq!(judged.measured.as_ref().unwrap().1.rounds, [0.5, 0.5]);
        assert_eq!(judged.verdict(), Verdict::Reached);
    }

    #[test]
    fn nothing_measured_is_said() {
        let empty = sample::empty();
        for judged in judge(&empty) {
            assert_eq!(judged.verdict(), Verdict::NotMeasured);
        }
        let error = quick_guard(&empty).unwrap_err().to_string();
        assert!(
            error.contains("to-guest-1 was not measured, beside relay: not part of this run"),
            "{error}"
        );
    }

    #[test]
    fn the_guard_fails_for_a_real_loss_only() {
        let mut results = sample::results();
        quick_guard(&results).unwrap();
        sample::set(
            &mut results,
            "virtproxy",
            "from-guest-1",
            &[Some(100.0), Some(90.0), Some(1000.0)],
        );
        sample::set(
            &mut results,
            "relay",
            "from-guest-1",
            &[Some(400.0), Some(300.0), Some(1000.0)],
        );
        let error = quick_guard(&results).unwrap_err().to_string();
        assert!(
            error.contains(
                "from-guest-1 is 0.30 x that of relay (0.25 to 1.00), and must be at least 0.5 x"
            ),
            "{error}"
        );
        assert!(!error.contains("to-guest-1 is"), "{error}");
    }
}
