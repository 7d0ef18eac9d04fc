//! The order of it all.
//!
//! All ways are started, each with its guest, and stay up. Then, measurement by measurement, rounds go over all of them
//! (A B C A B C). At last come the measurements of ways that have just been started, one way after the other.
//!
//! Nothing that a way does or does not do keeps the others waiting for long: every measurement has a time limit, and a
//! way that fails twice in a row in the same measurement is left out of the rest of it. One that fails is ended at once,
//! since what hangs may go on at the others' cost, and started anew before it is measured again.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cases::{MEASUREMENTS, Measurement, State, Subject};
use crate::interrupt;
use crate::progress::Progress;
use crate::results::{CaseInfo, Cell, Outcome, Results, WayInfo};
use crate::ways::Way;

/// A way that fails so often, one time after the other, is left out.
const PATIENCE: usize = 2;

/// What it roughly takes to start a way, in seconds.
const START: u32 = 8;

/// What is to be measured.
pub(crate) struct Plan {
    /// The ways.
    pub(crate) ways: Vec<Box<dyn Way>>,
    /// The cases, in the order of the report.
    pub(crate) cases: Vec<CaseInfo>,
    /// Rounds of each.
    pub(crate) rounds: u32,
    /// The folder for `results.json`, which is there.
    pub(crate) out: PathBuf,
}

impl Plan {
    /// The measurements to make of ways in `state`.
    fn measurements(&self, state: State) -> Vec<&'static Measurement> {
        let wanted = |one: &&Measurement| one.state == state && self.wants(one);
        MEASUREMENTS.iter().filter(wanted).collect()
    }

    fn wants(&self, measurement: &Measurement) -> bool {
        let mut keys = measurement.cases.iter();
        keys.any(|key| self.cases.iter().any(|case| case.key == *key))
    }

    /// What it all takes, roughly.
    fn seconds(&self) -> u32 {
        let stage = |state, rounds| match &self.measurements(state)[..] {
            [] => 0,
            all => START + rounds * all.iter().map(|one| one.seconds).sum::<u32>(),
        };
        let ways = u32::try_from(self.ways.len()).unwrap_or(u32::MAX);
        ways * (stage(State::Used, self.rounds) + stage(State::Fresh, 1))
    }
}

/// Measures all of `plan`. What was measured is in `results` and in their file, also when this ends with an error.
pub(crate) fn run(plan: &Plan, results: &mut Results) -> Result<()> {
    let folder = virtproxy_lab::temporary_folder()?;
    results.ways = plan.ways.iter().map(|way| info(&**way)).collect();
    results.cases = plan.cases.clone();
    let progress = Progress::new(plan.seconds());
    let ended = Run {
        plan,
        results,
        folder: &folder,
        progress,
    }
    .all();
    if std::env::var_os("VIRTPROXY_KEEP").is_none() {
        let _ = fs::remove_dir_all(&folder);
    }
    ended
}

fn info(way: &dyn Way) -> WayInfo {
    WayInfo {
        key: way.key().to_owned(),
        title: way.key().to_owned(),
        kind: way.kind(),
    }
}

/// A way in the run.
struct Contender<'a> {
    way: &'a dyn Way,
    /// It, while it is up; or why it is not.
    subject: Result<Subject, String>,
    /// How often it was started.
    starts: u32,
    /// How often it has failed, one time after the other.
    failures: usize,
}

impl<'a> Contender<'a> {
    fn new(way: &'a dyn Way) -> Self {
        Contender {
            way,
            subject: Err("not started".to_owned()),
            starts: 0,
            failures: 0,
        }
    }

    fn stop(&mut self) {
        self.subject = Err("ended".to_owned());
    }

    /// Why it cannot be measured so at all.
    fn cannot(&self, measurement: &Measurement) -> Option<String> {
        match &self.subject {
            // It will be started anew.
            Err(_) if self.failures > 0 => None,
            Err(reason) => Some(reason.clone()),
            Ok(subject) => match subject.running().most_connections() {
                Some((most, why)) if most < measurement.connections => Some(why.to_owned()),
                _ => None,
            },
        }
    }

    /// Measures it once.
    fn measure(&mut self, measurement: &Measurement) -> Result<Vec<f64>, String> {
        let Ok(subject) = &mut self.subject else {
            self.failures += 1;
            return Err(self.subject.as_ref().err().cloned().unwrap_or_default());
        };
        let measured = (measurement.measure)(subject);
        match measured {
            Ok(_) => self.failures = 0,
            Err(_) => {
                self.failures += 1;
                self.stop();
            }
        }
        measured.map_err(|error| first_line(&error))
    }
}

struct Run<'a> {
    plan: &'a Plan,
    results: &'a mut Results,
    /// For the sockets and logs of the ways.
    folder: &'a Path,
    progress: Progress,
}

impl Run<'_> {
    fn all(&mut self) -> Result<()> {
        let plan = self.plan;
        let mut contenders: Vec<_> = plan.ways.iter().map(|way| Contender::new(&**way)).collect();
        let [used, fresh] = [State::Used, State::Fresh].map(|state| plan.measurements(state));
        if !used.is_empty() {
            for contender in &mut contenders {
                self.start(contender)?;
            }
        }
        for measurement in used {
            self.measure(measurement, plan.rounds, &mut contenders)?;
        }
        for contender in &mut contenders {
            contender.stop();
        }
        if fresh.is_empty() {
            return Ok(());
        }
        for contender in &mut contenders {
            self.start(contender)?;
            for measurement in &fresh {
                self.measure(measurement, 1, std::slice::from_mut(contender))?;
            }
            contender.stop();
        }
        Ok(())
    }

    /// Starts a way; when it cannot, that is what its rows will say.
    fn start(&mut self, contender: &mut Contender<'_>) -> Result<()> {
        interrupt::check()?;
        let key = contender.way.key();
        self.progress.say(&format!("starting {key}"));
        // The old one goes first: addresses and memory are free again.
        contender.stop();
        contender.starts += 1;
        let folder = self.folder.join(format!("{key}-{}", contender.starts));
        fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        match contender.way.start(&folder) {
            Ok(running) => {
                let mut ways = self.results.ways.iter_mut();
                if let Some(way) = ways.find(|way| way.key == key) {
                    way.title = running.title();
                }
                contender.subject = Ok(Subject::new(running));
            }
            Err(error) => {
                self.progress.say(&format!(": FAILED: {error:#}"));
                contender.subject = Err(format!("does not start: {}", first_line(&error)));
            }
        }
        if contender.starts == 1 {
            self.progress.pass(START);
        }
        self.progress.end_line();
        Ok(())
    }

    /// Makes one measurement of all `contenders`, round by round, and keeps what came of it.
    fn measure(
        &mut self,
        measurement: &Measurement,
        rounds: u32,
        contenders: &mut [Contender<'_>],
    ) -> Result<()> {
        for contender in &mut *contenders {
            if contender.failures > 0 {
                self.start(contender)?;
            }
            contender.failures = 0;
        }
        let mut all = vec![Vec::new(); contenders.len()];
        let nobody = contenders
            .iter()
            .all(|one| one.cannot(measurement).is_some());
        for round in 1..=if nobody { 0 } else { rounds } {
            let name = measurement.cases[0];
            self.progress.say(&format!("{name} {round}/{rounds}:"));
            let mut failures = String::new();
            for (contender, all) in contenders.iter_mut().zip(&mut all) {
                interrupt::check().inspect_err(|_| self.progress.say("\n"))?;
                self.progress.pass(measurement.seconds);
                if contender.cannot(measurement).is_some() || contender.failures >= PATIENCE {
                    continue;
                }
                if contender.failures > 0 {
                    self.progress.say("\n");
                    self.start(contender)?;
                }
                let key = contender.way.key();
                self.progress.say(&format!("  {key}"));
                let measured = contender.measure(measurement);
                match &measured {
                    Ok(figures) => self.progress.say(&format!(" {:.0}", figures[0])),
                    Err(reason) => {
                        self.progress.say(" FAILED");
                        failures += &format!("    {key}: {reason}\n");
                    }
                }
                all.push(measured);
            }
            self.progress.end_line();
            self.progress.say(&failures);
        }
        for (contender, measured) in contenders.iter().zip(&all) {
            self.keep(measurement, rounds, contender, measured);
        }
        self.save()
    }

    /// Makes cells of what `contender` gave.
    fn keep(
        &mut self,
        measurement: &Measurement,
        rounds: u32,
        contender: &Contender<'_>,
        measured: &[Result<Vec<f64>, String>],
    ) {
        let mut failures: Vec<_> = measured
            .iter()
            .filter_map(|one| one.as_ref().err().cloned())
            .collect();
        if measured.len() < rounds as usize {
            failures.push(format!("given up after round {}", measured.len()));
        }
        for (at, key) in measurement.cases.iter().enumerate() {
            if !self.plan.cases.iter().any(|case| case.key == *key) {
                continue;
            }
            let outcome = match contender.cannot(measurement) {
                Some(reason) => Outcome::Cannot(reason),
                None => Outcome::Figures {
                    figures: (0..rounds as usize)
                        .map(|round| Some(measured.get(round)?.as_ref().ok()?[at]))
                        .collect(),
                    failures: failures.clone(),
                },
            };
            self.results.cells.push(Cell {
                way: contender.way.key().to_owned(),
                case: (*key).to_owned(),
                outcome,
            });
        }
    }

    /// Writes the results so far, in one step: a reader or an interruption never sees half of them.
    fn save(&self) -> Result<()> {
        let file = self.plan.out.join("results.json");
        let new = file.with_extension("json.new");
        fs::write(&new, serde_json::to_vec_pretty(self.results)?)
            .and_then(|()| fs::rename(&new, &file))
            .with_context(|| format!("cannot write {}", file.display()))
    }
}

/// The first line of an error, with its causes; guests tell a long story after it.
fn first_line(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    text.lines().next().unwrap_or_default().to_owned()
}
