//! Any operations on two sessions in virtual time (`virtproxy_mux::sim`), which checks every byte and every credit.

#![no_main]

use libfuzzer_sys::fuzz_target;
use virtproxy_mux::sim::{Garbage, Op, Pair, Setup};

fuzz_target!(|input: (u16, Vec<Op>)| {
    let (seed, ops) = input;
    let setup = match seed % 4 {
        0 => Setup::random(u64::from(seed)),
        _ => Setup::tight(u64::from(seed)),
    };
    let sealed = seed & 4 != 0;
    let setup = if sealed { setup.sealed() } else { setup };
    let mut pair = Pair::new(setup);
    // Seals notice what is lost and added, and both ends are well again by themselves.
    let damaged = ops.iter().any(|op| match op {
        Op::Corrupt(..) => true,
        Op::Fault(..) => !sealed,
        _ => false,
    });
    for op in ops.into_iter().take(200) {
        match op {
            Op::Settle if damaged => pair.quiet(),
            op => pair.apply(small(op)),
        }
    }
    if damaged {
        pair.apply(Op::LinkDown(Garbage::None, Garbage::None));
    }
    pair.apply(Op::Settle);
});

/// The same, with fewer bytes to move.
fn small(op: Op) -> Op {
    match op {
        Op::Open(side, mut plan) => {
            plan.bytes = plan.bytes.map(|units| units % 2048);
            Op::Open(side, plan)
        }
        Op::Write(side, which, units) => Op::Write(side, which, units % 2048),
        other => other,
    }
}
