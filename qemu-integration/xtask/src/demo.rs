//! `cargo xtask demo`: the main job, from nothing, in front of the user's eyes.
//!
//! A guest that has no network card serves pages, shells and files to this host and reaches a service of it; each
//! thing is done with the command that a user would type, shown with its result. Then everything stays up to be tried
//! by hand, or, with `--check`, ends and tells by the exit code whether all of it worked.

use crate::daemon::Daemon;
use crate::{http, test, workspace};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use virtproxy_lab::{
    DeviceOptions, Guest, GuestOptions, Lab, progress, spawn, temporary_folder,
    temporary_folder_in, vhost_user_console,
};

/// Options of `cargo xtask demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// End after the checks; exit with 0 when all of them passed and with 1 when one failed
    #[arg(long)]
    check: bool,
    /// Guest memory in MiB
    #[arg(long, default_value_t = 512)]
    memory: u32,
}

/// How long the agent may take from its start until the first request is answered.
const FIRST_ANSWER: Duration = Duration::from_secs(20);
const ANSWER: Duration = Duration::from_secs(10);
const HOST_PAGE: &str = "This page comes from a service on the host.\n";
const FILE_SIZE: usize = 2 << 20;

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let lab = Lab::get()?;
    for line in lab.describe() {
        println!("  {line}");
    }
    heading("build the programs");
    crate::steps::run(&mut test::build_programs())?;
    let mut demo = Demo::start(lab, &workspace::target()?.join("release"), arguments.memory)?;
    let mut result = demo.checks();
    match &result {
        Ok(()) => println!("\nAll of it worked."),
        Err(error) => println!("\nFAILED: {error:#}\n{}", demo.logs()),
    }
    if !arguments.check && result.is_ok() {
        demo.invite()?;
        result = wait_for_interrupt(&mut demo);
    }
    let ended = demo.end();
    result.context("the demonstration failed")?;
    ended
}

/// A folder that goes with this value.
struct Scratch(PathBuf);

impl Scratch {
    fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left is swept away by a later run.
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Demo {
    lab: &'static Lab,
    folder: Scratch,
    http: u16,
    ssh: u16,
    daemon: Daemon,
    guest: Guest,
    number: u32,
}

impl Demo {
    fn start(lab: &'static Lab, programs: &Path, memory_mib: u32) -> Result<Self> {
        let runtime = std::env::var_os("XDG_RUNTIME_DIR")
            .map(PathBuf::from)
            .filter(|dir| dir.is_dir());
        let folder = Scratch(match runtime {
            Some(runtime) => temporary_folder_in(&runtime)?,
            None => temporary_folder()?,
        });
        let socket = folder.join("vp.sock");
        let (http, ssh) = (http::free_port(9080)?, http::free_port(9022)?);
        let service = http::listen(3142)?;
        let package_port = service
            .local_addr()
            .context("the host service has no address")?
            .port();

        heading("a service on this host, for the guest");
        println!("  a page on 127.0.0.1:{package_port}, served by this very program");
        http::serve(service, HOST_PAGE);

        heading("the daemon: it is the guest's console device");
        let mut command = Command::new(programs.join("virtproxy"));
        command
            .args(["-c", &format!("vhost-user:{}:-", socket.display())])
            .args(["-o", &format!("http:127.0.0.1:{http}")])
            .args(["-o", &format!("ssh:127.0.0.1:{ssh}")])
            .args(["-i", &format!("pkg:127.0.0.1:{package_port}")]);
        println!("$ {} &", spawn::shown(&command));
        let daemon = Daemon::start(command, &socket, folder.join("virtproxy.log"))?;

        heading("a guest whose only way out is that console");
        let device = vhost_user_console(&socket, &DeviceOptions::default());
        let options = GuestOptions {
            memory_mib,
            ..GuestOptions::default()
        };
        let begun = Instant::now();
        let options = options
            .device(device)
            .agent(&programs.join("virtproxy-agent"));
        let guest = lab.boot(options).with_context(|| daemon.log())?;
        println!("$ {} &", guest.command_line());
        println!("  booted in {:.1} s", begun.elapsed().as_secs_f64());
        Ok(Self {
            lab,
            folder,
            http,
            ssh,
            daemon,
            guest,
            number: 0,
        })
    }

    fn checks(&mut self) -> Result<()> {
        self.guest_has_no_network()?;
        self.start_agent()?;
        self.fetch_a_page()?;
        self.run_a_command()?;
        self.copy_a_file()?;
        self.guest_reaches_the_host()
    }

    fn guest_has_no_network(&mut self) -> Result<()> {
        self.check("the guest has no network card", |demo| {
            println!("guest# ls /sys/class/net");
            let interfaces = demo.guest.check("ls /sys/class/net")?;
            ensure!(interfaces == "lo", "the guest has {interfaces}");
            Ok(format!("{interfaces} (loopback only)"))
        })
    }

    fn start_agent(&mut self) -> Result<()> {
        self.check("start the agent in the guest", |demo| {
            let agent = "virtproxy-agent -c virtserial-open:/dev/virtio-ports/org.virtproxy.0:- \
                         -i http:127.0.0.1:80 -i ssh:127.0.0.1:22 -o pkg:127.0.0.1:3142";
            println!("guest# {agent} &");
            demo.guest.check(&format!(
                "setsid {agent} >/tmp/agent.log 2>&1 </dev/null & sleep 0.3; kill -0 $!"
            ))?;
            Ok("it runs".to_owned())
        })
    }

    fn fetch_a_page(&mut self) -> Result<()> {
        self.check("the host reads a page of the guest's web server", |demo| {
            println!("$ curl http://127.0.0.1:{}/", demo.http);
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, demo.http));
            let deadline = Instant::now() + FIRST_ANSWER;
            let page = loop {
                match http::get(address, ANSWER) {
                    Ok(page) => break page,
                    Err(error) if Instant::now() >= deadline => return Err(error),
                    Err(_) => std::thread::sleep(Duration::from_millis(100)),
                }
            };
            ensure!(
                page.contains("no network card"),
                "another page came: {page}"
            );
            Ok(page)
        })
    }

    fn run_a_command(&mut self) -> Result<()> {
        self.check("the host runs a command in the guest over ssh", |demo| {
            let mut ssh = demo.ssh()?;
            ssh.args(["echo hello from $(hostname), $(uname -sr), $(id -un)"]);
            let said = demo.output(&mut ssh)?;
            ensure!(said.contains("hello from guest"), "it said {said}");
            Ok(said)
        })
    }

    fn copy_a_file(&mut self) -> Result<()> {
        self.check(
            "the host copies a file to the guest and back with sftp",
            |demo| {
                let (there, back) = (demo.folder.join("there"), demo.folder.join("back"));
                let bytes = noise(FILE_SIZE);
                fs::write(&there, &bytes).context("cannot write the file to copy")?;
                let mut sftp = demo.lab.sftp_command()?;
                sftp.args(["-P", &demo.ssh.to_string(), "-b", "-", "root@127.0.0.1"]);
                let batch = format!(
                    "put {} /tmp/file\nget /tmp/file {}\n",
                    there.display(),
                    back.display()
                );
                println!("$ {} <<'EOF'\n{batch}EOF", spawn::shown(&sftp));
                let mut child = sftp
                    .stdin(Stdio::piped())
                    .stdout(Stdio::null())
                    .stderr(Stdio::piped())
                    .spawn()
                    .context("cannot run sftp")?;
                child
                    .stdin
                    .take()
                    .context("sftp takes no input")?
                    .write_all(batch.as_bytes())
                    .context("sftp ended early")?;
                let output = child.wait_with_output().context("cannot wait for sftp")?;
                ensure!(
                    output.status.success(),
                    "sftp: {} {}",
                    output.status,
                    String::from_utf8_lossy(&output.stderr)
                );
                ensure!(
                    fs::read(&back).context("nothing came back")? == bytes,
                    "what came back differs"
                );
                let mut ssh = demo.ssh()?;
                ssh.args(["sha256sum /tmp/file; rm /tmp/file"]);
                let sum = demo.output(&mut ssh)?;
                Ok(format!(
                    "{} there and back are equal; in the guest: {sum}",
                    progress::size(bytes.len() as u64)
                ))
            },
        )
    }

    fn guest_reaches_the_host(&mut self) -> Result<()> {
        self.check("the guest reads a page of a service on the host", |demo| {
            println!("guest# wget -qO- http://127.0.0.1:3142/");
            let page = demo.guest.check("wget -T 10 -qO- http://127.0.0.1:3142/")?;
            ensure!(page.trim() == HOST_PAGE.trim(), "another page came: {page}");
            Ok(page)
        })
    }

    fn check(&mut self, what: &str, work: impl FnOnce(&mut Self) -> Result<String>) -> Result<()> {
        self.number += 1;
        heading(&format!("{}. {what}", self.number));
        let begun = Instant::now();
        let result = work(self).with_context(|| what.to_owned())?;
        for line in result.trim().lines() {
            println!("  {line}");
        }
        println!("  ok ({:.2} s)", begun.elapsed().as_secs_f64());
        Ok(())
    }

    fn ssh(&self) -> Result<Command> {
        let mut command = self.lab.ssh_command()?;
        command.args(["-p", &self.ssh.to_string(), "root@127.0.0.1"]);
        Ok(command)
    }

    fn output(&self, command: &mut Command) -> Result<String> {
        println!("$ {}", spawn::shown(command));
        let output = command
            .stdin(Stdio::null())
            .output()
            .context("cannot run it")?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {stderr}", output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn invite(&self) -> Result<()> {
        heading("it stays up until Ctrl-C; try");
        println!("  curl http://127.0.0.1:{}/", self.http);
        println!("  {}", spawn::shown(&self.ssh()?));
        println!(
            "  wget -qO- http://127.0.0.1:3142/     # in that shell: the guest reaches the host"
        );
        println!(
            "  the daemon's log: {}",
            self.folder.join("virtproxy.log").display()
        );
        println!(
            "  the guest's console: {}",
            self.guest.folder().join("console").display()
        );
        Ok(())
    }

    fn logs(&self) -> String {
        let agent = self.guest.run_for("tail -n 20 /tmp/agent.log", ANSWER);
        let agent = agent.map_or_else(
            |error| format!("(not readable: {error:#})"),
            |output| output.stdout,
        );
        format!("{}\n--- the agent's log:\n{agent}", self.daemon.log())
    }

    fn end(mut self) -> Result<()> {
        self.guest.quit()?;
        self.daemon.end()
    }
}

fn heading(text: &str) {
    println!("\n== {text}");
}

/// Bytes that do not compress and have no period (xorshift).
fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupted(_signal: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Waits for Ctrl-C; the end of either program is an error.
fn wait_for_interrupt(demo: &mut Demo) -> Result<()> {
    let handler: extern "C" fn(libc::c_int) = interrupted;
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler only stores to an atomic, which is allowed at any point of any thread.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
    while !INTERRUPTED.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(100));
        demo.daemon.look()?;
        ensure!(
            demo.guest.is_running(),
            "the guest has ended\n{}",
            demo.guest.stderr()
        );
    }
    println!();
    Ok(())
}
