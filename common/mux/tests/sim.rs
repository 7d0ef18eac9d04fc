//! Two sessions against each other in virtual time: named scenes, and long random runs.

use virtproxy_mux::sim::{
    Answer, Fault, Garbage, Op, Pair, Plan, Reading, Rng, Setup, Side, Split,
};
use virtproxy_mux::{Config, End};

/// A short request and a short answer, both ended.
const REQUEST: Plan = Plan {
    answer: Answer::Accept,
    bytes: [10, 20],
    ends: [true, true],
    reading: [Reading::Fast, Reading::Fast],
};

/// About a megabyte one way, never ended.
const BULK: Plan = Plan {
    answer: Answer::Accept,
    bytes: [u16::MAX, 0],
    ends: [false, false],
    reading: [Reading::Fast, Reading::Fast],
};

const BOTH: [Side; 2] = [Side::A, Side::B];

/// A pair that has shaken hands.
fn joined(setup: Setup) -> Pair {
    let mut pair = Pair::new(setup);
    pair.settle();
    pair
}

/// Runs requests each way; all must be answered in full.
fn requests_work(pair: &mut Pair) {
    pair.settle();
    for side in BOTH {
        let before = pair.tally(side).finished;
        assert!(pair.open(side, REQUEST).is_some());
        pair.settle();
        assert_eq!(pair.tally(side).finished, before + 1);
    }
}

/// How long a request takes, in microseconds.
fn request_time(pair: &mut Pair) -> u64 {
    let (start, finished) = (pair.now(), pair.tally(Side::A).finished);
    assert!(pair.open(Side::A, REQUEST).is_some());
    while pair.tally(Side::A).finished == finished {
        pair.run(10);
        assert!(pair.now() < start + 1_000_000, "no answer within a second");
    }
    pair.now() - start
}

#[test]
fn one_stalled_stream_stalls_no_other() {
    let mut pair = joined(Setup::tight(1));
    let alone: Vec<u64> = (0..100).map(|_| request_time(&mut pair)).collect();
    let stuck = Plan {
        reading: [Reading::Never; 2],
        bytes: [u16::MAX; 2],
        ..BULK
    };
    pair.open(Side::A, stuck);
    pair.open(Side::B, stuck);
    pair.settle();
    let beside: Vec<u64> = (0..100).map(|_| request_time(&mut pair)).collect();
    let worst = |times: &[u64]| times.iter().max().copied();
    assert!(
        worst(&beside) <= worst(&alone),
        "{beside:?} against {alone:?}"
    );
}

#[test]
fn bulk_delays_a_request_by_what_is_in_flight_and_no_more() {
    let mut pair = joined(Setup::tight(2));
    let alone = request_time(&mut pair);
    for side in BOTH {
        pair.open(side, BULK);
    }
    pair.run(5_000);
    let beside = request_time(&mut pair);
    assert!(
        beside <= 4 * alone,
        "{beside} us beside bulk, {alone} us alone"
    );
}

#[test]
fn either_end_restarts_at_any_byte() {
    restarts_at_any_byte(|setup| setup);
}

/// What was cut off a frame is never filled up with wrong bytes here.
#[test]
fn either_end_restarts_at_any_byte_of_a_sealed_session() {
    restarts_at_any_byte(Setup::sealed);
}

fn restarts_at_any_byte(kind: fn(Setup) -> Setup) {
    for side in BOTH {
        for cut in (0..5_000).step_by(53) {
            let mut pair = joined(kind(Setup::tight(u64::from(cut))));
            for opener in BOTH {
                pair.open(opener, BULK);
            }
            pair.run(1_000 + u64::from(cut) / 7);
            pair.apply(Op::Restart(side, cut));
            pair.settle();
            assert_eq!(pair.streams(Side::A), [], "an old stream lives");
            assert_eq!(pair.streams(Side::B), [], "an old stream lives");
            requests_work(&mut pair);
        }
    }
}

#[test]
fn both_ends_restart_at_once() {
    for seed in 0..50 {
        let mut pair = joined(Setup::tight(seed));
        pair.open(Side::A, BULK);
        pair.run(seed * 13);
        pair.apply(Op::Restart(Side::A, 0));
        pair.run(seed);
        pair.apply(Op::Restart(Side::B, 0));
        requests_work(&mut pair);
    }
}

#[test]
fn a_restart_is_told_as_one() {
    let mut pair = joined(Setup::tight(3));
    pair.apply(Op::Restart(Side::A, 0));
    pair.settle();
    assert_eq!(pair.last_end(Side::B), Some(&End::PeerRestarted));
}

#[test]
fn bytes_come_one_by_one() {
    let mut pair = Pair::new(Setup::tight(4));
    for side in BOTH {
        pair.apply(Op::Deliver(side, Split::Bytes, 50));
    }
    requests_work(&mut pair);
    pair.open(Side::B, BULK);
    pair.settle();
}

#[test]
fn garbage_before_a_session_is_skipped() {
    let mut kinds = vec![Garbage::None, Garbage::Echo];
    kinds.extend([true, false].map(Garbage::Stale));
    kinds.extend([1, 100, 255].map(Garbage::Random));
    kinds.extend([0, 57, 255].map(Garbage::FalseStart));
    for to_a in &kinds {
        for to_b in &kinds {
            let mut pair = Pair::new(Setup::tight(5));
            pair.apply(Op::LinkDown(*to_a, *to_b));
            requests_work(&mut pair);
        }
    }
}

#[test]
fn a_peer_of_another_version_is_named_and_a_later_one_is_served() {
    let mut pair = joined(Setup::tight(6));
    let other = |versions| Config {
        versions,
        product: "other 2".into(),
        ..Config::default()
    };
    pair.set_config(Side::B, other((2, 3)));
    pair.apply(Op::Restart(Side::B, 0));
    pair.quiet();
    assert!(!pair.is_joined());
    assert_eq!(pair.tally(Side::A).incompatible, 1);
    assert_eq!(pair.tally(Side::B).incompatible, 1);
    pair.set_config(Side::B, other((1, 3)));
    pair.apply(Op::Restart(Side::B, 0));
    requests_work(&mut pair);
}

#[test]
fn a_paused_peer_loses_nothing() {
    let mut pair = joined(Setup::tight(7));
    pair.open(Side::A, BULK);
    pair.open(Side::B, BULK);
    pair.run(3_000);
    pair.stall(Side::A, 3_600_000_000 / 2);
    pair.stall(Side::B, 3_600_000_000 / 2);
    for _ in 0..100 {
        pair.run(10_000_000);
        pair.apply(Op::Ping(Side::A));
        pair.apply(Op::Ping(Side::B));
    }
    pair.settle();
    assert_eq!(pair.tally(Side::A).sessions, 0, "the session was given up");
    requests_work(&mut pair);
}

#[test]
fn a_half_closed_stream_still_answers() {
    let mut pair = joined(Setup::tight(8));
    let late = Plan {
        bytes: [10, 0],
        ends: [true, false],
        ..REQUEST
    };
    pair.open(Side::A, late);
    pair.settle();
    assert_eq!(pair.streams(Side::A).len(), 1);
    pair.apply(Op::Write(Side::B, 0, 4_000));
    pair.apply(Op::Finish(Side::B, 0));
    pair.settle();
    assert_eq!(pair.tally(Side::A).finished, 1);
}

#[test]
fn every_request_beyond_the_limit_is_turned_down_at_once() {
    let mut pair = joined(Setup::tight(9));
    let hang = Plan {
        answer: Answer::Hang,
        ..REQUEST
    };
    let opened = (0..10).filter(|_| pair.open(Side::A, hang).is_some());
    assert_eq!(opened.count(), 6);
    pair.settle();
    for _ in 0..6 {
        pair.apply(Op::Reset(Side::A, 0));
    }
    requests_work(&mut pair);
}

#[test]
fn windows_grow_with_a_fast_reader() {
    let mut setup = Setup::tight(10);
    setup.capacities = [1 << 20; 2];
    setup.configs[1].session_window = 1 << 20;
    let mut pair = joined(setup);
    pair.open(Side::A, BULK);
    pair.settle();
    let id = pair.streams(Side::B)[0];
    let credit = pair.session(Side::B).stream_credit(id).unwrap();
    assert!(credit.granted > 16 * 1024, "{credit:?}");
}

/// A session in which one fault befalls bulk that B sends, at a place and of a length that follow from `n`.
fn fault_in_bulk(setup: Setup, n: u16) -> Pair {
    let mut pair = joined(setup);
    for opener in BOTH {
        pair.open(opener, BULK);
    }
    pair.run(1_000 + u64::from(n));
    let fault = match n % 3 {
        0 => Fault::Lose(1 + n / 3),
        1 => Fault::Double(1 + n / 3),
        _ => Fault::Insert((1 + n / 3).to_le_bytes()[0]),
    };
    pair.apply(Op::Fault(Side::B, n.wrapping_mul(41), fault));
    pair
}

#[test]
fn a_fault_in_a_sealed_session_ends_it_and_nothing_else() {
    for n in 0..300 {
        let mut pair = fault_in_bulk(Setup::tight(u64::from(n)).sealed(), n);
        pair.settle();
        let tally = pair.tally(Side::A);
        assert_eq!((tally.wrong, tally.damaged), (0, 1), "fault {n}");
        assert_eq!(pair.last_end(Side::A), Some(&End::Damaged));
        assert_eq!(pair.last_end(Side::B), Some(&End::PeerRestarted));
        requests_work(&mut pair);
    }
}

/// So the test above can fail: its faults do harm where frames are not sealed.
#[test]
fn the_same_faults_without_seals_give_streams_wrong_bytes() {
    let wrong = (0..300).filter(|n| {
        let mut pair = fault_in_bulk(Setup::tight(u64::from(*n)), *n);
        pair.run(100_000);
        pair.tally(Side::A).wrong > 0
    });
    assert!(wrong.count() > 100);
}

/// Runs `ops` random operations from `seed`.
fn random_run(setup: Setup, ops: u64) {
    let mut rng = Rng::new(setup.seed ^ 0x5eed);
    let mut pair = Pair::new(setup);
    for _ in 0..ops {
        pair.apply(Op::random(&mut rng));
    }
    pair.apply(Op::Settle);
}

/// The same on a channel that lies. All that is asked of the ends is to live, to hold no more than their limits, and to be
/// well again once the channel is.
fn damaged_run(setup: Setup, ops: u64) {
    let mut rng = Rng::new(setup.seed ^ 0xbad);
    let mut pair = Pair::new(setup);
    for _ in 0..ops {
        let op = match rng.below(20) {
            0 => {
                let [place, mask, ..] = rng.number().to_le_bytes();
                Op::Corrupt(BOTH[usize::from(place % 2)], place.into(), mask)
            }
            _ => Op::random(&mut rng),
        };
        if op != Op::Settle {
            pair.apply(op);
        }
    }
    pair.apply(Op::LinkDown(Garbage::None, Garbage::None));
    requests_work(&mut pair);
}

/// The same on a channel that loses and adds runs of bytes without a word. What is asked of sealed sessions there is no
/// less than on a sound one, but that they last.
fn faulty_run(setup: Setup, ops: u64) {
    let mut rng = Rng::new(setup.seed ^ 0xfa11);
    let mut pair = Pair::new(setup);
    for _ in 0..ops {
        pair.apply(match rng.below(20) {
            0 => Op::random_fault(&mut rng),
            _ => Op::random(&mut rng),
        });
    }
    pair.settle();
    // Clears away what fills the limits.
    pair.apply(Op::LinkDown(Garbage::None, Garbage::None));
    requests_work(&mut pair);
}

/// How many runs: a few, or as many as `MUX_SIM_RUNS` says.
fn seeds() -> Vec<u64> {
    let number = |name| Some(std::env::var(name).ok()?.parse().expect("a number"));
    match number("MUX_SIM_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("MUX_SIM_RUNS").unwrap_or(6)).collect(),
    }
}

#[test]
fn random_runs() {
    for seed in seeds() {
        random_run(Setup::random(seed), 1000);
        random_run(Setup::tight(seed), 1000);
    }
}

#[test]
fn random_runs_on_a_channel_that_damages_bytes() {
    for seed in seeds() {
        damaged_run(Setup::random(seed), 500);
        damaged_run(Setup::tight(seed), 500);
    }
}

#[test]
fn random_runs_with_seals() {
    for seed in seeds() {
        random_run(Setup::random(seed).sealed(), 1000);
        random_run(Setup::tight(seed).sealed(), 1000);
    }
}

#[test]
fn random_runs_on_a_channel_that_loses_and_adds_bytes() {
    for seed in seeds() {
        for setup in [Setup::random(seed), Setup::tight(seed)] {
            faulty_run(setup.sealed(), 1000);
        }
    }
}
