//! What the tests of drivers and channels share: a runtime with a time limit, an echo server and its clients.

#![allow(dead_code, reason = "each test program uses a part of it")]

pub(crate) mod ends;
pub(crate) mod log;
pub(crate) mod peer;
pub(crate) mod side;

use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;
use tokio::time::timeout;
use virtproxy_engine::driver::Settings;
use virtproxy_engine::limits::Limits;
use virtproxy_mux::Config;

/// Nothing in these tests takes that long.
const LIMIT: Duration = Duration::from_secs(60);

/// How long streams may go on when an end is asked to stop.
pub(crate) const GRACE: Option<Duration> = Some(Duration::from_millis(200));

pub(crate) fn settings() -> Settings {
    Settings {
        connect_timeout: Duration::from_secs(5),
        wait_for_peer: Duration::from_secs(5),
        udp_timeout: Duration::from_secs(60),
        limits: Limits::default(),
        session: Config::default(),
    }
}

pub(crate) fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, async {
        timeout(LIMIT, test).await.expect("the test hangs");
    });
}

/// An address that nobody else uses: each test process has a loopback network of its own.
pub(crate) fn new_address() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let (process, n) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    format!("127.{}.{}.{n}:4000", 1 + process % 250, process / 250 % 250)
}

pub(crate) fn free_port() -> u16 {
    let probe = std::net::TcpListener::bind("localhost:0").unwrap();
    probe.local_addr().unwrap().port()
}

/// A TCP server that echoes each client until end of file, then closes; its address.
pub(crate) async fn echo_server() -> String {
    let address = new_address();
    let listener = TcpListener::bind(&address).await.unwrap();
    tokio::task::spawn_local(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::task::spawn_local(async move {
                let (mut read, mut write) = client.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    address
}

pub(crate) fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|i| i.wrapping_mul(31).wrapping_add(seed).to_le_bytes()[1])
        .collect()
}

pub(crate) async fn connect(address: &str) -> TcpStream {
    TcpStream::connect(address).await.unwrap()
}

pub(crate) async fn echo_through(address: String, data: Vec<u8>) {
    let (mut read, mut write) = connect(&address).await.into_split();
    let sent = data.clone();
    let writer = tokio::task::spawn_local(async move {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    });
    let mut back = Vec::new();
    read.read_to_end(&mut back).await.unwrap();
    writer.await.unwrap();
    assert!(back == data, "{} of {} bytes", back.len(), data.len());
}

/// A target to which no connect comes through: its queue is full.
pub(crate) struct Deaf {
    _listener: Socket,
    _queue: Vec<TcpStream>,
    pub(crate) address: String,
}

impl Deaf {
    pub(crate) async fn new() -> Self {
        let address = new_address();
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let bound: std::net::SocketAddr = address.parse().unwrap();
        listener.bind(&bound.into()).unwrap();
        listener.listen(0).unwrap();
        let mut queue = Vec::new();
        let soon = Duration::from_millis(300);
        while let Ok(client) = timeout(soon, TcpStream::connect(bound)).await {
            queue.push(client.unwrap());
        }
        Deaf {
            _listener: listener,
            _queue: queue,
            address,
        }
    }
}

/// A server that reads a client to its end and only then answers, twice what it got; its address.
pub(crate) async fn twice_server() -> String {
    let address = new_address();
    let listener = TcpListener::bind(&address).await.unwrap();
    tokio::task::spawn_local(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut request = Vec::new();
            client.read_to_end(&mut request).await.unwrap();
            client.write_all(&request.repeat(2)).await.unwrap();
        }
    });
    address
}

pub(crate) async fn half_close_through(address: &str) {
    let mut client = connect(address).await;
    client.write_all(b"half-close").await.unwrap();
    client.shutdown().await.unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"half-closehalf-close");
}

/// A client that is refused sees an error or the end at once, perhaps already when it connects.
pub(crate) async fn refused_at_once(address: &str) {
    if let Ok(client) = TcpStream::connect(address).await {
        ends_at_once(client).await;
    }
}

/// A client whose stream was cut off sees an error or the end at once.
pub(crate) async fn ends_at_once(mut client: TcpStream) {
    let mut buf = [0; 16];
    let result = timeout(Duration::from_secs(2), client.read(&mut buf))
        .await
        .expect("the client hangs");
    assert!(matches!(result, Ok(0) | Err(_)));
}
