//! The client of the admin socket: one request, one answer.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::{Request, VERSION};

/// The longest answer; a daemon's lists are far shorter.
const MAX_ANSWER: u64 = 16 << 20;

/// How long a daemon may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody listens there.
    #[error("cannot reach a running program at {path}: {source}; is it the PATH of its --admin?")]
    Connect {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke, or the answer makes no sense.
    #[error("no answer: {0}")]
    Answer(#[from] io::Error),
    /// The program refuses.
    #[error("{0}")]
    Refused(String),
}

/// Sends `request` to the program whose admin socket is at `path`, and waits for its answer.
pub fn call(path: &Path, request: &Request) -> Result<Value, CallError> {
    let stream = UnixStream::connect(path).map_err(|source| CallError::Connect {
        path: path.to_owned(),
        source,
    })?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    (&stream).write_all(request.line().as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream.take(MAX_ANSWER)).read_line(&mut line)?;
    if line.is_empty() {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    let mut answer: Value = serde_json::from_str(&line).map_err(io::Error::from)?;
    if answer["version"] != VERSION {
        let other = format!(
            "the program speaks version {}, not {VERSION}",
            answer["version"]
        );
        return Err(io::Error::other(other).into());
    }
    match answer["error"].as_str() {
        Some(error) => Err(CallError::Refused(error.to_owned())),
        None => Ok(answer["ok"].take()),
    }
}
