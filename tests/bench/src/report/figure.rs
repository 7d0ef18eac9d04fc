//! A figure: panels, each as wide as a phone. The page lets them flow, a file has them in a grid.
//!
//! Every panel is read the same way: a way in each row, its name at the left, its place along the axis, the number at the
//! right. The scale is the same within a figure.

use super::svg::{LETTER, Scale, Svg, wrapped};
use crate::results::Kind;
use crate::spread::Spread;

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
    /// Its file's name.
    pub(super) name: &'static str,
    /// Its title.
    pub(super) title: &'static str,
    /// How to read it.
    pub(super) caption: &'static str,
    /// How many panels stand side by side in its file.
    columns: usize,
    scale: Scale,
    panels: Vec<Panel>,
}

/// One of them.
pub(super) struct Panel {
    /// Its title.
    pub(super) title: String,
    /// What stands above the numbers.
    pub(super) numbers: &'static str,
    /// What the axis is of.
    pub(super) axis: String,
    /// One a way.
    pub(super) rows: Vec<Row>,
}

/// A way in a panel.
pub(super) struct Row {
    /// Its key.
    pub(super) way: String,
    /// What gives it its colour.
    pub(super) kind: Kind,
    /// Whether it stands out.
    pub(super) first: bool,
    /// What is drawn.
    pub(super) shapes: Vec<Shape>,
    /// What stands at the right.
    pub(super) number: String,
    /// What is said to who points at it.
    pub(super) hint: String,
}

/// What is drawn in a row.
pub(super) enum Shape {
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

impl Figure {
    /// One of these panels that have something to show, on the scale that suits them.
    pub(super) fn new(
        name: &'static str,
        title: &'static str,
        caption: &'static str,
        columns: usize,
        scale: impl Fn(Vec<f64>) -> Scale,
        mut panels: Vec<Panel>,
    ) -> Self {
        panels.retain(Panel::shows);
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

    /// Whether there is anything in it.
    pub(super) fn is_empty(&self) -> bool {
        self.panels.is_empty()
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
    fn shows(&self) -> bool {
        self.rows
            .iter()
            .any(|row| !matches!(row.shapes[..], [Shape::Words(_)]))
    }

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
