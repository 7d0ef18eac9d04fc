//! Any operations on two ends of a bad line in virtual time (`virtproxy_link::sim`), which checks every byte.

#![no_main]

use libfuzzer_sys::fuzz_target;
use virtproxy_link::sim::{Op, Pair, Setup};

fuzz_target!(|input: (u16, Vec<Op>)| {
    let (seed, ops) = input;
    let mut pair = Pair::new(Setup::uart(seed.into()));
    for op in ops.into_iter().take(50) {
        pair.apply(match op {
            Op::Send(side, bytes) => Op::Send(side, bytes % 4_000),
            Op::Stop(side, millis) => Op::Stop(side, millis % 2_000),
            Op::Run(millis) => Op::Run(millis % 500),
            Op::Faults(in_a_million) => Op::Faults(in_a_million % 1_000),
            other => other,
        });
    }
    pair.apply(Op::Faults(0));
    pair.settle();
});
