//! What a sealed session does about bytes that its channel lost or added, one case each.

mod support;

use support::{Bench, EPOCH, PEER, Sealer, Sent, acks, address, frame, hello};
use virtproxy_mux::frame::kind;
use virtproxy_mux::hello::SEAL;
use virtproxy_mux::{Config, End, Event, Session, Transmit};

/// The cut frame of a dead peer, what its successor sends on its own, and what it answers when it is asked.
fn cut_frame_and_successor(bench: &mut Bench) -> Vec<Event> {
    bench.accepted(address(0, 0), 1 << 20);
    let cut = bench.seal(&frame(kind::DATA, address(0, 0), &[1; 60_000]));
    assert_eq!(bench.feed(&cut[..30_000]), []);
    let mut next = Bench::seeking(bench.config.clone());
    next.session = Session::new(bench.config.clone(), 4711);
    for sent in next.sent() {
        assert_eq!(bench.feed(&sent.bytes()), []);
    }
    bench.session.stalled();
    let question = bench.sent();
    assert_eq!(acks(&question), [(EPOCH, PEER)]);
    next.feed(&question[0].bytes());
    let answer: Vec<u8> = next.sent().iter().flat_map(Sent::bytes).collect();
    bench.feed(&answer)
}

#[test]
fn what_was_cut_off_a_frame_is_not_made_up_for_if_it_is_sealed() {
    let wrong = |bench: &Bench| {
        let bytes = bench.data.iter().filter(|(stream, _)| stream.is_some());
        bytes.flat_map(|(_, bytes)| bytes).any(|byte| *byte != 1)
    };
    let mut bench = Bench::sealed();
    let events = cut_frame_and_successor(&mut bench);
    assert_eq!(events, [Event::Ended(End::Damaged)]);
    assert!(bench.data.is_empty(), "nothing of the frame is delivered");
    assert_eq!(bench.sent(), [], "its HELLO will tell the peer");

    let mut bench = Bench::new(Config::default());
    let events = cut_frame_and_successor(&mut bench);
    assert_eq!(events, [Event::Ended(End::PeerRestarted)]);
    assert!(wrong(&bench), "without seals it is");
}

#[test]
fn a_loss_shows_even_if_the_peer_has_nothing_to_say() {
    let (mut bench, mut peer) = (Bench::sealed(), Bench::sealed());
    // The two know each other by the same epochs, so that the one can be the other's peer.
    let config = bench.config.clone();
    peer.session = Session::new(config, PEER);
    peer.sealers = None;
    peer.sent();
    let hello = hello(EPOCH, PEER);
    assert!(matches!(
        peer.feed(&hello.encode())[..],
        [Event::Established(_)]
    ));
    peer.sealers = Some([Sealer::new(EPOCH, PEER), Sealer::new(PEER, EPOCH)]);
    peer.sent();

    bench.accepted(address(0, 0), 1 << 20);
    let data = bench.seal(&frame(kind::DATA, address(0, 0), &[1; 60_000]));
    bench.feed(&data[..20_000]);
    bench.session.stalled();
    let [Sent::Hello(question)] = &bench.sent()[..] else {
        panic!("no question");
    };
    assert_eq!(peer.feed(question), []);
    let (mut padding, mut buf) = (Vec::new(), [0; 512]);
    while let Some(Transmit::Control(len)) = peer.session.poll_transmit(0, 8192, &mut buf) {
        assert_eq!(buf[0], kind::PADDING);
        padding.extend(&buf[..len]);
    }
    assert!(padding.len() < 2 * 65536, "no more than may be missing");
    let events = bench.feed(&padding);
    assert_eq!(events, [Event::Ended(End::Damaged)]);
    assert!(bench.data.is_empty());
}

#[test]
fn data_is_padding_enough() {
    let mut bench = Bench::sealed();
    let id = bench.accepted(address(0, 0), 1 << 20);
    bench.feed(&hello(PEER, EPOCH).encode());
    bench.session.set_readable(id);
    let mut buf = [0; 512];
    let mut turn = |bench: &mut Bench| bench.session.poll_transmit(bench.now, 1 << 20, &mut buf);
    for _ in 0..2 {
        let Some(Transmit::Data { stream, max }) = turn(&mut bench) else {
            panic!("padding goes before data");
        };
        bench.session.sent(stream, max);
    }
    bench.session.blocked(id);
    assert_eq!(turn(&mut bench), None);
}

#[test]
fn what_may_get_lost_is_said_again_where_frames_are_sealed() {
    let mut seeking = Bench::seeking(Config {
        seal: true,
        ..Config::default()
    });
    assert_eq!(acks(&seeking.sent()), [(EPOCH, 0)]);
    seeking.session.ping();
    assert_eq!(acks(&seeking.sent()), [(EPOCH, 0)]);
    // It need not be this end that has asked for seals.
    let mut asked = Bench::seeking(Config::default());
    let mut other = hello(PEER, 0);
    other.features = SEAL;
    asked.feed(&other.encode());
    asked.sent();
    asked.session.ping();
    assert_eq!(acks(&asked.sent()), [(EPOCH, 0)]);

    let mut bench = Bench::sealed();
    let token = |sent: Vec<Sent>| match &sent[..] {
        [Sent::Frame(kind::PING, 0, token)] => token.clone(),
        other => panic!("{other:?}"),
    };
    bench.session.ping();
    let lost = token(bench.sent());
    bench.session.ping();
    let mut again = bench.sent();
    // The peer may have begun anew, and it is its HELLO that got lost.
    assert_eq!(acks(&again), [(EPOCH, PEER)]);
    again.retain(|sent| matches!(sent, Sent::Frame(..)));
    let second = token(again);
    assert_eq!(bench.say(&frame(kind::PONG, 0, &lost)), []);
    let events = bench.say(&frame(kind::PONG, 0, &second));
    assert!(matches!(events[..], [Event::RoundTrip(_)]), "{events:?}");

    let mut unsealed = Bench::new(Config::default());
    unsealed.session.ping();
    token(unsealed.sent());
    unsealed.session.ping();
    assert_eq!(unsealed.sent(), []);
    let mut unsealed = Bench::seeking(Config::default());
    unsealed.sent();
    unsealed.session.ping();
    assert_eq!(unsealed.sent(), []);
}

#[test]
fn a_flood_of_questions_owes_one_lot_of_padding() {
    let mut bench = Bench::sealed();
    for _ in 0..1000 {
        assert_eq!(bench.feed(&hello(PEER, EPOCH).encode()), []);
    }
    let padding: usize = bench.sent().iter().map(|sent| sent.bytes().len()).sum();
    assert!(padding < 65536 + 1024);
}

#[test]
fn two_lost_answers_leave_nobody_waiting() {
    let sealed = Config {
        seal: true,
        ..Config::default()
    };
    let (mut a, mut b) = (
        Bench::seeking(sealed.clone()),
        Bench::seeking(sealed.clone()),
    );
    b.session = Session::new(sealed, PEER);
    let (to_b, to_a) = (a.sent(), b.sent());
    b.feed(&to_b[0].bytes());
    a.feed(&to_a[0].bytes());
    assert_eq!(acks(&a.sent()), [(EPOCH, PEER)], "which is lost");
    assert_eq!(acks(&b.sent()), [(PEER, EPOCH)], "which is lost");
    a.session.ping();
    b.feed(&a.sent()[0].bytes());
    assert!(matches!(
        a.feed(&b.sent()[0].bytes())[..],
        [Event::Established(_)]
    ));
    // B has not heard that; when it asks, A sees that they must begin again.
    b.session.ping();
    let events = a.feed(&b.sent()[0].bytes());
    assert_eq!(events, [Event::Ended(End::PeerRestarted)]);
}
