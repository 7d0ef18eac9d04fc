//! A hostile peer: raw bytes, and frames with a sound checksum and any contents.
//!
//! Whatever comes, the endpoint must not panic, must keep its invariants and must stay within its memory.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use virtproxy_link::sim::{forge, hello};
use virtproxy_link::{Config, Endpoint, Hello};

const ID: u64 = 0x1111_1111_1111_1111;
const PEER: u64 = 0x2222_2222_2222_2222;
/// A window each way, what is pushed at once, and what one piece of input brings.
const MAX_HELD: usize = 64 * 1024;

#[derive(Arbitrary, Debug)]
enum Input {
    Bytes(Vec<u8>),
    Frame {
        fields: [u8; 4],
        gaps: u32,
        ask: bool,
        payload: Vec<u8>,
    },
    Hello {
        version: u8,
        open: bool,
        same: bool,
        answers: bool,
        speed: u32,
    },
    Push(u16),
    Wait(u32),
}

fuzz_target!(|input: (bool, Vec<Input>)| {
    let (open, inputs) = input;
    let mut endpoint = Endpoint::new(Config {
        id: ID,
        speed: Some(115_200),
    });
    let (mut now, mut out, mut line) = (1, Vec::new(), Vec::new());
    let greeting = Hello {
        version: 1,
        open: true,
        id: PEER,
        ack: ID,
        speed: 0,
    };
    if open {
        endpoint.handle_bytes(now, &hello(greeting), &mut out);
        assert!(endpoint.is_open());
    }
    for input in inputs {
        match input {
            Input::Bytes(bytes) => endpoint.handle_bytes(now, &bytes, &mut out),
            Input::Frame {
                fields,
                gaps,
                ask,
                payload,
            } => {
                let payload = &payload[..payload.len().min(512)];
                let frame = forge([PEER, ID], fields, gaps, ask, payload);
                endpoint.handle_bytes(now, &frame, &mut out);
            }
            Input::Hello {
                version,
                open,
                same,
                answers,
                speed,
            } => {
                let other = Hello {
                    version,
                    open,
                    id: if same { PEER } else { 3 },
                    ack: if answers { ID } else { 0 },
                    speed,
                };
                endpoint.handle_bytes(now, &hello(other), &mut out);
            }
            Input::Push(n) => {
                if endpoint.wants_data() {
                    endpoint.push(&vec![1; usize::from(n % 2048)]);
                }
            }
            Input::Wait(micros) => now += u64::from(micros),
        }
        for _ in 0..200 {
            if !endpoint.poll_transmit(now, &mut line) {
                break;
            }
            line.clear();
        }
        assert!(!endpoint.poll_transmit(now, &mut line), "output without end");
        endpoint.check_invariants();
        assert!(endpoint.held() <= MAX_HELD, "memory without bound");
        out.clear();
    }
});
