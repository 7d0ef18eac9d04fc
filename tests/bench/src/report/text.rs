//! The tables for the terminal.

use std::fmt::Write as _;

use super::svg::wrapped;
use super::tables::{Entry, Table, Tables};

/// The widest that an entry of words gets: longer ones go on in the next line.
const WIDEST: usize = 44;

/// One below the other. The goals come late: that is where people look.
pub(super) fn tables(
    Tables {
        goals,
        figures,
        gaps,
    }: &Tables,
) -> String {
    let shown = figures
        .iter()
        .chain([goals, gaps])
        .filter(|table| !table.rows.is_empty());
    shown.map(table).collect::<Vec<_>>().join("\n")
}

fn table(table: &Table) -> String {
    let head = table
        .head
        .iter()
        .map(|name| Entry {
            main: name.clone(),
            small: String::new(),
        })
        .collect();
    let rows = || [&head].into_iter().chain(&table.rows);
    let shown: Vec<Vec<Vec<String>>> = if table.of_figures {
        let widths: Vec<usize> = (0..table.head.len())
            .map(|column| {
                rows()
                    .map(|row| row[column].main.chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        rows()
            .map(|row| {
                row.iter()
                    .zip(&widths)
                    .enumerate()
                    .map(|(column, (entry, width))| vec![aligned(entry, column > 0, *width)])
                    .collect()
            })
            .collect()
    } else {
        rows()
            .map(|row| {
                row.iter()
                    .map(|entry| wrapped(&format!("{} {}", entry.main, entry.small), WIDEST))
                    .collect()
            })
            .collect()
    };
    let width = |column: usize| {
        shown
            .iter()
            .flat_map(|row: &Vec<Vec<String>>| &row[column])
            .map(|line| line.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..table.head.len())
        .map(|column| width(column).unwrap_or(0))
        .collect();
    let mut text = format!("{}\n", table.title);
    if !table.note.is_empty() {
        let _ = writeln!(text, "{}", table.note);
    }
    for row in &shown {
        for line in 0..row.iter().map(Vec::len).max().unwrap_or(0) {
            let mut all = String::new();
            for (entry, width) in row.iter().zip(&widths) {
                let part = entry.get(line).map_or("", String::as_str);
                let _ = write!(all, "  {part:<width$}");
            }
            let _ = writeln!(text, "{}", all.trim_end());
        }
    }
    text
}

/// An entry of a table of figures: those are set by their right edge, with the spread behind it.
fn aligned(entry: &Entry, right: bool, width: usize) -> String {
    let Entry { main, small } = entry;
    if right {
        format!("{main:>width$} {small}")
    } else {
        format!("{main:<width$} {small}")
    }
}

#[cfg(test)]
mod tests {
    use super::super::{table, tables};
    use crate::sample;

    #[test]
    fn the_terminal_has_ratios_first_and_columns_in_line() {
        let text = table(&sample::results());
        assert!(
            text.starts_with("virtproxy divided by virtproxy-chardev, relay"),
            "{text}"
        );
        let lines: Vec<&str> = text.lines().collect();
        let head = lines
            .iter()
            .position(|line| line.starts_with("virtproxy divided by passt"))
            .unwrap()
            + 2;
        let column = |line: &str, word: &str| line[..line.find(word).unwrap()].chars().count();
        assert!(lines[head].contains("yamux"));
        assert!(column(lines[head], "yamux") < 120);
        assert!(text.contains("✗ missed by") && text.contains("✓ reached"));
    }

    #[test]
    fn nothing_is_shown_without_panic() {
        let empty = sample::empty();
        assert!(tables::all(&empty).figures.is_empty());
        assert!(table(&empty).contains("– not measured"));
    }
}
