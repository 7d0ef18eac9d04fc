//! TCP channels with TLS: who is let in, and what the others are told.

mod support;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams,
    CertifiedIssuer, DnType, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SerialNumber, date_time_ymd,
};
use tokio::net::{TcpListener, TcpStream};

use support::log;
use support::side::{Side, channel_error, serves_and_survives};
use support::{echo_server, echo_through, free_port, new_address, pattern};

fn run(test: impl Future<Output = ()>) {
    log::collect();
    support::run(test);
}

/// A CA.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, name);
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn sign(&self, change: impl FnOnce(&mut CertificateParams)) -> (Certificate, KeyPair) {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap(), key)
    }

    fn revoking(&self, serial: u8) -> String {
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(3000, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from_slice(&[serial]),
                revocation_time: date_time_ymd(2020, 1, 1),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.0).unwrap().pem().unwrap()
    }
}

/// A directory as `--tls-creds` wants it, removed when dropped.
struct Creds(PathBuf);

impl Creds {
    /// One that trusts `ca`.
    fn trusting(ca: &Authority) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("virtproxy-tls-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let creds = Creds(dir);
        creds.write("ca-cert.pem", &ca.0.pem());
        creds
    }

    fn with(self, role: &str, (cert, key): (Certificate, KeyPair)) -> Self {
        self.write(&format!("{role}-cert.pem"), &cert.pem());
        self.write(&format!("{role}-key.pem"), &key.serialize_pem());
        self
    }

    /// One with good certificates of `ca` for both roles.
    fn good(ca: &Authority) -> Self {
        Self::trusting(ca)
            .with("server", ca.sign(|_| {}))
            .with("client", ca.sign(|_| {}))
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.0.join(name), text).unwrap();
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Creds {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn bulk_and_restarts_with_the_server_known_by_name_and_by_address() {
    let creds = Creds::good(&Authority::new("CA"));
    let flags = ["--tls-creds", creds.path()];
    run(async {
        for host in ["localhost", "127.0.0.1"] {
            let port = free_port();
            let (connect, listen) = (
                format!("tcp-connect:{host}:{port}"),
                format!("tcp-listen:{host}:{port}"),
            );
            serves_and_survives(&connect, &listen, &flags).await;
            serves_and_survives(&listen, &connect, &flags).await;
        }
    });
}

/// Who listens with `listener` and who connects with `connector` each tell why nothing comes of it; then who connects
/// with `good`, if anybody, is served.
async fn refused(listener: &Creds, connector: &Creds, messages: [&str; 2], good: Option<&Creds>) {
    log::clear();
    let port = free_port();
    let (target, address) = (echo_server().await, new_address());
    let serve = format!("echo:{target}");
    let flags = ["--tls-creds", listener.path(), "-i", &serve];
    let listening = Side::start(&format!("tcp-listen:127.0.0.1:{port}"), &flags).await;
    let connect = format!("tcp-connect:127.0.0.1:{port}");
    let refused = Side::start(&connect, &["--tls-creds", connector.path()]).await;
    for message in messages {
        log::wait_for(message).await;
    }
    refused.kill().await;
    if let Some(good) = good {
        let out = format!("echo:{address}");
        let _good = Side::start(&connect, &["--tls-creds", good.path(), "-o", &out]).await;
        echo_through(address, pattern(10_000, 1)).await;
    }
    listening.kill().await;
}

#[test]
fn a_certificate_of_another_ca_is_refused() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let good = Creds::good(&ours);
    let stranger = Creds::trusting(&ours).with("client", theirs.sign(|_| {}));
    let suspicious = Creds::trusting(&theirs).with("client", ours.sign(|_| {}));
    let unsigned = "certificate is not signed by a CA of ca-cert.pem";
    let unknown = "ca-cert.pem has not the CA that signed our certificate";
    run(async {
        refused(&good, &stranger, [unsigned, unknown], Some(&good)).await;
        refused(&good, &suspicious, [unknown, unsigned], Some(&good)).await;
    });
}

#[test]
fn a_ca_of_the_same_name_is_another_ca() {
    let (ours, theirs) = (Authority::new("CA"), Authority::new("CA"));
    let good = Creds::good(&ours);
    let stranger = Creds::trusting(&ours).with("client", theirs.sign(|_| {}));
    run(async {
        let unsigned = "certificate is not signed by a CA of ca-cert.pem";
        refused(&good, &stranger, [unsigned, "the other end"], Some(&good)).await;
    });
}

#[test]
fn a_certificate_out_of_its_time_is_refused() {
    let ca = Authority::new("CA");
    let expired = |params: &mut CertificateParams| {
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(2001, 1, 1);
    };
    let early = |params: &mut CertificateParams| params.not_before = date_time_ymd(3000, 1, 1);
    let good = Creds::good(&ca);
    let old_client = Creds::trusting(&ca).with("client", ca.sign(expired));
    let old_server = Creds::trusting(&ca).with("server", ca.sign(expired));
    let early_client = Creds::trusting(&ca).with("client", ca.sign(early));
    let (theirs, ours) = (
        "certificate has expired",
        "says that our certificate has expired",
    );
    let not_yet = "certificate is not valid yet";
    run(async {
        refused(&good, &old_client, [theirs, ours], Some(&good)).await;
        refused(&old_server, &good, [ours, theirs], None).await;
        refused(
            &good,
            &early_client,
            [not_yet, "the other end"],
            Some(&good),
        )
        .await;
    });
}

#[test]
fn a_server_of_another_name_is_refused() {
    let ca = Authority::new("CA");
    let good = Creds::good(&ca);
    let elsewhere = Creds::trusting(&ca).with(
        "server",
        ca.sign(|params| {
            *params = CertificateParams::new(["elsewhere.example".to_owned()]).unwrap();
        }),
    );
    run(async {
        let name = "certificate is for DnsName(\"elsewhere.example\"), not for 127.0.0.1";
        refused(&elsewhere, &good, [name, "the other end refuses us"], None).await;
    });
}

#[test]
fn a_revoked_certificate_is_refused() {
    let ca = Authority::new("CA");
    let serial = |n: u8| {
        move |params: &mut CertificateParams| {
            params.serial_number = Some(SerialNumber::from_slice(&[n]));
        }
    };
    let listener = Creds::trusting(&ca).with("server", ca.sign(serial(1)));
    let revoked = Creds::trusting(&ca).with("client", ca.sign(serial(2)));
    let good = Creds::trusting(&ca).with("client", ca.sign(serial(3)));
    for creds in [&listener, &good] {
        creds.write("ca-crl.pem", &ca.revoking(2));
    }
    run(async {
        let messages = ["is revoked by ca-crl.pem", "the other end refuses us"];
        refused(&listener, &revoked, messages, Some(&good)).await;
    });
}

#[test]
fn a_peer_without_tls_is_refused() {
    let good = Creds::good(&Authority::new("CA"));
    let flags = ["--tls-creds", good.path()];
    run(async {
        for kinds in [["listen", "connect"], ["connect", "listen"]] {
            log::clear();
            let address = new_address();
            let [with, without] = kinds.map(|kind| format!("tcp-{kind}:{address}"));
            let _with = Side::start(&with, &flags).await;
            let _without = Side::start(&without, &[]).await;
            log::wait_for("the other end does not speak TLS: give it --tls-creds too").await;
        }
    });
}

#[test]
fn a_peer_that_stalls_is_given_up_and_keeps_nobody_out() {
    let good = Creds::good(&Authority::new("CA"));
    let flags = ["--tls-creds", good.path()];
    let stalled = "has not finished the TLS handshake within 10s";
    run(async {
        let port = free_port();
        let (target, address) = (echo_server().await, new_address());
        let [serve, out] = [format!("echo:{target}"), format!("echo:{address}")];
        let stall = async || TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let listen = format!("tcp-listen:127.0.0.1:{port}");
        let _listening = Side::start(&listen, &[&flags[..], &["-i", &serve]].concat()).await;
        // Who connects is stalled too, by somebody who accepts and says nothing.
        let silent = TcpListener::bind(new_address()).await.unwrap();
        let silent_address = silent.local_addr().unwrap();
        let connecting = Side::start(&format!("tcp-connect:{silent_address}"), &flags).await;
        let _held = silent.accept().await.unwrap();
        log::wait_for("listening").await;
        let _stalled = (stall().await, stall().await, stall().await);
        while log::count(stalled) < 4 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        connecting.kill().await;

        let _stalled = (stall().await, stall().await, stall().await);
        let connect = format!("tcp-connect:127.0.0.1:{port}");
        let _good = Side::start(&connect, &[&flags[..], &["-o", &out]].concat()).await;
        echo_through(address, pattern(10_000, 1)).await;
        assert_eq!(
            log::count(stalled),
            4,
            "was let in only after those that stalled"
        );
    });
}

#[test]
fn credentials_that_can_never_work_are_said_with_their_cure() {
    let ca = Authority::new("CA");
    let good = Creds::good(&ca);
    let empty = Creds::trusting(&ca);
    let no_key = Creds::trusting(&ca).with("client", ca.sign(|_| {}));
    std::fs::remove_file(no_key.0.join("client-key.pem")).unwrap();
    let mixed = Creds::good(&ca);
    let (_, other_key) = ca.sign(|_| {});
    mixed.write("server-key.pem", &other_key.serialize_pem());
    let swapped = Creds::good(&ca);
    let key = std::fs::read_to_string(swapped.0.join("client-key.pem")).unwrap();
    swapped.write("client-cert.pem", &key);
    let garbled = Creds::good(&ca);
    garbled.write(
        "ca-cert.pem",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    );
    let nowhere = "/nonexistent";
    let (connect, listen) = ("tcp-connect:localhost:9", "tcp-listen:localhost:0");
    let table = [
        (
            connect,
            nowhere,
            "cannot read /nonexistent/ca-cert.pem: No such file",
        ),
        (
            listen,
            empty.path(),
            "server-cert.pem: No such file or directory (os error 2): put a certificate there",
        ),
        (connect, empty.path(), "client-cert.pem: No such file"),
        (connect, no_key.path(), "client-key.pem: No such file"),
        (
            listen,
            mixed.path(),
            "server-cert.pem was not made for the key beside it",
        ),
        (
            connect,
            swapped.path(),
            "client-cert.pem: there is none in it: put a certificate there",
        ),
        (connect, garbled.path(), "ca-cert.pem is of no use"),
    ];
    run(async {
        for (channel, dir, message) in table {
            let error = channel_error(channel, &["--tls-creds", dir])
                .await
                .to_string();
            assert!(error.contains(message), "{channel} {dir}: {error}");
        }
        make_readable(&good.0.join("client-key.pem"));
        let _side = Side::start(connect, &["--tls-creds", good.path()]).await;
        log::wait_for("client-key.pem can be read by every user of this machine").await;
    });
}

fn make_readable(key: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(key, std::fs::Permissions::from_mode(0o644)).unwrap();
}
