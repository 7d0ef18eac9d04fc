//! A relay in the middle of a channel, which puts bytes in or takes some out when it is told to.
//!
//! It takes clients at one socket and connects each to another, whatever their kinds: UNIX, TCP or vsock. Or it stands
//! before a command's standard input and output ([`run_before`]). A [`Fault`] that is asked for strikes the next bytes in
//! its direction; so it is traffic that meets it, in the middle of a frame more often than not.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::peer::Pattern;

/// Bytes moved in one go.
const CHUNK: usize = 16 * 1024;
/// Bytes that are put in.
const GARBAGE: usize = 3001;
/// Bytes that are taken out.
const GAP: usize = 101;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the client that came to the tap.
    There,
    /// To it.
    Back,
}

/// What is done to the bytes on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Bytes that nobody sent come first, both ways, when the next client comes.
    First,
    /// Bytes that nobody sent come in between.
    Insert(Way),
    /// Some bytes are lost.
    Drop(Way),
}

impl Fault {
    /// Those that can strike in the middle of a session.
    pub const INSIDE: [Fault; 4] = [
        Fault::Insert(Way::There),
        Fault::Insert(Way::Back),
        Fault::Drop(Way::There),
        Fault::Drop(Way::Back),
    ];
}

/// Faults that were asked for and have not struck yet: a folder with an empty file for each, so that they can be asked
/// for from anywhere.
#[derive(Clone)]
pub struct Faults(pub PathBuf);

impl Faults {
    /// The file of one.
    pub fn file(&self, fault: Fault) -> PathBuf {
        self.0.join(match fault {
            Fault::First => "first",
            Fault::Insert(Way::There) => "insert-there",
            Fault::Insert(Way::Back) => "insert-back",
            Fault::Drop(Way::There) => "drop-there",
            Fault::Drop(Way::Back) => "drop-back",
        })
    }

    /// Whether it was asked for; it strikes once.
    fn take(&self, fault: Fault) -> bool {
        fs::remove_file(self.file(fault)).is_ok()
    }
}

fn garbage() -> Vec<u8> {
    let mut bytes = vec![0; GARBAGE];
    Pattern::new(0xbad).fill(&mut bytes);
    bytes
}

/// Moves bytes until either side ends.
fn relay(mut from: impl Read, mut to: impl Write, way: Way, faults: &Faults) -> io::Result<()> {
    let mut buf = vec![0; CHUNK];
    loop {
        let n = from.read(&mut buf)?;
        if n == 0 {
            return Ok(());
        }
        let bytes = &buf[..n];
        // In the middle of what came.
        let (first, second) = bytes.split_at(n / 2);
        if faults.take(Fault::Insert(way)) {
            to.write_all(first)?;
            to.write_all(&garbage())?;
            to.write_all(second)?;
        } else if faults.take(Fault::Drop(way)) {
            to.write_all(first)?;
            to.write_all(&second[GAP.min(second.len())..])?;
        } else {
            to.write_all(bytes)?;
        }
    }
}

/// Where a tap takes its clients, and where it connects them to.
#[derive(Clone)]
pub struct Between {
    /// Where clients come.
    pub listen: SockAddr,
    /// Where each is connected to.
    pub connect: SockAddr,
    /// A line each way belongs to the way and not to the channel: `CONNECT 9000` and `OK 1073741824`.
    pub after_a_line: bool,
    /// What it is to do to their bytes.
    pub faults: Faults,
}

impl Between {
    /// Takes clients from now on, each in threads of its own, until the process ends.
    pub fn start(self) -> Result<()> {
        let kind = |address: &SockAddr| Domain::from(i32::from(address.family()));
        let listener = Socket::new(kind(&self.listen), Type::STREAM, None)?;
        listener.bind(&self.listen).context("the tap cannot bind")?;
        listener.listen(16)?;
        std::thread::spawn(move || -> io::Result<()> {
            loop {
                let (client, _) = listener.accept()?;
                let between = self.clone();
                std::thread::spawn(move || -> io::Result<()> {
                    let other = Socket::new(kind(&between.connect), Type::STREAM, None)?;
                    // Who is not there yet is tried again by the client.
                    other.connect(&between.connect)?;
                    between.serve(&client, &other)
                });
            }
        });
        Ok(())
    }

    fn serve(&self, client: &Socket, other: &Socket) -> io::Result<()> {
        for side in [client, other] {
            // What is small goes on at once, as it does without a tap. Only TCP knows of anything else.
            let _ = side.set_tcp_nodelay(true);
        }
        if self.after_a_line {
            pass_a_line(client, other)?;
            pass_a_line(other, client)?;
        }
        if self.faults.take(Fault::First) {
            for mut side in [other, client] {
                side.write_all(&garbage())?;
            }
        }
        let end = |_| {
            // Either may be gone already.
            let _ = client.shutdown(Shutdown::Both);
            let _ = other.shutdown(Shutdown::Both);
        };
        std::thread::scope(|threads| {
            threads.spawn(|| end(relay(client, other, Way::There, &self.faults)));
            end(relay(other, client, Way::Back, &self.faults));
        });
        Ok(())
    }
}

fn pass_a_line(mut from: &Socket, mut to: &Socket) -> io::Result<()> {
    let mut byte = [0];
    while byte != *b"\n" {
        from.read_exact(&mut byte)?;
        to.write_all(&byte)?;
    }
    Ok(())
}

/// The tap as a program between two vsock ports of this machine.
pub fn run_between_vsock(listen: u32, connect: u32, faults: Faults) -> Result<()> {
    let between = Between {
        listen: SockAddr::vsock(libc::VMADDR_CID_ANY, listen),
        connect: SockAddr::vsock(libc::VMADDR_CID_LOCAL, connect),
        after_a_line: false,
        faults,
    };
    between.start()?;
    loop {
        std::thread::park();
    }
}

/// The tap as a program between its own standard input and output and those of `command`.
pub fn run_before(command: &[&str], faults: Faults) -> Result<()> {
    let [program, arguments @ ..] = command else {
        bail!("no command");
    };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    let mut there = child.stdin.take().context("piped")?;
    let back = child.stdout.take().context("piped")?;
    let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from);
    let (stdin, mut stdout) = (own(io::stdin().as_fd())?, own(io::stdout().as_fd())?);
    if faults.take(Fault::First) {
        there.write_all(&garbage())?;
        stdout.write_all(&garbage())?;
    }
    let faults_there = faults.clone();
    std::thread::spawn(move || relay(stdin, there, Way::There, &faults_there));
    // Whoever started this is told of the command's end by the end of its output.
    let _ = relay(back, stdout, Way::Back, &faults);
    child.wait()?;
    Ok(())
}
