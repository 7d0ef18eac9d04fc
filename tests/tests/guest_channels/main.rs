//! Every channel, and what each must stand: one guest with all devices, and a table of what was seen.
//!
//! | file | what it knows |
//! | --- | --- |
//! | `bench` | the guest, its devices, and a program at either end of a channel |
//! | `rows` | the channels: what each end is started with, and where a tap can stand in between |
//! | `cells` | what each must stand |
//!
//! Nothing wrong may ever be delivered: while an end is killed or bytes are put in and taken out, streams with a known
//! pattern run both ways, and each must be a beginning of that pattern, wherever it was cut off. What comes after must
//! be whole. A cell that cannot exist says why; a cell that fails is reported with its logs, the others still run, and
//! the test fails in the end.

mod bench;
mod cells;
mod rows;

use std::time::Instant;

use anyhow::{Result, ensure};

use bench::Bench;
use cells::{CELLS, Verdict};

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn every_channel_stands_everything() -> Result<()> {
    let begun = Instant::now();
    let bench = Bench::new()?;
    let mut rows = rows::all(&bench)?;
    let mut table = format!(
        "| channel | {} |\n|",
        CELLS.map(|cell| cell.name).join(" | ")
    );
    table.push_str(&" --- |".repeat(CELLS.len() + 1));
    let (mut failures, mut reasons) = (Vec::new(), Vec::new());
    for row in &mut rows {
        println!("== {}", row.name);
        table.push_str(&format!("\n| {} |", row.name));
        for (cell, verdict) in CELLS.iter().zip(cells::run_all(&bench, row)) {
            let text = match verdict {
                Verdict::Passed(time) => format!("ok, {:.2} s", time.as_secs_f64()),
                Verdict::CannotBe(reason) => {
                    let known = reasons.iter().position(|known| *known == reason);
                    let at = known.unwrap_or_else(|| {
                        reasons.push(reason);
                        reasons.len() - 1
                    });
                    format!("({})", at + 1)
                }
                Verdict::Failed(error) => {
                    println!("{}: {} FAILED: {error:#}", row.name, cell.name);
                    // The cause alone: what goes before it are the logs of both ends.
                    failures.push(format!(
                        "{}: {}: {}",
                        row.name,
                        cell.name,
                        error.root_cause()
                    ));
                    "FAILED".to_owned()
                }
            };
            println!("{}: {text}", cell.name);
            table.push_str(&format!(" {text} |"));
        }
        row.stop(&bench)?;
    }
    println!("\n{table}\n");
    for (n, reason) in reasons.iter().enumerate() {
        println!("({}) {reason}", n + 1);
    }
    println!("in {:.0} s", begun.elapsed().as_secs_f64());
    let wrong = bench.wrong_bytes()?;
    ensure!(wrong.is_empty(), "delivered, but never sent: {wrong}");
    ensure!(
        failures.is_empty(),
        "these cells failed, see above:\n{}",
        failures.join("\n")
    );
    Ok(())
}
