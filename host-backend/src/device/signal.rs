//! A wake-up from the device's threads to the one task that waits for it. It is never lost: a signal that
//! comes whilst nobody waits makes the next wait return at once.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// Set by any thread, waited for by one task.
#[derive(Default)]
pub(super) struct Signal(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    set: bool,
    waker: Option<Waker>,
}

impl Signal {
    /// Sets the signal and wakes whoever waits for it.
    pub(super) fn set(&self) {
        let waker = {
            let mut inner = self.lock();
            inner.set = true;
            inner.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Ready if the signal was set since the last time this was ready.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut inner = self.lock();
        if std::mem::take(&mut inner.set) {
            inner.waker = None;
            return Poll::Ready(());
        }
        match &mut inner.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
