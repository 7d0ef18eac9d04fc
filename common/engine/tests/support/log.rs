//! What is logged in the test's own thread, in which all of its drivers run.

use std::cell::RefCell;
use std::fmt::Debug;
use std::sync::Once;

use tracing::field::{Field, Visit};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};

thread_local! {
    static LINES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

struct Lines;

impl<S: tracing::Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if *event.metadata().level() <= tracing::Level::INFO {
            event.record(&mut Lines);
        }
    }
}

impl Visit for Lines {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            LINES.with_borrow_mut(|lines| lines.push(format!("{value:?}")));
        }
    }
}

/// Starts to collect. Every test of a program that does so does it first: a subscriber that comes when events are
/// already being written in other threads may miss some.
pub(crate) fn collect() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let subscriber = tracing_subscriber::registry().with(Lines);
        tracing::subscriber::set_global_default(subscriber).unwrap();
    });
}

/// How many lines so far have `text` in them.
pub(crate) fn count(text: &str) -> usize {
    LINES.with_borrow(|lines| lines.iter().filter(|line| line.contains(text)).count())
}

/// Waits until a line has `text` in it; how long a test may take is limited as a whole.
pub(crate) async fn wait_for(text: &str) {
    while count(text) == 0 {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

/// Forgets all lines so far.
pub(crate) fn clear() {
    LINES.with_borrow_mut(Vec::clear);
}
