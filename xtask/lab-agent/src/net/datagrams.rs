//! Numbered datagrams in one direction: every byte is verified, and reordered ones are counted.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use super::{ENOBUFS, anywhere};
use crate::pattern;

/// Statistics of received datagrams.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Taken {
    /// Number of datagrams.
    pub count: u64,
    /// Number of datagrams that were reordered or duplicated: their number is not above the highest
    /// one before.
    pub late: u64,
    /// Number of the first datagram.
    pub first: u64,
    /// The highest number plus 1.
    pub next: u64,
}

/// Receives datagrams until `end`.
pub struct Taker {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Taken>>,
}

impl Taker {
    /// Starts receiving at a port of all IPv4 addresses.
    ///
    /// # Errors
    /// The port is in use.
    pub fn start(port: u16, seed: u64, group: Option<Group>) -> Result<Self> {
        let socket = UdpSocket::bind(("0.0.0.0", port)).with_context(|| format!("port {port}"))?;
        if let Some(Group { group, by }) = group {
            socket.join_multicast_v4(&group, &by).with_context(|| format!("join {group}"))?;
        }
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
        let stop: Arc<AtomicBool> = Arc::default();
        let told = Arc::clone(&stop);
        Ok(Self { stop, thread: thread::spawn(move || take(&socket, seed, &told)) })
    }

    /// Waits until no more datagrams arrive; returns the statistics.
    ///
    /// # Errors
    /// A datagram was corrupt.
    pub fn end(self) -> Result<Taken> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the taker panicked"))?
    }
}

/// A multicast group, and the address of the interface that joins it.
#[derive(Clone, Copy, Deserialize)]
pub struct Group {
    group: Ipv4Addr,
    by: Ipv4Addr,
}

impl Group {
    /// Returns the group `group`, joined by the interface with address `by`.
    pub fn new(group: Ipv4Addr, by: Ipv4Addr) -> Self {
        Self { group, by }
    }
}

fn take(socket: &UdpSocket, seed: u64, stop: &AtomicBool) -> Result<Taken> {
    let mut bytes = vec![0; 65_536];
    let mut taken = Taken::default();
    loop {
        let Ok(n) = socket.recv(&mut bytes) else {
            if stop.load(Ordering::Relaxed) {
                return Ok(taken);
            }
            continue;
        };
        let (number, rest) = bytes[..n].split_first_chunk().context("a datagram too short")?;
        let number = u64::from_le_bytes(*number);
        let wrong = pattern::mismatch(rest, seed ^ number, 0);
        ensure!(wrong.is_none(), "datagram {number} of {n} bytes: byte {wrong:?} came as another");
        if taken.count == 0 {
            taken.first = number;
        }
        taken.count += 1;
        taken.late += u64::from(number < taken.next);
        taken.next = taken.next.max(number.saturating_add(1));
    }
}

/// A sequence of datagrams to send.
#[derive(Deserialize)]
pub struct Send {
    /// Destination address.
    pub server: String,
    /// Destination port.
    pub port: u16,
    /// Size of each in bytes, at least 8.
    pub size: usize,
    /// Number of datagrams.
    pub count: u64,
    /// Seed of their contents.
    pub seed: u64,
    /// Pause in milliseconds after every 16 datagrams.
    pub rest: u64,
}

/// Sends the datagrams.
///
/// # Errors
/// There is no route.
pub fn send(order: &Send) -> Result<()> {
    let socket = UdpSocket::bind(anywhere(&order.server))?;
    socket.connect((order.server.as_str(), order.port)).with_context(|| order.server.clone())?;
    let mut bytes = vec![0; order.size];
    for number in 0..order.count {
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        pattern::fill(&mut bytes[8..], order.seed ^ number, 0);
        match socket.send(&bytes) {
            Ok(n) => ensure!(n == order.size, "{n} of {} bytes were sent", order.size),
            // The interface's queue is full: this datagram is dropped.
            Err(error) if error.raw_os_error() == Some(ENOBUFS) => thread::yield_now(),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error).context("send a datagram"),
        }
        if order.rest > 0 && number % 16 == 15 {
            thread::sleep(Duration::from_millis(order.rest));
        }
    }
    Ok(())
}

/// Sends numbered datagrams without pauses until `end`.
pub struct Flood {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64>>,
}

/// Configuration of a flood.
#[derive(Deserialize)]
pub struct Flow {
    /// Destination address.
    pub server: String,
    /// Destination port.
    pub port: u16,
    /// Size of each in bytes, at least 8.
    pub size: usize,
    /// Seed of their contents.
    pub seed: u64,
    /// Whether the route may disappear while it is sent.
    #[serde(default)]
    pub lossy: bool,
}

impl Flood {
    /// Starts sending.
    ///
    /// # Errors
    /// There is no route.
    pub fn start(flow: Flow) -> Result<Self> {
        let socket = UdpSocket::bind(anywhere(&flow.server))?;
        socket.connect((flow.server.as_str(), flow.port)).context(flow.server.clone())?;
        let stop: Arc<AtomicBool> = Arc::default();
        let told = Arc::clone(&stop);
        Ok(Self { stop, thread: thread::spawn(move || pour(&socket, &flow, &told)) })
    }

    /// Stops; returns the number of datagrams sent.
    ///
    /// # Errors
    /// The route disappeared, and `lossy` is not set.
    pub fn end(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the flood panicked"))?
    }
}

fn pour(socket: &UdpSocket, flow: &Flow, stop: &AtomicBool) -> Result<u64> {
    let mut bytes = vec![0; flow.size];
    let mut number = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        pattern::fill(&mut bytes[8..], flow.seed ^ number, 0);
        match socket.send(&bytes) {
            Ok(_) => number += 1,
            Err(error) if error.raw_os_error() == Some(ENOBUFS) => thread::yield_now(),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
            Err(_) if flow.lossy => thread::sleep(Duration::from_millis(20)),
            Err(error) => return Err(error).context("send a datagram"),
        }
    }
    Ok(number)
}

/// Receives datagrams of a flood; returns the number of bytes of payload and of datagrams that
/// arrived from `from` to `until`, by this domain's clock.
///
/// # Errors
/// One was corrupt, reordered or lost. With losses, the result would not be the rate of the sender.
pub fn came(socket: &UdpSocket, seed: u64, from: Instant, until: Instant) -> Result<(u64, u64)> {
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let mut bytes = vec![0; 65_536];
    let (mut sum, mut count, mut next) = (0, 0, None);
    while Instant::now() < until {
        let Ok(n) = socket.recv(&mut bytes) else { continue };
        let now = Instant::now();
        let (number, rest) = bytes[..n].split_first_chunk().context("a datagram too short")?;
        let number = u64::from_le_bytes(*number);
        let wrong = pattern::mismatch(rest, seed ^ number, 0);
        ensure!(wrong.is_none(), "datagram {number} of {n} bytes: byte {wrong:?} came as another");
        if now < from || now >= until {
            continue;
        }
        let expected = next.replace(number + 1).unwrap_or(number);
        ensure!(number == expected, "datagram {number} came instead of {expected}");
        (sum, count) = (sum + n as u64, count + 1);
    }
    Ok((sum, count))
}
