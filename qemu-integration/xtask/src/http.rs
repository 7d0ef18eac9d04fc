//! As much HTTP as the demonstration needs: one GET, and a server of one page.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// Fetches `/` and gives the body of a 200 answer.
pub(crate) fn get(address: SocketAddr, limit: Duration) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, limit)
        .with_context(|| format!("cannot connect to {address}"))?;
    stream
        .set_read_timeout(Some(limit))
        .context("cannot set a time limit")?;
    write!(stream, "GET / HTTP/1.0\r\nHost: {address}\r\n\r\n")
        .context("cannot send the request")?;
    let mut answer = Vec::new();
    stream
        .read_to_end(&mut answer)
        .context("the answer broke off")?;
    let answer = String::from_utf8_lossy(&answer);
    let Some((head, body)) = answer.split_once("\r\n\r\n") else {
        bail!(
            "no answer: the connection was closed after {} bytes",
            answer.len()
        );
    };
    let status = head.lines().next().unwrap_or("");
    if status.split(' ').nth(1) != Some("200") {
        bail!("the answer was {status}");
    }
    Ok(body.to_owned())
}

/// Serves `page` on loopback from a thread that lives as long as the process.
pub(crate) fn serve(listener: TcpListener, page: &'static str) {
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that went away needs no page.
            let _ = answer(&stream, page);
        }
    });
}

fn answer(mut stream: &TcpStream, page: &str) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    for line in BufReader::new(stream).lines() {
        if line?.is_empty() {
            break;
        }
    }
    write!(
        stream,
        "HTTP/1.0 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{page}",
        page.len()
    )
}

/// A listener on the first free loopback port from `first` on.
pub(crate) fn listen(first: u16) -> Result<TcpListener> {
    for port in first..first.saturating_add(100) {
        if let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            return Ok(listener);
        }
    }
    bail!(
        "no port from {first} to {} is free on 127.0.0.1",
        first.saturating_add(99)
    )
}

/// The first free loopback port from `first` on; somebody else may take it before it is used.
pub(crate) fn free_port(first: u16) -> Result<u16> {
    Ok(listen(first)?
        .local_addr()
        .context("the listener has no address")?
        .port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_served_can_be_fetched() -> Result<()> {
        let listener = listen(39_142)?;
        let address = listener.local_addr()?;
        assert_ne!(free_port(address.port())?, address.port());
        serve(listener, "the page");
        assert_eq!(get(address, Duration::from_secs(5))?, "the page");
        Ok(())
    }
}
