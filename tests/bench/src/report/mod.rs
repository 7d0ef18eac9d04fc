//! What people read of a run: the tables on the terminal, the page, and the document in the repository.
//!
//! What is said is made once, as [`tables`] and as [`plots`] (of [`figure`]s, drawn in [`svg`]); the three places differ only in how they show it
//! ([`text`], [`html`], [`markdown`]).

mod figure;
mod html;
mod markdown;
mod number;
mod plots;
mod svg;
mod tables;
mod text;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::results::Results;

/// The tables, for the terminal.
pub(crate) fn table(results: &Results) -> String {
    text::tables(&tables::all(results))
}

/// Writes the page, `report.html`, and its plots as files of their own into a folder.
pub(crate) fn write(results: &Results, folder: &Path) -> Result<()> {
    let figures = plots::all(results);
    write_plots(&figures, folder)?;
    write_file(
        &folder.join("report.html"),
        &html::page(results, &tables::all(results), &figures),
    )
}

/// Renews the part between the two marks in `BENCHMARKS.md` in a folder, and the plots in `benchmarks` beside it. What people
/// wrote around that part stays.
pub(crate) fn document(results: &Results, folder: &Path) -> Result<()> {
    ensure!(
        !results.quick,
        "a quick run is not for the document: run it without --quick"
    );
    let path = folder.join("BENCHMARKS.md");
    let old =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let figures = plots::all(results);
    let new = markdown::renewed(
        &old,
        &markdown::part(results, &tables::all(results), &figures),
    )
    .with_context(|| format!("cannot renew {}", path.display()))?;
    write_plots(&figures, &folder.join(markdown::PLOTS))?;
    write_file(&path, &new)
}

fn write_plots(figures: &[figure::Figure], folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    for figure in figures {
        write_file(&folder.join(figure.file()), &figure.svg())?;
    }
    Ok(())
}

fn write_file(path: &Path, content: &str) -> Result<()> {
    fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    /// What it writes stays in `target/debug/report-sample`, to be looked at.
    #[test]
    fn a_run_and_the_document_are_written() {
        let program = std::env::current_exe().unwrap();
        let folder = program.ancestors().nth(2).unwrap().join("report-sample");
        let results = sample::results();
        write(&results, &folder).unwrap();
        assert!(folder.join("report.html").exists() && folder.join("bulk.svg").exists());

        let template = Path::new(env!("CARGO_MANIFEST_DIR")).join("../BENCHMARKS.md");
        fs::copy(template, folder.join("BENCHMARKS.md")).unwrap();
        document(&results, &folder).unwrap();
        let document = fs::read_to_string(folder.join("BENCHMARKS.md")).unwrap();
        for figure in plots::all(&results) {
            assert!(document.contains(&format!("({}/{})", markdown::PLOTS, figure.file())));
            assert!(folder.join(markdown::PLOTS).join(figure.file()).exists());
        }
        let quick = Results {
            quick: true,
            ..results.clone()
        };
        assert!(super::document(&quick, &folder).is_err());
        fs::write(folder.join("table.txt"), table(&results)).unwrap();
    }
}
