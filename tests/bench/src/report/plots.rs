//! The plots: what is shown of a run.

use super::figure::{Figure, Panel, Row, Shape};
use super::number::{figure as number, range, unit};
use super::svg::Scale;
use crate::goals::{Against, GOALS};
use crate::results::{Kind, Results, WayInfo};
use crate::spread::{Gap, Spread};

/// All figures that there is something to show in.
pub(super) fn all(results: &Results) -> Vec<Figure> {
    let mut figures = vec![
        ratios(results),
        bulk(results),
        latencies(results),
        connections(results),
        processor(results),
        memory(results),
    ];
    figures.retain(|figure| !figure.is_empty());
    figures
}

fn ratios(results: &Results) -> Figure {
    const CASES: [&str; 9] = [
        "to-guest-1",
        "from-guest-1",
        "both-ways-1",
        "call-p50-idle",
        "call-p99-bulk",
        "connections",
        "host-cpu-to",
        "host-cpu-from",
        "memory-host-10000",
    ];
    let ours = results
        .ways_of(Kind::Ours)
        .next()
        .map_or("", |way| way.key.as_str());
    let cases = CASES.iter().filter_map(|key| results.case(key));
    let panels = cases.map(|case| Panel {
        title: case.title.clone(),
        numbers: "ratio",
        axis: if case.more_is_better {
            "more is better →"
        } else {
            "← less is better"
        }
        .to_owned(),
        rows: rows(results, |way| {
            if way.key == ours {
                return Err(Gap::Absent);
            }
            let ratio = results.ratio((ours, &case.key), (&way.key, &case.key))?;
            let goals = GOALS.iter().filter(|goal| {
                goal.case == case.key
                    && match goal.against {
                        Against::Way(against) => against == way.key,
                        Against::EveryPeer => way.kind == Kind::Peer,
                        Against::OwnCase(_) | Against::PerStream(..) => false,
                    }
            });
            let (number, hint) = (number(ratio.median), range(&ratio));
            let mut shapes = vec![
                Shape::Spread(ratio.min, ratio.max),
                Shape::Mark(ratio.median, 0),
            ];
            shapes.extend(goals.map(|goal| Shape::Goal(goal.limit.value())));
            Ok((shapes, number, hint))
        }),
    });
    Figure::new(
        "ratios",
        "virtproxy divided by each other way",
        "Dot: the median of the rounds' ratios. Band: from the least to the greatest. Upright stroke: the goal, where there is \
         one. The axis is logarithmic, with the line at 1.",
        3,
        |values| Scale::log(values.into_iter().chain([1.0])),
        panels.collect(),
    )
}

const BARS: &str =
    "Bar: the median. Dots: each round, the first on top. Line: from the least to the greatest.";

fn bulk(results: &Results) -> Figure {
    let prefixes = ["to-guest-", "from-guest-", "both-ways-"];
    let panels = prefixes.iter().flat_map(|prefix| bars(results, prefix));
    Figure::new("bulk", "Bulk", BARS, 3, Scale::linear, panels.collect())
}

fn connections(results: &Results) -> Figure {
    Figure::new(
        "connections",
        "New connections",
        BARS,
        2,
        Scale::linear,
        bars(results, "connections"),
    )
}

/// A panel for each case whose key begins so.
fn bars(results: &Results, prefix: &str) -> Vec<Panel> {
    let cases = results
        .cases
        .iter()
        .filter(|case| case.key.starts_with(prefix));
    let panels = cases.map(|case| Panel {
        title: case.title.clone(),
        numbers: "",
        axis: axis(&case.unit, case.more_is_better),
        rows: rows(results, |way| {
            let spread = results.spread((&way.key, &case.key))?;
            let (number, hint) = (number(spread.median), range(&spread));
            Ok((
                vec![Shape::Bar(0.0, spread.median, false), Shape::Rounds(spread)],
                number,
                hint,
            ))
        }),
    });
    panels.collect()
}

fn axis(of: &str, more_is_better: bool) -> String {
    if more_is_better {
        format!("{}, more is better →", unit(of))
    } else {
        format!("← less is better, {}", unit(of))
    }
}

fn latencies(results: &Results) -> Figure {
    let panels = [
        ("idle", "small request, nothing else"),
        ("bulk", "small request, bulk on other streams"),
    ];
    let panels = panels.map(|(load, title)| {
        let keys = ["p50", "p99", "p999"].map(|part| format!("call-{part}-{load}"));
        let p99 = |way: &WayInfo| results.spread((&way.key, &keys[1]));
        marked(results, title, &keys, "us", "p99", p99)
    });
    Figure::new(
        "latency",
        "Latency of a small request",
        "Disc: p50. Diamond: p99. Upright bar: p99.9. Each is the median of the rounds; the tables have the spread. The axis \
         is logarithmic.",
        2,
        Scale::log,
        panels.into(),
    )
}

fn memory(results: &Results) -> Figure {
    let panels = [
        ("host", "resident memory at the host"),
        ("guest", "resident memory in the guest"),
    ];
    let panels = panels.map(|(place, title)| {
        let keys = ["0", "100", "10000"].map(|streams| format!("memory-{place}-{streams}"));
        let each = |way: &WayInfo| results.per_stream(&way.key, (&keys[2], &keys[0]), 10_000);
        marked(results, title, &keys, "KiB", "KiB/stream", each)
    });
    Figure::new(
        "memory",
        "Memory for idle streams",
        "Disc: no streams. Diamond: 100. Upright bar: 10,000. Of the processes that move the bytes, without what their sockets \
         cost the kernel. The number is what each of 10,000 streams adds. The axis is logarithmic.",
        2,
        Scale::log,
        panels.into(),
    )
}

/// A panel with a mark for each of the cases `keys`, less being better. Its numbers are named and come from `figure`.
fn marked(
    results: &Results,
    title: &str,
    keys: &[String; 3],
    unit: &str,
    numbers: &'static str,
    figure: impl Fn(&WayInfo) -> Result<Spread, Gap>,
) -> Panel {
    Panel {
        title: title.to_owned(),
        numbers,
        axis: axis(unit, false),
        rows: rows(results, |way| {
            let (shapes, hint) = marks(results, way, keys)?;
            let number = figure(way)
                .map_or_else(|gap| gap.word().to_owned(), |spread| number(spread.median));
            Ok((shapes, number, hint))
        }),
    }
}

/// A mark for each case that there is a figure for, on a thread; the first gap, if there is none.
fn marks(
    results: &Results,
    way: &WayInfo,
    keys: &[String; 3],
) -> Result<(Vec<Shape>, String), Gap> {
    let found = keys.each_ref().map(|key| results.spread((&way.key, key)));
    let medians: Vec<(usize, f64)> = (found.iter().enumerate())
        .filter_map(|(place, spread)| Some((place, spread.as_ref().ok()?.median)))
        .collect();
    let hint: Vec<String> = medians
        .iter()
        .map(|(place, median)| format!("{}: {}", keys[*place], number(*median)))
        .collect();
    let (Some(first), Some(last)) = (medians.first(), medians.last()) else {
        return Err(found
            .into_iter()
            .find_map(Result::err)
            .unwrap_or(Gap::Absent));
    };
    let mut shapes = vec![Shape::Thread(first.1, last.1)];
    shapes.extend(
        medians
            .iter()
            .map(|(place, median)| Shape::Mark(*median, *place)),
    );
    Ok((shapes, hint.join(", ")))
}

fn processor(results: &Results) -> Figure {
    let panels = [
        ("to", "CPU, bulk to the guest"),
        ("from", "CPU, bulk from the guest"),
    ];
    let panels = panels.map(|(direction, title)| {
        let (host, guest) = (
            format!("host-cpu-{direction}"),
            format!("guest-cpu-{direction}"),
        );
        Panel {
            title: title.to_owned(),
            numbers: "sum",
            axis: axis("s/GB", false),
            rows: rows(results, |way| {
                let (host, guest) = (
                    (way.key.as_str(), host.as_str()),
                    (way.key.as_str(), guest.as_str()),
                );
                let (on_host, in_guest) =
                    (results.spread(host)?.median, results.spread(guest)?.median);
                let sum = results.relate(host, guest, |host, guest| host + guest)?;
                let hint = format!("host {}, guest {}", number(on_host), number(in_guest));
                let number = number(sum.median);
                let bars = [
                    Shape::Bar(0.0, on_host, false),
                    Shape::Bar(on_host, on_host + in_guest, true),
                ];
                Ok((
                    bars.into_iter().chain([Shape::Rounds(sum)]).collect(),
                    number,
                    hint,
                ))
            }),
        }
    });
    Figure::new(
        "cpu",
        "CPU seconds for a gigabyte",
        "Full: the host's, of the way's processes and of QEMU. Pale: the guest's, of its virtual processors. Dots: the sum in \
         each round, the first on top. Line: from the least to the greatest.",
        2,
        Scale::linear,
        panels.into(),
    )
}

/// A row for each way; without those that had no part.
fn rows(
    results: &Results,
    row: impl Fn(&WayInfo) -> Result<(Vec<Shape>, String, String), Gap>,
) -> Vec<Row> {
    let mut rows = Vec::new();
    for (index, way) in results.ways.iter().enumerate() {
        let (shapes, number, hint) = match row(way) {
            Err(Gap::Absent) => continue,
            Ok(row) => row,
            Err(gap) => (
                vec![Shape::Words(gap.word().to_owned())],
                String::new(),
                gap.to_string(),
            ),
        };
        let hint = format!("{}: {number} ({hint})", way.title);
        rows.push(Row {
            way: way.key.clone(),
            kind: way.kind,
            first: index == 0,
            shapes,
            number,
            hint,
        });
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    fn well_formed(svg: &str) {
        roxmltree::Document::parse(svg).unwrap_or_else(|error| panic!("{error}: {svg}"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn every_figure_is_well_formed() {
        let figures = all(&sample::results());
        assert_eq!(figures.len(), 6);
        for figure in &figures {
            well_formed(&figure.svg());
            figure.panels().for_each(|panel| well_formed(&panel));
        }
    }

    #[test]
    fn of_nothing_there_is_no_figure() {
        assert!(all(&sample::empty()).is_empty());
        let mut results = sample::results();
        results.cells.clear();
        assert!(all(&results).is_empty());
    }

    #[test]
    fn one_round_and_useless_figures_are_drawn() {
        for value in [0.0, 1.0, 1e300, f64::INFINITY, f64::NAN, -1.0] {
            let mut results = sample::results();
            let places: Vec<(String, String)> = results
                .cells
                .iter()
                .map(|cell| (cell.way.clone(), cell.case.clone()))
                .collect();
            for (way, case) in places {
                sample::set(&mut results, &way, &case, &[Some(value)]);
            }
            for figure in all(&results) {
                well_formed(&figure.svg());
            }
        }
    }

    #[test]
    fn a_gap_is_a_row_that_says_so() {
        let figures = all(&sample::results());
        let bulk = figures
            .iter()
            .find(|figure| figure.name == "bulk")
            .unwrap()
            .svg();
        assert!(
            bulk.contains(">cannot<") && bulk.contains(">failed<"),
            "{bulk}"
        );
        assert!(bulk.contains("it has one connection at a time"));
    }
}
