//! A program that was taken over: it enters the sandbox that virtproxy, or its keeper, has with the same flags, and then
//! tries what it is told to. For the sandbox's tests.

use std::fs::{self, File};
use std::io;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use clap::{Parser, Subcommand};
use virtproxy_engine::program::Options;
use virtproxy_engine::sandbox;
use virtproxy_host::confine::{self, Needs};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    options: Options,
    /// The keeper was taken over
    #[arg(long)]
    keeper: bool,
    #[command(subcommand)]
    deed: Deed,
}

#[derive(Subcommand)]
enum Deed {
    /// What any thread of virtproxy does: more threads, more memory
    Nothing,
    /// A system call without arguments
    Call {
        number: libc::c_long,
    },
    /// A socket of this family and kind
    Socket {
        family: i32,
        kind: i32,
    },
    /// Pushing input into a terminal
    Push,
    /// Memory that can be run
    Code,
    Run {
        program: PathBuf,
    },
    /// Whether this process could be signalled
    Signal {
        process: i32,
    },
    Read {
        file: PathBuf,
    },
    Write {
        file: PathBuf,
    },
    Remove {
        file: PathBuf,
    },
    Tcp {
        address: String,
    },
    Unix {
        path: PathBuf,
    },
}

fn main() {
    let cli = Cli::parse();
    let entered = match cli.keeper {
        true => confine::enter_as_keeper(),
        false => confine::enter(&Needs::new(&cli.options, [], None), None),
    };
    entered.expect("there is a sandbox");
    match cli.deed.do_it() {
        Ok(()) => println!("done"),
        Err(error) => println!("{error}{}", sandbox::hint(&error)),
    }
}

impl Deed {
    fn do_it(self) -> io::Result<()> {
        match self {
            Deed::Nothing => {
                let busy = || {
                    vec![1_u8; 8 << 20]
                        .iter()
                        .map(|n| usize::from(*n))
                        .sum::<usize>()
                };
                let threads: Vec<_> = (0..8).map(|_| std::thread::spawn(busy)).collect();
                for thread in threads {
                    assert_eq!(thread.join().expect("it does not panic"), 8 << 20);
                }
                Ok(())
            }
            // SAFETY: zeros instead of pointers: the call can only fail.
            Deed::Call { number } => done(unsafe { libc::syscall(number, 0, 0, 0, 0, 0, 0) }),
            // SAFETY: plain integers.
            Deed::Socket { family, kind } => done(unsafe { libc::socket(family, kind, 0) }.into()),
            // SAFETY: a valid byte.
            Deed::Push => done(unsafe { libc::ioctl(0, libc::TIOCSTI, b"x".as_ptr()) }.into()),
            Deed::Code => {
                let (access, kind) = (
                    libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                );
                // SAFETY: new memory, of which nothing is used.
                let memory = unsafe { libc::mmap(std::ptr::null_mut(), 4096, access, kind, -1, 0) };
                done(if memory == libc::MAP_FAILED { -1 } else { 0 })
            }
            Deed::Run { program } => Command::new(program).status().map(drop),
            // SAFETY: plain integers.
            Deed::Signal { process } => done(unsafe { libc::kill(process, 0) }.into()),
            Deed::Read { file } => fs::read(file).map(drop),
            Deed::Write { file } => File::options()
                .append(true)
                .create(true)
                .open(file)
                .map(drop),
            Deed::Remove { file } => fs::remove_file(file),
            Deed::Tcp { address } => TcpStream::connect(address).map(drop),
            Deed::Unix { path } => UnixStream::connect(path).map(drop),
        }
    }
}

fn done(result: libc::c_long) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
