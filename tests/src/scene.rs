//! A daemon on the host, a guest without a network, and the agent in it.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use virtproxy_lab::{DeviceOptions, Guest, GuestFile, GuestOptions, Lab, vhost_user_console};

use crate::measure::{Usage, usage_script};
use crate::peer::{self, Caller};

/// How long what should happen at once may take here, where every core is busy emulating.
pub const SOON: Duration = Duration::from_secs(10);

/// Address of the peer in the guest.
pub const GUEST_PEER: &str = "127.0.0.1:7000";
/// Where the guest finds the host's peer.
pub const HOST_PEER_IN_GUEST: &str = "127.0.0.1:7001";

const AGENT_LOG: &str = "/tmp/agent.log";

/// The agent's flags, as a user would write them.
pub const AGENT_FLAGS: &str = "-c virtserial-open:/dev/virtio-ports/org.virtproxy.0:- \
    -i peer:127.0.0.1:7000 -i http:127.0.0.1:80 -i ssh:127.0.0.1:22 -i eof:127.0.0.1:7002 \
    -i closed:127.0.0.1:1 -i full:127.0.0.1:7003 -o hostpeer:127.0.0.1:7001";

/// An address of this machine that nobody else uses: each process has a loopback network of its own.
pub fn new_address() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let (process, n) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    format!("127.{}.{}.{n}:7000", 1 + process % 250, process / 250 % 250)
}

/// One of the programs under test.
pub fn program(name: &str) -> PathBuf {
    let folder = std::env::var_os("VIRTPROXY_BIN_DIR").map_or_else(
        || {
            // target/PROFILE/deps/this-test
            let exe = std::env::current_exe().expect("a test has a path");
            exe.ancestors().nth(2).expect("in target").to_path_buf()
        },
        PathBuf::from,
    );
    folder.join(name)
}

/// A running `virtproxy`, or another program that stays.
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts it with `flags`, logging to a file in `folder`.
    pub fn start(folder: &Path, flags: &[String]) -> Result<Self> {
        let mut command = Command::new(program("virtproxy"));
        command.args(flags);
        Self::run(folder, command)
    }

    /// Starts it with a command of the caller's choice.
    pub fn run(folder: &Path, mut command: Command) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = Path::new(command.get_program())
            .file_name()
            .unwrap_or_default()
            .display()
            .to_string();
        let log = folder.join(format!(
            "{name}-{}.log",
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        let file = File::create(&log)?;
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let child =
            virtproxy_lab::spawn::spawn(command).with_context(|| format!("cannot start {name}"))?;
        Ok(Daemon { child, log })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process ids of those that it has started, such as the worker of a keeper.
    pub fn children(&self) -> Vec<u32> {
        let pid = self.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.unwrap_or_default();
        children.split_whitespace().flat_map(str::parse).collect()
    }

    /// All it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until its log has `text` for the `count`th time.
    pub fn wait_log(&self, text: &str, count: usize, limit: Duration) -> Result<()> {
        wait_for(limit, || self.log().matches(text).count() >= count)
            .with_context(|| format!("no {text:?} (number {count}) in the log:\n{}", self.log()))
    }

    /// Waits until it has ended by itself.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        wait_for(limit, || !matches!(self.child.try_wait(), Ok(None)))
            .with_context(|| format!("virtproxy still runs:\n{}", self.log()))?;
        Ok(self.child.wait()?)
    }

    /// Asks it to end, and waits.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        virtproxy_lab::spawn::signal(&self.child, libc::SIGTERM);
        self.wait_exit(SOON)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until `done`, looking often.
pub fn wait_for(limit: Duration, mut done: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !done() {
        ensure!(Instant::now() < deadline, "not within {limit:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Waits until a new connection to `address` works.
pub fn wait_works(address: &str, patience: Duration) -> Result<()> {
    let begun = Instant::now();
    let call = || -> Result<()> { Caller::within(address, SOON)?.call(b"hello") };
    while let Err(error) = call() {
        ensure!(
            begun.elapsed() < patience,
            "nothing works within {patience:?}: {error:#}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// All of it, running.
pub struct Scene {
    /// The guest.
    pub guest: Guest,
    /// The daemon.
    pub daemon: Daemon,
    /// A folder for this scene.
    pub folder: PathBuf,
    flags: Vec<String>,
    /// Where the guest's peer is reached on this host.
    pub peer: String,
    /// Where the guest's `eof` service is reached.
    pub eof: String,
    /// Where each of the services is reached that cannot be had: `nobody`, `closed`, `full`.
    pub unavailable: [String; 3],
}

impl Scene {
    /// Starts the daemon, boots a guest with a peer in it, and starts the agent.
    pub fn start() -> Result<Self> {
        let folder = virtproxy_lab::temporary_folder()?;
        let host_peer = new_address();
        let listener = TcpListener::bind(&host_peer)?;
        std::thread::spawn(move || peer::serve(&listener));
        let (peer, eof) = (new_address(), new_address());
        let unavailable = [new_address(), new_address(), new_address()];
        let mut flags = vec![
            "-c".into(),
            format!("vhost-user:{}:-", folder.join("vp.sock").display()),
            "--connect-timeout=2".into(),
        ];
        let out = [
            ("peer", &peer),
            ("eof", &eof),
            ("nobody", &unavailable[0]),
            ("closed", &unavailable[1]),
            ("full", &unavailable[2]),
        ];
        for (service, address) in out {
            flags.extend(["-o".into(), format!("{service}:{address}")]);
        }
        flags.extend(["-i".into(), format!("hostpeer:{host_peer}")]);
        let daemon = Daemon::start(&folder, &flags)?;
        let guest = boot(&folder, &daemon, &DeviceOptions::default())?;
        let scene = Scene {
            guest,
            daemon,
            folder,
            flags,
            peer,
            eof,
            unavailable,
        };
        scene.prepare_guest()?;
        scene.start_agent(1)?;
        Ok(scene)
    }

    /// Starts another daemon in the place of one that is dead, and then another QEMU: the device of this one is lost.
    pub fn replace_daemon(&mut self) -> Result<()> {
        self.daemon = Daemon::start(&self.folder, &self.flags)?;
        self.replace_guest()
    }

    /// Ends QEMU and starts another one on the same socket.
    pub fn replace_guest(&mut self) -> Result<()> {
        self.guest.kill()?;
        self.guest = boot(&self.folder, &self.daemon, &DeviceOptions::default())?;
        self.prepare_guest()
    }

    /// Starts the services of a freshly booted guest.
    pub fn prepare_guest(&self) -> Result<()> {
        self.guest.check(&format!(
            "setsid peer serve {GUEST_PEER} >/tmp/peer.log 2>&1 &\n\
             setsid socat TCP-LISTEN:7002,bind=127.0.0.1,fork,reuseaddr SYSTEM:'wc -c' >/tmp/eof.log 2>&1 &\n\
             setsid peer full 127.0.0.1:7003 >/tmp/full.log 2>&1 &\n\
             until grep -q full /tmp/full.log; do sleep 0.1; done"
        ))?;
        Ok(())
    }

    /// Starts the agent and waits for the `session`th session of the daemon; how long a new connection then took to
    /// work.
    pub fn start_agent(&self, session: usize) -> Result<Duration> {
        self.guest.check(&format!(
            "setsid virtproxy-agent {AGENT_FLAGS} --connect-timeout=2 >>{AGENT_LOG} 2>&1 &"
        ))?;
        self.wait_session(session)
    }

    /// Waits for the `session`th session of the daemon; how long a new connection then took to work.
    pub fn wait_session(&self, session: usize) -> Result<Duration> {
        self.daemon
            .wait_log("session established", session, 3 * SOON)
            .with_context(|| format!("the agent says:\n{}", self.agent_log()))?;
        let start = Instant::now();
        Caller::new(&self.peer)?.call(b"a new connection")?;
        Ok(start.elapsed())
    }

    /// How many sessions the daemon has had.
    pub fn sessions(&self) -> usize {
        self.daemon.log().matches("session established").count()
    }

    /// What the agent has logged.
    pub fn agent_log(&self) -> String {
        self.guest
            .check(&format!("cat {AGENT_LOG}"))
            .unwrap_or_else(|error| format!("(not to be had: {error:#})"))
    }

    /// What the agent uses.
    pub fn agent_usage(&self) -> Result<Usage> {
        Usage::parse(
            &self
                .guest
                .check(&usage_script("$(pidof virtproxy-agent)"))?,
        )
    }

    /// The process id of the daemon's worker.
    pub fn worker(&self) -> Result<u32> {
        let worker = self.daemon.children().first().copied();
        worker.context("there is no worker")
    }

    /// What the daemon's worker uses; its keeper has nothing to do.
    pub fn daemon_usage(&self) -> Result<Usage> {
        Usage::of(self.worker()?)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.daemon.log());
            eprintln!("the agent's log:\n{}", self.agent_log());
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Boots a guest on the daemon's socket with the agent and the peer in it.
pub fn boot(folder: &Path, daemon: &Daemon, device: &DeviceOptions) -> Result<Guest> {
    let socket = folder.join("vp.sock");
    if wait_for(SOON, || socket.exists()).is_err() {
        bail!("virtproxy does not listen:\n{}", daemon.log());
    }
    Lab::get()?.boot(
        GuestOptions::default()
            .device(vhost_user_console(&socket, device))
            .agent(&program("virtproxy-agent"))
            .file(GuestFile::copy(program("peer"), "/usr/bin/peer")),
    )
}
