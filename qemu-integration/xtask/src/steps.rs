//! Named steps, one after the other: what runs, how long it took, what was skipped and why, and a closing summary.

use anyhow::{Context, Result, bail};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

/// The run of a list of steps. It ends at the first failure.
#[derive(Debug)]
pub(crate) struct Steps {
    filter: Vec<String>,
    begun: Instant,
    done: Vec<(String, Outcome)>,
}

#[derive(Debug)]
enum Outcome {
    Passed(Duration),
    Skipped(String),
}

impl Steps {
    /// Steps whose names contain one of `filter`'s words; all when it is empty.
    pub(crate) fn new(filter: &[String]) -> Self {
        Self {
            filter: filter.to_vec(),
            begun: Instant::now(),
            done: Vec::new(),
        }
    }

    /// True when a step of this name is to run.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.filter.is_empty() || self.filter.iter().any(|word| name.contains(word.as_str()))
    }

    /// Runs one step, unless it is filtered out. `work` gives the reason when it has to skip it.
    pub(crate) fn step(
        &mut self,
        name: &str,
        work: impl FnOnce() -> Result<Option<String>>,
    ) -> Result<()> {
        if !self.wants(name) {
            return Ok(());
        }
        eprintln!("\n==> {name}");
        let begun = Instant::now();
        let skipped = work()
            .with_context(|| format!("step `{name}` failed after {:.1} s", seconds(begun)))?;
        let outcome = match skipped {
            Some(reason) => {
                eprintln!("==> {name}: SKIPPED: {reason}");
                Outcome::Skipped(reason)
            }
            None => {
                eprintln!("==> {name}: passed ({:.1} s)", seconds(begun));
                Outcome::Passed(begun.elapsed())
            }
        };
        self.done.push((name.to_owned(), outcome));
        Ok(())
    }

    /// A step that is one command.
    pub(crate) fn command(&mut self, name: &str, command: &mut Command) -> Result<()> {
        self.step(name, || {
            run(command)?;
            Ok(None)
        })
    }

    /// Prints what was done. No step at all is an error: a misspelt filter must not look like success.
    pub(crate) fn finish(self) -> Result<()> {
        if self.done.is_empty() {
            bail!("no step matches {}: try --list", self.filter.join(", "));
        }
        println!("\nsummary");
        for (name, outcome) in &self.done {
            match outcome {
                Outcome::Passed(time) => {
                    println!("  passed   {:>7.1} s  {name}", time.as_secs_f64())
                }
                Outcome::Skipped(reason) => println!("  SKIPPED            {name}: {reason}"),
            }
        }
        let skipped = self
            .done
            .iter()
            .filter(|(_, outcome)| matches!(outcome, Outcome::Skipped(_)))
            .count();
        println!("all in {:.1} s", seconds(self.begun));
        println!(
            "steps: {} passed, 0 failed, {skipped} skipped",
            self.done.len() - skipped
        );
        Ok(())
    }
}

/// Runs a command that must succeed, its output going to the terminal.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let shown = virtproxy_lab::spawn::shown(command);
    eprintln!("$ {shown}");
    let status: ExitStatus = command
        .status()
        .with_context(|| format!("cannot run {shown}"))?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}

fn seconds(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_selects_and_a_failure_names_its_step() {
        let mut steps = Steps::new(&["un".to_owned()]);
        steps.step("fmt", || bail!("must not run")).unwrap();
        let error = format!("{:#}", steps.step("unit", || bail!("broken")).unwrap_err());
        assert!(
            error.starts_with("step `unit` failed") && error.ends_with("broken"),
            "{error}"
        );
        assert!(steps.finish().is_err());
    }
}
