//! UDP forwards with a real resolver and a real client at either end: dnsmasq and dig.

use std::fmt::Write;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use virtproxy_lab::{DeviceOptions, GuestFile, GuestOptions, Lab, vhost_user_console};
use virtproxy_tests::scene::{Daemon, SOON, new_address, program, wait_for};

/// Hosts that the resolver knows.
const HOSTS: usize = 200;
/// Where the guest's resolver listens.
const GUEST_RESOLVER: &str = "127.0.0.1:53";
/// Where the guest finds the host's resolver.
const HOST_RESOLVER_IN_GUEST: &str = "127.0.0.1:5300";
/// The answer for `big.test`: four strings of 250 bytes, with the space and quotes that dig puts around each.
const BIG_ANSWER: usize = 4 * 253 - 1;

/// What a resolver at `address` knows, as a configuration of dnsmasq.
fn zone(address: &str) -> Result<String> {
    let (host, port) = address.split_once(':').context("no port")?;
    let mut zone = format!(
        "listen-address={host}\nport={port}\nbind-interfaces\nno-resolv\nno-hosts\nlocal=/test/\n\
         host-record=fixed.test,192.0.2.7\ntxt-record=big.test"
    );
    for letter in ["a", "b", "c", "d"] {
        write!(zone, ",{}", letter.repeat(250))?;
    }
    zone.push('\n');
    for number in 0..HOSTS {
        writeln!(zone, "host-record=h{number}.test,198.51.100.{number}")?;
    }
    Ok(zone)
}

/// A resolver of this host.
struct Resolver(Child);

impl Resolver {
    fn start(lab: &Lab, folder: &Path, address: &str) -> Result<Self> {
        let file = folder.join("dnsmasq.conf");
        std::fs::write(&file, zone(address)?)?;
        let mut command = Command::new(lab.tool("dnsmasq")?);
        command
            .args(["--keep-in-foreground", "--user=root", "--pid-file="])
            .arg(format!("--conf-file={}", file.display()))
            .stdin(Stdio::null());
        let child = virtproxy_lab::spawn::spawn(command).context("cannot start dnsmasq")?;
        Ok(Resolver(child))
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `dig` for the resolver at `address`, over UDP and nothing else.
fn dig_words(address: &str, words: &str) -> Result<String> {
    let (host, port) = address.split_once(':').context("no port")?;
    Ok(format!("@{host} -p {port} +notcp +ignore {words}"))
}

fn dig(lab: &Lab, address: &str, words: &str) -> Result<Command> {
    let mut command = Command::new(lab.tool("dig")?);
    command.args(dig_words(address, words)?.split(' '));
    Ok(command)
}

fn text(output: &Output) -> Result<String> {
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ensure!(output.status.success(), "dig: {}: {text}", output.status);
    Ok(text)
}

/// The message's size, as dig gives it at the end of what it prints.
fn message_size(printed: &str) -> Result<usize> {
    let size = printed
        .lines()
        .find_map(|line| line.strip_prefix(";; MSG SIZE  rcvd: "));
    Ok(size.context("dig gives no size")?.trim().parse()?)
}

/// An answer of more than 512 bytes, whole, in one datagram.
fn check_big(printed: &str) -> Result<()> {
    ensure!(!printed.contains(" tc"), "truncated:\n{printed}");
    ensure!(printed.contains("(UDP)"), "not over UDP:\n{printed}");
    let size = message_size(printed)?;
    ensure!(size > 1000, "only {size} bytes:\n{printed}");
    Ok(())
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn dig_asks_a_resolver_at_the_other_end() -> Result<()> {
    let lab = Lab::get()?;
    let folder = virtproxy_lab::temporary_folder()?;
    let socket = folder.join("vp.sock");
    let (to_guest, host_resolver) = (new_address(), new_address());
    let _resolver = Resolver::start(lab, &folder, &host_resolver)?;
    let flags = [
        "-c",
        &format!("vhost-user:{}:-", socket.display()),
        "-o",
        &format!("dns/udp:{to_guest}"),
        "-i",
        &format!("hostdns/udp:{host_resolver}"),
    ];
    let daemon = Daemon::start(&folder, &flags.map(String::from))?;
    wait_for(SOON, || socket.exists())?;
    let guest = lab.boot(
        GuestOptions::default()
            .device(vhost_user_console(&socket, &DeviceOptions::default()))
            .agent(&program("virtproxy-agent"))
            .file(GuestFile::packaged("usr/sbin/dnsmasq"))
            .file(GuestFile::packaged("usr/bin/dig"))
            .file(GuestFile::bytes(zone(GUEST_RESOLVER)?, "/etc/dnsmasq.conf")),
    )?;
    guest.check("dnsmasq --user=root")?;
    guest.check(&format!(
        "setsid virtproxy-agent -c virtserial-open:org.virtproxy.0:- -i dns/udp:{GUEST_RESOLVER} \
         -o hostdns/udp:{HOST_RESOLVER_IN_GUEST} >/tmp/agent.log 2>&1 &"
    ))?;
    daemon.wait_log("session established", 1, 3 * SOON)?;

    // From the host to the guest.
    let ask = |words: &str| text(&dig(lab, &to_guest, words)?.output()?);
    ensure!(ask("+short A fixed.test")? == "192.0.2.7");
    ensure!(ask("+short TXT big.test")?.len() == BIG_ANSWER);
    check_big(&ask("TXT big.test")?)?;
    let start = Instant::now();
    let asked: Vec<_> = (0..HOSTS)
        .map(|number| {
            let mut command = dig(lab, &to_guest, &format!("+short A h{number}.test"))?;
            command.stdout(Stdio::piped()).stdin(Stdio::null());
            Ok(virtproxy_lab::spawn::spawn(command)?)
        })
        .collect::<Result<_>>()?;
    for (number, child) in asked.into_iter().enumerate() {
        let answer = text(&child.wait_with_output()?)?;
        ensure!(answer == format!("198.51.100.{number}"), "{answer}");
    }
    println!("{HOSTS} at once: {:?}", start.elapsed());

    // From the guest to the host.
    let ask = |words: &str| -> Result<String> {
        guest.check(&format!(
            "dig {}",
            dig_words(HOST_RESOLVER_IN_GUEST, words)?
        ))
    };
    ensure!(ask("+short A fixed.test")? == "192.0.2.7");
    ensure!(ask("+short TXT big.test")?.len() == BIG_ANSWER);
    check_big(&ask("TXT big.test")?)?;
    std::fs::remove_dir_all(folder)?;
    Ok(())
}
