//! A rogue client of the admin socket (`virtproxy_host::ports::rogue`), which checks what must hold.

#![no_main]

use libfuzzer_sys::fuzz_target;
use virtproxy_host::ports::rogue;

fuzz_target!(|bytes: &[u8]| rogue::run(bytes));
