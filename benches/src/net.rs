//! NIC: a guest's frontend, the backend and a tap, against a bare tap.
//!
//! Transmit: frames of an ethertype nobody listens to, which the host's stack drops at its door.
//! The reference hands the same frames to an equal tap from its own memory, in batches through one
//! io_uring. Receive: a thread of the host sends UDP datagrams into the tap for as long as a run
//! lasts; the reference reads them in batches and does nothing with them. Frontend and reference
//! run on one core, the backend's worker on the other, where the sender is too.
//!
//! To be run in a network namespace of its own, with the right to make interfaces there.

use crate::pin::pin;
use crate::row::{Row, paired};
use crate::until::{Done, Until};
use anyhow::{Context, Result, ensure};
use pvio_event_channel::EventChannel;
use pvio_hosted::{Domain, DomainConfig, Hypervisor};
use pvio_netback::port::tap::{Tap, TapConfig, VNET_HEADER};
use pvio_netback::queue::{EventPorts, QueueRefs};
use pvio_netback::worker::Worker;
use pvio_netback::{Features, Queue as Backend, Stats};
use pvio_netfront::SendError;
use pvio_netfront::queue::{Checksum, Features as FrontFeatures, Queue};
use pvio_uring::{PrivateBuf, Spin, Uring, whole};
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long one side of one pair runs.
const SLICE: Duration = Duration::from_millis(300);
/// Operations in flight on the reference's io_uring.
const BATCH: usize = 32;
/// Bytes of Ethernet, IPv4 and UDP headers.
const HEADERS: usize = 42;

/// What is asked of the NIC.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// What it is called.
    pub name: &'static str,
    bytes: usize,
    receive: bool,
}

/// What is measured.
pub const CASES: [Case; 4] = [
    Case { name: "tx-60", bytes: 60, receive: false },
    Case { name: "tx-1514", bytes: 1514, receive: false },
    Case { name: "rx-60", bytes: 60, receive: true },
    Case { name: "rx-1514", bytes: 1514, receive: true },
];

/// Measures every case, `runs` pairs each.
///
/// # Errors
/// Without the right to make taps in this network namespace.
pub fn run(dir: &Path, runs: usize) -> Result<Vec<Row>> {
    let raw_tap = Link::new("pvioraw", 1)?;
    let mut raw = Raw::new(raw_tap.tap)?;
    let mut ours = Attached::new(dir)?;
    let slice = Until::Time(SLICE);
    CASES
        .iter()
        .map(|case| {
            let pairs: Result<Vec<_>> = (0..runs)
                .map(|_| {
                    pin(0);
                    let reference = if case.receive {
                        let _sender = Sender::start(raw_tap.guest, case.bytes)?;
                        raw.receive()?
                    } else {
                        raw.send(case.bytes)?
                    };
                    Ok((ours.drive(case, slice)?.per_second(), reference.per_second()))
                })
                .collect();
            Ok(paired("net", case.name, "raw tap", "packets/s", &pairs?))
        })
        .collect()
}

/// A tap, and the address of the guest behind it, which the host knows without asking.
struct Link {
    tap: Tap,
    guest: Ipv4Addr,
}

impl Link {
    fn new(name: &str, net: u8) -> Result<Self> {
        let guest = Ipv4Addr::new(10, 99, net, 2);
        let mut config = TapConfig::new(name);
        config.address = Some((Ipv4Addr::new(10, 99, net, 1), 24));
        let tap = Tap::create(&config)?;
        let neighbour = [
            "neigh",
            "replace",
            &guest.to_string(),
            "lladdr",
            "02:00:00:00:00:02",
            "dev",
            name,
            "nud",
            "permanent",
        ]
        .map(String::from);
        let told =
            Command::new("ip").args(neighbour).status().context("ip (iproute2) is needed")?;
        ensure!(told.success(), "the guest's address could not be told to the host");
        Ok(Self { tap, guest })
    }
}

/// Sends datagrams until it is dropped.
struct Sender {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sender {
    fn start(to: Ipv4Addr, bytes: usize) -> Result<Self> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect((to, 9))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            pin(1);
            let payload = vec![0x55; bytes - HEADERS];
            while !stopped.load(Ordering::Relaxed) {
                // A full queue is what there should be.
                let _ = socket.send(&payload);
            }
        });
        Ok(Self { stop, thread: Some(thread) })
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

/// A frame that nobody takes: to an unknown station, of an experimental ethertype.
fn frame(bytes: usize) -> Vec<u8> {
    let mut frame = vec![0; bytes];
    frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

/// The reference.
struct Raw {
    uring: Uring<PrivateBuf>,
    tap: pvio_uring::FileId,
}

impl Raw {
    fn new(tap: Tap) -> Result<Self> {
        let mut uring = Uring::new(BATCH as u32)?;
        let tap = uring.add_file(tap.into_fd());
        Ok(Self { uring, tap })
    }

    fn send(&mut self, bytes: usize) -> Result<Done> {
        let packet = [vec![0; VNET_HEADER], frame(bytes)].concat();
        let mut idle: Vec<PrivateBuf> = Vec::new();
        for _ in 0..BATCH {
            let mut buf = PrivateBuf::zeroed(packet.len());
            buf.as_mut_slice().copy_from_slice(&packet);
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

    fn receive(&mut self) -> Result<Done> {
        let mut idle: Vec<PrivateBuf> = (0..BATCH).map(|_| PrivateBuf::zeroed(2048)).collect();
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
        // The sender still runs: what is in flight ends at once.
        while self.uring.busy() > 0 {
            self.uring.wait(None)?;
            self.uring.reap(|_| ());
        }
        Ok(Done { count: packets, time })
    }
}

/// A NIC attached through the hosted hypervisor. Fields drop in this order.
pub struct Attached {
    _worker: Worker,
    guest: Ipv4Addr,
    front: Queue<Domain>,
    _driver: Domain,
    _hypervisor: Hypervisor,
    spin: Spin,
}

impl Attached {
    /// Makes a tap and attaches a NIC to it.
    ///
    /// # Errors
    /// When any part of the path cannot be set up.
    pub fn new(dir: &Path) -> Result<Self> {
        let link = Link::new("pvioours", 2)?;
        let hypervisor = Hypervisor::start(dir.join("state"))?;
        let guest_id = hypervisor.create_domain(DomainConfig::new("guest"))?;
        let driver_id = hypervisor.create_domain(DomainConfig::new("driver"))?;
        let guest = Domain::join(dir.join("state"), guest_id)?;
        let driver = Domain::join(dir.join("state"), driver_id)?;
        let mut front = Queue::new(&guest, driver_id)?;
        front.set_features(FrontFeatures {
            sg: true,
            checksum_v4: true,
            checksum_v6: true,
            ..FrontFeatures::default()
        });
        let refs = QueueRefs {
            tx_ring: front.tx_gref(),
            rx_ring: front.rx_gref(),
            events: EventPorts::Shared(front.channel().port()),
        };
        let features = Features { sg: true, rx_notify: true, ..Features::LEAST };
        let stats = Arc::new(Stats::default());
        let queue = Backend::attach(driver.clone(), guest_id, &refs, features, stats)?;
        // A thread inherits its maker's core.
        pin(1);
        let worker = Worker::start("bench-net", queue, link.tap, |_| ())?;
        pin(0);
        let spin = Spin::default();
        let guest = link.guest;
        Ok(Self { _worker: worker, guest, front, _driver: driver, _hypervisor: hypervisor, spin })
    }

    /// Sends or receives packets until the run is over.
    ///
    /// # Errors
    /// When either end fails.
    pub fn drive(&mut self, case: &Case, until: Until) -> Result<Done> {
        pin(0);
        if case.receive {
            let _sender = Sender::start(self.guest, case.bytes)?;
            self.receive(until)
        } else {
            self.send(case.bytes, until)
        }
    }

    fn send(&mut self, bytes: usize, until: Until) -> Result<Done> {
        let frame = frame(bytes);
        let mut packets = 0;
        let begin = Instant::now();
        while !until.is_over(begin, packets) {
            for _ in 0..BATCH {
                match self.front.send(&frame, Checksum::Unknown) {
                    Ok(()) => packets += 1,
                    Err(SendError::Full) => break,
                    Err(other) => return Err(other.into()),
                }
            }
            self.front.publish()?;
            if !self.front.has_room(1)? {
                self.wait()?;
            }
        }
        Ok(Done { count: packets, time: begin.elapsed() })
    }

    fn receive(&mut self, until: Until) -> Result<Done> {
        let mut packets = 0;
        let begin = Instant::now();
        while !until.is_over(begin, packets) {
            let mut taken = 0;
            while taken < BATCH && self.front.receive(|_, _| ())?.is_some() {
                taken += 1;
            }
            packets += taken as u64;
            self.front.publish()?;
            if taken == 0 {
                self.wait()?;
            }
        }
        Ok(Done { count: packets, time: begin.elapsed() })
    }

    fn wait(&mut self) -> Result<()> {
        let front = &mut self.front;
        if self.spin.until(|| front.has_work())? {
            return Ok(());
        }
        if !front.final_check()? {
            self.spin.sleeping();
            front.channel().wait(Some(Duration::from_millis(100)))?;
            front.channel().take()?;
        }
        Ok(())
    }
}
