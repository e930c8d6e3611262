//! pvio's frontends in this guest's user space; its kernel has no frontends loaded.

use std::mem;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use pvio_blkfront::blocking::BlockingDisk;
use pvio_blkfront::{Op, RequestedFeatures, StartError};
use pvio_netfront::{Checksum, Nic, SendError};
use pvio_ring::proto::blkif::Status;
use pvio_xen_linux::XenDomain;
use pvio_xenbus::Xenstore;
use pvio_xenbus::client::Client;
use pvio_xenbus::driver::FrontendDriver;
use pvio_xenbus::handshake::common::{DeviceClass, FrontendAddr, read_error};
use serde::Deserialize;
use serde_json::{Value, json};

use super::read;
use crate::pattern::{self, Sum};
use crate::sys::modules;

const PATIENCE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(20);
/// Number of packets to send without a receiver: more than a ring has slots.
const PACKETS: usize = 300;
/// Number of slots of a transmit ring.
const SLOTS: usize = 256;

/// Executes the requests of this module; returns `None` for other verbs.
pub fn obey(verb: &str, arguments: &Value) -> Option<Result<Value>> {
    let arguments = arguments.clone();
    Some(match verb {
        "own-disk" => read(arguments).and_then(|order| disk(&order)),
        "own-nic" => read(arguments).and_then(|order| nic(&order)),
        _ => return None,
    })
}

fn domain() -> Result<XenDomain> {
    for module in ["xen-gntdev", "xen-evtchn"] {
        modules::load(module)?;
    }
    // A NIC has 514 pages, and two NICs exist at a time. The module's default limit is 1024.
    modules::load_with("xen-gntalloc", "limit=4096")?;
    Ok(XenDomain::open()?)
}

#[derive(Deserialize)]
struct DiskOrder {
    /// `virtual-device`
    number: u32,
    seed: u64,
    mib: u64,
}

type Disk = BlockingDisk<XenDomain, Client>;

/// Writes a disk's first `mib` MiB, abandons the frontend as when its process is killed, attaches a
/// second one that takes over, reads everything, and closes it. Returns the checksum of the data
/// read.
fn disk(order: &DiskOrder) -> Result<Value> {
    let domain = domain()?;
    let addr = FrontendAddr::new(DeviceClass::Vbd, domain.id(), order.number);
    let attach = || -> Result<Disk> {
        let xs = domain.xenstore()?;
        Ok(BlockingDisk::attach_requesting(
            domain.clone(),
            xs,
            addr,
            RequestedFeatures::default(),
            PATIENCE,
        )?)
    };
    let mut first = attach().context("the first frontend")?;
    let bytes = order.mib << 20;
    ensure!(first.size() >= bytes, "the disk has {} bytes", first.size());
    let queue = first.queue()?;
    let slot = queue.reserve().context("a slot")?;
    for sector in [1 << 55, u64::MAX] {
        let beyond = queue.start(slot, Op::Write { sector, bytes: 512 });
        ensure!(
            matches!(beyond, Err(StartError::OutOfRange { .. })),
            "a write at {sector}: {beyond:?}"
        );
    }
    queue.release(slot);
    write(&mut first, order.seed, bytes)?;
    mem::forget(first);
    let mut second = attach().context("the one that takes over")?;
    let mut found = vec![0; 1 << 20];
    let mut sum = Sum::NEW;
    for at in (0..bytes).step_by(found.len()) {
        second.read_at(at, &mut found)?;
        let wrong = pattern::mismatch(&found, order.seed, at);
        ensure!(wrong.is_none(), "another byte at {at} + {wrong:?}");
        sum.add(&found);
    }
    second.close()?;
    // A third one attaches after a frontend that closed properly.
    attach().context("the third frontend")?.close()?;
    Ok(json!(sum.text()))
}

fn write(session: &mut Disk, seed: u64, bytes: u64) -> Result<()> {
    let (mut at, mut flying, mut flushed) = (0, 0, false);
    while at < bytes || flying > 0 || !flushed {
        let queue = session.queue()?;
        while at < bytes
            && let Some(slot) = queue.reserve()
        {
            let mut data = vec![0; queue.slot_bytes().min((bytes - at) as usize)];
            pattern::fill(&mut data, seed, at);
            queue.fill(slot, 0, &data).context("the buffer is smaller")?;
            queue.start(slot, Op::Write { sector: at / 512, bytes: data.len() })?;
            (at, flying) = (at + data.len() as u64, flying + 1);
        }
        if at == bytes && flying == 0 {
            let slot = queue.reserve().context("a slot")?;
            queue.start(slot, Op::Flush)?;
            (flying, flushed) = (1, true);
        }
        queue.publish()?;
        let mut done = Vec::new();
        session.answers(|slot, op, status| done.push((slot, op, status)))?;
        for (slot, op, status) in done {
            // A device without a cache does not support flushes.
            let without = op == Op::Flush && status == Status::NotSupported;
            ensure!(status == Status::Okay || without, "{op:?}: {status:?}");
            session.queue()?.release(slot);
            flying -= 1;
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct NicOrder {
    /// Number of the vif.
    number: u32,
    address: [u8; 4],
    /// A host that replies to ARP. Without one, packets are only sent.
    peer: Option<[u8; 4]>,
}

/// Attaches a NIC, sends and receives, abandons the frontend as when its process is killed,
/// attaches a second one that takes over, sends and receives, and closes it.
fn nic(order: &NicOrder) -> Result<Value> {
    let domain = domain()?;
    let mut xs = domain.xenstore()?;
    let addr = FrontendAddr::new(DeviceClass::Vif, domain.id(), order.number);
    for last in [false, true] {
        let mut driver = FrontendDriver::new(addr, Nic::new(domain.clone()));
        tend(&mut driver, &mut xs, |driver| driver.class().is_connected())?;
        match order.peer {
            Some(peer) => ask(&mut driver, order.address, peer)?,
            None => send(&mut driver)?,
        }
        if !last {
            mem::forget(driver);
            continue;
        }
        driver.close(&mut xs)?;
        tend(&mut driver, &mut xs, FrontendDriver::is_closed)?;
    }
    Ok(Value::Null)
}

type Driver = FrontendDriver<Nic<XenDomain>>;

/// Steps a driver until a condition holds.
fn tend(driver: &mut Driver, xs: &mut Client, is_so: impl Fn(&Driver) -> bool) -> Result<()> {
    let (start, wanted_closed) = (Instant::now(), driver.is_closing());
    driver.step(xs)?;
    while !is_so(driver) {
        if driver.is_closing() && !wanted_closed {
            bail!("the NIC was closed: {:?}", read_error(xs, driver.token())?);
        }
        ensure!(start.elapsed() < PATIENCE, "the NIC is {} after {PATIENCE:?}", driver.state());
        if xs.wait_event(Some(LOOK))?.is_some() {
            driver.step(xs)?;
        }
    }
    Ok(())
}

/// Sends ARP requests for a neighbour's address until there is a reply.
fn ask(driver: &mut Driver, own: [u8; 4], peer: [u8; 4]) -> Result<()> {
    let mac = driver.class().mac().context("an address")?.0;
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    // ARP: Ethernet, IPv4, a request.
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(own);
    frame.extend([0; 6]);
    frame.extend(peer);
    frame.resize(60, 0);
    let start = Instant::now();
    let queue = driver.class_mut().queue().context("a queue")?;
    let mut asked = None::<Instant>;
    while start.elapsed() < PATIENCE {
        if asked.is_none_or(|when| when.elapsed() > Duration::from_millis(500)) {
            queue.send(&frame, Checksum::Unknown)?;
            asked = Some(Instant::now());
        }
        let answer = |frame: &[u8], _| {
            frame.get(12..14) == Some(&[8, 6])
                && frame.get(20..22) == Some(&[0, 2])
                && frame.get(28..32) == Some(&peer)
        };
        if queue.receive(answer)? == Some(true) {
            return Ok(());
        }
        queue.publish()?;
        thread::sleep(LOOK);
    }
    bail!("{peer:?} does not answer in {PATIENCE:?}")
}

/// Sends packets until the backend has completed more of them than the ring has slots.
fn send(driver: &mut Driver) -> Result<()> {
    let start = Instant::now();
    let queue = driver.class_mut().queue().context("a queue")?;
    let mut left = PACKETS;
    while left > 0 || !queue.has_room(SLOTS)? {
        ensure!(start.elapsed() < PATIENCE, "{left} packets were not taken in {PATIENCE:?}");
        while left > 0 {
            match queue.send(&[0x5a; 1000], Checksum::Unknown) {
                Ok(()) => left -= 1,
                Err(SendError::Full) => break,
                Err(error) => return Err(error.into()),
            }
        }
        queue.publish()?;
        thread::sleep(LOOK);
    }
    Ok(())
}
