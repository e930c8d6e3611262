//! Numbered datagrams one way: every byte is compared, and what came late is counted.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use super::{ENOBUFS, anywhere};
use crate::pattern;

/// What came.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Taken {
    /// Datagrams.
    pub count: u64,
    /// Of these, with a number that is not above the one before: out of order, or twice.
    pub late: u64,
    /// The number of the first.
    pub first: u64,
    /// The highest number, and 1.
    pub next: u64,
}

/// Takes datagrams until it is asked what came.
pub struct Taker {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Taken>>,
}

impl Taker {
    /// Begins at a port of every IPv4 address.
    ///
    /// # Errors
    /// The port is taken.
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

    /// What came until nothing came for a moment.
    ///
    /// # Errors
    /// One came as another.
    pub fn end(self) -> Result<Taken> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the taker panicked"))?
    }
}

/// A group, and the own address that says by which interface it is joined.
#[derive(Clone, Copy, Deserialize)]
pub struct Group {
    group: Ipv4Addr,
    by: Ipv4Addr,
}

impl Group {
    /// Of a group and an own address.
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

/// Datagrams to be sent.
#[derive(Deserialize)]
pub struct Send {
    /// To whom.
    pub server: String,
    /// Their port.
    pub port: u16,
    /// Bytes of each, at least 8.
    pub size: usize,
    /// How many.
    pub count: u64,
    /// What makes up their bytes.
    pub seed: u64,
    /// Milliseconds of rest after every 16.
    pub rest: u64,
}

/// Sends them.
///
/// # Errors
/// No way there.
pub fn send(order: &Send) -> Result<()> {
    let socket = UdpSocket::bind(anywhere(&order.server))?;
    socket.connect((order.server.as_str(), order.port)).with_context(|| order.server.clone())?;
    let mut bytes = vec![0; order.size];
    for number in 0..order.count {
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        pattern::fill(&mut bytes[8..], order.seed ^ number, 0);
        match socket.send(&bytes) {
            Ok(n) => ensure!(n == order.size, "{n} of {} bytes were sent", order.size),
            // The interface's queue is full: the next may find room.
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

/// Sends numbered datagrams, the next one always ready, until it is told to stop.
pub struct Flood {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64>>,
}

/// A flood to be sent.
#[derive(Deserialize)]
pub struct Flow {
    /// To whom.
    pub server: String,
    /// Their port.
    pub port: u16,
    /// Bytes of each, at least 8.
    pub size: usize,
    /// What makes up their bytes.
    pub seed: u64,
    /// Whether the way there may go away meanwhile.
    #[serde(default)]
    pub lossy: bool,
}

impl Flood {
    /// Begins.
    ///
    /// # Errors
    /// No way there.
    pub fn start(flow: Flow) -> Result<Self> {
        let socket = UdpSocket::bind(anywhere(&flow.server))?;
        socket.connect((flow.server.as_str(), flow.port)).context(flow.server.clone())?;
        let stop: Arc<AtomicBool> = Arc::default();
        let told = Arc::clone(&stop);
        Ok(Self { stop, thread: thread::spawn(move || pour(&socket, &flow, &told)) })
    }

    /// How many were sent.
    ///
    /// # Errors
    /// No way there any more, where that was not foreseen.
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

/// Takes datagrams of a flood from one moment to another, by this domain's clock, and lets those
/// before and after be: how many bytes of payload came, in how many datagrams.
///
/// # Errors
/// One came as another, or out of order, or some did not come: then it would not be said how fast
/// they were sent.
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
