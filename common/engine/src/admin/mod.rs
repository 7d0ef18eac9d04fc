//! The admin socket: what a running program is asked and told, by whoever may use its UNIX socket.
//!
//! # Theory of operation
//!
//! A client sends requests and gets one answer to each, in order. Both are JSON objects on a line of their own
//! (docs/admin.md is the reference):
//!
//! ```text
//! {"version":1,"request":"port-remove","name":"org.example.0"}
//! {"version":1,"ok":{}}                      or   {"version":1,"error":"there is no port \"org.example.0\""}
//! ```
//!
//! This file knows lines and their bounds; what the requests mean is a [`Handler`]'s business, so each program adds its
//! own. The socket is its owner's alone (mode 0600), so a client is trusted to command, but not to be well: each has a
//! task of its own, which reads at most a [line](MAX_LINE), and ends if the client is silent or does not read for
//! a minute. Nobody waits for it but itself.

mod client;
mod request;

use std::io;
use std::rc::Rc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::warn;

pub use client::{CallError, call};
pub use request::{Request, RequestError};

use crate::channel::BoxFuture;

/// The version of the protocol, which is in every line.
pub const VERSION: u64 = 1;

/// The longest request, in bytes, with its line end.
pub const MAX_LINE: usize = 16 * 1024;

/// Clients at a time; one more is told so.
pub const MAX_CLIENTS: usize = 16;

/// How long a client may take for its next request, and to take its answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long to wait when no client can be accepted: descriptors may come back.
const PAUSE: Duration = Duration::from_millis(500);

/// Carries requests out.
pub trait Handler {
    /// The answer, or one line that says what is wrong and how to cure it. Requests of several clients may be under way
    /// at the same time.
    fn handle(&self, request: Request) -> BoxFuture<'_, Result<Value, String>>;
}

/// Serves clients for ever. To be run on a `LocalSet`.
pub async fn serve(listener: UnixListener, handler: Rc<dyn Handler>) {
    let mut clients = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = clients.join_next() => continue,
        };
        match accepted {
            Ok((client, _)) if clients.len() >= MAX_CLIENTS => refuse(&client),
            Ok((client, _)) => {
                let handler = handler.clone();
                // How a client ends is its own business.
                clients.spawn_local(async move { attend(client, &*handler).await.ok() });
            }
            Err(error) => {
                warn!("cannot accept an admin client: {error}");
                sleep(PAUSE).await;
            }
        }
    }
}

fn refuse(client: &UnixStream) {
    let full = format!("{MAX_CLIENTS} clients are there already: try again later");
    // There is room in a new socket for a line.
    let _ = client.try_write(line(Err(full)).as_bytes());
}

async fn attend(mut client: UnixStream, handler: &dyn Handler) -> io::Result<()> {
    let (reader, mut writer) = client.split();
    let mut reader = BufReader::new(reader);
    let mut request = Vec::new();
    loop {
        request.clear();
        let limit = u64::try_from(MAX_LINE).unwrap_or(u64::MAX);
        let mut limited = (&mut reader).take(limit);
        timeout(PATIENCE, limited.read_until(b'\n', &mut request)).await??;
        let whole = request.pop_if(|last| *last == b'\n').is_some();
        let answer = match whole {
            true => match Request::parse(&request) {
                Ok(request) => handler.handle(request).await,
                Err(error) => Err(error.to_string()),
            },
            false if request.len() >= MAX_LINE => Err(RequestError::Long.to_string()),
            // It ended, perhaps in the middle of a line.
            false => return Ok(()),
        };
        timeout(PATIENCE, writer.write_all(line(answer).as_bytes())).await??;
        if !whole {
            return Ok(());
        }
    }
}

fn line(answer: Result<Value, String>) -> String {
    let answer = match answer {
        Ok(ok) => json!({"version": VERSION, "ok": ok}),
        Err(error) => json!({"version": VERSION, "error": error}),
    };
    format!("{answer}\n")
}

#[cfg(test)]
mod tests;
