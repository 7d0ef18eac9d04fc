//! The lab itself, with real guests: boots, runs commands, resets, pauses, reports failures. Run by `cargo xtask test`.

use anyhow::{Context, Result};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Stdio;
use std::time::{Duration, Instant};
use virtproxy_lab::serde_json::json;
use virtproxy_lab::{
    Chardev, GuestFile, GuestOptions, Lab, SerialPort, VsockDevice, isa_serial, temporary_folder,
    virtio_serial, virtserialport,
};

#[test]
#[ignore = "boots a guest: run `cargo xtask test`"]
fn one_guest_through_its_life() -> Result<()> {
    let folder = temporary_folder()?;
    let port = folder.join("port");
    let begun = Instant::now();
    let guest = Lab::get()?.boot(
        GuestOptions::default()
            .device(virtserialport(&port, "org.virtproxy.0"))
            .file(GuestFile::bytes("hello\n", "/etc/greeting"))
            .boot_line("echo from the start > /tmp/started"),
    )?;
    eprintln!("booted in {:.2} s", begun.elapsed().as_secs_f64());
    assert!(!guest.check("uname -r")?.is_empty());
    assert_eq!(
        guest.check("cat /etc/greeting /tmp/started")?,
        "hello\nfrom the start"
    );

    // Statuses, both outputs, odd bytes, long scripts, long outputs.
    let output = guest.run("echo out; echo err >&2; exit 7")?;
    assert_eq!(
        (
            output.status,
            output.stdout.as_str(),
            output.stderr.as_str()
        ),
        (7, "out\n", "err\n")
    );
    assert_eq!(
        guest.check("printf '\\003\\004\\021@lab END 1\\n\\033'")?,
        "\u{3}\u{4}\u{11}@lab END 1\n\u{1b}"
    );
    let long = "x".repeat(20_000);
    assert_eq!(guest.check(&format!("echo {long}"))?, long);
    assert_eq!(
        guest
            .check("seq 1 20000 | md5sum")?
            .split(' ')
            .next()
            .map(str::len),
        Some(32)
    );
    assert_eq!(guest.check("seq 1 20000")?.lines().count(), 20_000);
    guest.check("(while sleep 0.01; do echo noise; done) &")?;
    assert_eq!(guest.check("sleep 0.1; echo quiet")?, "quiet");

    // A command that takes too long ends, and the next one works.
    let error = guest
        .run_for("echo partial; sleep 60", Duration::from_secs(1))
        .unwrap_err();
    assert!(format!("{error:#}").contains("partial"), "{error:#}");
    assert_eq!(guest.check("echo next")?, "next");

    // Its servers, and that it has no network but loopback.
    assert_eq!(guest.check("ls /sys/class/net")?, "lo");
    assert!(
        guest
            .check("wget -qO- http://127.0.0.1/")?
            .contains("no network card")
    );
    assert!(
        guest
            .check("wget -qO- http://127.0.0.1/tmp/started")?
            .contains("from the start")
    );
    assert!(
        guest
            .check("nc 127.0.0.1 22 </dev/null | head -n 1")?
            .starts_with("SSH-2.0")
    );
    assert!(guest.check("socat -V | head -n 2")?.contains("socat"));

    // The port, both ways.
    assert_eq!(
        guest.check("cat /sys/class/virtio-ports/*/name")?,
        "org.virtproxy.0"
    );
    let node = guest.check("basename /sys/class/virtio-ports/*")?;
    let mut stream = UnixStream::connect(&port).context("cannot connect to the port")?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    guest.check(&format!(
        "setsid sh -c 'exec 3<>/dev/{node}; cat <&3 >&3' >/tmp/port.log 2>&1 & sleep 0.5"
    ))?;
    stream.write_all(b"through the port")?;
    let mut buffer = [0; 16];
    stream.read_exact(&mut buffer)?;
    assert_eq!(&buffer, b"through the port");

    // Pause and reset.
    guest.stop()?;
    assert_eq!(guest.qmp("query-status", json!({}))?["status"], "paused");
    guest.event("STOP", Duration::from_secs(1))?;
    guest.cont()?;
    guest.check("touch /tmp/before")?;
    let begun = Instant::now();
    guest.reset()?;
    eprintln!("reset in {:.2} s", begun.elapsed().as_secs_f64());
    assert_eq!(
        guest.check("ls /tmp/before 2>/dev/null; cat /tmp/started")?,
        "from the start"
    );

    let pid = guest.pid();
    let threads = guest.vcpu_threads()?;
    assert_eq!(threads.len(), 2);
    for thread in threads {
        assert!(std::path::Path::new(&format!("/proc/{pid}/task/{thread}")).exists());
    }
    assert!(guest.quit()?.success());
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    std::fs::remove_dir_all(folder)?;
    Ok(())
}

#[test]
#[ignore = "boots a guest: run `cargo xtask test`"]
fn ssh_and_sftp_through_a_bare_port() -> Result<()> {
    let lab = Lab::get()?;
    let folder = temporary_folder()?;
    let port = folder.join("port");
    let guest = lab.boot(GuestOptions::default().device(virtserialport(&port, "bare")))?;
    let node = guest.check("basename /sys/class/virtio-ports/*")?;
    let socat = lab.tool("socat")?;
    let proxy = format!(
        "ProxyCommand={} - UNIX-CONNECT:{}",
        socat.display(),
        port.display()
    );
    // The port reads as ended while nobody is connected on the host: that is no end here.
    let serve = format!(
        "killall -9 socat; setsid socat OPEN:/dev/{node},ignoreeof TCP:127.0.0.1:22 >/tmp/socat.log 2>&1 & sleep 0.3"
    );

    guest.check(&serve)?;
    let output = lab
        .ssh_command()?
        .args([
            "-o",
            "ConnectTimeout=30",
            "-o",
            &proxy,
            "root@guest",
            "hostname; id -u",
        ])
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(
        said,
        "guest\n0\n",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );

    guest.check(&serve)?;
    let (there, back) = (folder.join("there"), folder.join("back"));
    std::fs::write(&there, "to the guest and back")?;
    let mut sftp = lab.sftp_command()?;
    let mut child = sftp
        .args([
            "-o",
            "ConnectTimeout=30",
            "-o",
            &proxy,
            "-b",
            "-",
            "root@guest",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()?;
    let batch = format!(
        "put {} /tmp/f\nget /tmp/f {}\n",
        there.display(),
        back.display()
    );
    child
        .stdin
        .take()
        .context("no input")?
        .write_all(batch.as_bytes())?;
    assert!(child.wait()?.success());
    assert_eq!(std::fs::read_to_string(&back)?, "to the guest and back");
    std::fs::remove_dir_all(folder)?;
    Ok(())
}

#[test]
#[ignore = "boots a guest: run `cargo xtask test`"]
fn failures_show_the_console_and_what_qemu_said() -> Result<()> {
    let lab = Lab::get()?;
    let wrong = GuestOptions::default().device(vec!["-device".into(), "no-such-device".into()]);
    let error = format!("{:#}", lab.boot(wrong).unwrap_err());
    assert!(
        error.contains("no-such-device") && error.contains("QEMU has ended"),
        "{error}"
    );

    let panics = GuestOptions {
        kernel_args: "rdinit=/nowhere".to_owned(),
        ..GuestOptions::default()
    };
    let error = format!("{:#}", lab.boot(panics).unwrap_err());
    assert!(
        error.contains("kernel panicked") && error.contains("VFS"),
        "{error}"
    );

    let missing = GuestOptions::default().agent("/nowhere/virtproxy-agent".as_ref());
    let error = format!("{:#}", lab.boot(missing).unwrap_err());
    assert!(error.contains("build it first"), "{error}");
    Ok(())
}

#[test]
#[ignore = "boots a guest: run `cargo xtask test`"]
fn a_killed_guest_is_noticed() -> Result<()> {
    let guest = Lab::get()?.boot(GuestOptions {
        memory_mib: 256,
        smp: 1,
        ..GuestOptions::default()
    })?;
    let folder = guest.folder().to_owned();
    assert!(guest.is_running());
    guest.kill()?;
    let error = format!("{:#}", guest.run("true").unwrap_err());
    assert!(error.contains("QEMU") || error.contains("gone"), "{error}");
    drop(guest);
    assert!(!folder.exists());
    Ok(())
}

/// Reads until `text` has come.
fn expect(stream: &mut UnixStream, text: &str) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let (mut said, mut byte) = (Vec::new(), [0]);
    while !String::from_utf8_lossy(&said).contains(text) {
        stream
            .read_exact(&mut byte)
            .with_context(|| format!("no {text:?} in {:?}", String::from_utf8_lossy(&said)))?;
        said.push(byte[0]);
    }
    Ok(())
}

#[test]
#[ignore = "boots a guest: run `cargo xtask test`"]
fn one_guest_with_every_device() -> Result<()> {
    let lab = Lab::get()?;
    let folder = temporary_folder()?;
    let [console, listens, connects, isa] =
        ["console", "listens", "connects", "isa"].map(|name| folder.join(name));
    let vsock = VsockDevice::start(lab, 3, &folder)?;
    let address = format!("127.99.{}.1:7000", std::process::id() % 250);
    let begun = Instant::now();
    let guest = lab.boot(
        GuestOptions::default()
            .device(virtio_serial(&[
                SerialPort::Console("console", Chardev::Listens(&console)),
                SerialPort::Generic("listens", Chardev::Listens(&listens)),
                SerialPort::Generic("connects", Chardev::Connects(&connects)),
            ]))
            .device(isa_serial(&isa))
            .user_network(&[(&address, 53)])
            .vsock(vsock.socket())
            .file(GuestFile::packaged("usr/sbin/qemu-ga"))
            .file(GuestFile::packaged("usr/sbin/dnsmasq")),
    )?;
    eprintln!("booted in {:.2} s", begun.elapsed().as_secs_f64());

    // A getty on the console: somebody logs in with the password and runs a command.
    let mut terminal = UnixStream::connect(&console)?;
    guest.check("setsid getty 0 hvc0 vt100 >/tmp/getty.log 2>&1 &")?;
    expect(&mut terminal, "login: ")?;
    terminal.write_all(b"root\n")?;
    expect(&mut terminal, "Password: ")?;
    terminal.write_all(b"virtproxy\n")?;
    expect(&mut terminal, "guest# ")?;
    terminal.write_all(b"echo $((6 * 7)); tty\n")?;
    expect(&mut terminal, "42\r\n/dev/hvc0")?;

    // A QEMU guest agent on the raw port that QEMU connects outwards.
    let listener = UnixListener::bind(&connects)?;
    let port = "for p in /sys/class/virtio-ports/*; do [ $(cat $p/name) = connects ] && echo /dev/${p##*/}; done";
    guest.check(&format!(
        "setsid qemu-ga -m virtio-serial -p $({port}) -t /run >/tmp/qemu-ga.log 2>&1 &"
    ))?;
    let mut agent = listener.accept()?.0;
    agent.set_read_timeout(Some(Duration::from_secs(20)))?;
    agent.write_all(br#"{"execute":"guest-sync","arguments":{"id":4711}}"#)?;
    let mut line = String::new();
    BufReader::new(&agent).read_line(&mut line)?;
    assert!(line.contains("4711"), "{line}");

    // The third serial port, raw.
    let mut serial = UnixStream::connect(&isa)?;
    guest.check("stty -F /dev/ttyS2 raw -echo; echo over the line > /dev/ttyS2")?;
    expect(&mut serial, "over the line\n")?;

    // The network: a resolver in the guest, asked from here, and this host's loopback from the guest.
    guest.check("dnsmasq --user=root --no-resolv --no-hosts --txt-record=here.test,found")?;
    let (host, number) = address.split_once(':').context("an address has a port")?;
    let output = std::process::Command::new(lab.tool("dig")?)
        .args(["+tcp", "+short", "-p", number, "TXT", "here.test"])
        .arg(format!("@{host}"))
        .output()?;
    assert_eq!(String::from_utf8_lossy(&output.stdout), "\"found\"\n");
    let here = std::net::TcpListener::bind("127.0.0.1:0")?;
    let greeting = std::thread::spawn({
        let here = here.try_clone()?;
        move || -> Result<()> { Ok(here.accept()?.0.write_all(b"from the host")?) }
    });
    let said = guest.check(&format!(
        "nc 10.0.2.2 {} </dev/null",
        here.local_addr()?.port()
    ))?;
    greeting.join().expect("no panic")?;
    assert_eq!(said, "from the host");
    drop(TcpStream::connect(&address)?);

    // vsock: from here to the guest, from the guest to here, and within the guest.
    guest.check(
        "setsid socat VSOCK-LISTEN:9000,fork SYSTEM:'echo guest' >/tmp/vsock.log 2>&1 & sleep 0.5",
    )?;
    let mut stream = UnixStream::connect(vsock.uds())?;
    stream.write_all(b"CONNECT 9000\n")?;
    expect(&mut stream, "OK ")?;
    expect(&mut stream, "guest\n")?;
    assert_eq!(guest.check("socat -u VSOCK-CONNECT:1:9000 -")?, "guest");
    let listener = UnixListener::bind(vsock.uds_of(9001))?;
    guest.check(
        "setsid sh -c 'echo to the host | socat -u - VSOCK-CONNECT:2:9001' >/tmp/out.log 2>&1 &",
    )?;
    expect(&mut listener.accept()?.0, "to the host\n")?;
    std::fs::remove_dir_all(folder)?;
    Ok(())
}
