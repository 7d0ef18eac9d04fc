//! Replays the fuzzer's inputs that are kept: what it found, and what reaches most of the code that others can talk to.

use virtproxy_host::{device, keeper, ports};

/// A target's inputs, and what it does with one.
type Target = (&'static str, fn(&[u8]));

/// One input a line, in hexadecimal digits, behind a `#` what the next one is.
const TARGETS: [Target; 3] = [
    (include_str!("corpus.txt"), device::rogue::run),
    (include_str!("corpus-keeper.txt"), keeper::rogue::run),
    (include_str!("corpus-admin.txt"), ports::rogue::run),
];

fn bytes(line: &str) -> Vec<u8> {
    let digits = line.as_bytes().chunks(2);
    let byte = |two| u8::from_str_radix(str::from_utf8(two).unwrap(), 16).unwrap();
    digits.map(byte).collect()
}

#[test]
fn inputs_of_the_fuzzer_that_are_kept_do_no_harm() {
    for (kept, run) in TARGETS {
        for line in kept.lines().filter(|line| !line.starts_with('#')) {
            println!("{line}");
            run(&bytes(line));
        }
    }
}

/// Beside what the fuzzer came upon, operations that nothing has chosen.
#[test]
fn any_operations_of_guest_and_qemu_do_no_harm() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..9000 {
        let mut bytes = Vec::new();
        for _ in 0..64 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend(state.to_le_bytes());
        }
        TARGETS[round % TARGETS.len()].1(&bytes);
    }
}
