//! Two drivers, joined by a socket pair, between real local sockets.

mod support;

use std::cell::RefCell;
use std::fmt::Debug;
use std::future::Future;
use std::sync::Once;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::time::timeout;
use tracing::field::{Field, Visit};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};
use virtproxy_engine::driver::Settings;

use support::ends::{end, join};
use support::{
    GRACE, connect, echo_server, echo_through, ends_at_once, new_address, pattern, refused_at_once,
    settings,
};

/// Every test of this file collects hops (see `collect_hops`).
fn run(test: impl Future<Output = ()>) {
    collect_hops();
    support::run(test);
}

#[test]
fn many_streams_carry_bulk_both_ways() {
    run(async {
        let (target, address) = (echo_server().await, new_address());
        let near = end(settings(), &[format!("echo:{address}")], &[]).await;
        let far = end(settings(), &[], &[format!("echo:{target}")]).await;
        join(&near, &far);
        let transfers: Vec<_> = (0..50)
            .map(|i| {
                tokio::task::spawn_local(echo_through(address.clone(), pattern(300_000 + i, i)))
            })
            .collect();
        for transfer in transfers {
            transfer.await.unwrap();
        }
    });
}

#[test]
fn unix_sockets_and_the_reverse_direction_work() {
    run(async {
        let dir = std::env::temp_dir().join(format!("virtproxy-driver-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (front, back) = (dir.join("front.sock"), dir.join("back.sock"));
        let server = UnixListener::bind(&back).unwrap();
        tokio::task::spawn_local(async move {
            let (mut client, _) = server.accept().await.unwrap();
            let mut request = Vec::new();
            client.read_to_end(&mut request).await.unwrap();
            client.write_all(&request.repeat(2)).await.unwrap();
        });
        let near = end(settings(), &[], &[format!("twice:{}:-", back.display())]).await;
        let far = end(settings(), &[format!("twice:{}:-", front.display())], &[]).await;
        join(&near, &far);
        let mut client = UnixStream::connect(&front).await.unwrap();
        client.write_all(b"half-close").await.unwrap();
        client.shutdown().await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"half-closehalf-close");
        far.stop.send(GRACE).unwrap();
        far.done.await.unwrap().unwrap();
        assert!(!front.exists(), "the socket's file goes with its listener");
        std::fs::remove_dir_all(&dir).unwrap();
    });
}

#[test]
fn names_and_ipv6_addresses_work() {
    run(async {
        let server = TcpListener::bind("localhost:0").await.unwrap();
        let target = server.local_addr().unwrap().port();
        let port = std::net::TcpListener::bind("[::1]:0")
            .and_then(|listener| listener.local_addr())
            .unwrap()
            .port();
        let near = end(settings(), &[format!("who:[::1]:{port}")], &[]).await;
        let far = end(settings(), &[], &[format!("who:localhost:{target}")]).await;
        join(&near, &far);
        let mut client = connect(&format!("[::1]:{port}")).await;
        let (mut served, _) = server.accept().await.unwrap();
        served.write_all(b"localhost").await.unwrap();
        let mut answer = [0; 9];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"localhost");
    });
}

thread_local! {
    /// The `hop` of each trace event of this thread; a test's drivers run on its own.
    static HOPS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

struct Hops;

impl<S: tracing::Subscriber> Layer<S> for Hops {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        event.record(&mut Hops);
    }
}

impl Visit for Hops {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "hop" {
            let hop = format!("{value:?}").replace('"', "");
            HOPS.with_borrow_mut(|hops| hops.push(hop));
        }
    }
}

/// Collects hops in all threads. Every test does this first: a subscriber that comes when events are already being
/// written in other threads may miss some.
fn collect_hops() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let subscriber = tracing_subscriber::registry().with(Hops);
        tracing::subscriber::set_global_default(subscriber).unwrap();
    });
}

#[test]
fn a_byte_takes_its_hops_in_order() {
    run(async {
        let (target, address) = (echo_server().await, new_address());
        let near = end(settings(), &[format!("echo:{address}")], &[]).await;
        let far = end(settings(), &[], &[format!("echo:{target}")]).await;
        join(&near, &far);
        echo_through(address, vec![7]).await;
    });
    let there_and_back = ["socket-to-channel", "channel-to-socket"].repeat(2);
    HOPS.with_borrow(|hops| assert_eq!(*hops, there_and_back));
}

#[test]
fn what_cannot_be_had_is_refused_at_once() {
    run(async {
        let (closed, unknown, refused) = (new_address(), new_address(), new_address());
        let out = [format!("nobody:{unknown}"), format!("closed:{refused}")];
        let near = end(settings(), &out, &[]).await;
        let far = end(settings(), &[], &[format!("closed:{closed}")]).await;
        join(&near, &far);
        refused_at_once(&unknown).await;
        refused_at_once(&refused).await;
    });
}

#[test]
fn a_client_waits_for_the_other_end_or_is_refused_by_flag() {
    run(async {
        let (target, waits, refuses) = (echo_server().await, new_address(), new_address());
        let near = end(settings(), &[format!("echo:{waits}")], &[]).await;
        let impatient = Settings {
            wait_for_peer: Duration::ZERO,
            ..settings()
        };
        let _alone = end(impatient, &[format!("echo:{refuses}")], &[]).await;
        refused_at_once(&refuses).await;
        let early = tokio::task::spawn_local(echo_through(waits.clone(), pattern(1000, 1)));
        tokio::time::sleep(Duration::from_millis(50)).await;
        let far = end(settings(), &[], &[format!("echo:{target}")]).await;
        join(&near, &far);
        early.await.unwrap();
    });
}

#[test]
fn a_stuck_client_stalls_nobody_else() {
    run(async {
        let (target, address) = (echo_server().await, new_address());
        let near = end(settings(), &[format!("echo:{address}")], &[]).await;
        let far = end(settings(), &[], &[format!("echo:{target}")]).await;
        join(&near, &far);
        let mut stuck = Vec::new();
        for _ in 0..20 {
            let client = connect(&address).await;
            let data = pattern(64 * 1024, 0);
            // Write until nothing is taken any more, and never read.
            while let Ok(Ok(_)) = timeout(Duration::from_millis(20), client.writable()).await {
                let _ = client.try_write(&data);
            }
            stuck.push(client);
        }
        echo_through(address.clone(), pattern(3_000_000, 7)).await;
    });
}

#[test]
fn streams_end_when_the_link_does_and_new_ones_work() {
    run(async {
        let (target, address) = (echo_server().await, new_address());
        let near = end(settings(), &[format!("echo:{address}")], &[]).await;
        let far = end(settings(), &[], &[format!("echo:{target}")]).await;
        let link = join(&near, &far);
        let mut old = connect(&address).await;
        old.write_all(b"old").await.unwrap();
        let mut buf = [0; 3];
        old.read_exact(&mut buf).await.unwrap();
        link.shutdown(std::net::Shutdown::Both).unwrap();
        ends_at_once(old).await;
        join(&near, &far);
        echo_through(address.clone(), pattern(100_000, 2)).await;
    });
}

#[test]
fn a_client_that_comes_between_two_links_waits_for_the_second() {
    run(async {
        let (target, address) = (echo_server().await, new_address());
        let near = end(settings(), &[format!("echo:{address}")], &[]).await;
        let far = end(settings(), &[], &[format!("echo:{target}")]).await;
        let link = join(&near, &far);
        echo_through(address.clone(), pattern(1000, 1)).await;
        link.shutdown(std::net::Shutdown::Both).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        let between = tokio::task::spawn_local(echo_through(address, pattern(1000, 2)));
        tokio::time::sleep(Duration::from_millis(50)).await;
        join(&near, &far);
        timeout(Duration::from_secs(3), between)
            .await
            .expect("the client is forgotten")
            .unwrap();
    });
}

#[test]
fn a_request_to_end_lets_streams_finish_and_tells_the_peer() {
    run(async {
        let (target, address) = (echo_server().await, new_address());
        let near = end(settings(), &[format!("echo:{address}")], &[]).await;
        let far = end(settings(), &[], &[format!("echo:{target}")]).await;
        join(&near, &far);
        let mut open = connect(&address).await;
        open.write_all(b"open").await.unwrap();
        let mut buf = [0; 4];
        open.read_exact(&mut buf).await.unwrap();
        far.stop.send(GRACE).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        open.write_all(b"more").await.unwrap();
        open.read_exact(&mut buf).await.unwrap();
        assert_eq!(&buf, b"more");
        far.done.await.unwrap().unwrap();
        ends_at_once(open).await;
        near.stop.send(GRACE).unwrap();
        near.done.await.unwrap().unwrap();
    });
}
