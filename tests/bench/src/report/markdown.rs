//! The part of `tests/BENCHMARKS.md` that a run renews.

use std::fmt::Write as _;

use anyhow::{Result, bail};

use super::figure::Figure;
use super::tables::{Entry, Table, Tables};
use crate::results::Results;

/// The folder of the plots, beside the document.
pub(super) const PLOTS: &str = "benchmarks";

/// Before what is renewed.
const BEGIN: &str = "<!-- from here on renewed by `cargo xtask bench --document` -->";
/// Behind it.
const END: &str = "<!-- up to here renewed by `cargo xtask bench --document` -->";

/// A document with its part between the marks exchanged.
pub(super) fn renewed(document: &str, part: &str) -> Result<String> {
    let Some((before, rest)) = document.split_once(BEGIN) else {
        bail!("it lacks the line {BEGIN}")
    };
    let Some((_, after)) = rest.split_once(END) else {
        bail!("it lacks the line {END} behind {BEGIN}")
    };
    Ok(format!("{before}{BEGIN}\n\n{part}\n{END}{after}"))
}

/// What stands between the marks.
pub(super) fn part(results: &Results, tables: &Tables, figures: &[Figure]) -> String {
    let mut text = format!(
        "Begun {}, version {}, on:\n\n",
        escaped(&results.begun),
        escaped(&results.version)
    );
    for line in &results.machine {
        let _ = writeln!(text, "* {}", escaped(line));
    }
    text.push_str("\n| way | what it is |\n| --- | --- |\n");
    for way in &results.ways {
        let _ = writeln!(text, "| {} | {} |", escaped(&way.key), escaped(&way.title));
    }
    add_table(&mut text, &tables.goals);
    for figure in figures {
        let _ = writeln!(
            text,
            "\n### {}\n\n![{}. {}]({PLOTS}/{})",
            figure.title,
            figure.title,
            figure.caption,
            figure.file()
        );
    }
    tables
        .figures
        .iter()
        .chain([&tables.gaps])
        .for_each(|table| add_table(&mut text, table));
    text
}

fn add_table(text: &mut String, table: &Table) {
    if table.rows.is_empty() {
        return;
    }
    let _ = writeln!(text, "\n### {}\n", table.title);
    if !table.note.is_empty() {
        let _ = writeln!(text, "{}\n", table.note);
    }
    let line = |entries: Vec<String>| format!("| {} |\n", entries.join(" | "));
    text.push_str(&line(table.head.iter().map(|name| escaped(name)).collect()));
    let rule = |column| {
        if table.of_figures && column > 0 {
            "---:"
        } else {
            "---"
        }
    };
    text.push_str(&line(
        (0..table.head.len())
            .map(|column| rule(column).to_owned())
            .collect(),
    ));
    for row in &table.rows {
        text.push_str(&line(row.iter().map(entry).collect()));
    }
}

fn entry(entry: &Entry) -> String {
    match (escaped(&entry.main), escaped(&entry.small)) {
        (main, small) if small.is_empty() => main,
        (main, small) => format!("{main} ({small})"),
    }
}

/// Text that stays in its cell and is no markup.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '|' | '*' | '_' | '`' | '[' | ']' | '\\' => escaped.extend(['\\', letter]),
            '<' => escaped.push_str("&lt;"),
            letter if letter.is_control() => escaped.push(' '),
            letter => escaped.push(letter),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::super::{plots, tables};
    use super::*;
    use crate::sample;

    fn made(results: &Results) -> String {
        part(results, &tables::all(results), &plots::all(results))
    }

    #[test]
    fn what_people_wrote_stays() {
        let old = format!("# Benchmarks\n\n{BEGIN}\nold\n{END}\n\n## What holds it\n");
        let new = renewed(&old, "new\n").unwrap();
        assert_eq!(
            new,
            format!("# Benchmarks\n\n{BEGIN}\n\nnew\n\n{END}\n\n## What holds it\n")
        );
        assert_eq!(renewed(&new, "new\n").unwrap(), new);
        assert!(renewed("# Benchmarks\n", "new").is_err());
        assert!(renewed(&format!("{END}{BEGIN}"), "new").is_err());
    }

    #[test]
    fn rows_stay_rows() {
        let text = made(&sample::results());
        assert!(
            text.contains("it stalls \\| beyond 1 MiB at times"),
            "{text}"
        );
        assert!(text.contains("![Bulk. "), "{text}");
        for row in text.lines().filter(|line| line.starts_with('|')) {
            assert!(row.ends_with(" |"), "{row}");
        }
        made(&sample::empty());
    }

    #[test]
    fn the_document_in_the_repository_can_be_renewed() {
        let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../BENCHMARKS.md");
        renewed(&std::fs::read_to_string(document).unwrap(), "").unwrap();
    }
}
