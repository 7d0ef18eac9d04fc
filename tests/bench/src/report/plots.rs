//! The plots.
//!
//! A figure is of panels, each as wide as a phone: the page lets them flow, a file has them in a grid. Every panel is read the
//! same way: a way in each row, its name at the left, its place along the axis, the number at the right. The scale is the
//! same within a figure.

use super::number::{figure as number, range, unit};
use super::svg::{LETTER, Scale, Svg, wrapped};
use crate::goals::{Against, GOALS};
use crate::results::{Kind, Results, WayInfo};
use crate::spread::{Gap, Spread};

const WIDTH: f64 = 360.0;
const GAP: f64 = 28.0;
/// How many letters of a caption find room above a panel.
const LETTERS: usize = 58;
const ROW: f64 = 17.0;
/// Above the rows: the panel's title.
const TOP: f64 = 22.0;
/// Below the rows: the axis and its words.
const BOTTOM: f64 = 34.0;
/// At the right of the rows: the numbers.
const RIGHT: f64 = 52.0;

/// Several panels that are seen together.
pub(super) struct Figure {
    name: &'static str,
    /// Its title.
    pub(super) title: &'static str,
    /// How to read it.
    pub(super) caption: &'static str,
    columns: usize,
    scale: Scale,
    panels: Vec<Panel>,
}

struct Panel {
    title: String,
    /// What stands above the numbers.
    numbers: &'static str,
    /// What the axis is of.
    axis: String,
    rows: Vec<Row>,
}

struct Row {
    way: String,
    kind: Kind,
    first: bool,
    shapes: Vec<Shape>,
    number: String,
    hint: String,
}

/// What is drawn in a row.
enum Shape {
    /// From one value to another, with whether it is a part that is paler.
    Bar(f64, f64, bool),
    /// From the least to the greatest, and each round.
    Rounds(Spread),
    /// From the least to the greatest.
    Spread(f64, f64),
    /// A thin line that joins the marks.
    Thread(f64, f64),
    /// The first, second and third mark of a row.
    Mark(f64, usize),
    /// Where a goal is.
    Goal(f64),
    /// In place of all that.
    Words(String),
}

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
    for figure in &mut figures {
        figure.panels.retain(|panel| {
            panel
                .rows
                .iter()
                .any(|row| !matches!(row.shapes[..], [Shape::Words(_)]))
        });
    }
    figures.retain(|figure| !figure.panels.is_empty());
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
        Panel {
            title: title.to_owned(),
            numbers: "p99",
            axis: axis("us", false),
            rows: rows(results, |way| {
                let (shapes, hint) = marks(results, way, &keys)?;
                let number = results
                    .spread((&way.key, &keys[1]))
                    .map_or_else(|gap| gap.word().to_owned(), |p99| number(p99.median));
                Ok((shapes, number, hint))
            }),
        }
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
        Panel {
            title: title.to_owned(),
            numbers: "KiB/stream",
            axis: axis("KiB", false),
            rows: rows(results, |way| {
                let (shapes, hint) = marks(results, way, &keys)?;
                let each = |with: f64, without: f64| (with - without) / 10_000.0;
                let each = results.relate((&way.key, &keys[2]), (&way.key, &keys[0]), each);
                Ok((
                    shapes,
                    each.map_or_else(|gap| gap.word().to_owned(), |each| number(each.median)),
                    hint,
                ))
            }),
        }
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

impl Figure {
    fn new(
        name: &'static str,
        title: &'static str,
        caption: &'static str,
        columns: usize,
        scale: impl Fn(Vec<f64>) -> Scale,
        panels: Vec<Panel>,
    ) -> Self {
        let values: Vec<f64> = (panels.iter())
            .flat_map(|panel| &panel.rows)
            .flat_map(|row| row.shapes.iter().flat_map(Shape::values))
            .collect();
        Self {
            name,
            title,
            caption,
            columns,
            scale: scale(values),
            panels,
        }
    }

    /// What its file is called.
    pub(super) fn file(&self) -> String {
        format!("{}.svg", self.name)
    }

    /// The panels, each for a page of its own width.
    pub(super) fn panels(&self) -> impl Iterator<Item = String> {
        let left = self.left();
        self.panels.iter().map(move |panel| {
            panel
                .drawn(self.scale, left)
                .inline(&format!("{}: {}", self.title, panel.title))
        })
    }

    /// All of it, as a file.
    pub(super) fn svg(&self) -> String {
        let columns = self.columns.min(self.panels.len());
        let drawn: Vec<Svg> = self
            .panels
            .iter()
            .map(|panel| panel.drawn(self.scale, self.left()))
            .collect();
        let width = columns as f64 * (WIDTH + GAP) + GAP;
        let caption = wrapped(self.caption, columns * LETTERS);
        let rows: Vec<&[Svg]> = drawn.chunks(columns).collect();
        let high =
            |row: &[Svg]| row.iter().map(|panel| panel.height).fold(0.0, f64::max) + GAP * 0.6;
        let head = 40.0 + 15.0 * caption.len() as f64 + 12.0;
        let mut svg = Svg::new(
            width,
            head + rows.iter().map(|row| high(row)).sum::<f64>() + 6.0,
        );
        svg.text("h", (GAP, 32.0), self.title);
        for (index, line) in caption.iter().enumerate() {
            svg.text("q", (GAP, 52.0 + 15.0 * index as f64), line);
        }
        let mut y = head + 8.0;
        for row in rows {
            for (column, panel) in row.iter().enumerate() {
                svg.place((GAP + column as f64 * (WIDTH + GAP), y), panel);
            }
            y += high(row);
        }
        svg.file(&format!("{}. {}", self.title, self.caption))
    }

    /// Where the axis begins: behind the longest name.
    fn left(&self) -> f64 {
        let names = self
            .panels
            .iter()
            .flat_map(|panel| &panel.rows)
            .map(|row| row.way.chars().count());
        (names.max().unwrap_or(0) as f64 * LETTER + 8.0).min(WIDTH / 2.0)
    }
}

impl Panel {
    fn drawn(&self, scale: Scale, left: f64) -> Svg {
        let bottom = TOP + ROW * self.rows.len() as f64;
        let mut svg = Svg::new(WIDTH, bottom + BOTTOM);
        let right = WIDTH - RIGHT;
        let at = |value: f64| scale.part(value).map(|part| left + part * (right - left));
        svg.text("b", (0.0, 12.0), &self.title);
        svg.text("r q", (WIDTH, 12.0), self.numbers);
        for (value, text) in scale.ticks() {
            let Some(x) = at(value) else { continue };
            let log = matches!(scale, Scale::Log(..));
            let line = if log && value == 1.0 && self.numbers == "ratio" {
                "one"
            } else {
                "grid"
            };
            svg.line(line, (x, TOP), (x, bottom + 3.0));
            svg.text("m q", (x, bottom + 15.0), &text);
        }
        svg.text("m q", ((left + right) / 2.0, bottom + 29.0), &self.axis);
        for (index, row) in self.rows.iter().enumerate() {
            row.draw(&mut svg, TOP + ROW * (index as f64 + 0.5), left, at);
        }
        svg
    }
}

impl Row {
    fn draw(&self, svg: &mut Svg, y: f64, left: f64, at: impl Fn(f64) -> Option<f64>) {
        let class = match self.kind {
            Kind::Ours => "ours",
            Kind::Floor => "floor",
            Kind::Peer => "peer",
        };
        let (name, number) = if self.first {
            ("r b", "r b")
        } else {
            ("r", "r")
        };
        svg.open(&self.hint);
        svg.text(name, (left - 6.0, y + 4.0), &self.way);
        svg.text(number, (WIDTH, y + 4.0), &self.number);
        for shape in &self.shapes {
            shape.draw(svg, class, y, left, &at);
        }
        svg.close();
    }
}

impl Shape {
    /// What must be on the axis.
    fn values(&self) -> Vec<f64> {
        match self {
            Self::Bar(from, to, _) | Self::Spread(from, to) | Self::Thread(from, to) => {
                vec![*from, *to]
            }
            Self::Rounds(spread) => vec![spread.min, spread.max],
            Self::Mark(value, _) | Self::Goal(value) => vec![*value],
            Self::Words(_) => Vec::new(),
        }
    }

    fn draw(&self, svg: &mut Svg, class: &str, y: f64, left: f64, at: impl Fn(f64) -> Option<f64>) {
        // What the axis cannot show, as zero on a logarithmic one, is not drawn.
        let span = |from: f64, to: f64| Some((at(from)?, at(to)?));
        match self {
            Self::Bar(from, to, pale) => {
                if let Some((from, to)) = span(*from, *to) {
                    let class = if *pale {
                        format!("{class} pale")
                    } else {
                        class.to_owned()
                    };
                    svg.rect(&class, (from, y - 6.0), (to - from, 12.0));
                }
            }
            Self::Rounds(spread) => {
                if let Some((from, to)) = span(spread.min, spread.max) {
                    svg.line("", (from, y), (to, y));
                }
                let step = 9.0 / spread.rounds.len() as f64;
                for (index, round) in spread.rounds.iter().enumerate() {
                    if let Some(x) = at(*round) {
                        svg.disc("dot", (x, y - 4.5 + step * (index as f64 + 0.5)), 1.4);
                    }
                }
            }
            Self::Spread(from, to) => {
                if let Some((from, to)) = span(*from, *to) {
                    svg.line(&format!("{class} wide"), (from, y), (to, y));
                }
            }
            Self::Thread(from, to) => {
                if let Some((from, to)) = span(*from, *to) {
                    svg.line(&format!("{class} pale"), (from, y), (to, y));
                }
            }
            Self::Mark(value, place) => {
                if let Some(x) = at(*value) {
                    let class = format!("{class} mark");
                    match place {
                        0 => svg.disc(&class, (x, y), 3.8),
                        1 => svg.diamond(&class, (x, y), 5.0),
                        _ => svg.rect(&class, (x - 2.0, y - 6.0), (4.0, 12.0)),
                    }
                }
            }
            Self::Goal(value) => {
                if let Some(x) = at(*value) {
                    svg.line("goal", (x, y - 7.0), (x, y + 7.0));
                }
            }
            Self::Words(words) => svg.text("n", (left + 4.0, y + 4.0), words),
        }
    }
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
