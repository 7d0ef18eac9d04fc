//! Mutual TLS 1.3 for the channels over TCP: the credentials, and the handshake.
//!
//! # Theory of operation
//!
//! The directory of `--tls-creds` has what QEMU's own `tls-creds-x509` has, by the same names:
//!
//! | file | what | needed |
//! | --- | --- | --- |
//! | `ca-cert.pem` | whose signature the other end must have; several are allowed | always |
//! | `ca-crl.pem` | what of it was revoked | if it is there |
//! | `server-cert.pem`, `server-key.pem` | who listens | to listen |
//! | `client-cert.pem`, `client-key.pem` | who connects | to connect |
//!
//! They are read once, when the program starts. Either end takes the other one if its certificate is signed by the CA,
//! valid and not revoked, and the connecting end also if it is for the HOST it was told to connect to. Nothing is
//! resumed: each connection is judged anew.
//!
//! **A handshake takes bounded time**, [`HANDSHAKE`], and a bounded number, [`MAX_HANDSHAKES`], go on at once, so
//! that a peer that stalls keeps nobody else out. The first that succeeds becomes the link.
//!
//! **Both ends learn of a refusal.** In TLS 1.3 who connects is done before who listens has looked at its certificate.
//! So before it calls the link open, the connecting end waits a moment, [`VERDICT`], for the first bytes of the session,
//! which the other end sends of its own accord; if it is refused, an alert comes in their place. Nothing comes when the
//! other end is QEMU, and its guest is not up yet: then the link is open all the same.

use std::fs;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Connection, Error,
    RootCertStore, ServerConfig, ServerConnection,
};
use socket2::Socket;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::warn;

use super::retrying::{Attempt, Obstacle};
use super::sockets::Acceptor;
use super::tcp_link::TcpLink;
use super::tls_link::TlsLink;
use crate::channel::Link;
use crate::log_limit::LogLimit;
use crate::spec::Host;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long the other end may take to refuse who is done with the handshake.
const VERDICT: Duration = Duration::from_secs(2);
/// Handshakes that go on at once; more clients wait in the kernel's queue.
const MAX_HANDSHAKES: usize = 16;

/// What connects.
pub(super) struct Connector {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Connector {
    /// With the credentials in `dir`, to `host`.
    pub(super) fn new(dir: &Path, host: &Host) -> io::Result<Self> {
        let name = match host {
            Host::Ip(ip) => ServerName::IpAddress((*ip).into()),
            Host::Name(name) => ServerName::try_from(name.clone()).map_err(|_| {
                io::Error::other(format!(
                    "{name} is no name that a certificate can be for: connect to another, or to an address"
                ))
            })?,
        };
        let creds = Credentials::read(dir, "client")?;
        let verifier = WebPkiServerVerifier::builder_with_provider(creds.roots, provider())
            .with_crls(creds.crls)
            .build()
            .map_err(|error| unusable(&creds.ca, error))?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(io::Error::other)?
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(creds.chain, creds.key)
            .map_err(|error| mismatch(&creds.cert, error))?;
        config.resumption = Resumption::disabled();
        Ok(Connector {
            config: Arc::new(config),
            name,
        })
    }

    /// The link over `socket`, once the other end has taken us and we the other end.
    pub(super) async fn link(&self, socket: Socket) -> Attempt {
        let tls = ClientConnection::new(self.config.clone(), self.name.clone())
            .map_err(|error| Obstacle::Passing(error.to_string()))?;
        match self.shake_hands(socket, tls.into()).await {
            Ok(done) => done.link(),
            Err(refusal) => Err(Obstacle::Passing(refusal)),
        }
    }

    async fn shake_hands(&self, socket: Socket, tls: Connection) -> Result<Handshake, String> {
        let mut handshake = Handshake::over(socket, tls)?;
        handshake.finish().await?;
        let spoken = handshake.until(|_, plaintext| plaintext > 0);
        timeout(VERDICT, spoken).await.unwrap_or(Ok(()))?;
        Ok(handshake)
    }
}

/// What listens.
pub(super) struct Listener {
    config: Arc<ServerConfig>,
    handshakes: JoinSet<(Option<SocketAddr>, Result<Handshake, String>)>,
    refusals: LogLimit,
}

impl Listener {
    /// With the credentials in `dir`.
    pub(super) fn new(dir: &Path) -> io::Result<Self> {
        let creds = Credentials::read(dir, "server")?;
        let verifier = WebPkiClientVerifier::builder_with_provider(creds.roots, provider())
            .with_crls(creds.crls)
            .build()
            .map_err(|error| unusable(&creds.ca, error))?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(io::Error::other)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(creds.chain, creds.key)
            .map_err(|error| mismatch(&creds.cert, error))?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Listener {
            config: Arc::new(config),
            handshakes: JoinSet::new(),
            refusals: LogLimit::default(),
        })
    }

    /// The link to the first client that shows what it must.
    pub(super) async fn link(&mut self, acceptor: &Acceptor) -> Attempt {
        loop {
            tokio::select! {
                client = acceptor.accept(), if self.handshakes.len() < MAX_HANDSHAKES => {
                    let (socket, from) = client?;
                    let tls = ServerConnection::new(self.config.clone())
                        .map_err(|error| Obstacle::Passing(error.to_string()))?;
                    self.handshakes.spawn(async move {
                        let shake_hands = async {
                            let mut handshake = Handshake::over(socket, tls.into())?;
                            handshake.finish().await.map(|()| handshake)
                        };
                        (from.as_socket(), shake_hands.await)
                    });
                }
                Some(ended) = self.handshakes.join_next() => match ended {
                    Ok((_, Ok(done))) => {
                        self.handshakes.abort_all();
                        return done.link();
                    }
                    Ok((from, Err(refusal))) => self.refused(from, &refusal),
                    // Aborted, when another was taken.
                    Err(_) => {}
                }
            }
        }
    }

    fn refused(&mut self, from: Option<SocketAddr>, refusal: &str) {
        if let Some(more) = self.refusals.pass(Instant::now()) {
            let from = from.map_or_else(|| "a client".to_owned(), |from| from.to_string());
            warn!("{from} is not let in: {refusal}{more}");
        }
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// A connection that becomes a link.
struct Handshake {
    stream: TcpStream,
    tls: Connection,
}

impl Handshake {
    fn over(socket: Socket, tls: Connection) -> Result<Self, String> {
        let stream = TcpStream::from_std(socket.into()).map_err(broken)?;
        Ok(Handshake { stream, tls })
    }

    /// Does the handshake, in bounded time.
    async fn finish(&mut self) -> Result<(), String> {
        let finished = timeout(HANDSHAKE, self.until(|handshaking, _| !handshaking)).await;
        finished.unwrap_or_else(|_| {
            Err(format!(
                "the other end has not finished the TLS handshake within {HANDSHAKE:?}: it does not speak TLS, or \
                 serves another"
            ))
        })
    }

    /// Goes on until `done` is content with whether the handshake still goes on and how much plaintext has come.
    async fn until(&mut self, done: impl Fn(bool, usize) -> bool) -> Result<(), String> {
        let Handshake { stream, tls } = self;
        let mut io = Unblocked(stream);
        loop {
            let state = match tls.process_new_packets() {
                Ok(state) => state,
                Err(error) => {
                    // Tells the other end why; a socket with no room for that is not worth waiting for.
                    while tls.wants_write() && tls.write_tls(&mut io).is_ok() {}
                    return Err(explain(&error));
                }
            };
            if done(tls.is_handshaking(), state.plaintext_bytes_to_read()) {
                return Ok(());
            }
            while tls.wants_write() {
                match tls.write_tls(&mut io) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        stream.writable().await.map_err(broken)?;
                    }
                    result => drop(result.map_err(broken)?),
                }
            }
            stream.readable().await.map_err(broken)?;
            match tls.read_tls(&mut io) {
                Ok(0) => return Err(broken(io::ErrorKind::UnexpectedEof.into())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => drop(result.map_err(broken)?),
            }
        }
    }

    fn link(self) -> Attempt {
        let open = || {
            let socket = self.stream.into_std()?;
            let inner = TcpLink::new(OwnedFd::from(socket).into())?;
            Ok(TlsLink::new(inner, self.tls))
        };
        match open() {
            Ok(link) => Ok(Box::new(link) as Box<dyn Link>),
            Err(error) => Err(Obstacle::Passing(broken(error))),
        }
    }
}

fn broken(error: io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe => {
            "the other end hung up during the TLS handshake: its log may say why".into()
        }
        _ => format!("the TLS handshake broke off: {error}"),
    }
}

/// tokio's stream with calls that never wait.
struct Unblocked<'s>(&'s TcpStream);

impl Read for Unblocked<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(buf)
    }
}

impl Write for Unblocked<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.try_write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What went wrong, whose fault it is, and what cures it.
pub(super) fn explain(error: &Error) -> String {
    use AlertDescription as Alert;
    use CertificateError as Cert;
    let clock = "or the clock is wrong";
    match error {
        Error::InvalidMessage(_) => {
            "the other end does not speak TLS: give it --tls-creds too".into()
        }
        Error::NoCertificatesPresented => "the other end shows no certificate".into(),
        Error::InvalidCertificate(error) => match error {
            Cert::UnknownIssuer | Cert::BadSignature => {
                "the other end's certificate is not signed by a CA of ca-cert.pem".into()
            }
            Cert::Expired | Cert::ExpiredContext { .. } => {
                format!("the other end's certificate has expired, {clock} here")
            }
            Cert::NotValidYet | Cert::NotValidYetContext { .. } => {
                format!("the other end's certificate is not valid yet, {clock} here")
            }
            Cert::Revoked => "the other end's certificate is revoked by ca-crl.pem".into(),
            Cert::NotValidForNameContext {
                expected,
                presented,
            } => format!(
                "the other end's certificate is for {}, not for {}: connect to a name or address that it has, or make \
                 one whose subjectAltName has this",
                presented.join(", "),
                expected.to_str()
            ),
            error => format!("the other end's certificate is not good: {error}"),
        },
        Error::AlertReceived(alert) => match alert {
            Alert::UnknownCA => {
                "the other end's ca-cert.pem has not the CA that signed our certificate".into()
            }
            Alert::CertificateExpired => {
                format!("the other end says that our certificate has expired, {clock} there")
            }
            Alert::ProtocolVersion => "the other end speaks no TLS 1.3".into(),
            alert => format!("the other end refuses us: {alert:?}"),
        },
        Error::PeerIncompatible(_) => format!("the other end speaks another TLS: {error}"),
        _ => format!("the other end breaks the rules of TLS: {error}"),
    }
}

/// What a directory has for one of the two roles.
struct Credentials {
    ca: PathBuf,
    roots: Arc<RootCertStore>,
    crls: Vec<CertificateRevocationListDer<'static>>,
    cert: PathBuf,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Credentials {
    fn read(dir: &Path, role: &str) -> io::Result<Self> {
        let ca = dir.join("ca-cert.pem");
        let crl = dir.join("ca-crl.pem");
        let cert = dir.join(format!("{role}-cert.pem"));
        let key = dir.join(format!("{role}-key.pem"));
        let mut roots = RootCertStore::empty();
        for root in read_all::<CertificateDer<'_>>(&ca, "a CA's certificate")? {
            roots.add(root).map_err(|error| unusable(&ca, error))?;
        }
        Ok(Credentials {
            roots: Arc::new(roots),
            crls: match crl.exists() {
                true => read_all(&crl, "a revocation list")?,
                false => Vec::new(),
            },
            chain: read_all(&cert, "a certificate")?,
            key: read_all(&key, "a private key without a passphrase")
                .inspect(|_| warn_of_readers(&key))?
                .remove(0),
            ca,
            cert,
        })
    }
}

/// All sections of a kind in a PEM file; there is at least one.
fn read_all<T: PemObject>(path: &Path, what: &str) -> io::Result<Vec<T>> {
    let read = T::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<T>, _>>);
    let error = match read {
        Ok(found) if !found.is_empty() => return Ok(found),
        Ok(_) | Err(pem::Error::NoItemsFound) => "there is none in it".to_owned(),
        Err(pem::Error::Io(error)) => error.to_string(),
        Err(error) => error.to_string(),
    };
    Err(io::Error::other(format!(
        "--tls-creds: cannot read {}: {error}: put {what} there, in PEM",
        path.display()
    )))
}

fn unusable(path: &Path, error: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!(
        "--tls-creds: {} is of no use: {error}",
        path.display()
    ))
}

fn mismatch(cert: &Path, error: Error) -> io::Error {
    match error {
        Error::InconsistentKeys(_) => io::Error::other(format!(
            "--tls-creds: {} was not made for the key beside it: put a certificate and its own key there",
            cert.display()
        )),
        error => unusable(cert, error),
    }
}

fn warn_of_readers(key: &Path) {
    let mode = fs::metadata(key).map_or(0, |meta| meta.permissions().mode());
    if mode & 0o007 != 0 {
        warn!(
            "{} can be read by every user of this machine: chmod o= it",
            key.display()
        );
    }
}
