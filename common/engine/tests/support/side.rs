//! One end as a user would have it: named by its flags.

use std::io;
use std::time::Duration;

use clap::Parser;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use virtproxy_engine::channels;
use virtproxy_engine::driver::Driver;
use virtproxy_engine::program::Options;

use super::{
    echo_server, echo_through, half_close_through, new_address, pattern, settings, twice_server,
};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    options: Options,
}

/// An end with one channel.
pub(crate) struct Side {
    pub(crate) stop: watch::Sender<Option<Duration>>,
    pub(crate) done: JoinHandle<io::Result<()>>,
}

impl Side {
    /// Starts the end that has `channel` and the other `flags`.
    pub(crate) async fn start(channel: &str, flags: &[&str]) -> Self {
        Self::try_start(channel, flags).await.unwrap()
    }

    async fn try_start(channel: &str, flags: &[&str]) -> io::Result<Self> {
        let options = Cli::try_parse_from([&["test", "-c", channel], flags].concat())
            .unwrap_or_else(|error| panic!("{error}"))
            .options;
        let driver = Driver::new(settings(), &options.out, &options.serve).unwrap();
        let channel = channels::make(&options.channels[0], &options, "the hint")?;
        let (stop, stopped) = watch::channel(None);
        let done = tokio::task::spawn_local(driver.run(channel, stopped));
        Ok(Side { stop, done })
    }

    /// Ends it without a word, as a crash does.
    pub(crate) async fn kill(mut self) {
        self.done.abort();
        let _ = (&mut self.done).await;
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        self.done.abort();
    }
}

/// Why `channel` can never work.
pub(crate) async fn channel_error(channel: &str, flags: &[&str]) -> io::Error {
    match Side::try_start(channel, flags).await {
        Err(error) => error,
        Ok(mut side) => tokio::time::timeout(Duration::from_secs(10), &mut side.done)
            .await
            .expect("the channel goes on trying")
            .unwrap()
            .expect_err("the channel ended in order"),
    }
}

/// Bulk and half-close over `near` and `far`, both with `flags`, and again after either was restarted.
pub(crate) async fn serves_and_survives(near: &str, far: &str, flags: &[&str]) {
    let (echo, twice) = (echo_server().await, twice_server().await);
    let (a, b) = (new_address(), new_address());
    let [out, out_twice] = [format!("echo:{a}"), format!("twice:{b}")];
    let [serve, serve_twice] = [format!("echo:{echo}"), format!("twice:{twice}")];
    let near = async || Side::start(near, &[&["-o", &out, "-o", &out_twice], flags].concat()).await;
    let far =
        async || Side::start(far, &[&["-i", &serve, "-i", &serve_twice], flags].concat()).await;
    let all = async || {
        let bulk: Vec<_> = (0..8)
            .map(|i| tokio::task::spawn_local(echo_through(a.clone(), pattern(500_000 + i, i))))
            .collect();
        half_close_through(&b).await;
        for transfer in bulk {
            transfer.await.unwrap();
        }
    };
    let (one, other) = (near().await, far().await);
    all().await;
    other.kill().await;
    let other = far().await;
    all().await;
    one.kill().await;
    let one = near().await;
    all().await;
    one.kill().await;
    other.kill().await;
}
