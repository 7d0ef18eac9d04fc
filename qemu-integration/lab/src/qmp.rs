//! QEMU's control protocol, as much of it as tests need.
//!
//! One JSON object a line each way. Every command carries an id and its answer repeats it; events come in between at
//! any time and are kept until somebody waits for them.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How many events are kept; the oldest goes first.
const EVENTS: usize = 1000;
/// QEMU answers at once unless its main loop hangs.
const ANSWER: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub(crate) struct Qmp {
    stream: UnixStream,
    unread: Vec<u8>,
    events: VecDeque<Value>,
    last_id: u64,
}

impl Qmp {
    /// Greets and leaves the negotiation mode.
    pub(crate) fn new(stream: UnixStream) -> Result<Self> {
        let mut qmp = Self {
            stream,
            unread: Vec::new(),
            events: VecDeque::new(),
            last_id: 0,
        };
        let greeting = qmp.line(Instant::now() + ANSWER)?;
        if greeting.get("QMP").is_none() {
            bail!("QEMU greeted with {greeting}");
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Sends one command and gives what it returns.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.last_id += 1;
        let id = self.last_id;
        let mut text = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
        text.push('\n');
        self.stream
            .write_all(text.as_bytes())
            .with_context(|| format!("QEMU takes no commands ({command})"))?;
        let deadline = Instant::now() + ANSWER;
        loop {
            let mut line = self
                .line(deadline)
                .with_context(|| format!("no answer to {command}"))?;
            if line.get("id").and_then(Value::as_u64) == Some(id) {
                if let Some(error) = line.get("error") {
                    bail!("QEMU refused {command}: {error}");
                }
                return Ok(line.get_mut("return").map_or(Value::Null, Value::take));
            }
            self.keep(line);
        }
    }

    /// Waits for an event; one that came earlier and was not waited for counts.
    pub(crate) fn event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return self.events.remove(at).context("the event was just there");
            }
            let line = self
                .line(deadline)
                .with_context(|| format!("no event {name} within {limit:?}"))?;
            self.keep(line);
        }
    }

    /// Forgets the events so far.
    pub(crate) fn forget_events(&mut self) {
        self.events.clear();
    }

    fn keep(&mut self, line: Value) {
        if line.get("event").is_some() {
            if self.events.len() == EVENTS {
                self.events.pop_front();
            }
            self.events.push_back(line);
        }
    }

    fn line(&mut self, deadline: Instant) -> Result<Value> {
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                return serde_json::from_slice(&line)
                    .context("QEMU sent something that is not JSON");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("QEMU did not answer in time: its main loop hangs or it is gone");
            }
            self.stream
                .set_read_timeout(Some(left))
                .context("cannot set a time limit")?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!("QEMU has closed its control socket"),
                Ok(count) => self.unread.extend_from_slice(&buffer[..count]),
                Err(error) if is_pause(&error) => {}
                Err(error) => return Err(error).context("cannot read from QEMU's control socket"),
            }
        }
    }
}

/// A read that only ran out of time.
pub(crate) fn is_pause(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    #[test]
    fn events_between_question_and_answer_are_kept() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qemu = std::thread::spawn(move || {
            let mut out = theirs.try_clone().unwrap();
            let mut lines = BufReader::new(theirs).lines();
            writeln!(out, r#"{{"QMP": {{}}}}"#).unwrap();
            lines.next().unwrap().unwrap();
            writeln!(out, r#"{{"return": {{}}, "id": 1}}"#).unwrap();
            lines.next().unwrap().unwrap();
            writeln!(out, r#"{{"event": "STOP"}}"#).unwrap();
            writeln!(out, r#"{{"return": {{"a": 5}}, "id": 2}}"#).unwrap();
            lines.next().unwrap().unwrap();
            writeln!(out, r#"{{"error": {{"desc": "no such thing"}}, "id": 3}}"#).unwrap();
        });
        let mut qmp = Qmp::new(ours).unwrap();
        assert_eq!(qmp.execute("stop", json!({})).unwrap()["a"], 5);
        assert_eq!(
            qmp.event("STOP", Duration::from_secs(1)).unwrap()["event"],
            "STOP"
        );
        assert!(
            qmp.execute("x", json!({}))
                .unwrap_err()
                .to_string()
                .contains("no such thing")
        );
        qemu.join().unwrap();
        assert!(
            format!(
                "{:#}",
                qmp.event("STOP", Duration::from_secs(1)).unwrap_err()
            )
            .contains("closed")
        );
    }
}
