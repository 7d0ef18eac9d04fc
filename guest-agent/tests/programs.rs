//! The program as a user starts it: over a command's input and output, with several channels, by its old name.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

const AGENT: &str = env!("CARGO_BIN_EXE_virtproxy-agent");

/// Nothing in these tests takes that long.
const LIMIT: Duration = Duration::from_secs(30);

fn eventually<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(done) = attempt() {
            return done;
        }
        assert!(Instant::now() < end, "in vain: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A directory of a test's own, removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("virtproxy-prog-{}-{n}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    /// A server at `name` that answers each client with `prefix` and what the client sent, once that is all.
    fn serve(&self, name: &str, prefix: &'static str) -> String {
        let path = self.path(name);
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            for client in listener.incoming() {
                let mut client = client.unwrap();
                thread::spawn(move || {
                    let mut request = Vec::new();
                    client.read_to_end(&mut request)?;
                    client.write_all(prefix.as_bytes())?;
                    client.write_all(&request)
                });
            }
        });
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What is answered to `request` at the socket `path`, which may not be there yet.
fn ask(path: &str, request: &[u8]) -> Vec<u8> {
    let mut client = eventually(path, || UnixStream::connect(path).ok());
    client.set_read_timeout(Some(LIMIT)).unwrap();
    let mut answer = Vec::new();
    let mut writer = client.try_clone().unwrap();
    let request = request.to_vec();
    let writing = thread::spawn(move || {
        // A connection that breaks shows in the answer.
        let _ = writer.write_all(&request);
        let _ = writer.shutdown(Shutdown::Write);
    });
    let _ = client.read_to_end(&mut answer);
    writing.join().unwrap();
    answer
}

/// A program under way, killed when dropped.
struct Program {
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Program {
    fn start(program: impl AsRef<Path>, args: &[&str]) -> Self {
        let mut command = Command::new(program.as_ref());
        command
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (stderr, lines) = (child.stderr.take().unwrap(), log.clone());
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                *lines.lock().unwrap() += &(line + "\n");
            }
        });
        Program { child, log }
    }

    fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    fn wait_for_log(&self, text: &str) {
        eventually(text, || self.log().contains(text).then_some(()));
    }

    fn wait(&mut self) -> ExitStatus {
        eventually("the program ends", || self.child.try_wait().unwrap())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_command_is_the_other_end_and_is_started_again() {
    let folder = Folder::new();
    let (target, out, pids) = (
        folder.serve("target", ">"),
        folder.path("out"),
        folder.path("pids"),
    );
    let channel = format!(
        "exec:echo $$ >>{pids}; exec {AGENT} --channel stdio:-:- --iforward 'echo:{target}:-':-:cmd"
    );
    let _near = Program::start(AGENT, &["-c", &channel, "-o", &format!("echo:{out}:-:cmd")]);
    let bulk: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect();
    let answer = ask(&out, &bulk);
    assert!(
        answer[0] == b'>' && answer[1..] == bulk,
        "{} bytes",
        answer.len()
    );

    let first = fs::read_to_string(&pids).unwrap();
    let killed = Command::new("/bin/sh")
        .args(["-c", &format!("kill -9 {first}")])
        .status();
    assert!(killed.unwrap().success());
    // A stream that was under way when the link broke may be reset; the next is not.
    eventually("the command is back", || {
        (ask(&out, b"again") == b">again").then_some(())
    });
    assert_eq!(fs::read_to_string(&pids).unwrap().lines().count(), 2);
}

/// The program over `stdin` and a pipe, whose other end is returned.
fn over_stdio(stdin: impl Into<Stdio>) -> (Program, io::PipeReader) {
    let (stdout, theirs) = io::pipe().unwrap();
    let mut command = Command::new(AGENT);
    command
        .args(["-c", "stdio:-:-"])
        .stdin(stdin)
        .stdout(theirs);
    (Program::spawn(command), stdout)
}

#[test]
fn with_its_input_the_program_ends_in_order() {
    let (stdin, to_program) = io::pipe().unwrap();
    let (mut program, mut stdout) = over_stdio(stdin);
    stdout.read_exact(&mut [0; 16]).unwrap();
    drop(to_program);
    assert_eq!(program.wait().code(), Some(0), "{}", program.log());
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).unwrap();
    let text = String::from_utf8_lossy(&rest);
    assert!(
        !text.contains("INFO") && !text.contains("link"),
        "the log is in it"
    );
}

#[test]
fn the_end_of_its_log_does_not_upset_the_program() {
    let (stdin, to_program) = io::pipe().unwrap();
    let (log, theirs) = io::pipe().unwrap();
    let mut child = Command::new(AGENT)
        .args(["-vv", "-c", "stdio:-:-"])
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(theirs)
        .spawn()
        .unwrap();
    drop(log);
    child
        .stdout
        .take()
        .unwrap()
        .read_exact(&mut [0; 16])
        .unwrap();
    drop(to_program);
    let status = eventually("the program ends", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
}

#[test]
fn what_others_share_of_its_input_still_blocks() {
    let (stdin, _to_program) = io::pipe().unwrap();
    let ours = stdin.try_clone().unwrap();
    let (_program, mut stdout) = over_stdio(stdin);
    stdout.read_exact(&mut [0; 16]).unwrap();
    // SAFETY: only reads the flags of an open descriptor.
    let flags = unsafe { libc::fcntl(ours.as_raw_fd(), libc::F_GETFL) };
    assert_eq!(flags & libc::O_NONBLOCK, 0);
}

#[test]
fn a_file_is_no_channel() {
    for path in [AGENT, "/dev/null", "/"] {
        let (mut program, _stdout) = over_stdio(File::open(path).unwrap());
        assert_eq!(program.wait().code(), Some(4), "{path}");
        program.wait_for_log("is a file, over which nobody answers: connect a pipe or a socket");
    }
}

#[test]
fn a_terminal_is_no_channel() {
    let (mut master, mut terminal) = (-1, -1);
    let null = std::ptr::null_mut();
    // SAFETY: `openpty` fills in two descriptors, which are then owned here.
    let (_master, terminal) = unsafe {
        assert_eq!(
            libc::openpty(
                &raw mut master,
                &raw mut terminal,
                null,
                null.cast(),
                null.cast()
            ),
            0
        );
        (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(terminal))
    };
    let (mut program, _stdout) = over_stdio(terminal);
    assert_eq!(program.wait().code(), Some(4));
    program.wait_for_log("standard input is a terminal");
}

#[test]
fn several_channels_have_each_their_own_forwards() {
    let folder = Folder::new();
    let (one, two) = (folder.serve("one", "1"), folder.serve("two", "2"));
    let [a, b] = ["a", "b"].map(|name| folder.path(name));
    let [out_a, out_b, out] = ["out-a", "out-b", "out"].map(|name| folder.path(name));
    let _near = Program::start(
        AGENT,
        &[
            "--channel",
            &format!("unix-listen:{a}:-"),
            "-c",
            &format!("unix-listen:{b}:-:2"),
            "--oforward",
            &format!("x:{out}:-"),
            "-o",
            &format!("y:{out_a}:-:0"),
            "-o",
            &format!("x:{out_b}:-:2"),
            "--verbose",
        ],
    );
    let _far = [(&a, &one), (&b, &two)].map(|(channel, target)| {
        let channel = format!("unix-connect:{channel}:-");
        let (x, y) = (format!("x:{target}:-"), format!("y:{target}:-"));
        Program::start(AGENT, &["-c", &channel, "--iforward", &x, "-i", &y])
    });
    assert_eq!(ask(&out, b"?"), b"1?");
    assert_eq!(ask(&out_a, b"?"), b"1?");
    assert_eq!(ask(&out_b, b"?"), b"2?");
}

#[test]
fn a_kill_of_either_end_is_a_reset_for_both_sides_and_no_end_of_file() {
    for near_dies in [true, false] {
        let folder = Folder::new();
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = server.local_addr().unwrap();
        let socket = folder.path("channel");
        let start = |channel: &str, flag: &str, address| {
            let channel = format!("{channel}:{socket}:-");
            Program::start(AGENT, &["-c", &channel, flag, &format!("x:{address}")])
        };
        let mut near = start("unix-listen", "-o", address);
        let mut far = start("unix-connect", "-i", target);
        let mut client = eventually("a client is heard", || TcpStream::connect(address).ok());
        client.write_all(b"?").unwrap();
        let (mut served, _) = server.accept().unwrap();
        served.read_exact(&mut [0]).unwrap();
        served.write_all(b"the first part of it").unwrap();
        client.read_exact(&mut [0; 20]).unwrap();
        let killed = if near_dies { &mut near } else { &mut far };
        killed.child.kill().unwrap();
        for mut stream in [client, served] {
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            let end = stream.read(&mut [0]).map_err(|error| error.kind());
            assert_eq!(end, Err(io::ErrorKind::ConnectionReset), "{near_dies}");
        }
    }
}

#[test]
fn by_its_old_name_it_is_the_first_version() {
    let folder = Folder::new();
    let old = folder.path("qemu-vp");
    symlink(AGENT, &old).unwrap();
    let help = Command::new(&old).arg("-h").output().unwrap().stdout;
    let help = String::from_utf8(help).unwrap();
    assert!(help.contains("Usage: qemu-vp "), "{help}");

    let program = Program::start(&old, &["-c", "tcp-listen:0.0.0.0:0"]);
    program.wait_for_log("not encrypted");
    program.wait_for_log("listening");
    let mut refused = Program::start(AGENT, &["-c", "tcp-listen:0.0.0.0:0"]);
    assert_eq!(refused.wait().code(), Some(4));
    refused.wait_for_log("--insecure-plaintext");
}
