//! Two drivers in one process, which a test joins by socket pairs as often as it likes.

use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use virtproxy_engine::channel::{BoxFuture, Channel, Link};
use virtproxy_engine::counters::Counters;
use virtproxy_engine::driver::{Driver, Settings};
use virtproxy_engine::fd_link::FdLink;
use virtproxy_engine::spec::ForwardSpec;

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

/// One end under test.
pub(crate) struct End {
    pub(crate) links: mpsc::UnboundedSender<FdLink>,
    pub(crate) stop: watch::Sender<Option<Duration>>,
    pub(crate) done: tokio::task::JoinHandle<io::Result<()>>,
    pub(crate) counters: Rc<Counters>,
}

/// One end, with its forwards as a user writes them.
pub(crate) async fn end(settings: Settings, out: &[String], serve: &[String]) -> End {
    let parse = |specs: &[String]| -> Vec<ForwardSpec> {
        specs.iter().map(|spec| spec.parse().unwrap()).collect()
    };
    end_with(settings, &parse(out), &parse(serve)).await
}

/// One end.
pub(crate) async fn end_with(
    settings: Settings,
    out: &[ForwardSpec],
    serve: &[ForwardSpec],
) -> End {
    let driver = Driver::new(settings, out, serve).unwrap();
    let counters = driver.counters();
    let (links, receiver) = mpsc::unbounded_channel();
    let (stop, stopped) = watch::channel(None);
    let done = tokio::task::spawn_local(driver.run(Box::new(Handed(receiver)), stopped));
    End {
        links,
        stop,
        done,
        counters,
    }
}

impl End {
    /// Gives it a link over `socket`.
    pub(crate) fn link(&self, socket: StdUnixStream) {
        let link = FdLink::new(socket.into()).unwrap();
        self.links.send(link).unwrap();
    }

    /// Gives it a link over which frames are sealed; the other end of it.
    pub(crate) fn sealed_link(&self) -> UnixStream {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        let link = FdLink::new(ours.into()).unwrap().sealed();
        self.links.send(link).unwrap();
        tokio_socket(theirs)
    }
}

pub(crate) fn tokio_socket(socket: StdUnixStream) -> UnixStream {
    socket.set_nonblocking(true).unwrap();
    UnixStream::from_std(socket).unwrap()
}

/// A new link between two ends; shutting down what is returned cuts it.
pub(crate) fn join(a: &End, b: &End) -> StdUnixStream {
    let (x, y) = StdUnixStream::pair().unwrap();
    let cut = x.try_clone().unwrap();
    a.link(x);
    b.link(y);
    cut
}
