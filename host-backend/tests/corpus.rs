//! Replays the fuzzer's inputs that are kept: what it found, and what reaches most of the device's code.

use virtproxy_host::device::rogue;

/// One input a line, in hexadecimal digits, behind a `#` what the next one is.
const KEPT: &str = include_str!("corpus.txt");

fn bytes(line: &str) -> Vec<u8> {
    let digits = line.as_bytes().chunks(2);
    let byte = |two| u8::from_str_radix(str::from_utf8(two).unwrap(), 16).unwrap();
    digits.map(byte).collect()
}

#[test]
fn inputs_of_the_fuzzer_that_are_kept_do_no_harm() {
    let inputs = KEPT.lines().filter(|line| !line.starts_with('#'));
    for line in inputs {
        println!("{line}");
        rogue::run(&bytes(line));
    }
}

/// Beside what the fuzzer came upon, operations that nothing has chosen.
#[test]
fn any_operations_of_guest_and_qemu_do_no_harm() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..3000 {
        let mut bytes = Vec::new();
        for _ in 0..64 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend(state.to_le_bytes());
        }
        rogue::run(&bytes);
    }
}
