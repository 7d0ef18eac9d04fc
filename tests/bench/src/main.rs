//! `cargo xtask bench`: every way into a guest, measured side by side.
//!
//! A figure of one way means nothing by itself: the machine is shared, and the guest is emulated where there is no KVM.
//! So each way has a guest of its own, all of them are up at once, and every case goes round all ways before the next
//! round begins (A B C A B C): a drift of the machine hits all alike, and what is said in the end are ratios within a round,
//! with their spread.
//!
//! | file | what it knows |
//! | --- | --- |
//! | `ways` | the ways: ours, the floors under it, and what a user would pick instead |
//! | `cases` | what is measured of each, and how |
//! | `run` | the order of it all; `progress`, `interrupt` and `limits` serve it |
//! | `about` | the machine and the version that were measured |
//! | `results` | the figures, as they are kept in `results.json` |
//! | `spread` | medians and ratios of them |
//! | `goals` | what the ratios are to be, and what they are |
//! | `report` | the page with its plots, the table on the terminal, and the document |

mod about;
mod cases;
mod goals;
mod interrupt;
mod limits;
mod progress;
mod report;
mod results;
mod run;
#[cfg(test)]
mod sample;
mod spread;
mod ways;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use clap::builder::PossibleValuesParser;

use results::Results;
use run::Plan;

/// Measures every way into a guest, side by side.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench", after_help = STATUS)]
struct Arguments {
    /// Fewer ways, cases and rounds; fails when virtproxy has fallen far behind the bare relay of the same run
    #[arg(long)]
    quick: bool,
    /// Rounds of each case [default: 7; with --quick 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Only this way; may be repeated
    #[arg(long = "way", value_name = "KEY", hide_possible_values = true)]
    #[arg(value_parser = PossibleValuesParser::new(ways::all().iter().map(|way| way.key())))]
    ways: Vec<String>,
    /// Only this case; may be repeated
    #[arg(long = "case", value_name = "KEY", hide_possible_values = true)]
    #[arg(value_parser = PossibleValuesParser::new(cases::keys()))]
    cases: Vec<String>,
    /// Folder for results.json and the report [default: `bench` in cargo's target folder]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Renew the document in the repository, too; only of a whole run
    #[arg(long, conflicts_with_all = ["quick", "ways", "cases"])]
    document: bool,
    /// Name the ways and the cases, and measure nothing
    #[arg(long)]
    list: bool,
}

const STATUS: &str = "\
Exit status:
  0  all was measured that the ways can do; what a way cannot do, or failed at, is a row that says why
  1  nothing could be measured, --quick found a regression, or the run was interrupted
  2  the command line is wrong";

/// What `--quick` measures.
const QUICK_WAYS: &[&str] = &["virtproxy", "relay", "relay-chardev"];
const QUICK_CASES: &[&str] = &["to-guest-1", "from-guest-1", "call-p50-idle"];

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.list {
        list();
        return ExitCode::SUCCESS;
    }
    match bench(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn list() {
    println!("ways");
    for way in ways::all() {
        println!("  {}", way.key());
    }
    println!("cases");
    for case in cases::all() {
        println!("  {:20} {} ({})", case.key, case.title, case.unit);
    }
}

fn bench(arguments: &Arguments) -> Result<()> {
    let plan = plan(arguments)?;
    fs::create_dir_all(&plan.out).with_context(|| format!("cannot make {}", plan.out.display()))?;
    interrupt::catch();
    limits::raise();
    let mut results = Results {
        begun: about::now(),
        version: about::version(),
        machine: about::machine()?,
        quick: arguments.quick,
        ways: Vec::new(),
        cases: Vec::new(),
        cells: Vec::new(),
    };
    let ended = run::run(&plan, &mut results);
    if !results.cells.is_empty() {
        println!("\n{}", report::table(&results));
        report::write(&results, &plan.out)?;
        println!("all of it: {}", plan.out.join("report.html").display());
    }
    ended?;
    ensure!(results.measured(), "nothing could be measured: see above");
    if arguments.document {
        report::document(&results, &about::room())?;
    }
    // Who asked for other ways or cases has what was asked for.
    if arguments.quick && arguments.ways.is_empty() && arguments.cases.is_empty() {
        goals::quick_guard(&results)?;
    }
    Ok(())
}

/// Resolves what was asked for.
fn plan(arguments: &Arguments) -> Result<Plan> {
    let wanted = |key: &str, asked: &[String], quick: &[&str]| match asked {
        [] => !arguments.quick || quick.contains(&key),
        asked => asked.iter().any(|asked| asked == key),
    };
    let mut ways = ways::all();
    ways.retain(|way| wanted(way.key(), &arguments.ways, QUICK_WAYS));
    let mut cases = cases::all();
    cases.retain(|case| wanted(&case.key, &arguments.cases, QUICK_CASES));
    Ok(Plan {
        ways,
        cases,
        rounds: arguments
            .rounds
            .unwrap_or(if arguments.quick { 3 } else { 7 }),
        out: match &arguments.out {
            Some(out) => out.clone(),
            None => about::target()?.join("bench"),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn planned(line: &[&str]) -> (Vec<&'static str>, Vec<String>, u32) {
        let arguments = Arguments::try_parse_from([&["bench"], line].concat()).unwrap();
        let plan = plan(&arguments).unwrap();
        let ways = plan.ways.iter().map(|way| way.key()).collect();
        let cases = plan.cases.into_iter().map(|case| case.key).collect();
        (ways, cases, plan.rounds)
    }

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn an_unknown_key_is_told_the_known_ones() {
        let error = Arguments::try_parse_from(["bench", "--way", "pigeon"]).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("relay-chardev"), "{error}");
    }

    #[test]
    fn what_is_asked_for_goes_before_what_is_quick() {
        let (ways, cases, rounds) = planned(&["--quick"]);
        assert_eq!((&ways[..], rounds), (QUICK_WAYS, 3));
        assert_eq!(cases, QUICK_CASES);
        let (ways, cases, rounds) = planned(&["--quick", "--way", "relay", "--rounds", "1"]);
        assert_eq!((&ways[..], rounds), (&["relay"][..], 1));
        assert_eq!(cases, QUICK_CASES);
        let (_, cases, rounds) = planned(&[]);
        assert_eq!((cases.len(), rounds), (cases::all().len(), 7));
    }
}
