//! Figures: latencies and what processes use.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Latencies of many calls.
pub struct Latencies(Vec<Duration>);

impl Latencies {
    /// Times `call` until `done` says so; it is asked before each call, with the number of calls made.
    pub fn of(
        mut done: impl FnMut(usize) -> bool,
        mut call: impl FnMut() -> Result<()>,
    ) -> Result<Self> {
        let mut all = Vec::new();
        while !done(all.len()) {
            let start = Instant::now();
            call()?;
            all.push(start.elapsed());
        }
        all.sort();
        Ok(Latencies(all))
    }

    /// Those that `call` tells of itself, so many times.
    pub fn timed(times: usize, call: impl FnMut() -> Result<Duration>) -> Result<Self> {
        let mut all = std::iter::repeat_with(call)
            .take(times)
            .collect::<Result<Vec<_>>>()?;
        all.sort();
        Ok(Latencies(all))
    }

    /// The latency that `share` (0 to 1) of the calls did not exceed.
    pub fn percentile(&self, share: f64) -> Duration {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let rank = (self.0.len() as f64 * share) as usize;
        let last = self.0.len().saturating_sub(1);
        self.0.get(rank.min(last)).copied().unwrap_or_default()
    }
}

impl fmt::Display for Latencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |share| self.percentile(share).as_micros();
        write!(
            f,
            "{} calls: p50 {} us, p99 {} us, max {} us",
            self.0.len(),
            at(0.5),
            at(0.99),
            at(1.0)
        )
    }
}

/// Middle, smallest and largest of some figures, as a cell of a table.
pub fn spread(mut figures: Vec<f64>) -> String {
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    match (figures.first(), figures.get(middle), figures.last()) {
        (Some(first), Some(middle), Some(last)) => {
            format!("{middle:.0} ({first:.0} to {last:.0})")
        }
        _ => "-".to_owned(),
    }
}

/// A shell line that prints what the process `pid` uses: descriptors, resident KiB, and nanoseconds of CPU time of
/// all its threads. It runs on the host as well as in a guest.
pub fn usage_script(pid: &str) -> String {
    format!(
        "p={pid}; set -- $(ls /proc/$p/fd | wc -l) $(grep VmRSS /proc/$p/status); \
         echo $1 $3 $(cat /proc/$p/task/*/schedstat | while read run rest; do echo $run; done | tr '\\n' '+')0"
    )
}

/// What a process uses.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Open descriptors.
    pub descriptors: u64,
    /// Resident memory in KiB.
    pub resident_kib: u64,
    /// CPU time of all its threads.
    pub cpu: Duration,
}

impl Usage {
    /// Reads what [`usage_script`] printed.
    pub fn parse(text: &str) -> Result<Self> {
        let fields: Vec<_> = text.split_whitespace().collect();
        let bad = || format!("not what a process uses: {text:?}");
        let number = |at: usize| fields.get(at).and_then(|field| field.parse().ok());
        let terms = fields.get(2).with_context(bad)?.split('+');
        let nanos = terms.map(str::parse::<u64>).sum::<Result<u64, _>>();
        Ok(Usage {
            descriptors: number(0).with_context(bad)?,
            resident_kib: number(1).with_context(bad)?,
            cpu: Duration::from_nanos(nanos.with_context(bad)?),
        })
    }

    /// What the process `pid` of this machine uses.
    pub fn of(pid: u32) -> Result<Self> {
        let output = std::process::Command::new("sh")
            .args(["-c", &usage_script(&pid.to_string())])
            .output()?;
        Self::parse(&String::from_utf8_lossy(&output.stdout))
    }
}

/// The CPU time of each thread of the process `pid` of this machine, by thread id.
pub fn cpu_by_thread(pid: u32) -> Result<BTreeMap<u32, Duration>> {
    let folder = format!("/proc/{pid}/task");
    let mut times = BTreeMap::new();
    for thread in fs::read_dir(&folder).with_context(|| format!("no process {pid}"))? {
        let thread = thread?;
        // One that has ended since is not there any more.
        let Ok(text) = fs::read_to_string(thread.path().join("schedstat")) else {
            continue;
        };
        let nanos = text.split(' ').next().and_then(|text| text.parse().ok());
        let id = thread
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let (id, nanos) = id.zip(nanos).context("not what /proc says of a thread")?;
        times.insert(id, Duration::from_nanos(nanos));
    }
    Ok(times)
}

/// A shell line that prints the KiB that the processes `pids` hold, or 0 for none: each page counted once, and none that
/// they share with a guest as its memory. It runs on the host as well as in a guest.
pub fn memory_script(pids: &str) -> String {
    format!(
        "for p in {pids}; do cat /proc/$p/smaps_rollup; done | \
         awk '/^Pss:/ {{ sum += $2 }} /^Pss_Shmem:/ {{ sum -= $2 }} END {{ print sum + 0 }}'"
    )
}
