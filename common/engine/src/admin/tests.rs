//! The protocol over a real socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;

use super::*;
use crate::unix_socket;

struct Echo;

impl Handler for Echo {
    fn handle(&self, mut request: Request) -> BoxFuture<'_, Result<Value, String>> {
        Box::pin(async move {
            let text = request.string("text").map_err(|error| error.to_string())?;
            request.end().map_err(|error| error.to_string())?;
            Ok(json!({"echo": text}))
        })
    }
}

/// Runs `client` in a thread against a server.
fn with_server(name: &str, client: impl FnOnce(PathBuf) + Send + 'static) {
    let path = std::env::temp_dir().join(format!("virtproxy-admin-{}-{name}", std::process::id()));
    let (listener, _file) = unix_socket::listen(&path, 64).unwrap();
    listener.set_nonblocking(true).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let tasks = tokio::task::LocalSet::new();
    tasks.block_on(&runtime, async move {
        let listener = UnixListener::from_std(listener).unwrap();
        let server = tokio::task::spawn_local(serve(listener, Rc::new(Echo)));
        tokio::task::spawn_blocking(move || client(path))
            .await
            .unwrap();
        server.abort();
    });
}

fn ask(stream: &UnixStream, line: &[u8]) -> Value {
    (&*stream).write_all(line).unwrap();
    answer(stream)
}

fn answer(stream: &UnixStream) -> Value {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

#[test]
fn each_bad_request_gets_one_clear_error_and_the_next_is_served() {
    with_server("bad", |path| {
        let stream = UnixStream::connect(path).unwrap();
        for (line, part) in [
            (&b"hello\n"[..], "not JSON"),
            (b"\n", "not JSON"),
            (b"\xff\xfe{}\n", "not JSON"),
            (b"{\"version\":1,\n", "not JSON"),
            (b"[1]\n", "not a JSON object"),
            (b"{}\n", "missing key \"version\""),
            (
                b"{\"version\":2,\"request\":\"x\"}\n",
                "version 2 is not spoken here: use 1",
            ),
            (b"{\"version\":\"1\"}\n", "version \"1\" is not spoken"),
            (b"{\"version\":1}\n", "missing key \"request\""),
            (
                b"{\"version\":1,\"request\":7}\n",
                "\"request\" must be a string, not 7",
            ),
            (
                b"{\"version\":1,\"request\":\"e\"}\n",
                "missing key \"text\"",
            ),
            (
                b"{\"version\":1,\"request\":\"e\",\"text\":[]}\n",
                "\"text\" must be a string, not []",
            ),
            (
                b"{\"version\":1,\"request\":\"e\",\"text\":\"a\",\"x\":1}\n",
                "unknown key \"x\"",
            ),
        ] {
            let said = ask(&stream, line);
            let error = said["error"].as_str().unwrap();
            assert!(error.contains(part), "{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
        let said = ask(
            &stream,
            b"{\"version\":1,\"request\":\"e\",\"text\":\"a\"}\n",
        );
        assert_eq!(said, json!({"version": 1, "ok": {"echo": "a"}}));
    });
}

#[test]
fn a_line_without_end_is_refused_at_its_bound() {
    with_server("long", |path| {
        let stream = UnixStream::connect(path).unwrap();
        let said = ask(&stream, &[b'x'; MAX_LINE]);
        assert!(said["error"].as_str().unwrap().contains("longer than"));
        assert_eq!((&stream).read(&mut [0]).unwrap(), 0, "and it is the end");
    });
}

/// A served client; until the server has noticed that the one before it is gone, there is no seat.
fn take_the_last_seat(path: &Path) -> UnixStream {
    let line = Request::new("e").with("text", "b").line();
    loop {
        let stream = UnixStream::connect(path).unwrap();
        // A refused client's writes may find the socket closed: the answer tells.
        let _ = (&stream).write_all(line.as_bytes());
        if answer(&stream)["ok"]["echo"] == "b" {
            return stream;
        }
    }
}

#[test]
fn one_client_too_many_is_told_and_a_slow_one_blocks_nobody() {
    with_server("many", |path| {
        let idle: Vec<_> = (0..MAX_CLIENTS - 1)
            .map(|_| UnixStream::connect(&path).unwrap())
            .collect();
        for stream in &idle {
            (&*stream).write_all(b"{\"version").unwrap();
        }
        let request = Request::new("e").with("text", "still served");
        let said = call(&path, &request).unwrap();
        assert_eq!(said["echo"], "still served");
        let mut last = take_the_last_seat(&path);
        let refused = UnixStream::connect(&path).unwrap();
        let said = answer(&refused);
        assert!(said["error"].as_str().unwrap().contains("16 clients"));
        last.write_all(b"x").unwrap();
        drop((idle, last));
        // The seats come free as the server notices.
        while call(&path, &request).is_err() {
            thread::yield_now();
        }
    });
}

#[test]
fn a_client_without_a_server_is_told_which_flag_it_is_about() {
    let error = call(&PathBuf::from("/nonexistent/admin"), &Request::new("x")).unwrap_err();
    assert!(error.to_string().contains("--admin"), "{error}");
}
