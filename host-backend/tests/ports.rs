//! Ports beside the mux: every kind of place, with a guest's driver at one end and the program's users at the other.

mod frontend;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use frontend::guest::{CONSOLE_PORT, DEVICE_REMOVE, PORT_OPEN, PORT_READY, RESIZE};
use frontend::{Guest, NAME, Pattern, Setup, log, socket_path};
use tokio::sync::oneshot;
use virtproxy_engine::admin::{self, CallError, Request};
use virtproxy_engine::counters::Channels;
use virtproxy_engine::unix_socket;
use virtproxy_host::device::{Device, PortSpec};
use virtproxy_host::keeper::History;
use virtproxy_host::ports::{CONSOLE, Place, PortArg, Ports, console_spec, port_spec};

const PATIENCE: Duration = Duration::from_secs(20);

/// The program, in a thread.
struct Program {
    socket: PathBuf,
    admin: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Program {
    /// A device with the mux, these ports (the console is the one with its name), and room for more.
    fn start(ports: &[(&str, Place)], room: usize) -> Self {
        log();
        let (socket, admin) = (socket_path(), socket_path());
        let (stop, stopped) = oneshot::channel();
        let (tell, told) = mpsc::channel();
        let (ports, paths) = (owned(ports), (socket.clone(), admin.clone()));
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            tokio::task::LocalSet::new().block_on(&runtime, async move {
                let spec = |(name, place): &(String, Place)| match &**name {
                    CONSOLE => console_spec(place),
                    name => port_spec(name, place),
                };
                let specs = [PortSpec::generic(NAME)]
                    .into_iter()
                    .chain(ports.iter().map(spec))
                    .collect();
                let (device, made) = Device::start(&paths.0, specs, room).unwrap();
                let served = Rc::new(Ports::new(
                    device,
                    NAME,
                    Channels::default(),
                    History::default(),
                ));
                let mut made = made.into_iter();
                let _mux = made.next();
                for ((name, place), port) in ports.into_iter().zip(made) {
                    served.serve(&name, place, port).unwrap();
                }
                let (listener, _file) = unix_socket::listen(&paths.1, 16).unwrap();
                listener.set_nonblocking(true).unwrap();
                let listener = tokio::net::UnixListener::from_std(listener).unwrap();
                let server = tokio::task::spawn_local(admin::serve(listener, served));
                tell.send(()).unwrap();
                let _ = stopped.await;
                server.abort();
            });
        });
        told.recv().unwrap();
        Program {
            socket,
            admin,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    fn add(&self, port: &str) -> Result<serde_json::Value, CallError> {
        admin::call(&self.admin, &Request::new("port-add").with("port", port))
    }

    fn remove(&self, name: &str) -> Result<serde_json::Value, CallError> {
        admin::call(&self.admin, &Request::new("port-remove").with("name", name))
    }

    fn list(&self) -> serde_json::Value {
        admin::call(&self.admin, &Request::new("port-list")).unwrap()
    }

    /// Where the pseudo-terminal of a port is.
    fn terminal(&self, name: &str) -> PathBuf {
        let list = self.list();
        let ports = list["ports"].as_array().unwrap();
        let port = ports.iter().find(|port| port["name"] == name).unwrap();
        PathBuf::from(port["address"].as_str().unwrap())
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        drop(self.stop.take());
    }
}

fn owned(ports: &[(&str, Place)]) -> Vec<(String, Place)> {
    let own = |(name, place): &(&str, Place)| (String::from(*name), place.clone());
    ports.iter().map(own).collect()
}

fn setup(ports: usize, spare: usize) -> Setup {
    Setup {
        ports,
        spare,
        ..Setup::default()
    }
}

fn connect(path: &Path) -> UnixStream {
    let client = UnixStream::connect(path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.set_write_timeout(Some(PATIENCE)).unwrap();
    client
}

fn read_exact(reader: &mut impl Read, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    reader.read_exact(&mut bytes).unwrap();
    bytes
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "it never happened that {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn clients_of_a_listening_socket_come_one_after_the_other() {
    let path = socket_path();
    let program = Program::start(&[("p", Place::Listen(path.clone()))], 2);
    let mut guest = Guest::boot(&program.socket, setup(2, 0));
    guest.open(1);
    assert_eq!(guest.write(1, b"nobody hears this"), 0, "EAGAIN");
    for round in 0..20 {
        let mut client = connect(&path);
        let mut second = connect(&path);
        guest.wait_host_connected(1, true);
        client.write_all(b"question").unwrap();
        second.write_all(b"later").unwrap();
        assert_eq!(guest.read(1, 8), b"question", "round {round}");
        guest.write_all(1, b"answer");
        assert_eq!(read_exact(&mut client, 6), b"answer");
        guest.handle_control();
        guest.heard.clear();
        drop(client);
        // The guest sees that the first client is gone before it hears of the second.
        guest.wait_control("the next client came", |guest| {
            let opens = guest.heard.iter().filter(|m| m.event == PORT_OPEN);
            opens.map(|m| m.value).collect::<Vec<_>>() == [0, 1]
        });
        assert_eq!(guest.read(1, 5), b"later");
        drop(second);
        guest.wait_host_connected(1, false);
    }
}

#[test]
fn a_client_that_said_all_it_had_to_still_gets_its_answer() {
    let path = socket_path();
    let program = Program::start(&[("p", Place::Listen(path.clone()))], 2);
    let mut guest = Guest::boot(&program.socket, setup(2, 0));
    let mut client = connect(&path);
    guest.wait_host_connected(1, true);
    client.write_all(b"first").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    // The guest opens its port only now.
    guest.open(1);
    assert_eq!(guest.read(1, 5), b"first");
    guest.write_all(1, b"answer");
    assert_eq!(read_exact(&mut client, 6), b"answer");
    drop(client);
    guest.wait_host_connected(1, false);
    // What a client leaves behind is delivered too.
    let mut client = connect(&path);
    guest.wait_host_connected(1, true);
    client.write_all(&[7; 100_000]).unwrap();
    drop(client);
    assert_eq!(guest.read(1, 100_000), [7; 100_000]);
    guest.wait_host_connected(1, false);
}

#[test]
fn bytes_pass_whole_both_ways_at_once() {
    const TOTAL: usize = 8 << 20;
    let path = socket_path();
    let program = Program::start(&[("p", Place::Listen(path.clone()))], 2);
    let mut guest = Guest::boot(&program.socket, setup(2, 0));
    guest.open(1);
    let mut client = connect(&path);
    guest.wait_host_connected(1, true);
    let mut writer = client.try_clone().unwrap();
    let sender = thread::spawn(move || writer.write_all(&Pattern::new(1).take(TOTAL)).unwrap());
    let reader = thread::spawn(move || {
        Pattern::new(2).expect(&read_exact(&mut client, TOTAL));
        client
    });
    let (mut out, mut inn) = (Pattern::new(2).take(TOTAL), Pattern::new(1));
    let mut left = TOTAL;
    while left > 0 || !out.is_empty() {
        let written = guest.write(1, &out);
        out.drain(..written);
        let read = guest.take(1, 1 << 20);
        inn.expect(&read);
        left -= read.len();
        if written == 0 && read.is_empty() && (left > 0 || !out.is_empty()) {
            guest.wait(1, !out.is_empty());
        }
    }
    sender.join().unwrap();
    reader.join().unwrap();
}

#[test]
fn a_client_that_does_not_read_holds_the_guest_back_and_loses_nothing() {
    let path = socket_path();
    let program = Program::start(&[("p", Place::Listen(path.clone()))], 2);
    let mut guest = Guest::boot(&program.socket, setup(2, 0));
    guest.open(1);
    let mut client = connect(&path);
    guest.wait_host_connected(1, true);
    let (mut pattern, mut sent) = (Pattern::new(3), 0);
    let chunk = 32 * 1024;
    // Full when nothing has been taken for a while. A ring and a batch, in the worst case.
    let mut quiet_since = Instant::now();
    while quiet_since.elapsed() < Duration::from_millis(300) {
        let mut next = pattern.clone();
        let bytes = next.take(chunk);
        if guest.write(1, &bytes) == chunk {
            (pattern, sent) = (next, sent + chunk);
            quiet_since = Instant::now();
        }
        assert!(sent < 64 << 20, "the guest is not held back");
    }
    // The program goes on with everything else meanwhile.
    assert_eq!(program.list()["ports"][0]["connected"], true);
    let mut expected = Pattern::new(3);
    let received = thread::spawn(move || {
        expected.expect(&read_exact(&mut client, sent + chunk));
    });
    guest.write_all(1, &pattern.take(chunk));
    received.join().unwrap();
}

#[test]
fn a_socket_is_connected_to_again_and_again() {
    let path = socket_path();
    let program = Program::start(&[("p", Place::Connect(path.clone()))], 2);
    let mut guest = Guest::boot(&program.socket, setup(2, 0));
    guest.open(1);
    for _ in 0..3 {
        let listener = UnixListener::bind(&path).unwrap();
        guest.wait_host_connected(1, true);
        let (mut server, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        guest.write_all(1, b"hello");
        assert_eq!(read_exact(&mut server, 5), b"hello");
        server.write_all(b"world").unwrap();
        assert_eq!(guest.read(1, 5), b"world");
        drop((listener, server));
        fs::remove_file(&path).unwrap();
        guest.wait_host_connected(1, false);
    }
}

#[test]
fn a_file_gets_what_the_guest_writes() {
    let path = socket_path();
    fs::write(&path, "before\n").unwrap();
    let program = Program::start(&[("p", Place::File(path.clone()))], 2);
    let mut guest = Guest::boot(&program.socket, setup(2, 0));
    guest.open(1);
    guest.wait_host_connected(1, true);
    guest.write_all(1, b"one\n");
    guest.write_all(1, b"two\n");
    eventually("the file was written", || {
        fs::read(&path).unwrap() == b"before\none\ntwo\n"
    });
    assert!(guest.take(1, 1).is_empty());
    fs::remove_file(&path).unwrap();
}

fn open_terminal(path: &Path) -> File {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(path)
        .unwrap()
}

fn set_size(terminal: &File, columns: u16, rows: u16) {
    let size = libc::winsize {
        ws_col: columns,
        ws_row: rows,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: a valid `winsize`.
    let done = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    assert_eq!(done, 0);
}

#[test]
fn a_terminal_comes_and_goes() {
    let link = socket_path();
    let mut program = Program::start(&[("p", Place::Pty(Some(link.clone())))], 2);
    let mut guest = Guest::boot(&program.socket, setup(2, 0));
    guest.open(1);
    assert_eq!(fs::read_link(&link).unwrap(), program.terminal("p"));
    for _ in 0..3 {
        let mut terminal = open_terminal(&link);
        guest.wait_host_connected(1, true);
        terminal.write_all(b"\x03raw\r\n").unwrap();
        assert_eq!(guest.read(1, 6), b"\x03raw\r\n");
        guest.write_all(1, b"back\n");
        assert_eq!(read_exact(&mut terminal, 5), b"back\n");
        drop(terminal);
        guest.wait_host_connected(1, false);
    }
    drop(guest);
    program.end();
    assert!(fs::symlink_metadata(&link).is_err(), "the link is removed");
}

#[test]
fn a_console_follows_its_terminal_and_takes_emergencies() {
    let program = Program::start(&[(CONSOLE, Place::Pty(None))], 2);
    let mut guest = Guest::boot(&program.socket, setup(2, 0));
    assert_eq!(
        guest.features & 0b100,
        0b100,
        "VIRTIO_CONSOLE_F_EMERG_WRITE"
    );
    let console = |event| move |guest: &Guest| guest.heard.iter().any(|m| m.event == event);
    guest.wait_control("the console is announced", console(CONSOLE_PORT));
    guest.wait_control("its size is told", console(RESIZE));
    assert_eq!(guest.config(0, 4), [80, 0, 25, 0]);
    // Nobody is there, and nothing may wait.
    for _ in 0..1000 {
        guest.put_chars(1, &[b'.'; 4096]);
    }
    let mut terminal = open_terminal(&program.terminal(CONSOLE));
    for (columns, rows) in [(132, 43), (100, 30)] {
        set_size(&terminal, columns, rows);
        let told = [columns.to_le_bytes(), rows.to_le_bytes()].concat();
        guest.wait_control("the new size is told", |guest| {
            guest
                .heard
                .iter()
                .any(|m| m.event == RESIZE && m.rest == told)
        });
        assert_eq!(guest.config(0, 4), told);
    }
    eventually("the terminal is connected", || {
        program.list()["ports"][0]["connected"] == true
    });
    guest.write_all(1, b"login: ");
    assert_eq!(read_exact(&mut terminal, 7), b"login: ");
    terminal.write_all(b"root\r").unwrap();
    assert_eq!(guest.read(1, 5), b"root\r");
    // The driver's writes to other fields are none of it.
    let mut config = guest.config(0, 12);
    guest.set_config(&config);
    for byte in *b"panic!" {
        config[8] = byte;
        guest.set_config(&config);
    }
    assert_eq!(read_exact(&mut terminal, 6), b"panic!");
    // A terminal that is not read holds nothing up either.
    for _ in 0..1000 {
        guest.put_chars(1, &[b'.'; 4096]);
    }
}

#[test]
fn an_emergency_needs_no_driver() {
    let path = socket_path();
    let program = Program::start(&[(CONSOLE, Place::Listen(path.clone()))], 2);
    let mut client = connect(&path);
    eventually("the client is accepted", || {
        program.list()["ports"][0]["connected"] == true
    });
    let mut guest = Guest::connect(&program.socket, setup(2, 0));
    let mut config = guest.config(0, 12);
    for _ in 0..10_000 {
        config[8] = b'!';
        guest.set_config(&config);
    }
    assert_eq!(read_exact(&mut client, 4096), [b'!'; 4096]);
}

#[test]
fn ports_come_and_go_a_thousand_times() {
    let program = Program::start(&[], 3);
    let path = socket_path();
    let mut guest = Guest::boot(&program.socket, setup(1, 2));
    guest.open(0);
    let admin = program.admin.clone();
    let port = format!("p=unix-listen:{}", path.display());
    let (go, going) = mpsc::channel::<()>();
    let (done, is_done) = mpsc::channel();
    let commander = thread::spawn(move || {
        let add = Request::new("port-add").with("port", port);
        let remove = Request::new("port-remove").with("name", "p");
        for _ in 0..1000 {
            admin::call(&admin, &add).unwrap();
            done.send(()).unwrap();
            going.recv().unwrap();
            let removed = admin::call(&admin, &remove).unwrap();
            assert_eq!(removed["let_go"], true);
            going.recv().unwrap();
        }
    });
    for round in 0..1000 {
        guest.wait_control("the port was added", |guest| {
            guest.ports[1..].iter().any(|port| port.name.is_some())
        });
        let index = 1 + guest.ports[1..].iter().position(|p| p.added).unwrap();
        assert_eq!(guest.ports[index].name.as_deref(), Some(&b"p"[..]));
        is_done.recv().unwrap();
        // Also removed when it is open, with bytes in both rings that nobody has taken.
        if round % 2 == 0 {
            guest.open(index);
            let mut client = connect(&path);
            guest.wait_host_connected(index, true);
            let bytes = Pattern::new(round).take(64);
            client.write_all(&bytes).unwrap();
            assert!(guest.read(index, 64) == bytes, "stale bytes came");
            guest.write_all(index, &bytes);
            assert!(read_exact(&mut client, 64) == bytes, "stale bytes came");
            client.write_all(b"not read by the guest").unwrap();
            guest.write_all(index, b"not read by the client");
        }
        guest.heard.clear();
        go.send(()).unwrap();
        guest.wait_control("the port was removed", |guest| {
            guest.heard.iter().any(|m| m.event == DEVICE_REMOVE)
        });
        assert!(!guest.ports[index].added);
        // A rogue or a belated word about it.
        if round % 10 == 0 {
            let id = u32::try_from(index).unwrap();
            for (event, value) in [(PORT_OPEN, 1), (PORT_READY, 1), (PORT_OPEN, 0), (99, 9)] {
                guest.control(id, event, value);
            }
        }
        go.send(()).unwrap();
    }
    commander.join().unwrap();
    assert_eq!(program.list()["ports"].as_array().unwrap().len(), 0);
    assert!(guest.ports[0].host_connected, "the mux port is as it was");
}

#[test]
fn a_paused_guest_does_not_keep_a_port_from_being_removed() {
    let program = Program::start(&[("p", Place::Pty(None))], 2);
    let mut guest = Guest::boot(&program.socket, setup(2, 0));
    let admin = program.admin.clone();
    guest.pause_and_resume(|_| {
        let removed = admin::call(&admin, &Request::new("port-remove").with("name", "p")).unwrap();
        assert_eq!(removed["let_go"], false);
        let full = program.add("q=pty").unwrap_err().to_string();
        assert!(full.contains("room for 2 ports"), "{full}");
    });
    guest.wait_control("the port was removed", |guest| !guest.ports[1].added);
    eventually("there is room again", || program.add("q=pty").is_ok());
    guest.wait_control("the next port was added", |guest| {
        guest.ports[1].name.as_deref() == Some(b"q")
    });
}

#[test]
fn a_port_that_was_added_is_there_after_a_reboot_and_one_that_was_removed_is_not() {
    let program = Program::start(&[("p", Place::Pty(None))], 3);
    let mut guest = Guest::boot(&program.socket, setup(2, 1));
    program.add("q=pty").unwrap();
    guest.wait_control("the port was added", |guest| guest.ports[2].name.is_some());
    guest.open(2);
    // The guest reboots before it hears of the removal.
    let removing = thread::scope(|threads| {
        let removing = threads.spawn(|| program.remove("p").unwrap());
        eventually("the port is removed", || {
            program.list()["ports"].as_array().unwrap().len() == 1
        });
        guest.stop();
        guest.start_anew();
        guest.setup.ports = 0;
        guest.probe();
        while !removing.is_finished() {
            guest.handle_control();
            thread::yield_now();
        }
        removing.join().unwrap()
    });
    assert_eq!(removing["let_go"], true);
    guest.wait_control("the ports are there again", |guest| {
        guest.ports[0].name.is_some() && guest.ports[2].name.is_some()
    });
    assert!(!guest.ports[1].added);
    guest.open(2);
    let mut terminal = open_terminal(&program.terminal("q"));
    guest.wait_host_connected(2, true);
    terminal.write_all(b"on").unwrap();
    assert_eq!(guest.read(2, 2), b"on");
}

#[test]
fn each_bad_command_is_answered_with_its_cure() {
    let path = socket_path();
    let program = Program::start(&[("p", Place::Listen(path.clone()))], 3);
    let link = socket_path();
    let port = format!("l=pty:{}", link.display());
    program.add(&port).unwrap();
    let error = program.add(&port.replace("l=", "m=")).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("leads to port l already"), "{error}");
    program.remove("l").unwrap();
    assert!(fs::symlink_metadata(&link).is_err());
    for (port, part) in [
        ("p=pty", "there is a port \"p\" already"),
        ("org.virtproxy.0=pty", "already: name it otherwise"),
        ("console=pty", "the port of --console"),
        ("q=stdio", "only be given at the start"),
        ("q", "missing PLACE"),
        ("q=file:/nonexistent/x", "cannot append to /nonexistent/x"),
        (
            &format!("q=unix-listen:{}", path.display()),
            "another program listens on",
        ),
    ] {
        let error = program.add(port).unwrap_err().to_string();
        assert!(error.contains(part), "{port}: {error}");
    }
    let error = program.remove("x").unwrap_err().to_string();
    assert!(error.contains("there is no port \"x\""), "{error}");
    let error = program.remove(NAME).unwrap_err().to_string();
    assert!(error.contains("cannot be removed"), "{error}");
    let error = admin::call(&program.admin, &Request::new("port-fly")).unwrap_err();
    assert!(error.to_string().contains("unknown request"), "{error}");
    program.add("q=pty").unwrap();
    let error = program.add("r=pty").unwrap_err().to_string();
    assert!(error.contains("room for 3 ports"), "{error}");
    assert_eq!(program.list()["ports"].as_array().unwrap().len(), 2);
    let counters = admin::call(&program.admin, &Request::new("counters")).unwrap();
    let ports = serde_json::json!({"limit": 2, "now": 2, "reached": 1});
    assert_eq!(counters["ports"], ports);
    assert_eq!(counters["channels"], serde_json::json!([]));
}

#[test]
fn any_number_of_ports_has_its_queues() {
    for room in [1, 2, 15, 16, 31] {
        let names: Vec<String> = (1..room).map(|n| format!("p{n}")).collect();
        let ports: Vec<_> = names.iter().map(|n| (&**n, Place::Pty(None))).collect();
        let mut program = Program::start(&ports, room);
        let size = 64;
        let mut guest = Guest::boot(
            &program.socket,
            Setup {
                size,
                ..setup(room, 0)
            },
        );
        assert_eq!(guest.rings.len(), 2 * (room + 1));
        assert_eq!(guest.config(4, 4)[0] as usize, room);
        let last = room - 1;
        guest.open(last);
        if last > 0 {
            let mut terminal = open_terminal(&program.terminal(&format!("p{last}")));
            guest.wait_host_connected(last, true);
            guest.write_all(last, b"to");
            assert_eq!(read_exact(&mut terminal, 2), b"to");
            terminal.write_all(b"fro").unwrap();
            assert_eq!(guest.read(last, 3), b"fro");
        }
        drop(guest);
        program.end();
    }
}

#[test]
fn the_end_takes_the_ports_from_a_guest_that_would_spin() {
    let mut program = Program::start(&[("p", Place::Pty(None))], 2);
    let mut guest = Guest::boot(&program.socket, setup(2, 0));
    guest.open(0);
    guest.open(1);
    let ending = thread::spawn(move || program.end());
    guest.wait_control("both ports were removed", |guest| {
        guest.ports.iter().all(|port| !port.added)
    });
    ending.join().unwrap();
}

#[test]
fn what_is_parsed_is_what_is_served() -> io::Result<()> {
    let arg: PortArg = "p=pty".parse().map_err(io::Error::other)?;
    let program = Program::start(&[(&arg.name, arg.place)], 2);
    assert_eq!(program.list()["ports"][0]["place"], "pty");
    assert_eq!(program.list()["room"], 1);
    Ok(())
}
