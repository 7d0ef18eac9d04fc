//! Each quota against a peer that does not care: it holds, it is counted, and a neighbour's stream goes on.

mod support;

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::sleep;
use virtproxy_engine::counters::{Count, Counters};
use virtproxy_engine::driver::Settings;
use virtproxy_engine::limits::Limits;
use virtproxy_mux::Reason;
use virtproxy_mux::frame::kind;

use support::ends::{End, end};
use support::peer::{Peer, accept, code_of, frame, open, reset, word_of};
use support::{Deaf, connect, echo_server, ends_at_once, new_address, run};

const WINDOW: u32 = 1 << 20;
/// The slot of a stream that must not suffer.
const NEIGHBOUR: u32 = 0;

/// An end with these limits, which serves an echo and `target`; and a peer of it that has a stream to the echo.
async fn hostile(limits: Limits, target: &str) -> (End, Peer) {
    let settings = settings(limits);
    let echo = echo_server().await;
    let end = end(
        settings,
        &[],
        &[format!("echo:{echo}"), format!("target:{target}")],
    )
    .await;
    let mut peer = Peer::of(&end, WINDOW).await;
    peer.opened(NEIGHBOUR, "echo").await;
    (end, peer)
}

fn settings(limits: Limits) -> Settings {
    Settings {
        session: limits.session().unwrap(),
        limits,
        ..support::settings()
    }
}

fn refused(counters: &Counters) -> u64 {
    counters.ends.refused.of(Reason::Limit).get()
}

/// Every stream that was begun is open or has ended in one way.
fn check_balance(counters: &Counters) {
    let ends = &counters.ends;
    let reasons = [
        &ends.refused,
        &ends.refused_by_peer,
        &ends.reset,
        &ends.reset_by_peer,
    ];
    let with_reason: u64 = reasons.into_iter().map(|table| table.total()).sum();
    let ended = ends.finished.get() + ends.cut_off.get() + with_reason;
    let begun = counters.opened.get() + counters.asked.get();
    assert_eq!(begun, counters.streams.get() + ended);
}

async fn wait(count: &Count, value: u64) {
    while count.get() != value {
        sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn half_open_connects_are_bounded() {
    run(async {
        let deaf = Deaf::new().await;
        let limits = Limits {
            max_connecting: 3,
            ..Limits::default()
        };
        let (end, mut peer) = hostile(limits, &deaf.address).await;
        let counters = &end.counters;
        for slot in 1..=5 {
            peer.say(&open(slot, "target")).await;
        }
        for slot in [4, 5] {
            let (kind, _, payload) = peer.next_of(slot).await;
            assert_eq!((kind, code_of(&payload)), (kind::REFUSE, 5));
        }
        assert_eq!(counters.limits.connecting.reached.get(), 2);
        assert_eq!(counters.limits.connecting.now.get(), 3);
        assert_eq!(refused(counters), 2);
        peer.echo(NEIGHBOUR, b"unharmed").await;
        // Whoever gives up makes room.
        peer.say(&reset(1)).await;
        wait(&counters.limits.connecting.now, 2).await;
        peer.say(&open(6, "target")).await;
        wait(&counters.asked, 7).await;
        peer.echo(NEIGHBOUR, b"unharmed").await;
        assert_eq!(counters.limits.connecting.reached.get(), 2);
        check_balance(counters);
    });
}

#[test]
fn a_flood_of_opens_is_cut_to_its_rate() {
    run(async {
        let limits = Limits {
            max_open_rate: 50,
            ..Limits::default()
        };
        let (end, mut peer) = hostile(limits, &echo_server().await).await;
        let flood: Vec<u8> = (1..=300).flat_map(|slot| open(slot, "target")).collect();
        peer.say(&flood).await;
        wait(&end.counters.asked, 301).await;
        let refused = refused(&end.counters);
        // A second's worth, and what little time it took.
        assert!(
            (150..=251).contains(&refused),
            "{refused} of 300 were refused"
        );
        assert_eq!(end.counters.limits.open_rate.reached.get(), refused);
        peer.echo(NEIGHBOUR, b"unharmed").await;
        sleep(Duration::from_millis(100)).await;
        peer.opened(400, "echo").await;
        check_balance(&end.counters);
    });
}

#[test]
fn a_flood_of_resets_costs_the_peer_its_opens() {
    run(async {
        let limits = Limits {
            max_reset_rate: 100,
            ..Limits::default()
        };
        let (end, mut peer) = hostile(limits, &echo_server().await).await;
        let counters = &end.counters;
        let rapid = |slot| [open(slot, "target"), reset(slot)].concat();
        let flood: Vec<u8> = (1..=200).flat_map(rapid).collect();
        peer.say(&flood).await;
        // Those after the first hundred or so were refused before they could be reset.
        wait(&counters.asked, 201).await;
        let reached = counters.limits.reset_rate.reached.get();
        assert!(
            (50..=99).contains(&reached),
            "{reached} of 200 were refused"
        );
        assert_eq!(refused(counters), reached);
        let reset = counters.ends.reset_by_peer.of(Reason::Cancelled).get();
        assert_eq!(reset, 200 - reached);
        peer.echo(NEIGHBOUR, b"unharmed").await;
        sleep(Duration::from_millis(100)).await;
        peer.opened(400, "echo").await;
        check_balance(&end.counters);
    });
}

#[test]
fn streams_beyond_the_limit_are_refused() {
    run(async {
        let (few, address) = (new_limits(2), new_address());
        let end = end(settings(few), &[format!("any:{address}")], &[]).await;
        let mut peer = Peer::of(&end, WINDOW).await;
        let mut clients = Vec::new();
        for _ in 0..2 {
            clients.push(connect(&address).await);
            let (stream, _) = peer.wait(kind::OPEN).await;
            peer.say(&accept(stream ^ support::peer::YOURS, WINDOW))
                .await;
        }
        ends_at_once(connect(&address).await).await;
        assert_eq!(end.counters.limits.streams.reached.get(), 1);
        assert_eq!(end.counters.limits.streams.now.get(), 2);
        assert_eq!(end.counters.clients_refused.get(), 1);
        clients[0].write_all(b"unharmed").await.unwrap();
        assert_eq!(peer.wait(kind::DATA).await.1, b"unharmed");
    });
}

fn new_limits(max_streams: u32) -> Limits {
    Limits {
        max_streams,
        ..Limits::default()
    }
}

#[test]
fn a_peer_that_opens_more_streams_than_it_was_told_is_at_fault_alone() {
    run(async {
        let (_end, mut neighbour) = hostile(new_limits(2), &new_address()).await;
        let (end, mut peer) = hostile(new_limits(2), &new_address()).await;
        peer.say(&open(2, "echo")).await;
        let (_, payload) = peer.wait(kind::GOAWAY).await;
        assert_eq!(code_of(&payload), 9);
        assert_eq!(end.counters.sessions.violated.get(), 1);
        wait(&end.counters.ends.cut_off, 1).await;
        wait(&end.counters.streams, 0).await;
        check_balance(&end.counters);
        neighbour.echo(NEIGHBOUR, b"unharmed").await;
    });
}

/// Sends on a stream as much as it is granted, until it gets no more for a while; how much that was.
async fn send_all(peer: &mut Peer, slot: u32, mut credit: u32, at_most: usize) -> usize {
    let mut sent = 0;
    // Of the session's window.
    let mut session = WINDOW;
    while sent < at_most {
        let n = credit.min(session).min(16 * 1024);
        if n > 0 {
            peer.say(&frame(kind::DATA, slot, &vec![7; n as usize]))
                .await;
            (credit, session, sent) = (credit - n, session - n, sent + n as usize);
            continue;
        }
        let next = tokio::time::timeout(Duration::from_millis(200), peer.next());
        match next.await {
            Ok((kind::CREDIT, _, payload)) => credit += word_of(&payload),
            Ok((kind::SESSION_CREDIT, _, payload)) => session += word_of(&payload),
            Ok(_) => {}
            Err(_) => break,
        }
    }
    sent
}

#[test]
fn what_is_held_for_a_socket_that_does_not_read_is_bounded() {
    run(async {
        const BUFFER: u32 = 16 * 1024;
        let target = TcpListener::bind(new_address()).await.unwrap();
        let limits = Limits {
            max_stream_buffer: Some(BUFFER),
            ..Limits::default()
        };
        let address = target.local_addr().unwrap().to_string();
        let (end, mut peer) = hostile(limits, &address).await;
        let counters = &end.counters;
        let credit = peer.opened(1, "target").await;
        assert!(credit <= BUFFER, "{credit} bytes at once");
        let (mut silent, _) = target.accept().await.unwrap();
        let sent = send_all(&mut peer, 1, credit, usize::MAX).await;
        assert!(counters.limits.stream_buffer.reached.get() > 0);
        assert_eq!(counters.limits.stream_buffer.limit.get(), u64::from(BUFFER));
        assert!(counters.limits.buffer.now.get() <= 2 * u64::from(BUFFER));
        peer.echo(NEIGHBOUR, b"unharmed").await;
        let mut read = vec![0; sent];
        silent.read_exact(&mut read).await.unwrap();
    });
}

#[test]
fn what_is_held_for_a_whole_vm_is_bounded() {
    run(async {
        const MEMORY: u64 = 128 * 1024;
        let target = TcpListener::bind(new_address()).await.unwrap();
        let limits = Limits {
            max_streams: 2,
            max_buffer: MEMORY,
            ..Limits::default()
        };
        let address = target.local_addr().unwrap().to_string();
        let (end, mut peer) = hostile(limits, &address).await;
        let credit = peer.opened(1, "target").await;
        let (mut fast, _) = target.accept().await.unwrap();
        let reader = tokio::task::spawn_local(async move {
            tokio::io::copy(&mut fast, &mut tokio::io::sink()).await
        });
        let buffer = &end.counters.limits.buffer;
        send_all(&mut peer, 1, credit, 4 << 20).await;
        // A fast reader would get more.
        assert!(buffer.reached.get() > 0);
        assert!(buffer.now.get() <= MEMORY, "{} bytes", buffer.now.get());
        peer.echo(NEIGHBOUR, b"unharmed").await;
        reader.abort();
    });
}
