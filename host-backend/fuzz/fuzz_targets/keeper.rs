//! A rogue QEMU and rogue workers around a connection of the keeper's (`virtproxy_host::keeper::rogue`), which checks what must hold.

#![no_main]

use libfuzzer_sys::fuzz_target;
use virtproxy_host::keeper::rogue;

fuzz_target!(|bytes: &[u8]| rogue::run(bytes));
