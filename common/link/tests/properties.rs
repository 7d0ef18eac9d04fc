//! Any operations on two ends of a bad line: no byte is wrong, memory is bounded, and all comes through in the end. The
//! simulator checks; proptest searches, and shrinks what it finds.

use proptest::prelude::*;
use virtproxy_link::sim::{Op, Pair, Setup, Side};

fn side() -> impl Strategy<Value = Side> {
    prop_oneof![Just(Side::A), Just(Side::B)]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (side(), 0..4_000_u16).prop_map(|(side, bytes)| Op::Send(side, bytes)),
        1 => side().prop_map(Op::Restart),
        1 => (side(), 0..3_000_u16).prop_map(|(side, millis)| Op::Stop(side, millis)),
        1 => side().prop_map(Op::KernelMessage),
        1 => side().prop_map(Op::Banner),
        1 => (side(), any::<u8>()).prop_map(|(side, len)| Op::Garbage(side, len)),
        1 => (0..1_000_u16).prop_map(Op::Faults),
        6 => (0..500_u16).prop_map(Op::Run),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn all_comes_through(seed in any::<u16>(), ops in prop::collection::vec(op(), 1..40)) {
        let mut pair = Pair::new(Setup::uart(seed.into()));
        for op in ops {
            pair.apply(op);
        }
        pair.settle();
    }
}
