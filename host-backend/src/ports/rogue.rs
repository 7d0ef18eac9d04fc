//! A client of the admin socket out of a fuzzer's bytes.
//!
//! [`run`] sends its input, in pieces, to a real admin server, whose handler takes requests apart as [`Ports`](super::Ports)
//! does but carries none out: the places of a fuzzer would be files of this machine. What must hold, besides that nothing
//! panics:
//!
//! * each line gets one answer, in order, and the first that is too long the last one;
//! * an answer is one line of JSON with the version and either `ok` or `error`, and its length is bounded;
//! * what is understood as a port is printed as what parses to the same.

use std::io;
use std::path::PathBuf;
use std::rc::Rc;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::{Builder, Runtime};
use tokio::task::LocalSet;
use virtproxy_engine::admin::{self, Handler, MAX_LINE, Request, VERSION};
use virtproxy_engine::channel::BoxFuture;
use virtproxy_engine::unix_socket::{self, SocketFile};

use super::{Asked, PortError};

/// What a quoted character may become: an escape of six bytes within a string that is escaped itself.
const LONGEST: usize = 12 * MAX_LINE + 1024;

/// Says what it was asked.
struct Echo;

impl Handler for Echo {
    fn handle(&self, request: Request) -> BoxFuture<'_, Result<Value, String>> {
        Box::pin(async {
            match Asked::new(request) {
                Ok(Asked::Add(arg)) => {
                    assert_eq!(arg.to_string().parse().as_ref(), Ok(&arg));
                    Ok(json!(arg.to_string()))
                }
                Ok(Asked::Remove(name)) => Ok(json!(name)),
                Ok(Asked::List | Asked::Counters) => Ok(json!([])),
                Err(error) => Err(PortError::to_string(&error)),
            }
        })
    }
}

/// One for all inputs of a thread.
struct Server {
    runtime: Runtime,
    tasks: LocalSet,
    path: PathBuf,
    _file: SocketFile,
}

impl Server {
    fn new() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let name = format!(
            "virtproxy-rogue-{:?}",
            (std::process::id(), std::thread::current().id())
        );
        let path = std::env::temp_dir().join(name);
        let (listener, file) = unix_socket::listen(&path, 16).map_err(io::Error::other)?;
        listener.set_nonblocking(true)?;
        let listener = {
            let _inside = runtime.enter();
            UnixListener::from_std(listener)?
        };
        let tasks = LocalSet::new();
        tasks.spawn_local(admin::serve(listener, Rc::new(Echo)));
        Ok(Server {
            runtime,
            tasks,
            path,
            _file: file,
        })
    }

    /// All answers to what is said in pieces of `piece` bytes.
    fn ask(&self, said: &[u8], piece: usize) -> io::Result<Vec<u8>> {
        self.tasks.block_on(&self.runtime, async {
            let mut client = UnixStream::connect(&self.path).await?;
            let (mut reader, mut writer) = client.split();
            let write = async {
                for part in said.chunks(piece) {
                    // It need not listen to the end.
                    if writer.write_all(part).await.is_err() {
                        break;
                    }
                    tokio::task::yield_now().await;
                }
                writer.shutdown().await
            };
            let mut answers = Vec::new();
            let read = reader.read_to_end(&mut answers);
            // It may close with a part of what was said unread, which is a reset.
            let _ = tokio::join!(write, read);
            Ok(answers)
        })
    }
}

thread_local! {
    static SERVER: Server = Server::new().expect("a socket can be made in the folder for temporary files");
}

/// Does what the bytes say, and panics if something is as it must not be. The first byte says in what pieces the others
/// are sent, and whether one of them is to be repeated beyond the longest line.
pub fn run(bytes: &[u8]) {
    let Some((how, said)) = bytes.split_first() else {
        return;
    };
    let piece = [1, 7, 100, usize::MAX][usize::from(how % 4)];
    let mut said = said.to_vec();
    if how >> 5 == 7
        && let Some(last) = said.last().copied()
    {
        let beyond = usize::from(how >> 2 & 7);
        said.extend(std::iter::repeat_n(last, MAX_LINE - 4 + beyond));
    }
    let piece = piece.max(said.len() / 64);
    let answers = SERVER
        .with(|server| server.ask(&said, piece))
        .expect("the server is there");
    let answers = String::from_utf8(answers).expect("JSON is UTF-8");
    let mut count = 0;
    for answer in answers.split_inclusive('\n') {
        assert!(
            answer.ends_with('\n') && answer.len() <= LONGEST,
            "{answer}"
        );
        let answer: Value = serde_json::from_str(answer).expect("an answer is JSON");
        assert_eq!(answer["version"], VERSION);
        assert!(
            answer["ok"].is_null() != answer["error"].is_null(),
            "{answer}"
        );
        count += 1;
    }
    assert_eq!(count, expected(&said));
}

/// How many answers there must be.
fn expected(said: &[u8]) -> usize {
    let mut lines = 0;
    for line in said.split_inclusive(|byte| *byte == b'\n') {
        if line.len() > MAX_LINE || line.len() == MAX_LINE && !line.ends_with(b"\n") {
            return lines + 1;
        }
        lines += usize::from(line.ends_with(b"\n"));
    }
    lines
}
