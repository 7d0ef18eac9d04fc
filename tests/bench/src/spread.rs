//! Medians and ratios, with their spread, out of [`Results`].

use std::fmt;

use crate::results::{CaseInfo, Kind, Outcome, Results, WayInfo};

/// What several rounds gave.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Spread {
    /// One a round that gave a figure, in their order.
    pub(crate) rounds: Vec<f64>,
    /// The middle one.
    pub(crate) median: f64,
    /// The least.
    pub(crate) min: f64,
    /// The greatest.
    pub(crate) max: f64,
}

impl Spread {
    /// That of these rounds; none of no rounds. What is not a finite number is no round.
    pub(crate) fn of(rounds: impl IntoIterator<Item = f64>) -> Option<Self> {
        let rounds: Vec<f64> = rounds
            .into_iter()
            .filter(|figure| figure.is_finite())
            .collect();
        let mut sorted = rounds.clone();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            (sorted[middle - 1] + sorted[middle]) / 2.0
        };
        Some(Self {
            rounds,
            median,
            min,
            max,
        })
    }
}

/// Why there is no figure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Gap {
    /// The way or the case had no part in this run.
    Absent,
    /// The way cannot do that.
    Cannot(String),
    /// It was tried, and failed in every round.
    Failed(String),
    /// There are figures, but no round has both, or one to divide by.
    NoRatio,
}

impl Gap {
    /// What stands where the figure would.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Self::Absent => "",
            Self::Cannot(_) => "cannot",
            Self::Failed(_) => "failed",
            Self::NoRatio => "no ratio",
        }
    }
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("not part of this run"),
            Self::Cannot(why) => f.write_str(why),
            Self::Failed(why) => write!(f, "failed: {why}"),
            Self::NoRatio => f.write_str("no round has both figures"),
        }
    }
}

/// A way's key and a case's.
pub(crate) type Place<'a> = (&'a str, &'a str);

impl Results {
    /// The case of this key.
    pub(crate) fn case(&self, key: &str) -> Option<&CaseInfo> {
        self.cases.iter().find(|case| case.key == key)
    }

    /// The ways of a kind, in the order of the report.
    pub(crate) fn ways_of(&self, kind: Kind) -> impl Iterator<Item = &WayInfo> {
        self.ways.iter().filter(move |way| way.kind == kind)
    }

    /// What a way gave in a case.
    pub(crate) fn spread(&self, place: Place<'_>) -> Result<Spread, Gap> {
        let rounds = self.rounds(place)?;
        Spread::of(rounds.iter().copied().flatten()).ok_or_else(|| self.failed(place))
    }

    /// How one relates to another, round by round, by a rule such as division.
    pub(crate) fn relate(
        &self,
        one: Place<'_>,
        other: Place<'_>,
        rule: impl Fn(f64, f64) -> f64,
    ) -> Result<Spread, Gap> {
        self.spread(one)?;
        self.spread(other)?;
        let pairs = self.rounds(one)?.iter().zip(self.rounds(other)?);
        Spread::of(pairs.filter_map(|(one, other)| Some(rule((*one)?, (*other)?))))
            .ok_or(Gap::NoRatio)
    }

    /// One divided by another, round by round.
    pub(crate) fn ratio(&self, one: Place<'_>, other: Place<'_>) -> Result<Spread, Gap> {
        self.relate(one, other, |one, other| one / other)
    }

    /// What was added to a way's figure in `base` by each of `streams` streams, round by round.
    pub(crate) fn per_stream(
        &self,
        way: &str,
        (case, base): (&str, &str),
        streams: u32,
    ) -> Result<Spread, Gap> {
        self.relate((way, case), (way, base), |with, without| {
            (with - without) / f64::from(streams)
        })
    }

    fn rounds(&self, place: Place<'_>) -> Result<&[Option<f64>], Gap> {
        match self.outcome(place) {
            None => Err(Gap::Absent),
            Some(Outcome::Cannot(why)) => Err(Gap::Cannot(why.clone())),
            Some(Outcome::Figures { figures, .. }) => Ok(figures),
        }
    }

    fn failed(&self, place: Place<'_>) -> Gap {
        match self.outcome(place) {
            Some(Outcome::Figures { failures, .. }) => Gap::Failed(
                failures
                    .first()
                    .cloned()
                    .unwrap_or_else(|| "no figure".to_owned()),
            ),
            _ => Gap::Absent,
        }
    }

    fn outcome(&self, (way, case): Place<'_>) -> Option<&Outcome> {
        self.cells
            .iter()
            .find(|cell| cell.way == way && cell.case == case)
            .map(|cell| &cell.outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    #[test]
    fn a_median_has_its_spread() {
        let spread = Spread::of([3.0, 1.0, 2.0]).unwrap();
        assert_eq!((spread.median, spread.min, spread.max), (2.0, 1.0, 3.0));
        assert_eq!(spread.rounds, [3.0, 1.0, 2.0]);
        assert_eq!(Spread::of([4.0, 1.0]).unwrap().median, 2.5);
        assert_eq!(Spread::of([7.0]).unwrap().max, 7.0);
        assert_eq!(Spread::of([f64::INFINITY, f64::NAN]), None);
    }

    #[test]
    fn a_ratio_is_made_within_a_round() {
        let mut results = sample::results();
        sample::set(
            &mut results,
            "virtproxy",
            "to-guest-1",
            &[Some(100.0), Some(400.0), None],
        );
        sample::set(
            &mut results,
            "relay",
            "to-guest-1",
            &[Some(200.0), Some(400.0), Some(1.0)],
        );
        let ratio = results
            .ratio(("virtproxy", "to-guest-1"), ("relay", "to-guest-1"))
            .unwrap();
        assert_eq!(ratio.rounds, [0.5, 1.0]);
        assert_eq!(ratio.median, 0.75);
    }

    #[test]
    fn a_gap_says_why() {
        let mut results = sample::results();
        sample::set(&mut results, "passt", "to-guest-1", &[None, None]);
        sample::set(&mut results, "slirp", "to-guest-1", &[Some(0.0)]);
        let gap = |way| {
            results
                .ratio(("virtproxy", "to-guest-1"), (way, "to-guest-1"))
                .unwrap_err()
        };
        assert_eq!(gap("passt"), Gap::Failed("it stalled".to_owned()));
        assert_eq!(gap("slirp"), Gap::NoRatio);
        assert_eq!(gap("nobody"), Gap::Absent);
        assert!(matches!(
            results.spread(("relay", "to-guest-64")),
            Err(Gap::Cannot(_))
        ));
    }
}
