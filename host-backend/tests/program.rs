//! The program itself: ports from its flags, its standard input and output as a port, and what it says to bad flags.

mod frontend;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use virtproxy_engine::admin::{self, Request};

use frontend::{Guest, Setup, socket_path};

fn virtproxy() -> Command {
    Command::new(env!("CARGO_BIN_EXE_virtproxy"))
}

/// Ended when dropped, whatever happened.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(socket: &Path, flags: &[&str]) -> Running {
    let child = virtproxy()
        .args(["-c", &format!("vhost-user:{}:-", socket.display())])
        .args(flags)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while !socket.exists() {
        assert!(Instant::now() < end, "it does not listen");
        thread::sleep(Duration::from_millis(2));
    }
    Running(child)
}

#[test]
fn standard_input_and_output_are_a_place() {
    let socket = socket_path();
    let mut program = start(&socket, &["--port", "s=stdio"]);
    let setup = Setup {
        ports: 2,
        ..Setup::default()
    };
    let mut guest = Guest::boot(&socket, setup);
    guest.wait_host_connected(1, true);
    guest.open(1);
    let mut stdin = program.0.stdin.take().unwrap();
    let mut stdout = program.0.stdout.take().unwrap();
    stdin.write_all(b"typed").unwrap();
    assert_eq!(guest.read(1, 5), b"typed");
    // The end of the input is not the end of the output.
    drop(stdin);
    guest.write_all(1, b"printed");
    let mut printed = [0; 7];
    stdout.read_exact(&mut printed).unwrap();
    assert_eq!(&printed, b"printed");
    drop(stdout);
    guest.wait_host_connected(1, false);
}

#[test]
fn ports_are_added_listed_and_removed_by_command() {
    let (socket, admin) = (socket_path(), socket_path());
    let flags = ["--max-ports", "2", "--admin", admin.to_str().unwrap()];
    let _program = start(&socket, &flags);
    let port = |words: &[&str]| -> Output {
        virtproxy()
            .arg("port")
            .args(words)
            .arg("--admin")
            .arg(&admin)
            .output()
            .unwrap()
    };
    let said = |output: Output| {
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let end = Instant::now() + Duration::from_secs(20);
    while !admin.exists() {
        assert!(Instant::now() < end, "there is no admin socket");
        thread::sleep(Duration::from_millis(2));
    }
    let setup = Setup {
        spare: 1,
        ..Setup::default()
    };
    let mut guest = Guest::boot(&socket, setup);
    assert!(said(port(&["add", "org.example.hot=pty"])).contains(" at /dev/pts/"));
    guest.wait_control("the port came", |guest| {
        guest.ports[1].name.as_deref() == Some(b"org.example.hot")
    });
    let list = said(port(&["list"]));
    assert!(
        list.starts_with("org.example.hot\tpty at /dev/pts/"),
        "{list}"
    );
    let again = port(&["add", "org.example.hot=pty"]);
    assert_eq!(again.status.code(), Some(1));
    let error = String::from_utf8(again.stderr).unwrap();
    assert!(error.contains("there is a port"), "{error}");
    let removing = thread::scope(|threads| {
        let removing = threads.spawn(|| said(port(&["remove", "org.example.hot"])));
        guest.wait_control("the port went", |guest| !guest.ports[1].added);
        removing.join().unwrap()
    });
    assert_eq!(removing, "removed org.example.hot\n");
    assert_eq!(said(port(&["list"])), "");
}

/// Each kind of place, at the start and added later, while the program has no rights but those that its flags need.
#[test]
fn every_place_works_in_the_sandbox() {
    let folder = std::env::temp_dir().join(format!("virtproxy-places-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let path = |name: &str| folder.join(name).display().to_string();
    let (socket, admin) = (folder.join("vp.sock"), path("admin"));
    let server = UnixListener::bind(path("server")).unwrap();
    let later = UnixListener::bind(path("later-server")).unwrap();
    let places = [
        format!("a=unix-listen:{}", path("a")),
        format!("b=unix-connect:{}", path("server")),
        format!("c=file:{}", path("c")),
        format!("d=pty:{}", path("d")),
    ];
    let ports: Vec<_> = places
        .iter()
        .map(|place| format!("--port={place}"))
        .collect();
    let mut flags = vec!["--admin", &admin, "--max-ports=9"];
    flags.extend(ports.iter().map(String::as_str));
    let _program = start(&socket, &flags);
    let setup = Setup {
        ports: 5,
        spare: 4,
        ..Setup::default()
    };
    let mut guest = Guest::boot(&socket, setup);

    let connect = |name: &str| UnixStream::connect(path(name)).unwrap();
    let terminal = |name: &str| {
        File::options()
            .read(true)
            .write(true)
            .open(path(name))
            .unwrap()
    };
    let written = |name: &str| {
        let end = Instant::now() + Duration::from_secs(20);
        while fs::read(path(name)).unwrap() != b"there" {
            assert!(Instant::now() < end, "nothing is in the file {name}");
            thread::sleep(Duration::from_millis(2));
        }
    };
    there_and_back(&mut guest, 1, connect("a"));
    there_and_back(&mut guest, 2, server.accept().unwrap().0);
    guest.open(3);
    guest.write_all(3, b"there");
    written("c");
    there_and_back(&mut guest, 4, terminal("d"));

    let add = |place: String| -> Output {
        let add = ["port", "add", &place, "--admin", &admin];
        virtproxy().args(add).output().unwrap()
    };
    for (port, place) in [
        (5, format!("e=unix-listen:{}", path("e"))),
        (6, format!("f=unix-connect:{}", path("later-server"))),
        (7, format!("g=file:{}", path("g"))),
        (8, format!("h=pty:{}", path("h"))),
    ] {
        let added = add(place);
        assert!(added.status.success(), "{added:?}");
        guest.wait_control("the port came", |guest| guest.ports[port].added);
    }
    there_and_back(&mut guest, 5, connect("e"));
    there_and_back(&mut guest, 6, later.accept().unwrap().0);
    guest.open(7);
    guest.write_all(7, b"there");
    written("g");
    there_and_back(&mut guest, 8, terminal("h"));

    let elsewhere =
        std::env::temp_dir().join(format!("virtproxy-elsewhere-{}", std::process::id()));
    fs::create_dir_all(&elsewhere).unwrap();
    let forbidden = elsewhere.join("i").display().to_string();
    for place in [
        format!("i=unix-listen:{forbidden}"),
        format!("i=file:{forbidden}"),
    ] {
        let refused = add(place);
        let said = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(1), "{said}");
        for part in [
            &*forbidden,
            "in the sandbox",
            "the folder of the admin socket",
        ] {
            assert!(said.contains(part), "no {part:?} in {said}");
        }
    }
    fs::remove_dir(&elsewhere).unwrap();
    fs::remove_dir_all(&folder).unwrap();
}

fn there_and_back(guest: &mut Guest, port: usize, mut peer: impl Read + Write) {
    guest.wait_host_connected(port, true);
    guest.open(port);
    guest.write_all(port, b"there");
    let mut there = [0; 5];
    peer.read_exact(&mut there).unwrap();
    assert_eq!(&there, b"there");
    peer.write_all(b"back").unwrap();
    assert_eq!(guest.read(port, 4), b"back");
}

#[test]
fn its_counters_are_shown_to_whoever_asks() {
    let (socket, admin) = (socket_path(), socket_path());
    let flags = [
        "--max-streams=77",
        "--max-stream-buffer=32K",
        "--admin",
        admin.to_str().unwrap(),
    ];
    let _program = start(&socket, &flags);
    let counters = || admin::call(&admin, &Request::new("counters"));
    let end = Instant::now() + Duration::from_secs(20);
    let mut guest = Guest::boot(&socket, Setup::default());
    guest.open(0);
    let shown = loop {
        match counters() {
            Ok(shown) if shown["channels"][0]["up"] == true => break shown,
            _ => assert!(Instant::now() < end, "the link does not come up"),
        }
        thread::sleep(Duration::from_millis(2));
    };
    let channel = &shown["channels"][0];
    let name = format!("vhost-user:{}:-", socket.display());
    assert_eq!(channel["channel"], *name);
    assert_eq!(channel["established"], false);
    assert_eq!(channel["links"], 1);
    let streams = json!({"limit": 77, "now": 0, "reached": 0});
    assert_eq!(channel["limits"]["streams"], streams);
    let buffer = json!({"limit": 32768, "reached": 0});
    assert_eq!(channel["limits"]["stream_buffer"], buffer);
    let ports = json!({"limit": 0, "now": 0, "reached": 0});
    assert_eq!(shown["ports"], ports);
    let odd = Request::new("counters").with("x", 1);
    let error = admin::call(&admin, &odd).unwrap_err().to_string();
    assert!(error.contains("unknown key"), "{error}");
}

#[test]
fn bad_flags_end_with_code_2_and_a_line_that_names_them() {
    let device = ["-c", "vhost-user:/nonexistent/vp.sock:-"];
    for (flags, part) in [
        (
            &["--port", "a/b=pty"][..],
            "'--port <NAME=PLACE>': NAME \"a/b\"",
        ),
        (
            &["--port", "a=pty", "--port", "a=pty"],
            "--port a=pty: there is",
        ),
        (
            &["--port", "org.virtproxy.0=pty"],
            "--port org.virtproxy.0=pty: ",
        ),
        (&["--port", "a=tcp:1"], "unknown PLACE \"tcp:1\""),
        (
            &["--console", "pty", "--console", "pty"],
            "'--console <PLACE>'",
        ),
        (&["--max-ports", "0"], "'--max-ports <N>'"),
        (&["--max-buffer", "16M"], "use --max-streams 2048"),
    ] {
        let output = virtproxy().args(device).args(flags).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {error}");
        let first = error.lines().next().unwrap();
        assert!(first.contains(part), "{flags:?}: {error}");
    }
}
