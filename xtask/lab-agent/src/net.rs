//! Traffic between dom0 and a guest, every byte of which is verified.

pub mod counters;
pub mod datagrams;
pub mod http;

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::pattern::{self, Sum};

/// Port on which every domain echoes datagrams.
pub const ECHO: u16 = 7;
/// Timeout of an echo; then the datagram is sent again.
const PATIENCE: Duration = Duration::from_secs(2);
const TRIES: u32 = 4;
const PIECE: usize = 64 << 10;

/// Starts echoing datagrams.
///
/// # Errors
/// The address is in use.
pub fn serve_echo() -> Result<()> {
    let socket = UdpSocket::bind(("0.0.0.0", ECHO)).context("the echo port")?;
    std::mem::forget(Echoes::serve(socket)?);
    Ok(())
}

/// Echoes datagrams on one socket, until dropped.
pub struct Echoes {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echoes {
    /// Starts echoing.
    ///
    /// # Errors
    /// It is not a datagram socket.
    pub fn serve(socket: UdpSocket) -> Result<Self> {
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
        let stop: Arc<AtomicBool> = Arc::default();
        let told = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut bytes = vec![0; 65_536];
            while !told.load(Ordering::Relaxed) {
                // A removed interface causes one error.
                if let Ok((n, from)) = socket.recv_from(&mut bytes) {
                    let _ = socket.send_to(&bytes[..n], from);
                }
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Starts echoing at an address such as `fd00::1`, in addition to [`serve_echo`].
    ///
    /// # Errors
    /// The address is not assigned to this domain, or in use.
    pub fn at(address: &str) -> Result<Self> {
        let socket = UdpSocket::bind((address, ECHO));
        Self::serve(socket.with_context(|| format!("the echo port of {address}"))?)
    }
}

impl Drop for Echoes {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Returns a socket for [`echo`] to a server such as `10.0.0.1`.
///
/// # Errors
/// There is no route.
pub fn client(server: &str) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(anywhere(server))?;
    socket.connect((server, ECHO)).with_context(|| server.to_owned())?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Returns the address to bind a socket to that sends to `server`.
pub fn anywhere(server: &str) -> &'static str {
    if server.contains(':') { "[::]:0" } else { "0.0.0.0:0" }
}

/// Sends a datagram of `size` bytes, at least 8, and compares the echo. Datagrams may be lost, but
/// must not be changed.
///
/// # Errors
/// The echo differs, or there is none in several attempts.
pub fn echo(socket: &UdpSocket, size: usize, seed: u64) -> Result<()> {
    let mut sent = vec![0; size];
    pattern::fill(&mut sent, seed, 0);
    let mut bytes = vec![0; 65_536];
    for _ in 0..TRIES {
        match socket.send(&sent) {
            Ok(n) => ensure!(n == size, "{n} of {size} bytes were sent"),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error).context("send a datagram"),
        }
        match socket.recv(&mut bytes) {
            Ok(n) if bytes[..n] == sent => return Ok(()),
            // A late echo of an earlier attempt.
            Ok(n) if n != size && pattern::mismatch(&bytes[..n], seed, 0).is_some() => {}
            Ok(n) => bail!("a datagram of {size} bytes came back as another of {n}"),
            Err(_) => {}
        }
    }
    bail!("no answer to a datagram of {size} bytes in {TRIES} tries")
}

/// Sends `bytes` generated from `seed` over a new connection; returns their checksum.
///
/// # Errors
/// The connection's error.
pub fn send(to: (&str, u16), bytes: u64, seed: u64) -> Result<String> {
    let stream = TcpStream::connect(to).with_context(|| format!("connect to {to:?}"))?;
    stream.set_write_timeout(Some(Duration::from_secs(30)))?;
    pour(stream, bytes, seed)
}

/// Accepts one connection and receives everything; returns the number of bytes and their checksum.
///
/// # Errors
/// The connection's error, or data that was not generated from `seed`.
pub fn receive(listener: &TcpListener, seed: u64) -> Result<(u64, String)> {
    let (stream, _) = listener.accept()?;
    drain(stream, seed)
}

/// Sends `bytes` generated from `seed`, and shuts the connection down; returns their checksum.
///
/// # Errors
/// The connection's error.
pub fn pour(mut stream: TcpStream, bytes: u64, seed: u64) -> Result<String> {
    let mut piece = vec![0; PIECE];
    let mut sum = Sum::NEW;
    let mut sent = 0;
    while sent < bytes {
        let n = usize::try_from(bytes - sent)?.min(PIECE);
        pattern::fill(&mut piece[..n], seed, sent);
        stream.write_all(&piece[..n]).with_context(|| format!("send after {sent} bytes"))?;
        sum.add(&piece[..n]);
        sent += n as u64;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    Ok(sum.text())
}

/// Receives everything over a connection; returns the number of bytes and their checksum.
///
/// # Errors
/// The connection's error, or data that was not generated from `seed`.
pub fn drain(mut stream: TcpStream, seed: u64) -> Result<(u64, String)> {
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut piece = vec![0; PIECE];
    let mut sum = Sum::NEW;
    let mut received = 0;
    loop {
        // Complete blocks, so that sender and receiver sum the same words.
        let mut n = 0;
        while n < PIECE {
            match stream.read(&mut piece[n..]) {
                Ok(0) => break,
                Ok(more) => n += more,
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("after {} bytes", received + n as u64));
                }
            }
        }
        if let Some(at) = pattern::mismatch(&piece[..n], seed, received) {
            bail!("byte {} came as another", received + at as u64);
        }
        sum.add(&piece[..n]);
        received += n as u64;
        if n < PIECE {
            return Ok((received, sum.text()));
        }
    }
}

/// Sends datagrams of one size, without pauses.
///
/// # Errors
/// There is no route.
pub fn blast(to: (&str, u16), size: usize, packets: u64) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(to).with_context(|| format!("{to:?}"))?;
    let bytes = vec![0x5a; size];
    for _ in 0..packets {
        match socket.send(&bytes) {
            Ok(_) => {}
            // ENOBUFS: the interface's queue is full, and the datagram is dropped.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            Err(error) if error.raw_os_error() == Some(ENOBUFS) => thread::yield_now(),
            Err(error) => return Err(error).context("send a datagram"),
        }
    }
    Ok(())
}

const ENOBUFS: i32 = 105;

/// Counts datagrams from the first one until half a second without any; returns the number after
/// the first, and the seconds.
///
/// # Errors
/// None arrived within half a minute.
pub fn count(port: u16) -> Result<(u64, f64)> {
    let socket = UdpSocket::bind(("0.0.0.0", port)).with_context(|| format!("port {port}"))?;
    socket.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut bytes = vec![0; 65_536];
    socket.recv(&mut bytes).context("the first datagram")?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    let start = Instant::now();
    let (mut packets, mut last) = (0, start);
    while socket.recv(&mut bytes).is_ok() {
        packets += 1;
        last = Instant::now();
    }
    Ok((packets, (last - start).as_secs_f64()))
}

/// Receives everything over a connection; returns the number of bytes and the seconds.
///
/// # Errors
/// The connection's error.
pub fn swallow(mut stream: TcpStream) -> Result<(u64, f64)> {
    let mut piece = vec![0; PIECE];
    let start = Instant::now();
    let mut bytes = 0;
    loop {
        match stream.read(&mut piece)? {
            0 => return Ok((bytes, start.elapsed().as_secs_f64())),
            n => bytes += n as u64,
        }
    }
}
