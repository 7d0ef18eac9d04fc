//! Two drivers, joined by a socket pair, between real local sockets.

use std::cell::{Cell, RefCell};
use std::fmt::Debug;
use std::future::Future;
use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::rc::Rc;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::LocalSet;
use tokio::time::timeout;
use tracing::field::{Field, Visit};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};
use virtproxy_engine::channel::{BoxFuture, Channel, Link};
use virtproxy_engine::driver::{Driver, Settings};
use virtproxy_engine::fd_link::FdLink;
use virtproxy_engine::spec::ForwardSpec;
use virtproxy_mux::Config;

const LIMIT: Duration = Duration::from_secs(20);

/// A channel whose links are handed in by the test.
struct Handed(mpsc::UnboundedReceiver<FdLink>);

impl Channel for Handed {
    fn open(&mut self) -> BoxFuture<'_, io::Result<Box<dyn Link>>> {
        Box::pin(async {
            match self.0.recv().await {
                Some(link) => Ok(Box::new(link) as Box<dyn Link>),
                None => std::future::pending().await,
            }
        })
    }

    fn name(&self) -> &str {
        "handed"
    }
}

fn settings() -> Settings {
    Settings {
        connect_timeout: Duration::from_secs(5),
        wait_for_peer: Duration::from_secs(5),
        grace: Duration::from_millis(200),
        session: Config::default(),
    }
}

/// One end under test.
struct End {
    links: mpsc::UnboundedSender<FdLink>,
    stop: watch::Sender<bool>,
    done: tokio::task::JoinHandle<io::Result<()>>,
}

async fn end(settings: Settings, out: &[String], serve: &[String]) -> End {
    let parse = |specs: &[String]| -> Vec<ForwardSpec> {
        specs.iter().map(|spec| spec.parse().unwrap()).collect()
    };
    let driver = Driver::new(settings, &parse(out), &parse(serve))
        .await
        .unwrap();
    let (links, receiver) = mpsc::unbounded_channel();
    let (stop, stopped) = watch::channel(false);
    let done = tokio::task::spawn_local(driver.run(Box::new(Handed(receiver)), stopped));
    End { links, stop, done }
}

impl End {
    fn link(&self, socket: StdUnixStream) {
        let link = FdLink::new(socket.into()).unwrap();
        self.links.send(link).unwrap();
    }

    /// Gives it a link over which frames are sealed; the other end of it.
    fn sealed_link(&self) -> UnixStream {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        let link = FdLink::new(ours.into()).unwrap().sealed();
        self.links.send(link).unwrap();
        tokio_socket(theirs)
    }
}

fn tokio_socket(socket: StdUnixStream) -> UnixStream {
    socket.set_nonblocking(true).unwrap();
    UnixStream::from_std(socket).unwrap()
}

fn join(a: &End, b: &End) {
    let (x, y) = StdUnixStream::pair().unwrap();
    a.link(x);
    b.link(y);
}

fn run(test: impl Future<Output = ()>) {
    collect_hops();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, async {
        timeout(LIMIT, test).await.expect("the test hangs");
    });
}

/// An address that nobody else uses: each test process has a loopback network of its own.
fn new_address() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let (process, n) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    format!("127.{}.{}.{n}:4000", 1 + process % 250, process / 250 % 250)
}

/// A TCP server that echoes each client until end of file, then closes; its address.
async fn echo_server() -> String {
    let address = new_address();
    let listener = TcpListener::bind(&address).await.unwrap();
    tokio::task::spawn_local(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::task::spawn_local(async move {
                let (mut read, mut write) = client.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    address
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|i| i.wrapping_mul(31).wrapping_add(seed).to_le_bytes()[1])
        .collect()
}

async fn connect(address: &str) -> TcpStream {
    TcpStream::connect(address).await.unwrap()
}

async fn echo_through(address: String, data: Vec<u8>) {
    let (mut read, mut write) = connect(&address).await.into_split();
    let sent = data.clone();
    let writer = tokio::task::spawn_local(async move {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    });
    let mut back = Vec::new();
    read.read_to_end(&mut back).await.unwrap();
    writer.await.unwrap();
    assert!(back == data, "{} of {} bytes", back.len(), data.len());
}

/// A client that is refused sees an error or the end at once, perhaps already when it connects.
async fn refused_at_once(address: &str) {
    if let Ok(client) = TcpStream::connect(address).await {
        ends_at_once(client).await;
    }
}

/// A client whose stream was cut off sees an error or the end at once.
async fn ends_at_once(mut client: TcpStream) {
    let mut buf = [0; 16];
    let result = timeout(Duration::from_secs(2), client.read(&mut buf))
        .await
        .expect("the client hangs");
    assert!(matches!(result, Ok(0) | Err(_)));
}

#[test]
fn many_streams_carry_bulk_both_ways() {
    run(async {
        let (target, address) = (echo_server().await, new_address());
        let near = end(settings(), &[format!("echo:{address}")], &[]).await;
        let far = end(settings(), &[], &[format!("echo:{target}")]).await;
        join(&near, &far);
        let transfers: Vec<_> = (0..50)
            .map(|i| {
                tokio::task::spawn_local(echo_through(address.clone(), pattern(300_000 + i, i)))
            })
            .collect();
        for transfer in transfers {
            transfer.await.unwrap();
        }
    });
}

#[test]
fn unix_sockets_and_the_reverse_direction_work() {
    run(async {
        let dir = std::env::temp_dir().join(format!("virtproxy-driver-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (front, back) = (dir.join("front.sock"), dir.join("back.sock"));
        let server = UnixListener::bind(&back).unwrap();
        tokio::task::spawn_local(async move {
            let (mut client, _) = server.accept().await.unwrap();
            let mut request = Vec::new();
            client.read_to_end(&mut request).await.unwrap();
            client.write_all(&request.repeat(2)).await.unwrap();
        });
        let near = end(settings(), &[], &[format!("twice:{}:-", back.display())]).await;
        let far = end(settings(), &[format!("twice:{}:-", front.display())], &[]).await;
        join(&near, &far);
        let mut client = UnixStream::connect(&front).await.unwrap();
        client.write_all(b"half-close").await.unwrap();
        client.shutdown().await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"half-closehalf-close");
        far.stop.send(true).unwrap();
        far.done.await.unwrap().unwrap();
        assert!(!front.exists(), "the socket's file goes with its listener");
        std::fs::remove_dir_all(&dir).unwrap();
    });
}

#[test]
fn names_and_ipv6_addresses_work() {
    run(async {
        let server = TcpListener::bind("localhost:0").await.unwrap();
        let target = server.local_addr().unwrap().port();
        let port = std::net::TcpListener::bind("[::1]:0")
            .and_then(|listener| listener.local_addr())
            .unwrap()
            .port();
        let near = end(settings(), &[format!("who:[::1]:{port}")], &[]).await;
        let far = end(settings(), &[], &[format!("who:localhost:{target}")]).await;
        join(&near, &far);
        let mut client = connect(&format!("[::1]:{port}")).await;
        let (mut served, _) = server.accept().await.unwrap();
        served.write_all(b"localhost").await.unwrap();
        let mut answer = [0; 9];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"localhost");
    });
}

thread_local! {
    /// The `hop` of each trace event of this thread; a test's drivers run on its own.
    static HOPS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

struct Hops;

impl<S: tracing::Subscriber> Layer<S> for Hops {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        event.record(&mut Hops);
    }
}

impl Visit for Hops {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "hop" {
            let hop = format!("{value:?}").replace('"', "");
            HOPS.with_borrow_mut(|hops| hops.push(hop));
        }
    }
}

/// Collects hops in all threads. Every test does this first: a subscriber that comes when events are already being
/// written in other threads may miss some.
fn collect_hops() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let subscriber = tracing_subscriber::registry().with(Hops);
        tracing::subscriber::set_global_default(subscriber).unwrap();
    });
}

#[test]
fn a_byte_takes_its_hops_in_order() {
    run(async {
        let (target, address) = (echo_server().await, new_address());
        let near = end(settings(), &[format!("echo:{address}")], &[]).await;
        let far = end(settings(), &[], &[format!("echo:{target}")]).await;
        join(&near, &far);
        echo_through(address, vec![7]).await;
    });
    let there_and_back = ["socket-to-channel", "channel-to-socket"].repeat(2);
    HOPS.with_borrow(|hops| assert_eq!(*hops, there_and_back));
}

#[test]
fn what_cannot_be_had_is_refused_at_once() {
    run(async {
        let (closed, unknown, refused) = (new_address(), new_address(), new_address());
        let out = [format!("nobody:{unknown}"), format!("closed:{refused}")];
        let near = end(settings(), &out, &[]).await;
        let far = end(settings(), &[], &[format!("closed:{closed}")]).await;
        join(&near, &far);
        refused_at_once(&unknown).await;
        refused_at_once(&refused).await;
    });
}

#[test]
fn a_client_waits_for_the_other_end_or_is_refused_by_flag() {
    run(async {
        let (target, waits, refuses) = (echo_server().await, new_address(), new_address());
        let near = end(settings(), &[format!("echo:{waits}")], &[]).await;
        let impatient = Settings {
            wait_for_peer: Duration::ZERO,
            ..settings()
        };
        let _alone = end(impatient, &[format!("echo:{refuses}")], &[]).await;
        refused_at_once(&refuses).await;
        let early = tokio::task::spawn_local(echo_through(waits.clone(), pattern(1000, 1)));
        tokio::time::sleep(Duration::from_millis(50)).await;
        let far = end(settings(), &[], &[format!("echo:{target}")]).await;
        join(&near, &far);
        early.await.unwrap();
    });
}

#[test]
fn a_stuck_client_stalls_nobody_else() {
    run(async {
        let (target, address) = (echo_server().await, new_address());
        let near = end(settings(), &[format!("echo:{address}")], &[]).await;
        let far = end(settings(), &[], &[format!("echo:{target}")]).await;
        join(&near, &far);
        let mut stuck = Vec::new();
        for _ in 0..20 {
            let client = connect(&address).await;
            let data = pattern(64 * 1024, 0);
            // Write until nothing is taken any more, and never read.
            while let Ok(Ok(_)) = timeout(Duration::from_millis(20), client.writable()).await {
                let _ = client.try_write(&data);
            }
            stuck.push(client);
        }
        echo_through(address.clone(), pattern(3_000_000, 7)).await;
    });
}

#[test]
fn streams_end_when_the_link_does_and_new_ones_work() {
    run(async {
        let (target, address) = (echo_server().await, new_address());
        let near = end(settings(), &[format!("echo:{address}")], &[]).await;
        let far = end(settings(), &[], &[format!("echo:{target}")]).await;
        let (x, y) = StdUnixStream::pair().unwrap();
        let cut = x.try_clone().unwrap();
        near.link(x);
        far.link(y);
        let mut old = connect(&address).await;
        old.write_all(b"old").await.unwrap();
        let mut buf = [0; 3];
        old.read_exact(&mut buf).await.unwrap();
        cut.shutdown(std::net::Shutdown::Both).unwrap();
        ends_at_once(old).await;
        join(&near, &far);
        echo_through(address.clone(), pattern(100_000, 2)).await;
    });
}

#[test]
fn a_client_that_comes_between_two_links_waits_for_the_second() {
    run(async {
        let (target, address) = (echo_server().await, new_address());
        let near = end(settings(), &[format!("echo:{address}")], &[]).await;
        let far = end(settings(), &[], &[format!("echo:{target}")]).await;
        let (x, y) = StdUnixStream::pair().unwrap();
        let cut = x.try_clone().unwrap();
        near.link(x);
        far.link(y);
        echo_through(address.clone(), pattern(1000, 1)).await;
        cut.shutdown(std::net::Shutdown::Both).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        let between = tokio::task::spawn_local(echo_through(address, pattern(1000, 2)));
        tokio::time::sleep(Duration::from_millis(50)).await;
        join(&near, &far);
        timeout(Duration::from_secs(3), between)
            .await
            .expect("the client is forgotten")
            .unwrap();
    });
}

#[test]
fn a_request_to_end_lets_streams_finish_and_tells_the_peer() {
    run(async {
        let (target, address) = (echo_server().await, new_address());
        let near = end(settings(), &[format!("echo:{address}")], &[]).await;
        let far = end(settings(), &[], &[format!("echo:{target}")]).await;
        join(&near, &far);
        let mut open = connect(&address).await;
        open.write_all(b"open").await.unwrap();
        let mut buf = [0; 4];
        open.read_exact(&mut buf).await.unwrap();
        far.stop.send(true).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        open.write_all(b"more").await.unwrap();
        open.read_exact(&mut buf).await.unwrap();
        assert_eq!(&buf, b"more");
        far.done.await.unwrap().unwrap();
        ends_at_once(open).await;
        near.stop.send(true).unwrap();
        near.done.await.unwrap().unwrap();
    });
}

/// What happens to a run of bytes in the channel.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Lose(usize),
    Double(usize),
    Insert(usize),
}

/// Passes bytes on; at the byte `at`, once, something happens to them.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    at: usize,
    fault: Fault,
) {
    let (mut buf, mut passed) = (vec![0; 8192], 0);
    while let Ok(n @ 1..) = from.read(&mut buf).await {
        let mut bytes = buf[..n].to_vec();
        if (passed..passed + n).contains(&at) {
            let here = at - passed;
            let run = |len: usize| here..(here + len).min(n);
            match fault {
                Fault::Lose(len) => drop(bytes.drain(run(len))),
                Fault::Double(len) => drop(bytes.splice(here..here, buf[run(len)].to_vec())),
                Fault::Insert(len) => drop(bytes.splice(here..here, pattern(len, at))),
            }
        }
        passed += n;
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

/// Reads to the end, or to the first byte that is not one of `data`, which is noted in `wrong`; whether all was in order.
async fn read_checked(mut from: impl AsyncRead + Unpin, data: &[u8], wrong: &Cell<bool>) -> bool {
    let (mut buf, mut seen) = (vec![0; 8192], 0);
    loop {
        match from.read(&mut buf).await {
            Ok(0) => return true,
            Ok(n) if data.get(seen..seen + n) == Some(&buf[..n]) => seen += n,
            Ok(_) => {
                wrong.set(true);
                return false;
            }
            Err(_) => return false,
        }
    }
}

/// Sends bulk both ways over a channel in which one fault befalls the bytes of one way. Returns whether either socket got a
/// wrong byte.
async fn bulk_through(fault: Fault, at: usize, outward: bool, sealed: bool) -> bool {
    const NEVER: usize = usize::MAX;
    let (target, address) = (new_address(), new_address());
    let (data, wrong) = (Rc::new(pattern(400_000, at)), Rc::new(Cell::new(false)));
    let server = TcpListener::bind(&target).await.unwrap();
    let (served, got_wrong) = (data.clone(), wrong.clone());
    let (report, mut reports) = mpsc::unbounded_channel();
    tokio::task::spawn_local(async move {
        for number in 0.. {
            let (client, _) = server.accept().await.unwrap();
            let (read, mut write) = client.into_split();
            let bytes = served.clone();
            tokio::task::spawn_local(async move {
                let _ = write.write_all(&bytes).await;
                let _ = write.shutdown().await;
                std::future::pending::<()>().await;
            });
            let (bytes, wrong, report) = (served.clone(), got_wrong.clone(), report.clone());
            tokio::task::spawn_local(async move {
                let sound = read_checked(read, &bytes, &wrong).await;
                let _ = report.send((number, sound));
            });
        }
    });
    let near = end(settings(), &[format!("bulk:{address}")], &[]).await;
    let far = end(settings(), &[], &[format!("bulk:{target}")]).await;
    let link = |end: &End| match sealed {
        true => end.sealed_link(),
        false => {
            let (ours, theirs) = StdUnixStream::pair().unwrap();
            end.link(ours);
            tokio_socket(theirs)
        }
    };
    let (from_near, to_near) = link(&near).into_split();
    let (from_far, to_far) = link(&far).into_split();
    let (out, back) = if outward { (at, NEVER) } else { (NEVER, at) };
    tokio::task::spawn_local(pass(from_near, to_far, out, fault));
    tokio::task::spawn_local(pass(from_far, to_near, back, fault));

    let mut transfer = async |number: u32| {
        let (read, mut write) = connect(&address).await.into_split();
        let sent = data.clone();
        tokio::task::spawn_local(async move {
            let _ = write.write_all(&sent).await;
            let _ = write.shutdown().await;
            std::future::pending::<()>().await;
        });
        let sound = read_checked(read, &data, &wrong).await;
        sound
            && loop {
                match reports.recv().await.unwrap() {
                    (served, sound) if served == number => break sound,
                    _ => {}
                }
            }
    };
    assert!(!transfer(0).await, "{fault:?} at {at}: it did no harm");
    if sealed {
        assert!(transfer(1).await, "{fault:?} at {at}: no new session");
    }
    wrong.get()
}

/// Faults at the start, the middle and the end of a transfer.
fn faults() -> impl Iterator<Item = (Fault, usize, bool)> {
    let kinds = [Fault::Lose, Fault::Double, Fault::Insert];
    let faults = kinds.into_iter().flat_map(|kind| [kind(1), kind(700)]);
    let places = [2_000, 151_234, 396_000].into_iter();
    let places = places.flat_map(|at| [(at, false), (at, true)]);
    faults.flat_map(move |fault| {
        places
            .clone()
            .map(move |(at, outward)| (fault, at, outward))
    })
}

#[test]
fn sealed_streams_get_no_wrong_byte_and_a_new_session_follows() {
    for (fault, at, outward) in faults() {
        run(async move {
            let wrong = bulk_through(fault, at, outward, true).await;
            assert!(!wrong, "{fault:?} at {at}: a socket got wrong bytes");
        });
    }
}

/// So the test above can fail: what is lost of the last frame is made up for by the frame behind it.
#[test]
fn the_same_faults_without_seals_do_harm() {
    for outward in [false, true] {
        let harm = Rc::new(Cell::new(false));
        for _ in 0..10 {
            let harm = harm.clone();
            run(async move {
                let wrong = bulk_through(Fault::Lose(700), 396_000, outward, false).await;
                harm.set(harm.get() || wrong);
            });
        }
        assert!(harm.get(), "no wrong bytes in ten attempts");
    }
}

/// Passes bytes on between `near` and `far` until `at` bytes have come from `far`, then between `near` and `next`. `near` is
/// not told.
async fn replace(mut near: UnixStream, mut far: UnixStream, mut next: UnixStream, at: usize) {
    let (mut out, mut back, mut passed) = ([0; 8192], [0; 8192], 0);
    while passed < at {
        tokio::select! {
            n = near.read(&mut out) => far.write_all(&out[..n.unwrap()]).await.unwrap(),
            n = far.read(&mut back) => {
                let n = n.unwrap().min(at - passed);
                near.write_all(&back[..n]).await.unwrap();
                passed += n;
            }
        }
    }
    drop(far);
    let _ = tokio::io::copy_bidirectional(&mut near, &mut next).await;
}

#[test]
fn a_newcomer_behind_a_cut_frame_is_soon_in_a_session() {
    run(async {
        let (target, address) = (echo_server().await, new_address());
        let near = end(settings(), &[format!("echo:{address}")], &[]).await;
        let serves = [format!("echo:{target}")];
        let dies = end(settings(), &[], &serves).await;
        let next = end(settings(), &[], &serves).await;
        let at = 123_457;
        let links = (near.sealed_link(), dies.sealed_link(), next.sealed_link());
        tokio::task::spawn_local(replace(links.0, links.1, links.2, at));

        let data = pattern(400_000, 3);
        let (mut read, mut write) = connect(&address).await.into_split();
        let sent = data.clone();
        tokio::task::spawn_local(async move {
            let _ = write.write_all(&sent).await;
            std::future::pending::<()>().await;
        });
        let (mut buf, mut seen) = (vec![0; 8192], 0);
        let mut last = Instant::now();
        while let Ok(n @ 1..) = read.read(&mut buf).await {
            assert_eq!(&data[seen..seen + n], &buf[..n]);
            seen += n;
            last = Instant::now();
        }
        assert!(seen < at);
        echo_through(address, pattern(1_000, 4)).await;
        println!("in a new session {:?} after the last byte", last.elapsed());
        // Far less than it takes until a silent peer is asked again.
        assert!(last.elapsed() < Duration::from_secs(10));
    });
}
