//! What is said in tables, whoever shows them.

use std::collections::BTreeMap;

use super::number::{figure, range, unit};
use crate::goals::{self, Against, Judged};
use crate::results::{CaseInfo, Kind, Outcome, Results, WayInfo};
use crate::spread::{Gap, Spread};

/// A table.
pub(super) struct Table {
    /// Its title.
    pub(super) title: String,
    /// What is to be known about it, or nothing.
    pub(super) note: String,
    /// The columns.
    pub(super) head: Vec<String>,
    /// The rows, as wide as the head.
    pub(super) rows: Vec<Vec<Entry>>,
    /// Whether all columns but the first hold figures.
    pub(super) of_figures: bool,
}

/// What stands in a table.
#[derive(Default)]
pub(super) struct Entry {
    /// The thing itself.
    pub(super) main: String,
    /// What is to be shown smaller behind it, or nothing: the spread.
    pub(super) small: String,
}

impl Entry {
    fn new(main: impl Into<String>) -> Self {
        Self {
            main: main.into(),
            small: String::new(),
        }
    }

    fn of(spread: &Result<Spread, Gap>) -> Self {
        match spread {
            Ok(spread) => Self {
                main: figure(spread.median),
                small: range(spread),
            },
            Err(gap) => Self::new(gap.word()),
        }
    }
}

/// All of them.
pub(super) struct Tables {
    /// The goals, and what came of them.
    pub(super) goals: Table,
    /// Ratios, then figures.
    pub(super) figures: Vec<Table>,
    /// What could not be measured.
    pub(super) gaps: Table,
}

/// Makes them.
pub(super) fn all(results: &Results) -> Tables {
    let ways = |kinds: &[Kind]| -> Vec<&WayInfo> {
        results
            .ways
            .iter()
            .filter(|way| kinds.contains(&way.kind))
            .collect()
    };
    let (near, peers) = (ways(&[Kind::Ours, Kind::Floor]), ways(&[Kind::Peer]));
    let mut tables = Vec::new();
    for ours in results.ways_of(Kind::Ours) {
        // What was put beside it before is not shown again upside down.
        let behind = near.iter().skip_while(|way| way.key != ours.key).skip(1);
        tables.push(ratios(results, ours, &behind.copied().collect::<Vec<_>>()));
        tables.push(ratios(results, ours, &peers));
    }
    tables.push(under_bulk(results));
    tables.push(figures(results, &near));
    tables.push(figures(results, &peers));
    tables.retain(|table| !table.rows.is_empty());
    Tables {
        goals: goals(results),
        figures: tables,
        gaps: gaps(results),
    }
}

fn goals(results: &Results) -> Table {
    let judged = goals::judge(results);
    // A quick run is not made to judge them all.
    let shown = judged
        .iter()
        .filter(|judged| !results.quick || judged.measured.is_some());
    Table {
        title: "Goals".to_owned(),
        note: "The median of the rounds' ratios decides; behind it, their spread.".to_owned(),
        head: ["case", "beside", "goal", "measured", "verdict"]
            .map(str::to_owned)
            .to_vec(),
        rows: shown.map(|judged| goal(results, judged)).collect(),
        of_figures: false,
    }
}

fn goal(results: &Results, judged: &Judged) -> Vec<Entry> {
    let nearest = judged.measured.as_ref().map(|(way, _)| way.as_str());
    let (beside, sign) = match judged.goal.against {
        Against::Way(way) => (Entry::new(way), " x"),
        Against::EveryPeer => {
            let nearest = nearest
                .map(|way| format!("nearest: {way}"))
                .unwrap_or_default();
            (
                Entry {
                    main: "every peer".to_owned(),
                    small: nearest,
                },
                " x",
            )
        }
        Against::OwnCase(case) => (Entry::new(format!("its own {case}")), " x"),
        Against::PerStream(base, streams) => {
            let beside = format!("its own {base}, what is added per stream of {streams}");
            (Entry::new(beside), " KiB")
        }
    };
    let measured = match &judged.measured {
        Some((_, spread)) => Entry {
            main: format!("{}{sign}", figure(spread.median)),
            small: range(spread),
        },
        None => Entry::new("–"),
    };
    let gaps: Vec<String> = (judged.gaps.iter())
        .map(|(beside, gap)| match judged.goal.against {
            Against::EveryPeer => format!("without {beside}: {gap}"),
            _ => gap.to_string(),
        })
        .collect();
    vec![
        Entry {
            main: judged.goal.case.to_owned(),
            small: title(results, judged.goal.case),
        },
        beside,
        Entry::new(format!("{}{sign}", judged.goal.limit)),
        measured,
        Entry {
            main: judged.verdict().to_string(),
            small: gaps.join("; "),
        },
    ]
}

fn title(results: &Results, case: &str) -> String {
    results
        .case(case)
        .map(|case| case.title.clone())
        .unwrap_or_default()
}

fn ratios(results: &Results, ours: &WayInfo, others: &[&WayInfo]) -> Table {
    Table {
        title: format!("{} divided by {}", ours.key, list(others)),
        note: "Round by round: the median, and the spread behind it.".to_owned(),
        head: head("case", others),
        rows: rows(results, others, CaseInfo::sense, |case, way| {
            Entry::of(&results.ratio((&ours.key, &case.key), (&way.key, &case.key)))
        }),
        of_figures: true,
    }
}

/// What bulk does to a small request: each way beside itself.
fn under_bulk(results: &Results) -> Table {
    const PARTS: [&str; 3] = ["p50", "p99", "p999"];
    let rows = results.ways.iter().map(|way| {
        let ratios = PARTS.map(|part| {
            let [bulk, idle] = ["bulk", "idle"].map(|load| format!("call-{part}-{load}"));
            Entry::of(&results.ratio((&way.key, &bulk), (&way.key, &idle)))
        });
        [Entry::new(&way.key)]
            .into_iter()
            .chain(ratios)
            .collect::<Vec<Entry>>()
    });
    Table {
        title: "A small request under bulk, divided by the same when idle".to_owned(),
        note: "Each way beside itself. Less is better.".to_owned(),
        head: ["way"]
            .into_iter()
            .chain(PARTS)
            .map(str::to_owned)
            .collect(),
        rows: rows
            .filter(|row| row[1..].iter().any(|entry| !entry.main.is_empty()))
            .collect(),
        of_figures: true,
    }
}

fn figures(results: &Results, ways: &[&WayInfo]) -> Table {
    Table {
        title: format!("Figures of {}", list(ways)),
        note: "The median of the rounds, and the spread behind it. They mean nothing outside this run.".to_owned(),
        head: head("case", ways),
        rows: rows(
            results,
            ways,
            |case| unit(&case.unit).to_owned(),
            |case, way| Entry::of(&results.spread((&way.key, &case.key))),
        ),
        of_figures: true,
    }
}

fn list(ways: &[&WayInfo]) -> String {
    let keys: Vec<&str> = ways.iter().map(|way| way.key.as_str()).collect();
    keys.join(", ")
}

fn head(first: &str, ways: &[&WayInfo]) -> Vec<String> {
    [first.to_owned()]
        .into_iter()
        .chain(ways.iter().map(|way| way.key.clone()))
        .collect()
}

/// A row a case, without those that would be empty.
fn rows(
    results: &Results,
    ways: &[&WayInfo],
    about: impl Fn(&CaseInfo) -> String,
    entry: impl Fn(&CaseInfo, &WayInfo) -> Entry,
) -> Vec<Vec<Entry>> {
    let rows = results.cases.iter().map(|case| {
        let mut row = vec![Entry {
            main: case.key.clone(),
            small: about(case),
        }];
        row.extend(ways.iter().map(|way| entry(case, way)));
        row
    });
    rows.filter(|row| row[1..].iter().any(|entry| !entry.main.is_empty()))
        .collect()
}

impl CaseInfo {
    fn sense(&self) -> String {
        if self.more_is_better {
            "more is better"
        } else {
            "less is better"
        }
        .to_owned()
    }
}

/// What could not be done, and what failed: for each way, the reasons, and the cases under each.
fn gaps(results: &Results) -> Table {
    let mut rows = Vec::new();
    for way in &results.ways {
        let mut reasons: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for cell in results.cells.iter().filter(|cell| cell.way == way.key) {
            match &cell.outcome {
                Outcome::Cannot(why) => reasons
                    .entry(why.clone())
                    .or_default()
                    .push(cell.case.clone()),
                Outcome::Figures { figures, failures } => {
                    for why in failures {
                        let case = format!(
                            "{} ({} of {} rounds failed)",
                            cell.case,
                            failures.len(),
                            figures.len()
                        );
                        let cases = reasons.entry(why.clone()).or_default();
                        if !cases.contains(&case) {
                            cases.push(case);
                        }
                    }
                }
            }
        }
        for (why, cases) in reasons {
            let all = cases.len() > 1 && cases.len() == results.cases.len();
            let cases = if all {
                "every case".to_owned()
            } else {
                cases.join(", ")
            };
            rows.push([&way.key, &why, &cases].map(Entry::new).into());
        }
    }
    Table {
        title: "What could not be measured, and why".to_owned(),
        note: String::new(),
        head: ["way", "why", "cases"].map(str::to_owned).to_vec(),
        rows,
        of_figures: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    #[test]
    fn every_row_is_as_wide_as_its_head() {
        let Tables {
            goals,
            figures,
            gaps,
        } = all(&sample::results());
        assert_eq!(figures.len(), 7);
        for table in figures.iter().chain([&goals, &gaps]) {
            assert!(
                table.rows.iter().all(|row| row.len() == table.head.len()),
                "{}",
                table.title
            );
        }
    }

    #[test]
    fn reasons_are_said_once() {
        let table = gaps(&sample::results());
        let whys: Vec<&str> = table.rows.iter().map(|row| row[1].main.as_str()).collect();
        assert_eq!(
            whys.iter()
                .filter(|why| **why == "it has one connection at a time")
                .count(),
            2,
            "one a relay"
        );
        assert!(
            table
                .rows
                .iter()
                .any(|row| row[2].main.contains("to-guest-1 (3 of 7 rounds failed)"))
        );
    }

    #[test]
    fn a_quick_run_shows_the_goals_that_it_judged() {
        let mut results = sample::results();
        results.quick = true;
        results
            .ways
            .retain(|way| way.key == "virtproxy" || way.key == "relay");
        results
            .cells
            .retain(|cell| cell.way == "virtproxy" || cell.way == "relay");
        assert_eq!(goals(&results).rows.len(), 6);
        assert_eq!(goals(&sample::empty()).rows.len(), goals::GOALS.len());
    }
}
