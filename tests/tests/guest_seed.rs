//! The examples of the first version's announcement, run as they stand with a program called `qemu-vp` on each side.
//!
//! `scripts/seed-examples.sh` is the announcement's own text. Its pieces are found by its own comments and given to a
//! shell where they belong: QEMU's arguments to the lab, `./qemu-vp` of this host and of the guest, and `wget` and `ssh`
//! of this host. They use the announcement's own addresses, so 127.0.0.1:9080 and :9022 must be free here.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use virtproxy_lab::{Guest, GuestOptions, Lab};
use virtproxy_tests::scene::{Daemon, new_address, program};

const EXAMPLES: &str = include_str!("../scripts/seed-examples.sh");
const NETWORK: &str = "over a network connection";

const IN_THE_HOST: &str = "# in the host:";
const IN_THE_GUEST: &str = "# in the guest:";

/// The command after the line `comment` of an example.
fn command_after(example: &str, comment: &str) -> Result<String> {
    let (_, rest) = example
        .split_once(comment)
        .with_context(|| format!("the announcement has no {comment:?}"))?;
    let lines = rest.lines().skip(1);
    let command: Vec<_> = lines
        .take_while(|line| !line.is_empty() && !line.starts_with('#'))
        .collect();
    ensure!(!command.is_empty(), "nothing follows {comment:?}");
    Ok(command.join("\n"))
}

/// A folder of this host where the announcement's words mean something: `./qemu-vp`, `qemu`, `ssh`.
struct Host {
    folder: PathBuf,
}

impl Host {
    fn new() -> Result<Self> {
        let folder = virtproxy_lab::temporary_folder()?;
        symlink(program("virtproxy"), folder.join("qemu-vp"))?;
        let host = Host { folder };
        // The lab starts QEMU, with the arguments that this one prints.
        host.script("qemu", "printf '%s\\n' \"$@\"")?;
        let ssh = virtproxy_lab::spawn::shown(&Lab::get()?.ssh_command()?);
        host.script("ssh", &format!("exec {ssh} -o User=root \"$@\""))?;
        Ok(host)
    }

    fn script(&self, name: &str, text: &str) -> Result<()> {
        let file = self.folder.join("bin").join(name);
        fs::create_dir_all(self.folder.join("bin"))?;
        fs::write(&file, format!("#!/bin/sh\n{text}\n"))?;
        fs::set_permissions(file, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// A shell in the folder that becomes `line`.
    fn shell(&self, line: &str) -> Result<Command> {
        println!("$ {line}");
        let mut command = Command::new("sh");
        let path = std::env::var("PATH")?;
        command
            .args(["-c", &format!("exec {line}")])
            .current_dir(&self.folder)
            .env("PATH", format!("{}/bin:{path}", self.folder.display()))
            .env("no_proxy", "localhost");
        Ok(command)
    }

    /// What `line` prints, with `input` to read.
    fn output(&self, line: &str, input: &str) -> Result<String> {
        let mut child = self
            .shell(line)?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child
            .stdin
            .take()
            .context("piped")?
            .write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{line}: {}: {said}", output.status);
        Ok(String::from_utf8(output.stdout)?)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// What QEMU left behind where the announcement puts its sockets.
fn remove_sockets() {
    for name in [
        "test0-virtioconsole",
        "test1-virtio-serial",
        "test2-virtio-serial",
    ] {
        let _ = fs::remove_file(Path::new("/tmp").join(format!("{name}.sock")));
    }
}

fn start_in_guest(guest: &Guest, line: &str) -> Result<()> {
    println!("guest# {line}");
    guest.check(&format!(
        "[ -e qemu-vp ] || ln -s /usr/bin/virtproxy-agent qemu-vp\n\
         killall qemu-vp; while pidof qemu-vp >/dev/null; do sleep 0.1; done\n\
         setsid {line} >/tmp/qemu-vp.log 2>&1 &"
    ))?;
    Ok(())
}

/// With both ends as the example has them, the announcement's own clients reach the guest's servers.
fn reach_the_guest(host: &Host, guest: &Guest, in_host: &str, in_guest: &str) -> Result<()> {
    start_in_guest(guest, in_guest)?;
    let daemon = Daemon::run(&host.folder, host.shell(in_host)?)?;
    let clients = || -> Result<()> {
        let wget = command_after(EXAMPLES, "access guest http server")?;
        host.output(&wget.replace("locahost", "localhost"), "")?;
        let page = fs::read_to_string(host.folder.join("index.html"))?;
        ensure!(page.contains("virtproxy guest"), "another page: {page}");
        fs::remove_file(host.folder.join("index.html"))?;
        let ssh = command_after(EXAMPLES, "access guest ssh server")?;
        let said = host.output(&ssh, "hostname; id -u\n")?;
        ensure!(said == "guest\n0\n", "another machine: {said}");
        Ok(())
    };
    clients().with_context(|| logs(&daemon, guest))
}

/// "By specifying -i and -o options in the host and guest, respectively, the channel can also be used to establish
/// connections from a guest to a host."
fn reach_the_host(host: &Host, guest: &Guest, in_host: &str, in_guest: &str) -> Result<()> {
    let channel = |line: &str| -> Result<String> {
        let (channel, _) = line
            .split_once(" -i ")
            .or(line.split_once(" -o "))
            .context("a forward")?;
        Ok(channel.to_owned())
    };
    let address = serve_a_page()?;
    start_in_guest(
        guest,
        &format!("{} -o http:127.0.0.1:9080", channel(in_guest)?),
    )?;
    let line = format!("{} -i http:{address}", channel(in_host)?);
    let daemon = Daemon::run(&host.folder, host.shell(&line)?)?;
    let page = guest.check("wget -qO- http://localhost:9080");
    let page = page.with_context(|| logs(&daemon, guest))?;
    ensure!(page == "a page of the host", "another page: {page}");
    Ok(())
}

fn logs(daemon: &Daemon, guest: &Guest) -> String {
    let in_guest = guest.check("cat /tmp/qemu-vp.log");
    format!(
        "in the host:\n{}\nin the guest:\n{}",
        daemon.log(),
        in_guest.unwrap_or_else(|error| format!("{error:#}"))
    )
}

/// A web server of this host.
fn serve_a_page() -> Result<String> {
    let listener = TcpListener::bind(new_address())?;
    let address = listener.local_addr()?.to_string();
    std::thread::spawn(move || -> Result<()> {
        for client in listener.incoming() {
            let mut client = client?;
            let request = BufReader::new(client.try_clone()?).lines();
            // Up to the empty line after its headers.
            request
                .take_while(|line| line.as_ref().is_ok_and(|line| !line.is_empty()))
                .for_each(drop);
            client.write_all(b"HTTP/1.0 200 OK\r\n\r\na page of the host")?;
        }
        Ok(())
    });
    Ok(address)
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn the_examples_of_the_announcement_run_as_they_stand() -> Result<()> {
    remove_sockets();
    let host = Host::new()?;
    let (serial, network) = EXAMPLES.split_once(NETWORK).context("two examples")?;
    let qemu = host.output(
        &command_after(serial, "# start guest with virtio-serial")?,
        "",
    )?;
    let arguments = qemu.lines().filter(|word| *word != "...");
    let guest_ip = new_address().replace(":7000", "");
    let guest = Lab::get()?.boot(
        GuestOptions::default()
            .device(arguments.map(str::to_owned).collect())
            .user_network(&[(&format!("{guest_ip}:9000"), 9000)])
            .agent(&program("virtproxy-agent")),
    )?;
    let in_host = command_after(serial, IN_THE_HOST)?;
    let in_guest = command_after(serial, IN_THE_GUEST)?;
    reach_the_guest(&host, &guest, &in_host, &in_guest).context("over virtio-serial")?;
    reach_the_host(&host, &guest, &in_host, &in_guest).context("back over virtio-serial")?;

    // QEMU's user network gives the guest one address inside and another outside.
    let in_host = command_after(network, IN_THE_HOST)?.replace("<guest_ip>", &guest_ip);
    let in_guest = command_after(network, IN_THE_GUEST)?.replace("<guest_ip>", "10.0.2.15");
    reach_the_guest(&host, &guest, &in_host, &in_guest).context("over the network")?;
    reach_the_host(&host, &guest, &in_host, &in_guest).context("back over the network")?;
    drop(guest);
    remove_sockets();
    Ok(())
}
