//! What the user is told when QEMU was started with the wrong options. Alone in its program: it reads the log.

mod frontend;

use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use frontend::socket_path;
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtproxy_host::device::{Device, PortSpec};
use vmm_sys_util::eventfd::EventFd;

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn wait_for(&self, text: &str) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let log = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
            if log.contains(text) {
                return;
            }
            assert!(Instant::now() < end, "no {text:?} in the log:\n{log}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// QEMU makes its device with so many queues.
fn realize(path: &Path, queues: usize) -> Frontend {
    let mut frontend = Frontend::connect(path, 64).unwrap();
    frontend.get_features().unwrap();
    let offered = frontend.get_protocol_features().unwrap();
    frontend
        .set_protocol_features(offered & VhostUserProtocolFeatures::MQ)
        .unwrap();
    frontend.set_owner().unwrap();
    for queue in 0..queues {
        let call = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let _ = frontend.set_vring_call(queue, &call);
    }
    frontend
}

#[test]
fn a_wrong_number_of_queues_is_said_with_the_cure() {
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .init();
    let path = socket_path();
    let _device = Device::start(&path, vec![PortSpec::generic("x")], 1).unwrap();
    drop(realize(&path, 4));
    log.wait_for("QEMU is gone: it closed the connection");
    drop(realize(&path, 5));
    log.wait_for("too many queues: say num_vqs=4");
    let _two = realize(&path, 2);
    log.wait_for("too few queues, its guest will not find the port: say num_vqs=4");
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert_eq!(text.matches("num_vqs").count(), 2, "{text}");
}
