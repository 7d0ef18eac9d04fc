//! The channels: what each end is started with, and where a tap stands in between.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result};
use socket2::SockAddr;
use virtproxy_lab::Lab;
use virtproxy_tests::scene::{new_address, wait_works};
use virtproxy_tests::tap::{Between, Faults};

use crate::bench::{Bench, End, TLS_IN_GUEST, new_folder, own_program};

/// One channel.
pub(crate) struct Row {
    /// As the table has it.
    pub(crate) name: &'static str,
    /// The end with `-o peer:...`.
    pub(crate) near: End,
    /// The end with `-i peer:...`.
    pub(crate) far: End,
    /// Where the near end's clients come.
    pub(crate) address: String,
    /// What stands between the ends.
    pub(crate) tap: Tap,
    /// A way to the near end's clients, where that is in the guest: an agent on the bench's device.
    pub(crate) carrier: Option<End>,
    /// So many bytes are bulk there.
    pub(crate) bulk: u64,
    /// What is lost on the way is sent again: a fault costs no session.
    pub(crate) repairs: bool,
}

/// What can put bytes into a channel.
pub(crate) enum Tap {
    /// A relay of the host.
    InHost(Faults),
    /// A relay of the guest.
    InGuest(Faults),
    /// Nothing, but a program of the guest can write to the port before the agent has it.
    PortOnly,
}

const BULK: u64 = 16 << 20;
/// Where the emulated guest encrypts, or handles each byte.
const SLOW: u64 = 4 << 20;
const SERIAL: u64 = 96 << 10;
/// vhost-device-vsock 0.3.0 stalls in longer transfers, of socat as well.
const SHORT: u64 = 1 << 20;

const FAR: &str = "-i peer:127.0.0.1:7000";
/// A client of a channel that does not come up hangs no longer than that.
const QUICK: &str = "--wait-for-peer=10";

/// The near end on the host, the far end in the guest.
fn row(
    bench: &Bench,
    name: &'static str,
    file: &'static str,
    near: &str,
    far: &str,
) -> Result<Row> {
    let address = new_address();
    Ok(Row {
        name,
        near: End::host(&["-c", near, "-o", &format!("peer:{address}"), QUICK]),
        far: End::Guest {
            name: file,
            flags: format!("-c {far} {FAR}"),
        },
        address,
        tap: Tap::InHost(Faults(new_folder(&bench.path(&format!("{file}.faults")))?)),
        bulk: BULK,
        repairs: false,
        carrier: None,
    })
}

impl Row {
    /// Puts the tap between `listen` and `connect`.
    fn tapped(self, listen: SockAddr, connect: SockAddr, after_a_line: bool) -> Result<Self> {
        if let Tap::InHost(faults) = &self.tap {
            let faults = faults.clone();
            Between {
                listen,
                connect,
                after_a_line,
                faults,
            }
            .start()
            .with_context(|| self.name)?;
        }
        Ok(self)
    }

    /// Starts both ends and waits until they work together.
    pub(crate) fn start(&mut self, bench: &Bench) -> Result<()> {
        for end in self
            .carrier
            .iter_mut()
            .chain([&mut self.near, &mut self.far])
        {
            end.start(bench)?;
        }
        wait_works(&self.address).with_context(|| self.logs(bench))
    }

    /// How many sessions the near end has had.
    pub(crate) fn sessions(&self, bench: &Bench) -> usize {
        self.near.log(bench).matches("session established").count()
    }

    /// What both ends have logged.
    pub(crate) fn logs(&self, bench: &Bench) -> String {
        let (near, far) = (self.near.log(bench), self.far.log(bench));
        format!("near end:\n{near}\nfar end:\n{far}\n")
    }

    /// Ends both ends.
    pub(crate) fn stop(&mut self, bench: &Bench) -> Result<()> {
        let ends = [&mut self.far, &mut self.near];
        ends.into_iter()
            .chain(self.carrier.iter_mut())
            .try_for_each(|end| end.kill(bench))
    }
}

fn unix(path: &Path) -> Result<SockAddr> {
    Ok(SockAddr::unix(path)?)
}

fn tcp(address: &str) -> Result<SockAddr> {
    Ok(address.parse::<SocketAddr>()?.into())
}

/// All of them.
pub(crate) fn all(bench: &Bench) -> Result<Vec<Row>> {
    Ok(vec![
        vhost_user(bench),
        chardev_listens(
            bench,
            "unix-connect, virtserialport",
            "listens",
            "virtserial-open:/dev/virtio-ports/listens:-",
        )?,
        chardev_connects(bench)?,
        Row {
            bulk: SLOW,
            repairs: true,
            ..chardev_listens(
                bench,
                "unix-connect, virtconsole",
                "console",
                "virtserial-open:/dev/hvc0:-",
            )?
        },
        Row {
            bulk: SERIAL,
            repairs: true,
            ..chardev_listens(
                bench,
                "isa-serial-open",
                "isa",
                "isa-serial-open:/dev/ttyS2:115200",
            )?
        },
        Row {
            bulk: SLOW,
            ..tcp_to_guest(bench)?
        },
        Row {
            bulk: SLOW,
            ..tls_to_guest(bench)?
        },
        Row {
            bulk: SLOW,
            ..tcp_from_guest(bench)?
        },
        Row {
            bulk: SHORT,
            ..hvsock(bench)?
        },
        Row {
            bulk: SHORT,
            ..vsock_from_guest(bench)?
        },
        vsock_within(bench)?,
        Row {
            bulk: SLOW,
            ..exec(bench)?
        },
    ])
}

fn vhost_user(bench: &Bench) -> Row {
    Row {
        name: "vhost-user",
        near: End::Device,
        far: End::Guest {
            name: "vhost-user",
            flags: format!("-c virtserial-open:/dev/virtio-ports/org.virtproxy.0:- {FAR}"),
        },
        address: bench.device_address.clone(),
        tap: Tap::PortOnly,
        bulk: BULK,
        repairs: false,
        carrier: None,
    }
}

/// QEMU listens on the chardev's socket.
fn chardev_listens(
    bench: &Bench,
    name: &'static str,
    port: &'static str,
    far: &str,
) -> Result<Row> {
    let tap = bench.path(&format!("{port}.tap"));
    let near = format!("unix-connect:{}:-", tap.display());
    row(bench, name, port, &near, far)?.tapped(unix(&tap)?, unix(&bench.path(port))?, false)
}

/// QEMU connects to the chardev's socket.
fn chardev_connects(bench: &Bench) -> Result<Row> {
    let daemon = bench.path("connects.daemon");
    row(
        bench,
        "unix-listen, virtserialport",
        "connects",
        &format!("unix-listen:{}:-", daemon.display()),
        "virtserial-open:/dev/virtio-ports/connects:-",
    )?
    .tapped(unix(&bench.path("connects"))?, unix(&daemon)?, false)
}

fn tcp_to_guest(bench: &Bench) -> Result<Row> {
    let tap = new_address();
    row(
        bench,
        "tcp-connect, tcp-listen in the guest",
        "tcp",
        &format!("tcp-connect:{tap}"),
        "tcp-listen:10.0.2.15:9000 --insecure-plaintext",
    )?
    .tapped(tcp(&tap)?, tcp(&bench.forwards[1])?, false)
}

fn tls_to_guest(bench: &Bench) -> Result<Row> {
    let tap = &bench.tls_address;
    let mut row = row(
        bench,
        "tcp-connect, tcp-listen in the guest, TLS",
        "tls",
        &format!("tcp-connect:{tap}"),
        &format!("tcp-listen:10.0.2.15:9001 --tls-creds {TLS_IN_GUEST}"),
    )?
    .tapped(tcp(tap)?, tcp(&bench.forwards[2])?, false)?;
    if let End::Host { flags, .. } = &mut row.near {
        flags.push(format!("--tls-creds={}", bench.path("tls").display()));
    }
    Ok(row)
}

fn tcp_from_guest(bench: &Bench) -> Result<Row> {
    let daemon = new_address();
    // QEMU's user network leads to this one address of this host.
    let port = std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port();
    row(
        bench,
        "tcp-listen, tcp-connect in the guest",
        "tcp-back",
        &format!("tcp-listen:{daemon}"),
        &format!("tcp-connect:10.0.2.2:{port} --insecure-plaintext"),
    )?
    .tapped(tcp(&format!("127.0.0.1:{port}"))?, tcp(&daemon)?, false)
}

fn hvsock(bench: &Bench) -> Result<Row> {
    let tap = bench.path("hvsock.tap");
    row(
        bench,
        "hvsock-connect, vsock-listen",
        "hvsock",
        &format!("hvsock-connect:{}:9002", tap.display()),
        "vsock-listen:any:9002",
    )?
    .tapped(unix(&tap)?, unix(bench.vsock.uds())?, true)
}

fn vsock_from_guest(bench: &Bench) -> Result<Row> {
    let daemon = bench.path("vsock.daemon");
    row(
        bench,
        "unix-listen, vsock-connect",
        "vsock-back",
        &format!("unix-listen:{}:-", daemon.display()),
        "vsock-connect:host:9003",
    )?
    .tapped(unix(&bench.vsock.uds_of(9003))?, unix(&daemon)?, false)
}

/// Both ends are in the guest, and a tap between them.
fn vsock_within(bench: &Bench) -> Result<Row> {
    let faults = Faults("/tmp/faults".into());
    bench.guest.check(&format!(
        "mkdir {0}; setsid peer tap-vsock {0} 9005 9004 >/tmp/tap.log 2>&1 &",
        faults.0.display()
    ))?;
    Ok(Row {
        name: "vsock-connect, vsock-listen",
        near: End::Guest {
            name: "vsock-near",
            flags: format!("-c vsock-connect:local:9005 -o peer:127.0.0.1:7100 {QUICK}"),
        },
        far: End::Guest {
            name: "vsock-far",
            flags: format!("-c vsock-listen:any:9004 {FAR}"),
        },
        address: bench.near_address.clone(),
        tap: Tap::InGuest(faults),
        bulk: BULK,
        repairs: false,
        carrier: Some(End::Guest {
            name: "carrier",
            flags: "-c virtserial-open:org.virtproxy.0:- -i near:127.0.0.1:7100".to_owned(),
        }),
    })
}

/// The host's end starts the guest's with ssh, and a tap before that.
fn exec(bench: &Bench) -> Result<Row> {
    let faults = Faults(new_folder(&bench.path("exec.faults"))?);
    let mut ssh = Lab::get()?.ssh_command()?;
    let (host, port) = bench.forwards[0]
        .split_once(':')
        .context("an address has a port")?;
    ssh.args(["-p", port, &format!("root@{host}")]);
    ssh.arg(format!("virtproxy-agent -c stdio:-:- {FAR}"));
    let folder = faults.0.display().to_string();
    let tap = own_program("peer", &["tap-before", &folder]);
    let address = new_address();
    Ok(Row {
        name: "exec, stdio",
        near: End::host(&[
            "-c",
            &format!("exec:{tap} {}:-", virtproxy_lab::spawn::shown(&ssh)),
            "-o",
            &format!("peer:{address}"),
            QUICK,
        ]),
        far: End::StartedByTheOther,
        address,
        tap: Tap::InHost(faults),
        bulk: BULK,
        repairs: false,
        carrier: None,
    })
}
