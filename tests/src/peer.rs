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
//! | `GIVE n` | sends `n` zero bytes |
//! | `BOUNCE n size` | sends back `n` messages of `size` bytes |

use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

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

/// Serves clients on `listener`, each in a thread, until the process ends.
pub fn serve(listener: &TcpListener) {
    for client in listener.incoming().flatten() {
        std::thread::spawn(move || {
            // A client that goes away in the middle is its own business.
            let _ = attend(&client);
        });
    }
}

fn attend(client: &TcpStream) -> Result<()> {
    client.set_nodelay(true)?;
    let mut reader = BufReader::with_capacity(CHUNK, client);
    while converse(&mut reader, client)? {}
    Ok(())
}

/// Does what the client's next line says; whether there may be another.
fn converse(reader: &mut BufReader<&TcpStream>, client: &TcpStream) -> Result<bool> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let words: Vec<_> = line.split_whitespace().collect();
    let mut writer = client;
    match words[..] {
        ["TAKE", n] => {
            let (mut buf, mut left) = (vec![0; 4 * CHUNK], n.parse()?);
            while left > 0 {
                let most = buf.len().min(left);
                let n = reader.read(&mut buf[..most])?;
                ensure!(n > 0, "cut off");
                left -= n;
            }
            writer.write_all(b"!")?;
            return Ok(true);
        }
        ["GIVE", n] => {
            let (buf, mut left) = (vec![0; 4 * CHUNK], n.parse()?);
            while left > 0 {
                let most = buf.len().min(left);
                writer.write_all(&buf[..most])?;
                left -= most;
            }
            return Ok(true);
        }
        ["BOUNCE", n, size] => {
            let mut message = vec![0; size.parse()?];
            for _ in 0..n.parse::<u64>()? {
                reader.read_exact(&mut message)?;
                writer.write_all(&message)?;
            }
            return Ok(true);
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
    Ok(false)
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
