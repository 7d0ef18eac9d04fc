//! A running guest.
//!
//! It has no network card unless it asks for one. Its first serial port is the kernel's console and goes to a file, which errors quote; the
//! second carries the command shell. QEMU connects to sockets that already listen in the guest's own temporary
//! folder, so nothing is polled for at the start. Dropping a [`Guest`] ends its QEMU by its own process id; should this
//! process be killed, the kernel ends it.

use crate::device::{user_network, vhost_user_network, vhost_user_vsock};
use crate::folder::temporary_folder;
use crate::image::{self, GuestFile};
use crate::kernel;
use crate::lab::Lab;
use crate::qmp::Qmp;
use crate::shell::{Output, Shell};
use crate::spawn;
use crate::starting::{Starting, explain, look, text_of};
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a guest is to be like. `GuestOptions::default()` is a guest with nothing but its two serial ports.
#[derive(Debug, Clone)]
pub struct GuestOptions {
    /// Memory in MiB, shared with vhost-user processes.
    pub memory_mib: u32,
    /// Virtual processors.
    pub smp: u32,
    /// More arguments for QEMU: devices and their chardevs.
    pub qemu_args: Vec<String>,
    /// Files added to the guest.
    pub files: Vec<GuestFile>,
    /// Kernel modules that the guest loads at its start, in this order.
    pub modules: Vec<&'static str>,
    /// Shell lines that the guest runs at its start, before its servers.
    pub boot_lines: Vec<String>,
    /// More words for the kernel's command line.
    pub kernel_args: String,
    /// How long it may take until its shell answers.
    pub boot_limit: Duration,
}

impl Default for GuestOptions {
    fn default() -> Self {
        Self {
            memory_mib: 512,
            smp: 2,
            qemu_args: Vec::new(),
            files: Vec::new(),
            modules: Vec::new(),
            boot_lines: Vec::new(),
            kernel_args: String::new(),
            boot_limit: Duration::from_secs(90),
        }
    }
}

impl GuestOptions {
    /// Adds QEMU arguments, such as those of [`crate::vhost_user_console`].
    #[must_use]
    pub fn device(mut self, arguments: Vec<String>) -> Self {
        self.qemu_args.extend(arguments);
        self
    }

    /// Adds a file.
    #[must_use]
    pub fn file(mut self, file: GuestFile) -> Self {
        self.files.push(file);
        self
    }

    /// Adds the agent as `/usr/bin/virtproxy-agent`.
    #[must_use]
    pub fn agent(self, program: &Path) -> Self {
        self.file(GuestFile::copy(program, "/usr/bin/virtproxy-agent"))
    }

    /// Adds a line that the guest's shell runs at the start.
    #[must_use]
    pub fn boot_line(mut self, line: &str) -> Self {
        self.boot_lines.push(line.to_owned());
        self
    }

    /// Adds kernel modules, such as those of [`crate::VSOCK`], to be loaded in this order.
    #[must_use]
    pub fn modules(mut self, names: &[&'static str]) -> Self {
        self.modules.extend(names);
        self
    }

    /// Adds a network card on QEMU's user network, which needs no root: the guest is 10.0.2.15, and 10.0.2.2 leads to
    /// this host's loopback. `forwards` are an address of this host, where QEMU listens, and a port of the guest.
    #[must_use]
    pub fn user_network(self, forwards: &[(&str, u16)]) -> Self {
        self.device(user_network(forwards)).card(1500)
    }

    /// Adds a network card whose device is the process that listens on `socket`, such as `passt --vhost-user`; the
    /// guest is 10.0.2.15, and the rest of the world is behind 10.0.2.2.
    #[must_use]
    pub fn vhost_user_network(self, socket: &Path, mtu: u16) -> Self {
        self.device(vhost_user_network(socket)).card(mtu)
    }

    fn card(self, mtu: u16) -> Self {
        self.modules(kernel::NETWORK)
            .boot_line(&format!(
                "ip link set eth0 mtu {mtu} up && ip addr add 10.0.2.15/24 dev eth0"
            ))
            .boot_line("ip route add default via 10.0.2.2")
    }

    /// Adds vsock: between this host and the guest through the device that listens on `socket`, and within the guest.
    #[must_use]
    pub fn vsock(self, socket: &Path) -> Self {
        self.device(vhost_user_vsock(socket)).modules(kernel::VSOCK)
    }
}

/// A running guest. All its methods may be called from several threads; commands run one after the other.
#[derive(Debug)]
pub struct Guest {
    folder: PathBuf,
    boot_limit: Duration,
    command_line: String,
    pid: u32,
    child: Mutex<Child>,
    qmp: Mutex<Qmp>,
    shell: Mutex<Shell>,
}

/// The limit of [`Guest::run`].
pub const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// How long QEMU may take to end after it was asked to.
const END_LIMIT: Duration = Duration::from_secs(10);

impl Guest {
    /// Starts QEMU and waits until the guest's shell answers, its web server listens on 127.0.0.1:80 and its SSH
    /// server on 127.0.0.1:22.
    pub fn boot(lab: &Lab, options: GuestOptions) -> Result<Self> {
        let folder = temporary_folder()?;
        let result = Self::boot_in(lab, &options, &folder);
        if result.is_err() && std::env::var_os("VIRTPROXY_KEEP").is_none() {
            let _ = fs::remove_dir_all(&folder);
        }
        result
    }

    fn boot_in(lab: &Lab, options: &GuestOptions, folder: &Path) -> Result<Self> {
        let initrd = folder.join("initrd");
        let (mut files, mut lines) = (options.files.clone(), Vec::new());
        for name in &options.modules {
            let path = format!("/usr/lib/modules/{name}.ko.xz");
            lines.push(format!("insmod {path}"));
            files.push(GuestFile::copy(lab.kernel.module(name)?, path));
        }
        lines.extend_from_slice(&options.boot_lines);
        image::for_boot(&lab.image, &lab.userland, &files, &lines, &initrd)?;
        let listen = |name: &str| {
            let path = folder.join(name);
            UnixListener::bind(&path)
                .with_context(|| format!("cannot listen on {}", path.display()))
        };
        let (shell, qmp) = (listen("shell")?, listen("qmp")?);
        let command = command(lab, options, folder)?;
        let command_line = spawn::shown(&command);
        let child = spawn::spawn(command).context("cannot start QEMU")?;
        let mut starting = Starting::new(child, folder);
        let deadline = Instant::now() + options.boot_limit;
        let shell = starting
            .accept(&shell, deadline)
            .map_err(|error| starting.explain(error))?;
        let qmp = starting
            .accept(&qmp, deadline)
            .map_err(|error| starting.explain(error))?;
        let qmp = Qmp::new(qmp).map_err(|error| starting.explain(error))?;
        let mut shell = Shell::new(shell);
        let ready = shell.ready(deadline, &mut || starting.look());
        ready
            .context("the guest did not boot")
            .map_err(|error| starting.explain(error))?;
        // The kernel has its image: it stays away from the disk from here on.
        let _ = fs::remove_file(&initrd);
        let child = starting.finish()?;
        Ok(Self {
            folder: folder.to_owned(),
            boot_limit: options.boot_limit,
            command_line,
            pid: child.id(),
            child: Mutex::new(child),
            qmp: Mutex::new(qmp),
            shell: Mutex::new(shell),
        })
    }

    /// Runs shell lines in the guest, for [`COMMAND_LIMIT`] at most. What must go on running is started with
    /// `setsid ... >/tmp/log 2>&1 &`.
    pub fn run(&self, script: &str) -> Result<Output> {
        self.run_for(script, COMMAND_LIMIT)
    }

    /// Runs shell lines in the guest with a limit.
    pub fn run_for(&self, script: &str, limit: Duration) -> Result<Output> {
        let output = lock(&self.shell).run(script, limit, &mut || self.look());
        output
            .with_context(|| format!("in the guest: {script}"))
            .map_err(|error| explain(error, &self.folder))
    }

    /// Runs shell lines that must succeed and gives their standard output without the last line end.
    pub fn check(&self, script: &str) -> Result<String> {
        let output = self.run(script)?;
        if !output.success() {
            bail!(
                "in the guest: {script}: status {}\n{}{}",
                output.status,
                output.stdout,
                output.stderr
            );
        }
        Ok(output.stdout.trim_end_matches('\n').to_owned())
    }

    /// Sends a command to QEMU (QMP) and gives what it returns.
    pub fn qmp(&self, command: &str, arguments: Value) -> Result<Value> {
        lock(&self.qmp)
            .execute(command, arguments)
            .map_err(|error| explain(error, &self.folder))
    }

    /// Waits for an event of QEMU; one that came before and that nobody waited for counts.
    pub fn event(&self, name: &str, limit: Duration) -> Result<Value> {
        lock(&self.qmp).event(name, limit)
    }

    /// Pauses the guest.
    pub fn stop(&self) -> Result<()> {
        self.qmp("stop", json!({})).map(drop)
    }

    /// Lets a paused guest go on.
    pub fn cont(&self) -> Result<()> {
        self.qmp("cont", json!({})).map(drop)
    }

    /// Resets the guest like its reset button and waits until its shell answers again.
    pub fn reset(&self) -> Result<()> {
        let mut shell = lock(&self.shell);
        {
            let mut qmp = lock(&self.qmp);
            qmp.forget_events();
            qmp.execute("system_reset", json!({}))?;
        }
        let deadline = Instant::now() + self.boot_limit;
        let ready = shell.ready(deadline, &mut || self.look());
        ready
            .context("the guest did not come back after its reset")
            .map_err(|error| explain(error, &self.folder))
    }

    /// Asks QEMU to end and waits for it.
    pub fn quit(&self) -> Result<ExitStatus> {
        // QEMU may close the socket before its answer is read.
        let _ = lock(&self.qmp).execute("quit", json!({}));
        self.wait_exit(END_LIMIT)
    }

    /// Kills QEMU (SIGKILL) and waits for it.
    pub fn kill(&self) -> Result<ExitStatus> {
        let mut child = lock(&self.child);
        child.kill().context("cannot kill QEMU")?;
        child.wait().context("cannot wait for QEMU")
    }

    /// Waits until QEMU has ended.
    pub fn wait_exit(&self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = lock(&self.child)
                .try_wait()
                .context("cannot wait for QEMU")?
            {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                return Err(explain(
                    anyhow!("QEMU still runs after {limit:?}"),
                    &self.folder,
                ));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// True while QEMU runs.
    pub fn is_running(&self) -> bool {
        matches!(lock(&self.child).try_wait(), Ok(None))
    }

    /// The command line that QEMU was started with, quoted for a shell.
    pub fn command_line(&self) -> &str {
        &self.command_line
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The node of its virtio port called `name`, as in `/dev/vport1p1`: there is no udev that would name it.
    pub fn virtio_port(&self, name: &str) -> Result<String> {
        let node = self.check(&format!(
            "for p in /sys/class/virtio-ports/*; do [ \"$(cat $p/name)\" != {name} ] || echo /dev/${{p##*/}}; done"
        ))?;
        ensure!(!node.is_empty(), "the guest has no virtio port {name}");
        Ok(node)
    }

    /// The ids of QEMU's threads that are the guest's processors; what its other threads do is the host's work.
    pub fn vcpu_threads(&self) -> Result<Vec<u32>> {
        let answer = self.qmp("query-cpus-fast", json!({}))?;
        let processors = answer.as_array().map(Vec::as_slice).unwrap_or_default();
        processors
            .iter()
            .map(|processor| {
                let id = processor["thread-id"].as_u64().map(u32::try_from);
                Ok(id.with_context(|| format!("a processor without a thread: {processor}"))??)
            })
            .collect()
    }

    /// What QEMU has printed as errors so far.
    pub fn stderr(&self) -> String {
        text_of(&self.folder.join("stderr"))
    }

    /// What the guest's kernel has printed so far.
    pub fn console(&self) -> String {
        text_of(&self.folder.join("console"))
    }

    /// A folder for sockets and files of this guest; it goes with the guest.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn look(&self) -> Result<()> {
        look(&mut lock(&self.child), &self.folder)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Errors here mean that it has ended already.
        let _ = self.kill();
        if std::env::var_os("VIRTPROXY_KEEP").is_none() {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

fn command(lab: &Lab, options: &GuestOptions, folder: &Path) -> Result<Command> {
    let mut command = lab.qemu_command();
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-machine",
            "q35,memory-backend=mem0",
        ])
        .args([
            "-object",
            &format!(
                "memory-backend-memfd,id=mem0,size={}M,share=on",
                options.memory_mib
            ),
        ])
        .args([
            "-m",
            &format!("{}M", options.memory_mib),
            "-smp",
            &options.smp.to_string(),
        ])
        .args(lab.accel.arguments())
        .args([
            "-chardev",
            &format!("file,id=console,path={}", folder.join("console").display()),
        ])
        .args(["-serial", "chardev:console"])
        .args([
            "-chardev",
            &format!("socket,id=shell,path={}", folder.join("shell").display()),
        ])
        .args(["-serial", "chardev:shell"])
        .args(["-qmp", &format!("unix:{}", folder.join("qmp").display())])
        .arg("-kernel")
        .arg(&lab.kernel.image)
        .arg("-initrd")
        .arg(folder.join("initrd"))
        .args([
            "-append",
            format!("console=ttyS0 quiet {}", options.kernel_args).trim(),
        ])
        .args(&options.qemu_args)
        .stdin(Stdio::null())
        .stdout(
            File::create(folder.join("stdout"))
                .context("cannot create a file for QEMU's output")?,
        )
        .stderr(
            File::create(folder.join("stderr"))
                .context("cannot create a file for QEMU's errors")?,
        );
    Ok(command)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
