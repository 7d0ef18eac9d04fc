//! A rogue guest, a rogue QEMU and the engine around the device (`virtproxy_host::device::rogue`), which checks what must hold.

#![no_main]

use libfuzzer_sys::fuzz_target;
use virtproxy_host::device::rogue;

fuzz_target!(|bytes: &[u8]| rogue::run(bytes));
