//! The taps, the senders and receivers on the host's side, and the reference, which uses a tap
//! directly.

use super::{BATCH, Case, SLICE, Spent};
use crate::cpu;
use crate::pin::pin;
use crate::until::Done;
use anyhow::{Context, Result, ensure};
use pvio_ports::tap::{Tap, TapConfig, VNET_HEADER};
use pvio_ring::proto::checksum::Transport;
use pvio_runtime::{FileId, PrivateBuf, Uring, whole};
use std::net::{Ipv4Addr, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Size of the Ethernet, IPv4 and UDP headers in bytes.
const HEADERS: usize = 42;
/// Segment size of GSO packets in bytes of payload.
pub const SEGMENT: u16 = 1448;
/// Size of a read's buffer in bytes: the largest packet and its header.
const READ: usize = VNET_HEADER + 65_553;

/// A tap, and the guest's address on it, which has a static ARP entry. For received GSO packets,
/// the tap is on a bridge with another tap that the packets are written to.
pub struct Link {
    pub tap: Tap,
    guest: Ipv4Addr,
    feed: Option<Tap>,
}

impl Link {
    pub fn new(name: &str, net: u8, case: &Case) -> Result<Self> {
        let guest = Ipv4Addr::new(10, 99, net, 2);
        let mut config = TapConfig::new(name);
        if case.gso && case.receive {
            let bridge = format!("br-{name}");
            ip(&["link", "add", &bridge, "type", "bridge"])?;
            ip(&["link", "set", &bridge, "up"])?;
            config.bridge = Some(bridge);
            let tap = Tap::create(&config)?;
            tap.set_unsegmented(true, true)?;
            config.name = format!("f-{name}");
            return Ok(Self { tap, guest, feed: Some(Tap::create(&config)?) });
        }
        config.address = Some((Ipv4Addr::new(10, 99, net, 1), 24));
        let tap = Tap::create(&config)?;
        let (guest_ip, mac) = (guest.to_string(), "02:00:00:00:00:02");
        ip(&["neigh", "replace", &guest_ip, "lladdr", mac, "dev", name, "nud", "permanent"])?;
        Ok(Self { tap, guest, feed: None })
    }

    /// Starts sending packets into the tap, until the returned value is dropped.
    pub fn sender(&self, case: &Case) -> Result<Sender> {
        match &self.feed {
            Some(feed) => Sender::feed(feed.try_clone()?, packet(case)),
            None => Sender::start(self.guest, case.bytes),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.feed.is_some() {
            // If this fails, the bridge is removed with the namespace.
            let _ = ip(&["link", "del", &format!("br-{}", self.tap.name())]);
        }
    }
}

fn ip(words: &[&str]) -> Result<()> {
    let told = Command::new("ip").args(words).status().context("ip (iproute2) is needed")?;
    ensure!(told.success(), "ip {words:?} failed");
    Ok(())
}

/// A thread that sends packets until it is dropped.
pub struct Sender {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sender {
    fn start(to: Ipv4Addr, bytes: usize) -> Result<Self> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect((to, 9))?;
        let payload = vec![0x55; bytes - HEADERS];
        // Errors are ignored: the socket's queue is full most of the time.
        Ok(Self::repeat(move || drop(socket.send(&payload))))
    }

    fn feed(tap: Tap, packet: Vec<u8>) -> Result<Self> {
        let file = std::fs::File::from(tap.into_fd());
        Ok(Self::repeat(move || drop(std::io::Write::write(&mut &file, &packet))))
    }

    fn repeat(mut send: impl FnMut() + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            pin(1);
            while !stopped.load(Ordering::Relaxed) {
                send();
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Returns a frame without a recipient: to an unknown MAC address, with an experimental ethertype,
/// or a TCP packet with a blank checksum for GSO.
pub fn frame(case: &Case) -> Vec<u8> {
    let mut frame = vec![0; case.bytes];
    frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
    if !case.gso {
        frame[12..14].copy_from_slice(&[0x88, 0xb5]);
        return frame;
    }
    let total = (case.bytes - 14) as u16;
    frame[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
    frame[16..18].copy_from_slice(&total.to_be_bytes());
    frame[22..24].copy_from_slice(&[64, 6]);
    frame[26..34].copy_from_slice(&[10, 99, 9, 1, 10, 99, 9, 2]);
    let words = frame[14..34].chunks_exact(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])));
    let sum: u32 = words.sum();
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    frame[46] = 0x50;
    if let Ok(transport) = Transport::of(&frame) {
        transport.blank(&mut frame);
    }
    frame
}

/// Returns the frame with the header that a tap expects.
fn packet(case: &Case) -> Vec<u8> {
    let mut header = vec![0; VNET_HEADER];
    if case.gso {
        // NEEDS_CSUM, with the checksum at 34 + 16; TCP over IPv4 with 54 bytes of headers.
        header = vec![1, 1];
        [54, SEGMENT, 34, 16].iter().for_each(|word: &u16| header.extend(word.to_ne_bytes()));
    }
    [header, frame(case)].concat()
}

/// The reference: a bare tap.
pub struct Raw {
    uring: Uring<PrivateBuf>,
    tap: FileId,
    link: Link,
}

impl Raw {
    pub fn new(link: Link) -> Result<Self> {
        let mut uring = Uring::new(BATCH as u32)?;
        let tap = uring.add_file(link.tap.try_clone()?.into_fd());
        Ok(Self { uring, tap, link })
    }

    pub fn run(&mut self, case: &Case) -> Result<Spent> {
        let _sender = case.receive.then(|| self.link.sender(case)).transpose()?;
        let begin = cpu::of_this_thread();
        let done = if case.receive { self.receive(case) } else { self.send(&packet(case)) }?;
        Ok(Spent { done, here: cpu::of_this_thread() - begin, worker: Duration::ZERO })
    }

    fn send(&mut self, packet: &[u8]) -> Result<Done> {
        let mut idle: Vec<PrivateBuf> = Vec::new();
        for _ in 0..BATCH {
            let mut buf = PrivateBuf::zeroed(packet.len());
            buf.as_mut_slice().copy_from_slice(packet);
            idle.push(buf);
        }
        let mut packets = 0;
        let begin = Instant::now();
        while begin.elapsed() < SLICE {
            for buf in idle.drain(..) {
                ensure!(self.uring.write_stream(self.tap, [whole(buf)], 0).is_ok(), "no slot");
            }
            self.uring.wait(None)?;
            let mut failed = None;
            packets += self.uring.reap(|done| {
                failed = done.result.err().or(failed);
                idle.extend(done.segments.drain(..).map(|s| s.buf));
            }) as u64;
            ensure!(failed.is_none(), "writing to the tap: error {failed:?}");
        }
        Ok(Done { count: packets, time: begin.elapsed() })
    }

    fn receive(&mut self, case: &Case) -> Result<Done> {
        let len = if case.gso { READ } else { 2048 };
        let mut idle: Vec<PrivateBuf> = (0..BATCH).map(|_| PrivateBuf::zeroed(len)).collect();
        let mut packets = 0;
        let begin = Instant::now();
        while begin.elapsed() < SLICE {
            for buf in idle.drain(..) {
                ensure!(self.uring.read_stream(self.tap, whole(buf), 0).is_ok(), "no slot");
            }
            self.uring.wait(None)?;
            packets += self.uring.reap(|done| {
                idle.extend(done.segments.drain(..).map(|s| s.buf));
            }) as u64;
        }
        let time = begin.elapsed();
        // The sender is still running, so the outstanding reads complete immediately.
        while self.uring.busy() > 0 {
            self.uring.wait(None)?;
            self.uring.reap(|_| ());
        }
        Ok(Done { count: packets, time })
    }
}
