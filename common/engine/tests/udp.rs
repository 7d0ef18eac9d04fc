//! UDP forwards between two drivers and real sockets.
//!
//! Tests that count descriptors see all of the process, so these run one after the other.

mod support;

use std::future::Future;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};
use tokio::time::{sleep, timeout};
use virtproxy_engine::driver::Settings;
use virtproxy_engine::spec::{Endpoint, ForwardSpec};

use support::ends::{End, end, end_with, join};
use support::{GRACE, connect, echo_server, echo_through, new_address, pattern, settings};

/// The flows of a forward, as the README has it.
const MAX_FLOWS: usize = 1024;
/// Descriptors of a flow at both ends: a pair of sockets at each, and the socket to the target.
const FLOW_DESCRIPTORS: usize = 5;
/// How long what should happen at once may take on a busy machine.
const SOON: Duration = Duration::from_secs(10);

fn run(test: impl Future<Output = ()>) {
    static ONE_BY_ONE: Mutex<()> = Mutex::new(());
    let _guard = ONE_BY_ONE
        .lock()
        .unwrap_or_else(|broken| broken.into_inner());
    support::run(test);
}

/// A server that answers each datagram with the same one; its address.
async fn udp_echo() -> String {
    let address = new_address();
    udp_echo_at(&address).await;
    address
}

async fn udp_echo_at(address: &str) {
    let socket = UdpSocket::bind(address).await.unwrap();
    tokio::task::spawn_local(async move {
        let mut buf = vec![0; 65_536];
        while let Ok((n, from)) = socket.recv_from(&mut buf).await {
            let _ = socket.send_to(&buf[..n], from).await;
        }
    });
}

/// A server that answers each datagram with the address that it came from; its address.
async fn udp_who() -> String {
    let address = new_address();
    let socket = UdpSocket::bind(&address).await.unwrap();
    tokio::task::spawn_local(async move {
        while let Ok((_, from)) = socket.recv_from(&mut [0; 1]).await {
            let _ = socket.send_to(from.to_string().as_bytes(), from).await;
        }
    });
    address
}

/// A client that hears only what comes from `address`.
async fn client_of(address: impl tokio::net::ToSocketAddrs) -> UdpSocket {
    let address = tokio::net::lookup_host(address)
        .await
        .unwrap()
        .next()
        .unwrap();
    let any = if address.is_ipv4() {
        "127.0.0.1:0"
    } else {
        "[::1]:0"
    };
    let client = UdpSocket::bind(any).await.unwrap();
    client.connect(address).await.unwrap();
    client
}

/// Sends a datagram, once; the answer, which must come.
async fn ask(client: &UdpSocket, question: &[u8]) -> Vec<u8> {
    client.send(question).await.unwrap();
    answer(client).await
}

async fn answer(client: &UdpSocket) -> Vec<u8> {
    let mut buf = vec![0; 65_536];
    let n = timeout(SOON, client.recv(&mut buf))
        .await
        .expect("no answer")
        .unwrap();
    buf.truncate(n);
    buf
}

/// Sends a datagram again and again, as a patient client does, until there is an answer.
async fn insist(client: &UdpSocket, question: &[u8]) -> Vec<u8> {
    let mut buf = vec![0; 65_536];
    let answered = timeout(SOON, async {
        loop {
            client.send(question).await.unwrap();
            match timeout(Duration::from_millis(100), client.recv(&mut buf)).await {
                Ok(Ok(n)) => return n,
                Ok(Err(_)) => sleep(Duration::from_millis(100)).await,
                Err(_) => {}
            }
        }
    });
    let n = answered
        .await
        .expect("no answer, however often it was asked");
    buf.truncate(n);
    buf
}

/// Two ends with a session between them, and what keeps them going.
struct Pair {
    near: End,
    far: End,
    link: UnixStream,
    /// A TCP echo service through both.
    echo: String,
}

/// Joins two ends; `out` and `serve` are the near end's and the far end's, besides an echo service for TCP.
async fn pair(settings: Settings, out: &[String], serve: &[String]) -> Pair {
    let parse = |spec: &String| spec.parse().unwrap();
    let out: Vec<ForwardSpec> = out.iter().map(parse).collect();
    let serve: Vec<ForwardSpec> = serve.iter().map(parse).collect();
    pair_with(settings, out, serve).await
}

async fn pair_with(
    settings: Settings,
    mut out: Vec<ForwardSpec>,
    mut serve: Vec<ForwardSpec>,
) -> Pair {
    let (target, echo) = (echo_server().await, new_address());
    out.push(format!("echo:{echo}").parse().unwrap());
    serve.push(format!("echo:{target}").parse().unwrap());
    let near = end_with(settings.clone(), &out, &[]).await;
    let far = end_with(settings, &[], &serve).await;
    let link = join(&near, &far);
    // A TCP client waits for the session; then datagrams need not.
    echo_through(echo.clone(), pattern(1000, 1)).await;
    Pair {
        near,
        far,
        link,
        echo,
    }
}

/// A forward of a UDP service that hands out, or is served by, a bare stream: what a hostile peer can do.
fn bare(service: &str, address: &str) -> ForwardSpec {
    let as_tcp: ForwardSpec = format!("x:{address}").parse().unwrap();
    let Endpoint::Tcp { .. } = as_tcp.endpoint else {
        panic!("{address} is not for TCP");
    };
    ForwardSpec {
        service: service.parse().unwrap(),
        ..as_tcp
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The same, once sockets of what was done before are closed: when it has not changed for a while.
async fn descriptors_at_rest() -> usize {
    let (mut count, mut unchanged) = (descriptors(), 0);
    while unchanged < 20 {
        sleep(Duration::from_millis(5)).await;
        let now = descriptors();
        unchanged = if now == count { unchanged + 1 } else { 0 };
        count = now;
    }
    count
}

/// Waits until the process has at most `count` descriptors.
async fn settle_at(count: usize) {
    let start = Instant::now();
    while descriptors() > count {
        let now = descriptors();
        assert!(start.elapsed() < SOON, "{now} descriptors, not {count}");
        sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn boundaries_are_kept_at_every_size() {
    run(async {
        let (target, address) = (udp_echo().await, new_address());
        let out = [format!("x/udp:{address}")];
        let _pair = pair(settings(), &out, &[format!("x/udp:{target}")]).await;
        let client = client_of(&address).await;
        for len in [0, 1, 511, 1472, 9000, 65_507, 0, 2] {
            let question = pattern(len, len);
            assert!(ask(&client, &question).await == question, "{len} bytes");
        }
        // As many at once as the path has room for, of all sizes: in order, and none merged or cut.
        let burst: Vec<_> = [0, 1, 511, 1472, 9000, 0, 3]
            .map(|len| pattern(len, len))
            .into();
        for datagram in &burst {
            client.send(datagram).await.unwrap();
        }
        for datagram in &burst {
            assert!(
                answer(&client).await == *datagram,
                "{} bytes",
                datagram.len()
            );
        }
    });
}

#[test]
fn the_other_direction_and_ipv6_work() {
    run(async {
        let server = UdpSocket::bind("[::1]:0").await.unwrap();
        let target = server.local_addr().unwrap();
        let address = new_address();
        let out = [format!("who/udp:{address}")];
        let _pair = pair(settings(), &out, &[format!("who/udp:{target}")]).await;
        let client = client_of(&address).await;
        client.send(b"question").await.unwrap();
        let mut buf = [0; 100];
        let (n, from) = timeout(SOON, server.recv_from(&mut buf))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(&buf[..n], b"question");
        // A service may speak first, and more than once.
        for answer_sent in ["one", "two"] {
            server.send_to(answer_sent.as_bytes(), from).await.unwrap();
            assert_eq!(answer(&client).await, answer_sent.as_bytes());
        }
    });
}

#[test]
fn answers_come_from_the_address_that_was_asked() {
    run(async {
        let target = udp_echo().await;
        let (v4, v6) = (free_port("0.0.0.0:0").await, free_port("[::]:0").await);
        let out = [format!("x/udp:0.0.0.0:{v4}"), format!("x/udp:[::]:{v6}")];
        let _pair = pair(settings(), &out, &[format!("x/udp:{target}")]).await;
        let asked: [SocketAddr; 5] = [
            ([127, 0, 0, 1], v4).into(),
            ([127, 9, 8, 7], v4).into(),
            ("::1".parse::<std::net::IpAddr>().unwrap(), v6).into(),
            ([127, 0, 0, 1], v6).into(),
            ([127, 9, 8, 7], v6).into(),
        ];
        // One client of each family asks all of them: each is a flow of its own.
        for address in asked {
            let any = if address.is_ipv4() {
                "0.0.0.0:0"
            } else {
                "[::]:0"
            };
            let client = UdpSocket::bind(any).await.unwrap();
            client.send_to(b"who answers?", address).await.unwrap();
            let (_, from) = timeout(SOON, client.recv_from(&mut [0; 20]))
                .await
                .unwrap_or_else(|_| panic!("{address} does not answer"))
                .unwrap();
            assert_eq!(from, address);
        }
    });
}

async fn free_port(any: &str) -> u16 {
    let socket = UdpSocket::bind(any).await.unwrap();
    socket.local_addr().unwrap().port()
}

#[test]
fn more_clients_than_flows_are_all_answered_and_bounded() {
    run(async {
        let (target, address) = (udp_echo().await, new_address());
        let out = [format!("x/udp:{address}")];
        let _pair = pair(settings(), &out, &[format!("x/udp:{target}")]).await;
        let before = descriptors_at_rest().await;
        let mut clients = Vec::new();
        for number in 0..2000_usize {
            let client = client_of(&address).await;
            assert_eq!(
                ask(&client, &pattern(40, number)).await,
                pattern(40, number)
            );
            clients.push(client);
        }
        let most = before + clients.len() + MAX_FLOWS * FLOW_DESCRIPTORS;
        settle_at(most).await;
        assert!(
            descriptors() > most - 100,
            "the cap is not where it is said to be"
        );
        // The first client lost its flow to another one, and gets a new one.
        let question = pattern(40, 9);
        assert_eq!(ask(&clients[0], &question).await, question);
        settle_at(most).await;
    });
}

#[test]
fn idle_flows_are_freed_and_busy_ones_stay() {
    run(async {
        let (echo, who) = (udp_echo().await, udp_who().await);
        let log = UdpSocket::bind(new_address()).await.unwrap();
        let logged = log.local_addr().unwrap();
        let (idle, busy, silent) = (new_address(), new_address(), new_address());
        let out = [
            format!("idle/udp:{idle}"),
            format!("busy/udp:{busy}"),
            format!("log/udp:{silent}"),
        ];
        let serve = [
            format!("idle/udp:{echo}"),
            format!("busy/udp:{who}"),
            format!("log/udp:{logged}"),
        ];
        let hasty = Settings {
            udp_timeout: Duration::from_secs(2),
            ..settings()
        };
        let _pair = pair(hasty, &out, &serve).await;
        let (busy, logs) = (client_of(&busy).await, client_of(&silent).await);
        let flow = ask(&busy, b"?").await;
        // One way only is busy too.
        logs.send(b"line").await.unwrap();
        let (_, logs_from) = log.recv_from(&mut [0; 9]).await.unwrap();
        let mut clients = Vec::new();
        for _ in 0..50 {
            clients.push(client_of(&idle).await);
        }
        let before = descriptors_at_rest().await;
        for client in &clients {
            ask(client, b"once").await;
        }
        assert_eq!(descriptors(), before + clients.len() * FLOW_DESCRIPTORS);
        let start = Instant::now();
        // Longer than a flow that is not seen to be busy would last.
        while descriptors() > before || start.elapsed() < Duration::from_secs(4) {
            assert!(start.elapsed() < SOON, "idle flows are kept");
            assert_eq!(ask(&busy, b"?").await, flow, "a busy flow is lost");
            logs.send(b"line").await.unwrap();
            let (_, from) = log.recv_from(&mut [0; 9]).await.unwrap();
            assert_eq!(from, logs_from, "a flow that is busy one way is lost");
            sleep(Duration::from_millis(200)).await;
        }
        assert_eq!(ask(&clients[0], b"again").await, b"again");
        assert_eq!(ask(&busy, b"?").await, flow);
    });
}

#[test]
fn a_restart_of_either_end_ends_flows_and_the_next_datagram_begins_one() {
    run(async {
        let (target, address) = (udp_echo().await, new_address());
        let (out, serve) = ([format!("x/udp:{address}")], [format!("x/udp:{target}")]);
        let Pair {
            near, far, link, ..
        } = pair(settings(), &out, &serve).await;
        let client = client_of(&address).await;
        assert_eq!(ask(&client, b"one").await, b"one");
        // The link.
        link.shutdown(std::net::Shutdown::Both).unwrap();
        join(&near, &far);
        assert_eq!(insist(&client, b"two").await, b"two");
        // The end that serves.
        far.stop.send(GRACE).unwrap();
        far.done.await.unwrap().unwrap();
        let far = end(settings(), &[], &serve).await;
        join(&near, &far);
        assert_eq!(insist(&client, b"three").await, b"three");
        // The end that listens.
        near.stop.send(GRACE).unwrap();
        near.done.await.unwrap().unwrap();
        let near = end(settings(), &out, &[]).await;
        join(&near, &far);
        assert_eq!(insist(&client, b"four").await, b"four");
    });
}

#[test]
fn nothing_waits_while_the_other_end_is_not_there() {
    run(async {
        let (target, address) = (udp_echo().await, new_address());
        let patient = Settings {
            wait_for_peer: Duration::from_secs(3600),
            ..settings()
        };
        let near = end(patient, &[format!("x/udp:{address}")], &[]).await;
        let before = descriptors_at_rest().await;
        for _ in 0..3000 {
            let client = client_of(&address).await;
            client.send(b"lost").await.unwrap();
            tokio::task::yield_now().await;
        }
        settle_at(before).await;
        let far = end(settings(), &[], &[format!("x/udp:{target}")]).await;
        join(&near, &far);
        let client = client_of(&address).await;
        assert_eq!(insist(&client, b"found").await, b"found");
    });
}

#[test]
fn a_service_that_is_refused_is_tried_again_at_a_bounded_rate() {
    run(async {
        // The service ends each flow at once, and counts them.
        let (address, target) = (new_address(), new_address());
        let server = TcpListener::bind(&target).await.unwrap();
        let out = vec![format!("x/udp:{address}").parse().unwrap()];
        let _pair = pair_with(settings(), out, vec![bare("x/udp", &target)]).await;
        let client = client_of(&address).await;
        let (mut flows, start) = (0, Instant::now());
        while flows < 3 {
            assert!(start.elapsed() < SOON, "only {flows} flows");
            client.send(b"again").await.unwrap();
            if let Ok(Ok(_)) = timeout(Duration::from_millis(1), server.accept()).await {
                flows += 1;
            }
        }
        assert!(
            start.elapsed() > Duration::from_millis(1900),
            "{:?}",
            start.elapsed()
        );
    });
}

#[test]
fn an_unreachable_target_ends_nothing() {
    run(async {
        let (target, address) = (new_address(), new_address());
        let out = [format!("x/udp:{address}")];
        let pair = pair(settings(), &out, &[format!("x/udp:{target}")]).await;
        let client = client_of(&address).await;
        let flows = descriptors_at_rest().await + FLOW_DESCRIPTORS;
        client.send(b"into the void").await.unwrap();
        let start = Instant::now();
        while descriptors() < flows {
            assert!(start.elapsed() < SOON, "no flow is begun");
            sleep(Duration::from_millis(5)).await;
        }
        for _ in 0..20 {
            client.send(b"into the void").await.unwrap();
            sleep(Duration::from_millis(5)).await;
        }
        echo_through(pair.echo.clone(), pattern(1000, 2)).await;
        assert_eq!(descriptors_at_rest().await, flows, "the flow is not kept");
        udp_echo_at(&target).await;
        assert_eq!(ask(&client, b"found").await, b"found");
    });
}

#[test]
fn a_peer_that_sends_no_datagrams_loses_that_flow_only() {
    run(async {
        // Towards the end that serves.
        let (target, front) = (udp_echo().await, new_address());
        let raw = new_address();
        let out = vec![
            bare("x/udp", &raw),
            format!("x/udp:{front}").parse().unwrap(),
        ];
        let serve = vec![format!("x/udp:{target}").parse().unwrap()];
        let pair = pair_with(settings(), out, serve).await;
        let client = client_of(&front).await;
        assert_eq!(ask(&client, b"before").await, b"before");
        let mut hostile = connect(&raw).await;
        hostile.write_all(&[3, 0, 1, 2, 3]).await.unwrap();
        let mut echoed = [0; 5];
        timeout(SOON, hostile.read_exact(&mut echoed))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(echoed, [3, 0, 1, 2, 3]);
        hostile.write_all(&[0xf8, 0xff, 1, 2, 3]).await.unwrap();
        let end = timeout(SOON, hostile.read(&mut [0; 9]))
            .await
            .expect("the flow goes on");
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
        // A flood of empty datagrams, half a datagram, and nothing.
        let mut flood = connect(&raw).await;
        flood.write_all(&[0; 100_000]).await.unwrap();
        let mut half = connect(&raw).await;
        half.write_all(&[0xf7, 0xff, 1]).await.unwrap();
        let _silent = connect(&raw).await;
        assert_eq!(ask(&client, b"after").await, b"after");
        echo_through(pair.echo.clone(), pattern(100_000, 3)).await;

        // Towards the end that listens.
        let (front, target) = (new_address(), new_address());
        let server = TcpListener::bind(&target).await.unwrap();
        let out = vec![format!("x/udp:{front}").parse().unwrap()];
        let _pair = pair_with(settings(), out, vec![bare("x/udp", &target)]).await;
        let (one, two) = (client_of(&front).await, client_of(&front).await);
        one.send(b"1").await.unwrap();
        let (mut hostile, _) = timeout(SOON, server.accept()).await.unwrap().unwrap();
        two.send(b"2").await.unwrap();
        let (mut honest, _) = timeout(SOON, server.accept()).await.unwrap().unwrap();
        hostile.write_all(&[0xff, 0xff]).await.unwrap();
        let mut rest = Vec::new();
        let _ = timeout(SOON, hostile.read_to_end(&mut rest))
            .await
            .expect("the flow goes on");
        honest.write_all(&[2, 0, 7, 8, 0, 0]).await.unwrap();
        assert_eq!(answer(&two).await, [7, 8]);
        assert!(answer(&two).await.is_empty());
    });
}

/// How long an echo of `len` bytes takes.
async fn echo_time(echo: &str, len: usize) -> Duration {
    let start = Instant::now();
    echo_through(echo.to_owned(), pattern(len, 5)).await;
    start.elapsed()
}

/// The median time of a small echo, and that of a large one.
async fn stream_times(echo: &str) -> (Duration, Duration) {
    let mut small = Vec::new();
    for _ in 0..101 {
        small.push(echo_time(echo, 100).await);
    }
    small.sort();
    let mut large = Vec::new();
    for _ in 0..5 {
        large.push(echo_time(echo, 5_000_000).await);
    }
    large.sort();
    (small[50], large[2])
}

/// Sends datagrams from a thread, as fast as they go, until told to stop; how many it sent.
fn flood(address: &str, len: usize) -> (Arc<AtomicBool>, std::thread::JoinHandle<u64>) {
    let stop = Arc::new(AtomicBool::new(false));
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(address).unwrap();
    let stopped = stop.clone();
    let thread = std::thread::spawn(move || {
        let datagram = vec![0; len];
        let mut sent = 0;
        while !stopped.load(Ordering::Relaxed) {
            sent += u64::from(socket.send(&datagram).is_ok());
        }
        sent
    });
    (stop, thread)
}

#[test]
fn a_flood_does_not_block_a_stream() {
    run(async {
        // A service that never reads, and one that takes all: to a stream beside them neither may matter much.
        let (stuck, sink) = (new_address(), new_address());
        let (to_stuck, to_sink) = (new_address(), new_address());
        let server = TcpListener::bind(&stuck).await.unwrap();
        let taken = std::net::UdpSocket::bind(&sink).unwrap();
        let out = ["stuck", "sink"].map(|name| {
            let front = if name == "stuck" { &to_stuck } else { &to_sink };
            format!("{name}/udp:{front}").parse().unwrap()
        });
        let serve = vec![
            bare("stuck/udp", &stuck),
            format!("sink/udp:{sink}").parse().unwrap(),
        ];
        let pair = pair_with(settings(), out.into(), serve).await;
        let alone = stream_times(&pair.echo).await;
        for (what, address) in [("stuck", &to_stuck), ("sink", &to_sink)] {
            let (stop, thread) = flood(address, 1472);
            let beside = stream_times(&pair.echo).await;
            stop.store(true, Ordering::Relaxed);
            let sent = thread.join().unwrap();
            let ratio = |a: Duration, b: Duration| b.as_secs_f64() / a.as_secs_f64();
            println!(
                "{what}: {sent} datagrams; small echo {:?} -> {:?} (x {:.1}), 5 MB echo {:?} -> {:?} (x {:.1})",
                alone.0,
                beside.0,
                ratio(alone.0, beside.0),
                alone.1,
                beside.1,
                ratio(alone.1, beside.1),
            );
            assert!(sent > 2000, "{sent} datagrams are no flood");
            // The flood and both drivers share two cores; a stream that waits for datagrams would be slower by far.
            assert!(ratio(alone.0, beside.0) < 30.0 && ratio(alone.1, beside.1) < 30.0);
        }
        // All of that flood was one flow.
        server.accept().await.unwrap();
        let second = timeout(Duration::from_millis(100), server.accept()).await;
        assert!(second.is_err(), "a flow that is backed up was ended");
        drop(taken);
    });
}
