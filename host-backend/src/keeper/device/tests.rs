//! Workers that die over what they are told, played by the test.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

const GET_FEATURES: u32 = 1;
const SET_OWNER: u32 = 3;
const GET_CONFIG: u32 = 24;

fn message(request: u32) -> Vec<u8> {
    [request, 1, 0].map(u32::to_ne_bytes).concat()
}

/// A device, its QEMU, and the worker's end of a leash.
struct Scene {
    device: Device,
    qemu: UnixStream,
    leash: (OwnedFd, OwnedFd),
}

impl Scene {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "virtproxy-keep-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        let spec = format!("vhost-user:{}:-", path.display());
        let mut device = Device::new(&spec.parse().unwrap()).unwrap();
        device.set_state(Vec::new()).unwrap();
        let qemu = UnixStream::connect(&path).unwrap();
        device.turn();
        let leash = leash::leash().unwrap();
        Scene {
            device,
            qemu,
            leash,
        }
    }

    /// The connection that the worker has.
    fn accept(&self) -> UnixStream {
        let worker = self.device.door.listener.accept().unwrap().0;
        worker.set_nonblocking(false).unwrap();
        worker
    }

    /// The next worker begins.
    fn begin(&mut self) -> UnixStream {
        self.device
            .begin(&self.leash.0, &History::default())
            .unwrap();
        self.device.turn();
        self.accept()
    }

    /// The worker gets these requests, and answers with their like.
    fn answer(&mut self, worker: &mut UnixStream, requests: &[u32]) {
        for request in requests {
            self.hear(worker, *request);
            worker.write_all(&message(*request)).unwrap();
            self.device.turn();
        }
    }

    fn hear(&mut self, worker: &mut UnixStream, request: u32) {
        self.device.turn();
        let mut heard = [0; 12];
        worker.read_exact(&mut heard).unwrap();
        assert_eq!(&heard[..4], request.to_ne_bytes());
    }

    fn is_served(&self) -> bool {
        matches!(self.device.frontend, Frontend::Served(_))
    }
}

#[test]
fn a_request_that_kills_each_worker_is_given_up() {
    let mut scene = Scene::new();
    let mut worker = scene.accept();
    scene.qemu.write_all(&message(GET_CONFIG)).unwrap();
    for _ in 1..MAX_DEATHS {
        scene.hear(&mut worker, GET_CONFIG);
        scene.device.worker_gone(true);
        assert!(scene.is_served());
        worker = scene.begin();
        scene.answer(&mut worker, &[GET_FEATURES, GET_FEATURES]);
    }
    scene.hear(&mut worker, GET_CONFIG);
    scene.device.worker_gone(true);
    assert!(!scene.is_served());
    assert_eq!(scene.qemu.read(&mut [0]).unwrap(), 0);
}

#[test]
fn so_is_a_connection_whose_record_does() {
    let mut scene = Scene::new();
    let mut worker = scene.accept();
    scene.qemu.write_all(&message(SET_OWNER)).unwrap();
    scene.hear(&mut worker, SET_OWNER);
    // It was not asked for an answer, so nobody knows whether this one died over it.
    scene.device.worker_gone(true);
    for deaths in 1..=MAX_DEATHS {
        assert!(scene.is_served(), "{deaths}");
        let mut worker = scene.begin();
        scene.answer(&mut worker, &[GET_FEATURES]);
        scene.hear(&mut worker, SET_OWNER);
        scene.device.worker_gone(true);
    }
    assert!(!scene.is_served());
}

#[test]
fn deaths_that_are_nobodys_fault_or_were_followed_by_an_answer_do_not_count() {
    let mut scene = Scene::new();
    let mut worker = scene.accept();
    for _ in 0..3 * MAX_DEATHS {
        scene.qemu.write_all(&message(GET_CONFIG)).unwrap();
        scene.hear(&mut worker, GET_CONFIG);
        scene.device.worker_gone(true);
        // One that does not run, and one that was asked to leave.
        for died in [true, false] {
            worker = scene.begin();
            if !died {
                scene.answer(&mut worker, &[GET_FEATURES]);
            }
            scene.device.worker_gone(died);
        }
        worker = scene.begin();
        let told = [GET_FEATURES, GET_FEATURES, GET_CONFIG];
        scene.answer(&mut worker, &told);
        let mut answer = [0; 12];
        scene.qemu.read_exact(&mut answer).unwrap();
    }
    assert!(scene.is_served());
}
