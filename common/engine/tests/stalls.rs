//! The stall watchdog: whatever a stream or a link waits for is told of, once, and counted until it goes on.

mod support;

use std::future::Future;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use virtproxy_engine::driver::{On, Settings};
use virtproxy_engine::limits::Limits;
use virtproxy_mux::frame::kind;

use support::ends::{End, end};
use support::peer::{Peer, YOURS, accept, frame, open, reset};
use support::{Deaf, connect, log, new_address, pattern, settings};

const PATIENCE: Duration = Duration::from_millis(200);
const PLENTY: u32 = 1 << 30;
const STUCK: &str = "nothing has moved for";
const OVER: &str = "no longer stuck";

fn run(test: impl Future<Output = ()>) {
    log::collect();
    support::run(test);
}

fn impatient() -> Settings {
    Settings {
        limits: Limits {
            stall_after: PATIENCE,
            ..Limits::default()
        },
        ..settings()
    }
}

/// An end that has a client, and its peer, which has accepted the client's stream with so much credit.
async fn with_client(session_window: u32, credit: u32) -> (End, Peer, TcpStream, u32) {
    let address = new_address();
    let end = end(impatient(), &[format!("any:{address}")], &[]).await;
    let mut peer = Peer::of(&end, session_window).await;
    let client = connect(&address).await;
    let (stream, _) = peer.wait(kind::OPEN).await;
    let stream = stream ^ YOURS;
    peer.say(&accept(stream, credit)).await;
    (end, peer, client, stream)
}

/// Waits until the one thing that is stuck waits for `on`, which is told of once.
async fn stuck(end: &End, on: On, text: &str) {
    log::wait_for(STUCK).await;
    sleep(3 * PATIENCE).await;
    let shown = end.counters.show();
    let (now, total) = (&shown["stalls"]["now"], &shown["stalls"]["total"]);
    for other in On::ALL {
        let count = usize::from(other == on);
        assert_eq!(now[other.name()], count, "{now}");
        assert_eq!(total[other.name()], count, "{total}");
    }
    assert_eq!((log::count(STUCK), log::count(text)), (1, 1));
    assert_eq!(log::count(OVER), 0);
}

async fn over(end: &End) {
    log::wait_for(OVER).await;
    assert_eq!(log::count(OVER), 1);
    assert_eq!(end.counters.stalled.total(), 0);
    assert_eq!(end.counters.stalls.total(), 1);
}

#[test]
fn a_client_that_does_not_read() {
    run(async {
        let (end, mut peer, mut client, stream) = with_client(PLENTY, PLENTY).await;
        // More than the kernel takes of it.
        let mut sent = 0;
        let mut credit = 64 * 1024;
        loop {
            let n = credit.min(16 * 1024);
            peer.say(&frame(kind::DATA, stream, &vec![1; n])).await;
            (credit, sent) = (credit - n, sent + n);
            if credit > 0 {
                continue;
            }
            match timeout(PATIENCE / 2, peer.wait(kind::CREDIT)).await {
                Ok((_, payload)) => credit += support::peer::word_of(&payload) as usize,
                Err(_) => break,
            }
        }
        stuck(&end, On::Client, "(any)").await;
        let mut bytes = vec![0; sent];
        client.read_exact(&mut bytes).await.unwrap();
        over(&end).await;
    });
}

#[test]
fn a_peer_that_gives_no_credit() {
    run(async {
        let (end, mut peer, mut client, stream) = with_client(PLENTY, 1000).await;
        client.write_all(&pattern(1001, 1)).await.unwrap();
        stuck(&end, On::Credit, "the other end gives no credit").await;
        peer.say(&frame(kind::CREDIT, stream, &1u32.to_le_bytes()))
            .await;
        over(&end).await;
    });
}

#[test]
fn a_peer_that_takes_nothing_from_the_channel() {
    run(async {
        let (end, mut peer, client, _) = with_client(4096, PLENTY).await;
        let (_read, mut write) = client.into_split();
        write.write_all(&pattern(8192, 1)).await.unwrap();
        stuck(&end, On::SessionCredit, "takes nothing from the channel").await;
        let credit = frame(kind::SESSION_CREDIT, 0, &PLENTY.to_le_bytes());
        peer.say(&credit).await;
        over(&end).await;
    });
}

#[test]
fn a_channel_without_room() {
    run(async {
        let (end, mut peer, client, _) = with_client(PLENTY, PLENTY).await;
        let (_read, mut write) = client.into_split();
        let writer = tokio::task::spawn_local(async move {
            write.write_all(&pattern(8 << 20, 1)).await.unwrap();
        });
        stuck(&end, On::Room, "the channel takes nothing").await;
        while !writer.is_finished() {
            peer.next().await;
        }
        over(&end).await;
    });
}

#[test]
fn a_frame_that_is_not_whole() {
    run(async {
        let (end, mut peer, _client, stream) = with_client(PLENTY, PLENTY).await;
        let data = frame(kind::DATA, stream, b"two parts");
        peer.say(&data[..12]).await;
        stuck(&end, On::Rest, "the rest of a frame does not come").await;
        peer.say(&data[12..]).await;
        over(&end).await;
    });
}

#[test]
fn a_target_that_does_not_answer() {
    run(async {
        let deaf = Deaf::new().await;
        let end = end(impatient(), &[], &[format!("deaf:{}", deaf.address)]).await;
        let mut peer = Peer::of(&end, PLENTY).await;
        peer.say(&open(0, "deaf")).await;
        stuck(&end, On::Target, "(deaf)").await;
        peer.say(&reset(0)).await;
        over(&end).await;
    });
}

#[test]
fn an_open_that_nobody_answers() {
    run(async {
        let address = new_address();
        let end = end(impatient(), &[format!("any:{address}")], &[]).await;
        let mut peer = Peer::of(&end, PLENTY).await;
        let _client = connect(&address).await;
        let (stream, _) = peer.wait(kind::OPEN).await;
        stuck(&end, On::Answer, "does not answer the request").await;
        peer.say(&accept(stream ^ YOURS, PLENTY)).await;
        over(&end).await;
    });
}

#[test]
fn what_idles_or_moves_slowly_is_not_stuck() {
    run(async {
        let target = TcpListener::bind(new_address()).await.unwrap();
        let address = target.local_addr().unwrap();
        let end = end(impatient(), &[], &[format!("slow:{address}")]).await;
        let mut peer = Peer::of(&end, PLENTY).await;
        peer.opened(0, "slow").await;
        let (mut slow, _) = target.accept().await.unwrap();
        for _ in 0..20 {
            sleep(PATIENCE / 4).await;
            peer.say(&frame(kind::DATA, 0, b"some")).await;
            slow.read_exact(&mut [0; 4]).await.unwrap();
        }
        sleep(3 * PATIENCE).await;
        assert_eq!(log::count(STUCK), 0);
        assert_eq!(end.counters.stalls.total(), 0);
    });
}
