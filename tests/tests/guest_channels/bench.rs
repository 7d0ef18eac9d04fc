//! The guest with every device, and the programs at the ends of a channel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use virtproxy_lab::{
    Chardev, DeviceOptions, Guest, GuestFile, GuestOptions, Lab, SerialPort, VsockDevice,
    isa_serial, vhost_user_console, virtio_serial,
};
use virtproxy_tests::creds;
use virtproxy_tests::scene::{Daemon, GUEST_PEER, SOON, new_address, program, wait_for};

/// The folder of certificates in the guest.
pub(crate) const TLS_IN_GUEST: &str = "/etc/tls";

/// All that every channel needs.
pub(crate) struct Bench {
    // Fields are dropped in this order: QEMU cannot live without the device of the daemon.
    /// The guest.
    pub(crate) guest: Guest,
    /// The vsock device.
    pub(crate) vsock: VsockDevice,
    /// The daemon that is the guest's vhost-user device, for as long as it lives.
    pub(crate) device: Daemon,
    /// Where its clients come.
    pub(crate) device_address: String,
    /// Where those come that want the guest's own port 7100.
    pub(crate) near_address: String,
    /// Where those of the TLS channel come, on their way to the guest's port 9001: what its certificate names.
    pub(crate) tls_address: String,
    /// Where this host reaches the guest's ports 2222, 9000 and 9001.
    pub(crate) forwards: [String; 3],
    /// For sockets and logs.
    pub(crate) folder: PathBuf,
}

impl Bench {
    /// Boots it.
    pub(crate) fn new() -> Result<Self> {
        let folder = virtproxy_lab::temporary_folder()?;
        let vsock = VsockDevice::start(Lab::get()?, 3, &folder)?;
        let (device_address, near_address) = (new_address(), new_address());
        let socket = folder.join("vp.sock");
        let device = Daemon::start(
            &folder,
            &[
                "-c".into(),
                format!("vhost-user:{}:-", socket.display()),
                "-o".into(),
                format!("peer:{device_address}"),
                "-o".into(),
                format!("near:{near_address}"),
            ],
        )?;
        wait_for(SOON, || socket.exists()).with_context(|| device.log())?;
        let tls_address = new_address();
        let (name, _) = tls_address
            .split_once(':')
            .context("an address has a port")?;
        let tls = folder.join("tls");
        creds::make(&tls, name)?;
        let forwards = [(); 3].map(|()| new_address());
        let port = |name: &str| folder.join(name);
        let mut options = GuestOptions::default()
            .device(vhost_user_console(&socket, &DeviceOptions::default()))
            .device(virtio_serial(&[
                SerialPort::Console("console", Chardev::Listens(&port("console"))),
                SerialPort::Generic("listens", Chardev::Listens(&port("listens"))),
                SerialPort::Generic("connects", Chardev::Connects(&port("connects"))),
            ]))
            .device(isa_serial(&port("isa")))
            .user_network(&[
                (&forwards[0], 2222),
                (&forwards[1], 9000),
                (&forwards[2], 9001),
            ])
            .vsock(vsock.socket())
            .agent(&program("virtproxy-agent"))
            .file(GuestFile::copy(program("peer"), "/usr/bin/peer"));
        for file in creds::FILES {
            let there = format!("{TLS_IN_GUEST}/{file}");
            options = options.file(GuestFile::copy(tls.join(file), there));
        }
        let guest = Lab::get()?.boot(options)?;
        guest.check(&format!(
            "setsid peer serve {GUEST_PEER} >/tmp/peer.log 2>&1 &\n\
             setsid socat TCP-LISTEN:2222,bind=10.0.2.15,fork,reuseaddr TCP:127.0.0.1:22 >/tmp/socat.log 2>&1 &"
        ))?;
        Ok(Bench {
            guest,
            vsock,
            device,
            device_address,
            near_address,
            tls_address,
            forwards,
            folder,
        })
    }

    /// A path for a socket or a file of the host.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// What the guest's service has read that was never sent.
    pub(crate) fn wrong_bytes(&self) -> Result<String> {
        self.guest
            .check("grep WRONG /tmp/peer.log; [ -e /tmp/peer.log ]")
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Before the device goes.
        let _ = self.guest.kill();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// What runs at one end of a channel.
pub(crate) enum End {
    /// A program of the host, which is `virtproxy`.
    Host {
        /// What it is started with.
        flags: Vec<String>,
        /// While it runs.
        running: Option<Daemon>,
    },
    /// A program of the guest, which is `virtproxy-agent`.
    Guest {
        /// Tells its files from those of others.
        name: &'static str,
        /// What it is started with.
        flags: String,
    },
    /// The bench's own daemon, which is the device.
    Device,
    /// An agent of the guest that the other end starts.
    StartedByTheOther,
}

impl End {
    /// A program of the host with these flags, still to be started.
    pub(crate) fn host(flags: &[&str]) -> Self {
        End::Host {
            flags: flags.iter().map(|&flag| flag.to_owned()).collect(),
            running: None,
        }
    }

    /// Starts it.
    pub(crate) fn start(&mut self, bench: &Bench) -> Result<()> {
        match self {
            End::Host { flags, running } => {
                *running = Some(Daemon::start(&bench.folder, flags)?);
            }
            End::Guest { name, flags } => {
                bench.guest.check(&format!(
                    "setsid sh -c 'echo $$ >/tmp/{name}.pid; exec virtproxy-agent {flags}' >>/tmp/{name}.log 2>&1 &\n\
                     until [ -s /tmp/{name}.pid ]; do sleep 0.05; done"
                ))?;
            }
            End::Device | End::StartedByTheOther => {}
        }
        Ok(())
    }

    /// Kills it, with SIGKILL.
    pub(crate) fn kill(&mut self, bench: &Bench) -> Result<()> {
        let kill_in_guest = |pids: &str| -> Result<()> {
            bench.guest.check(&format!(
                "for p in {pids}; do kill -9 $p; while [ -d /proc/$p ]; do sleep 0.02; done; done"
            ))?;
            Ok(())
        };
        match self {
            End::Host { running, .. } => *running = None,
            End::Guest { name, .. } => {
                kill_in_guest(&format!("$(cat /tmp/{name}.pid)"))?;
                bench.guest.check(&format!("rm -f /tmp/{name}.pid"))?;
            }
            End::StartedByTheOther => kill_in_guest("$(pidof virtproxy-agent)")?,
            End::Device => {}
        }
        Ok(())
    }

    /// What it has logged.
    pub(crate) fn log(&self, bench: &Bench) -> String {
        match self {
            End::Host { running, .. } => running.as_ref().map(Daemon::log).unwrap_or_default(),
            End::Guest { name, .. } => bench
                .guest
                .check(&format!("tail -c 10000 /tmp/{name}.log"))
                .unwrap_or_else(|error| format!("{error:#}")),
            End::Device => bench.device.log(),
            End::StartedByTheOther => String::new(),
        }
    }
}

/// A command line of one of the test's own programs on this host.
pub(crate) fn own_program(name: &str, words: &[&str]) -> String {
    let mut command = Command::new(program(name));
    command.args(words);
    virtproxy_lab::spawn::shown(&command)
}

/// An empty folder.
pub(crate) fn new_folder(path: &Path) -> Result<PathBuf> {
    fs::create_dir(path).with_context(|| format!("cannot create {}", path.display()))?;
    Ok(path.to_owned())
}
