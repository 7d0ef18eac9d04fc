//! Any sequence of operations on two sessions: no byte is wrong, no credit leaks, nothing is stuck, every end has a reason.
//! The simulator checks; proptest searches, and shrinks what it finds.

use proptest::prelude::*;
use virtproxy_mux::sim::{Answer, Fault, Garbage, Op, Pair, Plan, Reading, Setup, Side, Split};

fn side() -> impl Strategy<Value = Side> {
    prop_oneof![Just(Side::A), Just(Side::B)]
}

fn reading() -> impl Strategy<Value = Reading> {
    prop_oneof![3 => Just(Reading::Fast), 1 => Just(Reading::Slow), 1 => Just(Reading::Never)]
}

fn plan() -> impl Strategy<Value = Plan> {
    let answer = prop_oneof![
        4 => Just(Answer::Accept),
        1 => Just(Answer::AcceptLater),
        1 => Just(Answer::Refuse),
        1 => Just(Answer::RefuseLater),
        1 => Just(Answer::Hang),
    ];
    let bytes = || prop_oneof![0..20_u16, 0..3_000_u16];
    (
        answer,
        [bytes(), bytes()],
        any::<[bool; 2]>(),
        [reading(), reading()],
    )
        .prop_map(|(answer, bytes, ends, reading)| Plan {
            answer,
            bytes,
            ends,
            reading,
        })
}

fn garbage() -> impl Strategy<Value = Garbage> {
    prop_oneof![
        Just(Garbage::None),
        any::<u8>().prop_map(Garbage::Random),
        any::<u8>().prop_map(Garbage::FalseStart),
        any::<bool>().prop_map(Garbage::Stale),
        Just(Garbage::Echo),
    ]
}

/// What streams and their users do.
fn traffic() -> impl Strategy<Value = Op> {
    let which = any::<u8>;
    prop_oneof![
        8 => (side(), plan()).prop_map(|(side, plan)| Op::Open(side, plan)),
        2 => (side(), which(), reading()).prop_map(|(side, n, reading)| Op::Read(side, n, reading)),
        2 => (side(), which(), 0..3_000_u16).prop_map(|(side, n, units)| Op::Write(side, n, units)),
        2 => (side(), which()).prop_map(|(side, n)| Op::Finish(side, n)),
        3 => (side(), which()).prop_map(|(side, n)| Op::Reset(side, n)),
        1 => (side(), which(), any::<bool>()).prop_map(|(side, n, yes)| Op::Answer(side, n, yes)),
        1 => side().prop_map(Op::Ping),
        1 => (side(), any::<u16>()).prop_map(|(side, micros)| Op::Stall(side, micros)),
        6 => (0..500_u16).prop_map(Op::Run),
        1 => Just(Op::Settle),
    ]
}

/// The same, and what befalls ends and channels.
fn life() -> impl Strategy<Value = Op> {
    let split = prop_oneof![Just(Split::Whole), Just(Split::Bytes), Just(Split::Random)];
    let cut = prop_oneof![Just(0), 0..6_000_u16];
    prop_oneof![
        20 => traffic(),
        1 => side().prop_map(Op::GoAway),
        1 => (side(), split, 0..2_000_u16).prop_map(|(side, split, us)| Op::Deliver(side, split, us)),
        1 => (side(), cut).prop_map(|(side, cut)| Op::Restart(side, cut)),
        1 => (garbage(), garbage()).prop_map(|(a, b)| Op::LinkDown(a, b)),
    ]
}

/// The same, and what befalls a channel that nobody watches.
fn hard_life() -> impl Strategy<Value = Op> {
    let fault = prop_oneof![
        (1..6_000_u16).prop_map(Fault::Lose),
        (1..6_000_u16).prop_map(Fault::Double),
        any::<u8>().prop_map(Fault::Insert),
    ];
    prop_oneof![
        10 => life(),
        1 => (side(), any::<u16>(), fault).prop_map(|(side, place, fault)| Op::Fault(side, place, fault)),
    ]
}

fn run(setup: Setup, ops: Vec<Op>) {
    let mut pair = Pair::new(setup);
    for op in ops {
        pair.apply(op);
    }
    pair.apply(Op::Settle);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn credit_is_conserved_on_every_path(seed: u64, ops in prop::collection::vec(traffic(), 1..60)) {
        run(Setup::tight(seed), ops);
    }

    #[test]
    fn whatever_befalls_the_ends_new_streams_are_sound(seed: u64, ops in prop::collection::vec(life(), 1..60)) {
        run(Setup::tight(seed), ops);
    }

    #[test]
    fn whatever_befalls_a_channel_sealed_streams_are_sound(seed: u64, ops in prop::collection::vec(hard_life(), 1..60)) {
        run(Setup::tight(seed).sealed(), ops);
    }

    #[test]
    fn any_limits_will_do(seed: u64, ops in prop::collection::vec(life(), 1..40)) {
        run(Setup::random(seed), ops);
    }
}
