//! Each kind of channel between two drivers, over the real thing.

mod support;

use std::future::Future;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener, UnixStream};

use support::log;
use support::side::{Side, channel_error, serves_and_survives};
use support::{connect, echo_server, echo_through, free_port, new_address, pattern};

fn run(test: impl Future<Output = ()>) {
    log::collect();
    support::run(test);
}

/// A path that nobody else uses.
fn socket_path(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("virtproxy-chan-{}-{name}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

#[test]
fn unix_sockets_work_either_way_round() {
    let path = socket_path("either");
    let (listen, connect) = (
        format!("unix-listen:{}:-", path.display()),
        format!("unix-connect:{}:-", path.display()),
    );
    run(async {
        serves_and_survives(&connect, &listen, &[]).await;
        serves_and_survives(&listen, &connect, &[]).await;
    });
}

#[test]
fn tcp_works_by_address_and_by_name() {
    let address = new_address();
    let port = free_port();
    run(async {
        serves_and_survives(
            &format!("tcp-connect:{address}"),
            &format!("tcp-listen:{address}"),
            &[],
        )
        .await;
        serves_and_survives(
            &format!("tcp-listen:localhost:{port}"),
            &format!("tcp-connect:localhost:{port}"),
            &[],
        )
        .await;
    });
}

#[test]
fn vsock_works_within_this_machine() {
    use socket2::{Domain, SockAddr, Socket, Type};
    let probe = Socket::new(Domain::VSOCK, Type::STREAM, None)
        .and_then(|socket| socket.bind(&SockAddr::vsock(1, u32::MAX)));
    if let Err(error) = probe {
        // Not through `eprintln!`, which a passing test swallows.
        let why = format!("SKIPPED: no vsock loopback here (modprobe vsock_loopback): {error}\n");
        std::io::stderr().write_all(why.as_bytes()).unwrap();
        return;
    }
    let port = 20_000 + std::process::id() % 10_000;
    run(async {
        serves_and_survives(
            &format!("vsock-connect:local:{port}"),
            &format!("vsock-listen:any:{port}"),
            &[],
        )
        .await;
    });
}

#[test]
fn a_second_client_waits_until_the_first_has_gone() {
    let path = socket_path("second");
    let listen = format!("unix-listen:{}:-", path.display());
    let connect = format!("unix-connect:{}:-", path.display());
    run(async {
        let (target, address) = (echo_server().await, new_address());
        let _near = Side::start(&listen, &["-o", &format!("echo:{address}")]).await;
        let serve = format!("echo:{target}");
        let first = Side::start(&connect, &["-i", &serve]).await;
        echo_through(address.clone(), pattern(100_000, 1)).await;
        // Some come and go, and one stays.
        for _ in 0..5 {
            drop(UnixStream::connect(&path).await.unwrap());
        }
        let _second = Side::start(&connect, &["-i", &serve]).await;
        let open = connect_and_greet(&address).await;
        echo_through(address.clone(), pattern(3_000_000, 2)).await;
        greet(open).await;
        first.kill().await;
        echo_through(address.clone(), pattern(100_000, 3)).await;
    });
}

async fn connect_and_greet(address: &str) -> tokio::net::TcpStream {
    greet(connect(address).await).await
}

async fn greet(mut client: tokio::net::TcpStream) -> tokio::net::TcpStream {
    client.write_all(b"hello").await.unwrap();
    let mut answer = [0; 5];
    client.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"hello");
    client
}

#[test]
fn garbage_before_a_session_is_skipped() {
    let (front, back) = (socket_path("front"), socket_path("back"));
    run(async {
        let (target, address) = (echo_server().await, new_address());
        let relay = UnixListener::bind(&front).unwrap();
        let to = back.clone();
        tokio::task::spawn_local(async move {
            let (mut client, _) = relay.accept().await.unwrap();
            let mut server = UnixStream::connect(&to).await.unwrap();
            for end in [&mut client, &mut server] {
                end.write_all(b"\r\n[    0.000000] Linux version\r\nlogin: ")
                    .await
                    .unwrap();
                end.write_all(&pattern(10_000, 5)).await.unwrap();
            }
            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
        });
        let _far = Side::start(
            &format!("unix-listen:{}:-", back.display()),
            &["-i", &format!("echo:{target}")],
        )
        .await;
        let _near = Side::start(
            &format!("unix-connect:{}:-", front.display()),
            &["-o", &format!("echo:{address}")],
        )
        .await;
        echo_through(address, pattern(200_000, 4)).await;
    });
    std::fs::remove_file(front).unwrap();
}

/// Stands for a monitor: hangs up on the first who asks, then hands on to `to` who asks for port 9000.
fn monitor(path: &PathBuf, to: PathBuf) {
    let listener = UnixListener::bind(path).unwrap();
    tokio::task::spawn_local(async move {
        let mut asked = 0;
        while let Ok((mut client, _)) = listener.accept().await {
            let mut request = [0; 13];
            client.read_exact(&mut request).await.unwrap();
            assert_eq!(&request, b"CONNECT 9000\n");
            asked += 1;
            if asked == 1 {
                continue;
            }
            let Ok(mut server) = UnixStream::connect(&to).await else {
                continue;
            };
            tokio::task::spawn_local(async move {
                // In pieces, the last of them with the first bytes of the link.
                client.write_all(b"OK 10737").await.unwrap();
                tokio::task::yield_now().await;
                let mut first = vec![0; 4096];
                let n = server.read(&mut first).await.unwrap();
                let rest = [b"41824\n", &first[..n]].concat();
                client.write_all(&rest).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
}

#[test]
fn a_monitors_socket_leads_to_the_guest() {
    let (front, back) = (socket_path("hvsock"), socket_path("guest"));
    run(async {
        monitor(&front, back.clone());
        serves_and_survives(
            &format!("hvsock-connect:{}:9000", front.display()),
            &format!("unix-listen:{}:-", back.display()),
            &[],
        )
        .await;
    });
    std::fs::remove_file(front).unwrap();
}

#[test]
fn what_stands_in_the_way_is_said_once() {
    let path = socket_path("once");
    let channel = format!("hvsock-connect:{}:9000", path.display());
    run(async {
        let _side = Side::start(&channel, &[]).await;
        log::wait_for("there is no socket").await;
        let listener = UnixListener::bind(&path).unwrap();
        for _ in 0..4 {
            drop(listener.accept().await.unwrap());
        }
        let (mut client, _) = listener.accept().await.unwrap();
        client.write_all(b"OK 1\n").await.unwrap();
        log::wait_for("the way is clear").await;
        for obstacle in ["there is no socket", "nobody listens on vsock port 9000"] {
            assert_eq!(log::count(obstacle), 1, "{obstacle}");
        }
    });
    std::fs::remove_file(path).unwrap();
}

#[test]
fn what_can_never_work_is_said_with_its_cure() {
    let file = socket_path("file");
    std::fs::write(&file, "precious").unwrap();
    let occupied = format!("unix-listen:{}:-", file.display());
    let table = [
        (occupied.as_str(), "is not a socket: remove it"),
        (
            "unix-listen:/nonexistent/a.sock:-",
            "create the directory first",
        ),
        (
            "tcp-connect:192.0.2.1:9000",
            "give --tls-creds DIR, or --insecure-plaintext",
        ),
        ("tcp-listen:0.0.0.0:9000", "is no loopback address"),
        ("tcp-listen:[::]:9000", "is no loopback address"),
        (
            "tcp-connect:[::ffff:192.0.2.1]:9000",
            "is no loopback address",
        ),
        ("vsock-connect:any:9000", "name the machine"),
        ("vhost-user:/run/vp.sock:-", "the hint"),
        ("virtserial-open:org.virtproxy.0:-", "the hint"),
    ];
    run(async {
        for (channel, message) in table {
            let error = channel_error(channel, &[]).await.to_string();
            assert!(
                error.contains(message) && !error.contains('\n'),
                "{channel}: {error}"
            );
        }
    });
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    std::fs::remove_file(file).unwrap();
}

#[test]
fn a_listening_address_in_use_is_said() {
    run(async {
        let address = new_address();
        let _taken = TcpListener::bind(&address).await.unwrap();
        let error = channel_error(&format!("tcp-listen:{address}"), &[])
            .await
            .to_string();
        assert!(error.contains("another program listens there"), "{error}");

        let path = socket_path("in-use");
        let channel = format!("unix-listen:{}:-", path.display());
        let _first = Side::start(&channel, &[]).await;
        let error = channel_error(&channel, &[]).await.to_string();
        assert!(error.contains("another program listens on"), "{error}");
    });
}

#[test]
fn plaintext_to_other_machines_must_be_asked_for() {
    run(async {
        let port = free_port();
        let listen = format!("tcp-listen:0.0.0.0:{port}");
        let (target, out) = (echo_server().await, new_address());
        let _near = Side::start(
            &listen,
            &["--insecure-plaintext", "-o", &format!("echo:{out}")],
        )
        .await;
        let _far = Side::start(
            &format!("tcp-connect:127.0.0.1:{port}"),
            &["-i", &format!("echo:{target}")],
        )
        .await;
        echo_through(out, pattern(1000, 1)).await;
    });
}

/// Waits for `done`; how long a test may take is limited as a whole.
async fn eventually(mut done: impl FnMut() -> bool) {
    while !done() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn a_command_is_restarted_when_it_ends_and_ended_with_its_channel() {
    let log = socket_path("pids");
    let pids = || -> Vec<PathBuf> {
        let pids = std::fs::read_to_string(&log).unwrap_or_default();
        pids.lines()
            .map(|pid| PathBuf::from("/proc").join(pid))
            .collect()
    };
    run(async {
        // The first two end at once; the third and what it started ignore SIGTERM.
        let command = format!(
            "echo $$ >>{log}; test $(wc -l <{log}) -lt 3 && exit 3; trap '' TERM; sleep 1000 & echo $! >>{log}; wait",
            log = log.display()
        );
        let side = Side::start(&format!("exec:{command}:-"), &[]).await;
        eventually(|| pids().len() == 4).await;
        let pids = pids();
        assert!(!pids[0].exists() && !pids[1].exists(), "left as zombies");
        assert!(pids[2].exists() && pids[3].exists());
        side.kill().await;
        assert!(!pids[2].exists(), "outlived its channel");
        // The shell's own child is reaped by whoever reaps orphans.
        eventually(|| {
            let state = std::fs::read_to_string(pids[3].join("stat")).unwrap_or_default();
            state.is_empty() || state.contains(") Z ")
        })
        .await;
    });
    std::fs::remove_file(log).unwrap();
}
