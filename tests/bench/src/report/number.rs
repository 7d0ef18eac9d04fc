//! Numbers for people: three digits that mean something.

use crate::spread::Spread;

/// A figure or a ratio.
pub(super) fn figure(value: f64) -> String {
    match value.abs() {
        size if !size.is_finite() => "?".to_owned(),
        0.0 => "0".to_owned(),
        size if size >= 99.95 => grouped(value),
        size if size >= 9.995 => format!("{value:.1}"),
        size if size >= 0.0995 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// The least and the greatest, if they differ.
pub(super) fn range(spread: &Spread) -> String {
    if spread.rounds.len() < 2 {
        String::new()
    } else {
        format!("{}–{}", figure(spread.min), figure(spread.max))
    }
}

/// The value at a tick of an axis.
pub(super) fn tick(value: f64) -> String {
    match value.abs() {
        size if size >= 1e7 || (size > 0.0 && size < 1e-4) => format!("{value:.0e}"),
        size if size >= 1e3 => grouped(value),
        // Ticks are of few digits; what is beyond came by adding them up.
        _ => format!("{}", (value * 1e6).round() / 1e6),
    }
}

/// A unit as people write it.
pub(super) fn unit(unit: &str) -> &str {
    if unit == "us" { "µs" } else { unit }
}

/// Without decimals, with a thin space between thousands once there are five digits.
fn grouped(value: f64) -> String {
    let digits = format!("{value:.0}");
    if digits.trim_start_matches('-').len() < 5 {
        return digits;
    }
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) && !text.ends_with('-') {
            text.push('\u{2009}');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_mean_something() {
        let cases = [
            (0.0, "0"),
            (0.0123, "0.012"),
            (0.84, "0.84"),
            (9.999, "10.0"),
            (99.96, "100"),
            (1234.4, "1234"),
            (12_345.0, "12\u{2009}345"),
            (-1_234_567.0, "-1\u{2009}234\u{2009}567"),
            (f64::INFINITY, "?"),
            (f64::NAN, "?"),
        ];
        for (value, text) in cases {
            assert_eq!(figure(value), text);
        }
    }

    #[test]
    fn ticks_are_short() {
        let cases = [
            (0.1 + 0.2, "0.3"),
            (0.0, "0"),
            (1000.0, "1000"),
            (20_000.0, "20\u{2009}000"),
            (5e9, "5e9"),
        ];
        for (value, text) in cases {
            assert_eq!(tick(value), text);
        }
    }
}
