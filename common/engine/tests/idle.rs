//! What idle streams cost an end of virtproxy: bytes of memory each, and nothing for an event of another stream.
//!
//! ```text
//!  this process                child         child               this process
//!  clients ----UNIX sockets----[near]==link==[far]----UNIX sockets---- targets
//! ```
//!
//! Each end is a process of its own, so that its heap and its processor's time are its own too, and so that a usual limit of
//! open files is enough. Idle connections to the targets are left in their listeners' queues: they are open for the end that
//! made them, and need no descriptor here.

mod support;

use std::alloc::System;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Type};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use tokio::io::AsyncBufReadExt;
use tokio::io::AsyncWriteExt;
use virtproxy_engine::program::raise_descriptor_limit;

use support::ends::{end, tokio_socket};
use support::settings;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const STREAMS: usize = 10_000;
/// What an idle stream may cost at one end beside what the kernel keeps for its socket, in bytes.
const LIMIT: usize = 1024;
/// How much more processor time an event may take among idle streams than alone.
const EVENT_LIMIT: f64 = 1.5;
/// Descriptors of a process that are not sockets of idle streams, at most.
const SPARE: usize = 100;
/// Rounds in which calls are measured, and calls in one.
const ROUNDS: usize = 7;
const CALLS: usize = 1_000;
/// Clients that connect before the ends are waited for: fewer than targets that may be being connected to at once.
const BATCH: usize = 500;

/// What tells a child that it is an end: what it listens at, what it serves, and where it reports; a word for each.
const END: &str = "VIRTPROXY_TEST_END";

#[test]
fn idle_streams_cost_little_memory_and_no_time() {
    let streams = possible_streams();
    let dir = std::env::temp_dir().join(format!("virtproxy-idle-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let mut alone = Pair::new(&dir, "alone", 0);
    let mut among = Pair::new(&dir, "among", streams);
    let before = among.heap();
    among.idle(streams);
    let after = among.heap();
    for (name, (before, after)) in ["near", "far"].iter().zip(before.into_iter().zip(after)) {
        let each = after.saturating_sub(before) / streams;
        println!("{streams} idle streams: {each} bytes each at the {name} end");
        assert!(
            each < LIMIT,
            "{each} bytes for each stream at the {name} end"
        );
    }
    let mut ratios: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let (a, b) = (alone.calls(), among.calls());
            b.as_secs_f64() / a.as_secs_f64()
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    let [least, median, greatest] = [ratios[0], ratios[ROUNDS / 2], ratios[ROUNDS - 1]];
    println!(
        "a call takes {median:.2} x the processor time it takes alone ({least:.2} to {greatest:.2})"
    );
    assert!(
        median <= EVENT_LIMIT,
        "events cost more among idle streams: {ratios:?}"
    );
    fs::remove_dir_all(&dir).unwrap();
}

/// As many streams as the limit of open files allows, which is raised as far as may be.
fn possible_streams() -> usize {
    let limit = raise_descriptor_limit().expect("up to the hard limit it may be raised");
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let streams = STREAMS.min(limit.saturating_sub(SPARE));
    if streams < STREAMS {
        eprintln!("ONLY {streams} OF {STREAMS} STREAMS: the hard limit of open files is {limit}");
    }
    streams
}

/// Two ends with a link between them, and one stream that carries calls.
struct Pair {
    ends: [End; 2],
    /// Where clients of idle streams connect.
    front: Vec<PathBuf>,
    /// Targets whose clients are never accepted.
    _targets: Vec<socket2::Socket>,
    call: UnixStream,
    answer: UnixStream,
    clients: Vec<UnixStream>,
}

/// An end in a process of its own.
struct End {
    child: Child,
    control: BufReader<UnixStream>,
}

impl Pair {
    /// Ends that can carry so many idle streams.
    fn new(dir: &Path, name: &str, streams: usize) -> Self {
        let path = |what: &str| dir.join(format!("{name}-{what}"));
        let queue = queue_length();
        let services = streams.div_ceil(queue);
        let mut out = vec![format!("call:{}:-", path("call").display())];
        let mut serve = vec![format!("call:{}:-", path("answer").display())];
        let (mut front, mut targets) = (Vec::new(), Vec::new());
        for service in 0..services {
            let [near, far] = ["front", "back"].map(|end| path(&format!("{end}{service}")));
            out.push(format!("idle{service}:{}:-", near.display()));
            serve.push(format!("idle{service}:{}:-", far.display()));
            let target = socket2::Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
            target.bind(&SockAddr::unix(&far).unwrap()).unwrap();
            target.listen(i32::try_from(queue).unwrap()).unwrap();
            targets.push(target);
            front.push(near);
        }
        let answers = UnixListener::bind(path("answer")).unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        let ends = [
            End::new(&path("near"), near, &out, &[]),
            End::new(&path("far"), far, &[], &serve),
        ];
        let call = connect(&path("call"));
        let (answer, _) = answers.accept().unwrap();
        let mut pair = Pair {
            ends,
            front,
            _targets: targets,
            call,
            answer,
            clients: Vec::new(),
        };
        pair.calls();
        pair
    }

    /// Opens so many streams that nothing goes through.
    fn idle(&mut self, streams: usize) {
        let open: [usize; 2] = [0, 1].map(|end| self.ends[end].sockets());
        for n in 0..streams {
            let front = &self.front[n % self.front.len()];
            self.clients.push(connect(front));
            if n % BATCH == BATCH - 1 || n == streams - 1 {
                for (end, open) in self.ends.iter().zip(open) {
                    end.wait_for_sockets(open + self.clients.len());
                }
            }
        }
        // Its answer comes when all that went before it is done with.
        self.calls();
    }

    /// The bytes that each end holds.
    fn heap(&mut self) -> [usize; 2] {
        [0, 1].map(|end| self.ends[end].heap())
    }

    /// Calls over the one stream that is not idle; the processor time that they took both ends.
    fn calls(&mut self) -> Duration {
        let before = self.time();
        let mut message = [7; 64];
        for _ in 0..CALLS {
            self.call.write_all(&message).unwrap();
            self.answer.read_exact(&mut message).unwrap();
            self.answer.write_all(&message).unwrap();
            self.call.read_exact(&mut message).unwrap();
        }
        self.time() - before
    }

    fn time(&self) -> Duration {
        self.ends.iter().map(End::time).sum()
    }
}

impl End {
    fn new(report: &Path, link: UnixStream, out: &[String], serve: &[String]) -> Self {
        let listener = UnixListener::bind(report).unwrap();
        let words = [report.display().to_string(), out.join(","), serve.join(",")];
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "an_end", "--ignored", "--nocapture"])
            .env(END, words.join(" "))
            .stdin(Stdio::from(OwnedFd::from(link)))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (control, _) = listener.accept().unwrap();
        End {
            child,
            control: BufReader::new(control),
        }
    }

    fn heap(&mut self) -> usize {
        self.control.get_mut().write_all(b"?\n").unwrap();
        let mut line = String::new();
        self.control.read_line(&mut line).unwrap();
        line.trim().parse().unwrap()
    }

    /// Processor time of all its threads.
    fn time(&self) -> Duration {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let nanos = tasks.map(|task| {
            let stat = fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap();
            let first = stat.split(' ').next().unwrap();
            first.parse::<u64>().unwrap()
        });
        Duration::from_nanos(nanos.sum())
    }

    fn sockets(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id()))
            .unwrap()
            .count()
    }

    fn wait_for_sockets(&self, count: usize) {
        let begun = Instant::now();
        while self.sockets() < count {
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "{} sockets instead of {count}",
                self.sockets()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn queue_length() -> usize {
    let most = fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
    most.trim().parse().unwrap()
}

/// A client of an end, which may still have to begin to listen.
fn connect(path: &Path) -> UnixStream {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(client) => return client,
            Err(error) if begun.elapsed() > Duration::from_secs(20) => {
                panic!("{}: {error}", path.display());
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

#[test]
#[ignore = "is one of the ends that the test beside it starts"]
fn an_end() {
    let Ok(words) = std::env::var(END) else {
        return;
    };
    let words: Vec<&str> = words.split(' ').collect();
    let [report, out, serve] = words[..] else {
        panic!("three words");
    };
    let specs = |list: &str| -> Vec<String> {
        let specs = list.split(',').filter(|spec| !spec.is_empty());
        specs.map(str::to_owned).collect()
    };
    let (out, serve) = (specs(out), specs(serve));
    let link = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    let control = UnixStream::connect(report).unwrap();
    support::run(async {
        let end = end(settings(), &out, &serve).await;
        end.link(link);
        let mut control = tokio::io::BufStream::new(tokio_socket(control));
        let mut line = String::new();
        while control.read_line(&mut line).await.unwrap() > 0 {
            let stats = ALLOCATOR.stats();
            let held = stats.bytes_allocated - stats.bytes_deallocated;
            control
                .write_all(format!("{held}\n").as_bytes())
                .await
                .unwrap();
            control.flush().await.unwrap();
        }
    });
}
