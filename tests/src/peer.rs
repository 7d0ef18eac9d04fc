//! A service to test with, at either end, and its client.
//!
//! The client's first line says what the connection is for:
//!
//! | line | what the service does |
//! | --- | --- |
//! | `ECHO` | sends back all it gets, until end of file |
//! | `SOURCE n seed` | sends `n` bytes of [`Pattern`] and the 32 bytes of their SHA-256, then closes |
//! | `SINK` | reads to end of file, then answers with the 32 bytes of the SHA-256 of what it read |
//! | `DISCARD` | reads to end of file, then answers with the number of bytes as 8 bytes, little-endian |
//! | `ZEROS n` | sends `n` zero bytes, then closes |
//! | `FLOOD seed` | sends a pattern until the client goes away |
//! | `CHECK seed` | reads to end of file, and prints `WRONG ...` if that is not the beginning of the pattern |
//! | `LAST word` | closes its sending side, reads to end of file, and prints `LAST word n` with the number of bytes |
//!
//! After these the connection goes on with the next line:
//!
//! | line | what the service does |
//! | --- | --- |
//! | `TAKE n` | reads `n` bytes, then answers with one |
//! | `GIVE n` | sends `n` bytes |
//! | `SWAP n` | sends `n` bytes while it reads as many, then answers with one |
//! | `BOUNCE size` | sends back messages of `size` bytes, of which one that begins with a zero is the last |
//!
//! And `HOLD` answers with one byte, then keeps the connection until the client ends it, at no cost: ten thousand of
//! them are a test of what lies between, not of this.

use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{LazyLock, OnceLock};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use tokio::runtime::{Builder, Handle};

/// Bytes moved in one go.
const CHUNK: usize = 64 * 1024;

/// What has not moved for so long hangs.
const STUCK: Duration = Duration::from_secs(120);

/// A SHA-256.
pub type Hash = [u8; 32];

/// Bytes that differ for every seed: no stream's bytes can pass for another's.
pub struct Pattern(u64);

impl Pattern {
    /// The bytes of `seed`.
    pub fn new(seed: u64) -> Self {
        Pattern(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next bytes; a multiple of 8 of them at a time, until the last.
    pub fn fill(&mut self, buf: &mut [u8]) {
        for chunk in buf.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Bytes to send in one go, where it does not matter which: ones, since a page of zeros may be no page at all.
pub static BULK: LazyLock<Vec<u8>> = LazyLock::new(|| vec![1; 4 * CHUNK]);

/// Serves clients on `listener` until the process ends. Each has a thread, which then waits for the next one: to start
/// a thread costs a guest more than a short connection does.
pub fn serve(listener: &TcpListener) {
    let waiting = AtomicUsize::new(0);
    thread::scope(|scope| serve_in(scope, listener, &waiting));
}

fn serve_in<'s>(scope: &'s Scope<'s, '_>, listener: &'s TcpListener, waiting: &'s AtomicUsize) {
    loop {
        waiting.fetch_add(1, Ordering::Relaxed);
        let client = listener.accept();
        if waiting.fetch_sub(1, Ordering::Relaxed) == 1 {
            scope.spawn(|| serve_in(scope, listener, waiting));
        }
        // A client that goes away in the middle is its own business.
        let _ = client
            .map_err(Into::into)
            .and_then(|(client, _)| attend(client));
    }
}

fn attend(client: TcpStream) -> Result<()> {
    client.set_nodelay(true)?;
    let mut reader = BufReader::with_capacity(CHUNK, &client);
    let mut buf = Vec::new();
    loop {
        match converse(&mut reader, &client, &mut buf)? {
            Next::Line => {}
            Next::Hold => break hold(client),
            Next::End => break Ok(()),
        }
    }
}

/// Keeps `client` until it ends, without a thread of its own.
fn hold(client: TcpStream) -> Result<()> {
    static HOLDER: OnceLock<Handle> = OnceLock::new();
    let holder = HOLDER.get_or_init(|| {
        let runtime = Builder::new_current_thread().enable_io().build();
        let runtime = runtime.expect("a process can have an epoll");
        let handle = runtime.handle().clone();
        thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
        handle
    });
    client.set_nonblocking(true)?;
    holder.spawn(async move { tokio::net::TcpStream::from_std(client)?.readable().await });
    Ok(())
}

/// Reads `n` bytes and forgets them.
pub fn take(reader: &mut impl Read, n: u64, buf: &mut Vec<u8>) -> Result<()> {
    buf.resize(4 * CHUNK, 0);
    let mut left = n;
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        let n = reader.read(&mut buf[..most])?;
        ensure!(n > 0, "cut off");
        left -= n as u64;
    }
    Ok(())
}

/// Sends `n` bytes, whichever.
pub fn give(writer: &mut impl Write, n: u64) -> Result<()> {
    let mut left = n;
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(BULK.len());
        writer.write_all(&BULK[..most])?;
        left -= most as u64;
    }
    Ok(())
}

/// What is to be done when a request is.
enum Next {
    /// Read the next line.
    Line,
    /// Keep the connection as it is.
    Hold,
    /// End it.
    End,
}

/// Does what the client's next line says.
fn converse(
    reader: &mut BufReader<&TcpStream>,
    client: &TcpStream,
    buf: &mut Vec<u8>,
) -> Result<Next> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let words: Vec<_> = line.split_whitespace().collect();
    let mut writer = client;
    match words[..] {
        ["TAKE", n] => {
            take(reader, n.parse()?, buf)?;
            writer.write_all(b"!")?;
            return Ok(Next::Line);
        }
        ["GIVE", n] => {
            give(&mut writer, n.parse()?)?;
            return Ok(Next::Line);
        }
        ["SWAP", n] => {
            let n = n.parse()?;
            thread::scope(|scope| {
                let giver = scope.spawn(|| give(&mut &*client, n));
                take(reader, n, buf)?;
                giver.join().expect("the giver does not panic")
            })?;
            writer.write_all(b"!")?;
            return Ok(Next::Line);
        }
        ["HOLD"] => {
            writer.write_all(b"!")?;
            return Ok(Next::Hold);
        }
        ["BOUNCE", size] => {
            let mut message = vec![1; size.parse()?];
            while message.first().is_some_and(|first| *first != 0) {
                reader.read_exact(&mut message)?;
                writer.write_all(&message)?;
            }
            return Ok(Next::Line);
        }
        ["ECHO"] => {
            io::copy(reader, &mut writer)?;
        }
        ["SOURCE", n, seed] => {
            let hash = send_pattern(&mut writer, seed.parse()?, n.parse()?)?;
            writer.write_all(&hash)?;
        }
        ["SINK"] => {
            let (hash, _) = hash_all(reader)?;
            writer.write_all(&hash)?;
        }
        ["DISCARD"] => {
            let (mut buf, mut len) = (vec![0; 4 * CHUNK], 0);
            while let n @ 1.. = reader.read(&mut buf)? {
                len += n as u64;
            }
            writer.write_all(&len.to_le_bytes())?;
        }
        ["ZEROS", n] => {
            io::copy(
                &mut io::repeat(0).take(n.parse()?),
                &mut BufWriter::with_capacity(4 * CHUNK, writer),
            )?;
        }
        ["FLOOD", seed] => {
            send_pattern(&mut writer, seed.parse()?, u64::MAX)?;
        }
        ["CHECK", seed] => {
            let end = Arrival::new(seed.parse()?).read_all(reader, || false);
            if let Err(wrong) = end {
                println!("WRONG {wrong:#}");
            }
        }
        ["LAST", word] => {
            client.shutdown(Shutdown::Write)?;
            let (_, n) = hash_all(reader)?;
            println!("LAST {word} {n}");
        }
        [] => {}
        _ => anyhow::bail!("unknown request {line:?}"),
    }
    Ok(Next::End)
}

/// Writes `n` bytes of the pattern of `seed`; their hash.
pub fn send_pattern(writer: &mut impl Write, seed: u64, n: u64) -> Result<Hash> {
    let (mut pattern, mut hasher) = (Pattern::new(seed), Sha256::new());
    let mut buf = vec![0; CHUNK];
    let mut left = n;
    while left > 0 {
        let chunk = &mut buf[..usize::try_from(left).unwrap_or(CHUNK).min(CHUNK)];
        pattern.fill(chunk);
        hasher.update(&*chunk);
        writer.write_all(chunk)?;
        left -= chunk.len() as u64;
    }
    Ok(hasher.finalize().into())
}

/// Reads to the end; the hash of it all and its length.
pub fn hash_all(reader: &mut impl Read) -> Result<(Hash, u64)> {
    let (mut hasher, mut buf, mut len) = (Sha256::new(), vec![0; CHUNK], 0);
    loop {
        let n = reader.read(&mut buf)?;
        if n == 0 {
            return Ok((hasher.finalize().into(), len));
        }
        hasher.update(&buf[..n]);
        len += n as u64;
    }
}

/// What arrives of a pattern that may be cut off at any byte.
struct Arrival {
    seed: u64,
    pattern: Pattern,
    expected: Vec<u8>,
    /// How much of `expected` has come.
    at: usize,
    len: u64,
}

impl Arrival {
    fn new(seed: u64) -> Self {
        let expected = vec![0; CHUNK];
        Arrival {
            seed,
            pattern: Pattern::new(seed),
            at: expected.len(),
            expected,
            len: 0,
        }
    }

    /// Reads until the other side ends or breaks off, or `done`; how many bytes came. An error is a byte that was
    /// never sent.
    fn read_all(mut self, reader: &mut impl Read, done: impl Fn() -> bool) -> Result<u64> {
        let mut buf = vec![0; CHUNK];
        while !done() {
            if self.at == self.expected.len() {
                self.pattern.fill(&mut self.expected);
                self.at = 0;
            }
            let expected = &self.expected[self.at..];
            let n = match reader.read(&mut buf[..expected.len()]) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(_) => break,
            };
            let same = std::iter::zip(&buf[..n], expected).take_while(|(a, b)| a == b);
            let same = same.count();
            ensure!(
                same == n,
                "byte {} of stream {} was never sent",
                self.len + same as u64,
                self.seed
            );
            self.at += n;
            self.len += n as u64;
        }
        Ok(self.len)
    }
}

/// Reads an endless pattern until it breaks off, or `done`. An error is a byte that was never sent.
pub fn watch(address: &str, seed: u64, done: &AtomicBool) -> Result<u64> {
    let mut stream = request(address, &format!("FLOOD {seed}"))?;
    stream.set_read_timeout(Some(Duration::from_millis(100)))?;
    Arrival::new(seed).read_all(&mut stream, || done.load(Ordering::Relaxed))
}

/// Sends an endless pattern until it breaks off, or `done`; the service checks it.
pub fn feed(address: &str, seed: u64, done: &AtomicBool) -> Result<u64> {
    let mut stream = request(address, &format!("CHECK {seed}"))?;
    stream.set_write_timeout(Some(Duration::from_millis(100)))?;
    let (mut pattern, mut buf, mut at, mut len) = (Pattern::new(seed), vec![0; CHUNK], CHUNK, 0);
    while !done.load(Ordering::Relaxed) {
        if at == CHUNK {
            pattern.fill(&mut buf);
            at = 0;
        }
        match stream.write(&buf[at..]) {
            Ok(n) => {
                at += n;
                len += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
    }
    Ok(len)
}

/// Connects and says what for.
pub fn request(address: &str, line: &str) -> Result<TcpStream> {
    let mut stream =
        TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(STUCK))?;
    stream.set_write_timeout(Some(STUCK))?;
    writeln!(stream, "{line}")?;
    Ok(stream)
}

/// Connections a second, one after another, each with a call.
///
/// # Errors
/// One of them fails.
pub fn connects(address: &str, duration: Duration) -> Result<f64> {
    let (start, mut count) = (Instant::now(), 0);
    while start.elapsed() < duration {
        Caller::new(address)?.call(b"hello")?;
        count += 1;
    }
    Ok(f64::from(count) / start.elapsed().as_secs_f64())
}

/// Sends `n` bytes and closes the sending side: the service knows their number, and its answer still comes.
pub fn half_close(address: &str, n: usize) -> Result<()> {
    let mut stream = request(address, "DISCARD")?;
    stream.write_all(&vec![1; n])?;
    stream.shutdown(Shutdown::Write)?;
    let mut told = [0; 8];
    stream.read_exact(&mut told)?;
    ensure!(told == (n as u64).to_le_bytes(), "not {n} bytes came");
    Ok(())
}

/// The service closes its sending side first, and only then `n` bytes are sent to it; it prints `LAST word n`.
pub fn last_word(address: &str, word: &str, n: usize) -> Result<()> {
    let mut stream = request(address, &format!("LAST {word}"))?;
    ensure!(stream.read(&mut [0])? == 0, "a byte came that nobody sent");
    stream.write_all(&vec![1; n])?;
    Ok(())
}

/// Gets `n` bytes from the service and checks their SHA-256 against what the service says it sent.
pub fn download(address: &str, n: u64, seed: u64) -> Result<()> {
    let stream = request(address, &format!("SOURCE {n} {seed}"))?;
    let reader = &stream;
    let (hash, len) = hash_all(&mut reader.take(n))?;
    ensure!(len == n, "{len} of {n} bytes came");
    let mut told = [0; 32];
    (&stream).read_exact(&mut told)?;
    ensure!(hash == told, "the SHA-256 of {n} bytes differs");
    Ok(())
}

/// Sends `n` bytes to the service and checks the SHA-256 of what arrived there.
pub fn upload(address: &str, n: u64, seed: u64) -> Result<()> {
    let mut stream = request(address, "SINK")?;
    let hash = send_pattern(&mut stream, seed, n)?;
    stream.shutdown(Shutdown::Write)?;
    let mut told = [0; 32];
    stream.read_exact(&mut told)?;
    ensure!(hash == told, "the SHA-256 of {n} bytes differs");
    Ok(())
}

/// Sends `n` bytes and reads them back at the same time, over one connection; the hashes must be equal.
pub fn echo(address: &str, n: u64, seed: u64) -> Result<()> {
    let stream = request(address, "ECHO")?;
    let mut writer = stream.try_clone()?;
    let sender = std::thread::spawn(move || -> Result<Hash> {
        let hash = send_pattern(&mut writer, seed, n)?;
        writer.shutdown(Shutdown::Write)?;
        Ok(hash)
    });
    let (back, len) = hash_all(&mut &stream)?;
    let sent = sender.join().expect("the sender does not panic")?;
    ensure!(len == n, "{len} of {n} bytes came back");
    ensure!(sent == back, "the SHA-256 of {n} echoed bytes differs");
    Ok(())
}

/// An open connection that answers small requests.
pub struct Caller(TcpStream);

impl Caller {
    /// Connects.
    pub fn new(address: &str) -> Result<Self> {
        Ok(Caller(request(address, "ECHO")?))
    }

    /// Connects, and lets each answer take `limit` at most.
    pub fn within(address: &str, limit: Duration) -> Result<Self> {
        let caller = Self::new(address)?;
        caller.0.set_read_timeout(Some(limit))?;
        Ok(caller)
    }

    /// Sends `message` and waits for it to come back.
    pub fn call(&mut self, message: &[u8]) -> Result<()> {
        self.0.write_all(message)?;
        let mut back = vec![0; message.len()];
        self.0.read_exact(&mut back)?;
        ensure!(back == message, "another message came back");
        Ok(())
    }

    /// Waits until the connection ends, which it must within `limit`.
    pub fn wait_end(mut self, limit: Duration) -> Result<()> {
        self.0.set_read_timeout(Some(limit))?;
        match self.0.read(&mut [0; 1]) {
            Ok(0) => Ok(()),
            Ok(_) => anyhow::bail!("a byte came that nobody sent"),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
            Err(error) => Err(error).context("the connection did not end"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        thread::spawn(move || serve(&listener));
        address
    }

    fn answer(mut stream: &TcpStream) {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"!");
    }

    #[test]
    fn one_connection_takes_one_request_after_the_other() {
        let mut stream = &request(&start(), "TAKE 100000").unwrap();
        give(&mut stream, 100_000).unwrap();
        answer(stream);
        let mut buf = Vec::new();
        writeln!(stream, "GIVE 1000000").unwrap();
        take(&mut stream, 1_000_000, &mut buf).unwrap();
        writeln!(stream, "SWAP 3000000").unwrap();
        thread::scope(|scope| {
            scope.spawn(|| give(&mut &*stream, 3_000_000).unwrap());
            take(&mut &*stream, 3_000_000, &mut buf).unwrap();
        });
        answer(stream);
        writeln!(stream, "BOUNCE 8").unwrap();
        for message in [[1; 8], [2; 8], [0; 8]] {
            stream.write_all(&message).unwrap();
            let mut back = [9; 8];
            stream.read_exact(&mut back).unwrap();
            assert_eq!(message, back);
        }
        writeln!(stream, "TAKE 0").unwrap();
        answer(stream);
    }

    #[test]
    fn connections_that_are_held_stay_open_and_keep_nobody_waiting() {
        let address = start();
        let held: Vec<_> = (0..300)
            .map(|_| request(&address, "HOLD").unwrap())
            .collect();
        held.iter().for_each(answer);
        Caller::new(&address).unwrap().call(b"another").unwrap();
        for stream in &held {
            stream.set_nonblocking(true).unwrap();
            let error = { stream }.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        }
    }
}
