//! New connections: made, used for one small request and its answer, and closed by the client.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::subject::{NOTHING, Subject, connect};

/// How long each client goes on.
const LENGTH: Duration = Duration::from_millis(600);

/// How many connections a second `clients` clients get, each making one after the other.
pub(super) fn rate(way: &mut Subject, clients: usize) -> Result<Vec<f64>> {
    let address = way.running().address();
    let start = Instant::now();
    let client = || {
        let mut count = 0;
        while start.elapsed() < LENGTH {
            connect(address, NOTHING)?;
            count += 1;
        }
        Ok(count)
    };
    let count: Result<u32> = thread::scope(|scope| {
        let clients: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
        clients
            .into_iter()
            .map(|one| one.join().expect("a client does not panic"))
            .sum()
    });
    Ok(vec![f64::from(count?) / start.elapsed().as_secs_f64()])
}
