//! Just enough SVG: a drawing of classed shapes, and the scales to place them by.
//!
//! Shapes have classes and no colours, so that one style sheet, [`STYLE`], gives them theirs in the page as in a file, by
//! day and by night.

use std::fmt::Write as _;

use super::number;

/// How wide a letter of a class-less text is at most, in the units of the drawing.
pub(super) const LETTER: f64 = 6.7;

/// What gives the shapes their colours.
pub(super) const STYLE: &str = "\
svg{font-family:system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif}
svg text{font-size:11px;fill:#24292f}
svg .r{text-anchor:end}svg .m{text-anchor:middle}
svg .b{font-weight:bold}svg .h{font-size:15px;font-weight:bold}
svg text.q{fill:#59636e}svg text.n{fill:#6b7580;font-style:italic}
svg .paper{fill:#ffffff}
svg line{stroke-width:1;stroke:#24292f}svg .grid{stroke:#e3e7eb}svg .one{stroke:#59636e;stroke-width:1.5}
svg .goal{stroke:#24292f;stroke-width:2}
svg .ours{fill:#0a5fd1}svg .floor{fill:#7d8590}svg .peer{fill:#c9a66b}
svg line.ours{stroke:#0a5fd1}svg line.floor{stroke:#7d8590}svg line.peer{stroke:#c9a66b}
svg .wide{stroke-width:6;stroke-opacity:.4}
svg .pale{fill-opacity:.4}svg line.pale{stroke-opacity:.6}
svg .dot{fill:#24292f;fill-opacity:.55}svg .mark{stroke:#ffffff;stroke-width:.8}
@media(prefers-color-scheme:dark){
svg text{fill:#e6edf3}svg text.q{fill:#9aa5b1}svg text.n{fill:#8b949e}
svg .paper{fill:#0d1117}
svg line{stroke:#e6edf3}svg .grid{stroke:#2b323b}svg .one{stroke:#9aa5b1}svg .goal{stroke:#e6edf3}
svg .ours{fill:#58a6ff}svg .floor{fill:#8b949e}svg .peer{fill:#9c7f4d}
svg line.ours{stroke:#58a6ff}svg line.floor{stroke:#8b949e}svg line.peer{stroke:#9c7f4d}
svg .dot{fill:#e6edf3}svg .mark{stroke:#0d1117}
}
";

/// A drawing.
pub(super) struct Svg {
    /// How wide it is.
    pub(super) width: f64,
    /// How high it is.
    pub(super) height: f64,
    body: String,
}

impl Svg {
    /// An empty one.
    pub(super) fn new(width: f64, height: f64) -> Self {
        Self {
            width,
            height,
            body: String::new(),
        }
    }

    /// A line from one point to another.
    pub(super) fn line(&mut self, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        self.add(&format!(
            r#"<line class="{class}" x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}"/>"#
        ));
    }

    /// A rectangle: its left upper corner, and its size.
    pub(super) fn rect(&mut self, class: &str, (x, y): (f64, f64), (width, height): (f64, f64)) {
        self.add(&format!(r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}"/>"#));
    }

    /// A disc around a point.
    pub(super) fn disc(&mut self, class: &str, (x, y): (f64, f64), radius: f64) {
        self.add(&format!(
            r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="{radius:.1}"/>"#
        ));
    }

    /// A square on its corner, around a point.
    pub(super) fn diamond(&mut self, class: &str, (x, y): (f64, f64), radius: f64) {
        let (left, right, top, bottom) = (x - radius, x + radius, y - radius, y + radius);
        self.add(&format!(
            r#"<path class="{class}" d="M{left:.1} {y:.1}L{x:.1} {top:.1}L{right:.1} {y:.1}L{x:.1} {bottom:.1}Z"/>"#
        ));
    }

    /// Words on a base line; the class says whether the point is their start, middle or end.
    pub(super) fn text(&mut self, class: &str, (x, y): (f64, f64), words: &str) {
        self.add(&format!(
            r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{}</text>"#,
            escaped(words)
        ));
    }

    /// Another drawing, moved.
    pub(super) fn place(&mut self, (x, y): (f64, f64), other: &Self) {
        self.add(&format!(r#"<g transform="translate({x:.1} {y:.1})">"#));
        self.body.push_str(&other.body);
        self.add("</g>");
    }

    /// What follows until [`Self::close`] belongs together, and has this to say to who points at it.
    pub(super) fn open(&mut self, hint: &str) {
        self.add(&format!("<g><title>{}</title>", escaped(hint)));
    }

    /// The end of what belongs together.
    pub(super) fn close(&mut self) {
        self.add("</g>");
    }

    /// For a page that has [`STYLE`]; the label is for who cannot see it.
    pub(super) fn inline(&self, label: &str) -> String {
        self.element(label, "")
    }

    /// A file of its own.
    pub(super) fn file(&self, label: &str) -> String {
        let paper = format!(
            r#"<rect class="paper" width="{:.0}" height="{:.0}"/>"#,
            self.width, self.height
        );
        self.element(label, &format!("<style>\n{STYLE}</style>\n{paper}\n"))
    }

    fn element(&self, label: &str, first: &str) -> String {
        let Self {
            width,
            height,
            body,
        } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
             height=\"{height:.0}\" role=\"img\" aria-label=\"{}\">\n{first}{body}</svg>\n",
            escaped(label)
        )
    }

    fn add(&mut self, element: &str) {
        let _ = writeln!(self.body, "{element}");
    }
}

/// Text as XML has it, without what XML cannot have.
pub(super) fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' | '\t' => escaped.push(' '),
            '\u{fffe}' | '\u{ffff}' => {}
            letter if letter.is_control() => {}
            letter => escaped.push(letter),
        }
    }
    escaped
}

/// Text in lines of at most so many letters, unless a word is longer.
pub(super) fn wrapped(text: &str, letters: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split([' ', '\n']).filter(|word| !word.is_empty()) {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= letters => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Where a value lies on an axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scale {
    /// From zero to this.
    Linear(f64),
    /// From the one to the other, by their logarithms.
    Log(f64, f64),
}

/// The steps within a decade that an axis may end at.
const STEPS: [f64; 3] = [1.0, 2.0, 5.0];

/// What part of an axis the words at a tick need.
const ROOM: f64 = 0.14;

impl Scale {
    /// From zero to the greatest of these, or a little more.
    pub(super) fn linear(values: impl IntoIterator<Item = f64>) -> Self {
        let greatest = values
            .into_iter()
            .filter(|value| value.is_finite())
            .fold(0.0, f64::max);
        if greatest <= 0.0 {
            return Self::Linear(1.0);
        }
        let step = step_below(greatest / 2.0);
        Self::Linear((greatest / step).ceil() * step)
    }

    /// From the least of these that has a logarithm to the greatest, or a little more.
    pub(super) fn log(values: impl IntoIterator<Item = f64>) -> Self {
        let (mut least, mut greatest) = (f64::INFINITY, 0.0_f64);
        for value in values
            .into_iter()
            .filter(|value| value.is_finite() && *value > 0.0)
        {
            (least, greatest) = (least.min(value), greatest.max(value));
        }
        if greatest <= 0.0 {
            return Self::Log(1.0, 10.0);
        }
        let (from, to) = (step_below(least / 1.05), step_above(greatest * 1.05));
        Self::Log(from, to)
    }

    /// The part of the axis that lies before a value; nothing for one that cannot be shown.
    pub(super) fn part(self, value: f64) -> Option<f64> {
        let part = match self {
            Self::Linear(greatest) => value / greatest,
            Self::Log(least, greatest) => (value / least).ln() / (greatest / least).ln(),
        };
        part.is_finite().then(|| part.clamp(0.0, 1.0))
    }

    /// The values that have a line, and what stands at it: nothing, where that would be too close to another.
    pub(super) fn ticks(self) -> Vec<(f64, String)> {
        let values: Vec<f64> = match self {
            Self::Linear(greatest) => {
                let step = step_above(greatest / 5.0);
                (0..=5)
                    .map(|count| f64::from(count) * step)
                    .filter(|value| *value <= greatest * 1.000_001)
                    .collect()
            }
            Self::Log(least, greatest) => {
                // No axis is so long: this only bounds what a figure out of the blue can ask for.
                let decades = decade(least).max(-9)..=decade(greatest).min(12);
                // Whole decades first: they are to have their words.
                let values = STEPS
                    .iter()
                    .flat_map(|step| decades.clone().map(move |decade| step * ten(decade)));
                values
                    .filter(|value| *value > least * 0.999_999 && *value < greatest * 1.000_001)
                    .collect()
            }
        };
        let mut worded: Vec<f64> = Vec::new();
        let ticks = values.into_iter().filter_map(|value| {
            let place = self.part(value)?;
            let free = worded.iter().all(|other| (place - other).abs() > ROOM);
            let words = if free {
                number::tick(value)
            } else {
                String::new()
            };
            worded.extend(free.then_some(place));
            Some((value, words))
        });
        ticks.collect()
    }
}

fn ten(decade: i32) -> f64 {
    10_f64.powi(decade)
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "a logarithm of a double is of three digits"
)]
fn decade(value: f64) -> i32 {
    // A power of ten is not to fall into the decade below it by rounding.
    (value.log10() + 1e-9).floor() as i32
}

/// The greatest step that is not above a value.
fn step_below(value: f64) -> f64 {
    let ten = ten(decade(value));
    STEPS
        .iter()
        .rev()
        .map(|step| step * ten)
        .find(|step| *step <= value * 1.000_001)
        .unwrap_or(ten)
}

/// The least step that is not below a value.
fn step_above(value: f64) -> f64 {
    let ten = ten(decade(value));
    STEPS
        .iter()
        .map(|step| step * ten)
        .find(|step| *step >= value * 0.999_999)
        .unwrap_or(ten * 10.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(scale: Scale) -> String {
        let mut ticks = scale.ticks();
        ticks.sort_by(|(one, _), (other, _)| one.total_cmp(other));
        ticks
            .into_iter()
            .map(|(_, words)| {
                if words.is_empty() {
                    "|".to_owned()
                } else {
                    words
                }
            })
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn an_axis_ends_at_a_round_number() {
        assert_eq!(Scale::linear([910.0, 1220.0]), Scale::Linear(1500.0));
        assert_eq!(words(Scale::Linear(1500.0)), "0 500 1000 1500");
        assert_eq!(Scale::log([0.12, 9.0]), Scale::Log(0.1, 10.0));
        assert_eq!(words(Scale::Log(0.1, 10.0)), "0.1 0.2 0.5 1 2 5 10");
        assert_eq!(words(Scale::Log(20.0, 5000.0)), "20 | 100 | | 1000 | 5000");
    }

    #[test]
    fn a_scale_bears_anything() {
        for scale in [
            Scale::linear([]),
            Scale::log([]),
            Scale::linear([f64::NAN, f64::INFINITY, -1.0]),
            Scale::log([0.0, f64::NAN]),
            Scale::log([5.0]),
            Scale::log([1e-300, 1e300]),
            Scale::linear([1e-300]),
        ] {
            let ticks = scale.ticks();
            assert!(ticks.len() < 70, "{scale:?}: {ticks:?}");
            for value in [0.0, 1.0, -1.0, f64::NAN, f64::INFINITY, 1e300] {
                assert!(
                    scale
                        .part(value)
                        .is_none_or(|part| (0.0..=1.0).contains(&part)),
                    "{scale:?} {value}"
                );
            }
        }
    }

    #[test]
    fn a_place_is_by_the_logarithm() {
        let scale = Scale::Log(0.1, 10.0);
        assert!((scale.part(1.0).unwrap() - 0.5).abs() < 1e-9);
        assert_eq!(scale.part(0.0), None);
        assert_eq!(Scale::Linear(10.0).part(0.0), Some(0.0));
    }

    #[test]
    fn words_are_escaped() {
        assert_eq!(
            escaped("a<b> & \"c\"\u{0}\u{1b}[1m"),
            "a&lt;b&gt; &amp; &quot;c&quot;[1m"
        );
        assert_eq!(wrapped("one two\nthree", 7), ["one two", "three"]);
        assert!(wrapped("", 7).is_empty());
    }
}
