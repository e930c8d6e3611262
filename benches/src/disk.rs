//! Disk: a guest's frontend, the backend and an image file, compared with a bare io_uring on that
//! file.
//!
//! Pvio and the reference access the same file in the same order with the same number of requests
//! in flight, alternately in one run. The reference moves data between the page cache and its own
//! memory. Pvio moves it between the page cache and the guest's memory, through the ring, the grant
//! table and the event channels of the hosted hypervisor, with frontend and worker on one core
//! each.

use crate::pin::pin;
use crate::row::{Row, paired};
use crate::until::{Done, Until};
use anyhow::{Context, Result, ensure};
use pvio_blkback::{DataPath, DiskState, QueueParts, QueueRecord, Stats};
use pvio_blkfront::{Op, Queue, Shape, SlotId};
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{Access, GrantMapper};
use pvio_hosted::{Domain, DomainConfig, Hypervisor};
use pvio_ring::BackRing;
use pvio_ring::proto::blkif::{Abi, Status};
use pvio_ring::shm::PAGE_SIZE;
use pvio_runtime::{PrivateBuf, Spin, Uring, whole};
use pvio_storage::image::{Image, ImageOptions};
use pvio_storage::worker::{self, Worker};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;
use rustix::fs::OFlags;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Size of the image in bytes.
const IMAGE: u64 = 256 << 20;
/// Duration of one run of pvio or of the reference in a pair.
const SLICE: Duration = Duration::from_millis(300);

/// How a frontend waits for responses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wait {
    /// Polls until they arrive.
    Spin,
    /// Polls for a while, then sleeps.
    Hybrid,
    /// Sleeps without polling.
    Sleep,
}

/// A workload on the disk.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Name of the case.
    pub name: &'static str,
    bytes: usize,
    depth: usize,
    write: bool,
    sequential: bool,
    /// Without the page cache (`O_DIRECT`), for pvio and the reference.
    direct: bool,
    wait: Wait,
    path: DataPath,
}

/// The cases. Pages are mapped for each request unless the name says otherwise.
pub const CASES: [Case; 43] = [
    case("read-4k-qd1-spin", 4096, 1, Wait::Spin),
    case("read-4k-qd1-hybrid", 4096, 1, Wait::Hybrid),
    case("read-4k-qd1-sleep", 4096, 1, Wait::Sleep),
    case("read-4k-qd32-spin", 4096, 32, Wait::Spin),
    case("read-4k-qd32-hybrid", 4096, 32, Wait::Hybrid),
    case("read-4k-qd32-sleep", 4096, 32, Wait::Sleep),
    case("read-4k-qd128-spin", 4096, 128, Wait::Spin),
    Case { sequential: true, ..case("read-44k-seq-qd32-hybrid", 45056, 32, Wait::Hybrid) },
    case("read-44k-qd32-spin", 45056, 32, Wait::Spin),
    case("read-256k-qd32-spin", 256 << 10, 32, Wait::Spin),
    Case { write: true, ..case("write-4k-qd32-hybrid", 4096, 32, Wait::Hybrid) },
    copying(case("read-4k-qd1-spin-copy", 4096, 1, Wait::Spin)),
    copying(case("read-4k-qd32-spin-copy", 4096, 32, Wait::Spin)),
    copying(case("read-4k-qd128-spin-copy", 4096, 128, Wait::Spin)),
    copying(case("read-44k-qd32-spin-copy", 45056, 32, Wait::Spin)),
    copying(case("read-256k-qd32-spin-copy", 256 << 10, 32, Wait::Spin)),
    copying(Case { write: true, ..case("write-4k-qd32-hybrid-copy", 4096, 32, Wait::Hybrid) }),
    keeping(case("read-4k-qd1-spin-persistent", 4096, 1, Wait::Spin)),
    keeping(case("read-4k-qd32-spin-persistent", 4096, 32, Wait::Spin)),
    keeping(case("read-4k-qd128-spin-persistent", 4096, 128, Wait::Spin)),
    keeping(case("read-44k-qd32-spin-persistent", 45056, 32, Wait::Spin)),
    keeping(case("read-256k-qd32-spin-persistent", 256 << 10, 32, Wait::Spin)),
    keeping(Case {
        write: true,
        ..case("write-4k-qd32-hybrid-persistent", 4096, 32, Wait::Hybrid)
    }),
    case("read-64k-qd1-spin", 64 << 10, 1, Wait::Spin),
    case("read-64k-qd32-spin", 64 << 10, 32, Wait::Spin),
    case("read-1m-qd1-spin", 1 << 20, 1, Wait::Spin),
    case("read-1m-qd32-spin", 1 << 20, 32, Wait::Spin),
    copying(case("read-64k-qd1-spin-copy", 64 << 10, 1, Wait::Spin)),
    copying(case("read-64k-qd32-spin-copy", 64 << 10, 32, Wait::Spin)),
    copying(case("read-1m-qd1-spin-copy", 1 << 20, 1, Wait::Spin)),
    copying(case("read-1m-qd32-spin-copy", 1 << 20, 32, Wait::Spin)),
    keeping(case("read-64k-qd1-spin-persistent", 64 << 10, 1, Wait::Spin)),
    keeping(case("read-64k-qd32-spin-persistent", 64 << 10, 32, Wait::Spin)),
    keeping(case("read-1m-qd1-spin-persistent", 1 << 20, 1, Wait::Spin)),
    keeping(case("read-1m-qd32-spin-persistent", 1 << 20, 32, Wait::Spin)),
    beyond(case("read-256k-qd32-spin-persistent-or-copy", 256 << 10, 32, Wait::Spin)),
    beyond(case("read-1m-qd32-spin-persistent-or-copy", 1 << 20, 32, Wait::Spin)),
    direct(case("read-4k-qd32-spin-direct", 4096, 32, Wait::Spin)),
    direct(case("read-64k-qd32-spin-direct", 64 << 10, 32, Wait::Spin)),
    direct(copying(case("read-4k-qd32-spin-copy-direct", 4096, 32, Wait::Spin))),
    direct(copying(case("read-64k-qd32-spin-copy-direct", 64 << 10, 32, Wait::Spin))),
    direct(keeping(case("read-4k-qd32-spin-persistent-direct", 4096, 32, Wait::Spin))),
    direct(keeping(case("read-64k-qd32-spin-persistent-direct", 64 << 10, 32, Wait::Spin))),
];

const fn case(name: &'static str, bytes: usize, depth: usize, wait: Wait) -> Case {
    let path = DataPath::Map;
    Case { name, bytes, depth, write: false, sequential: false, direct: false, wait, path }
}

const fn copying(case: Case) -> Case {
    Case { path: DataPath::Copy, ..case }
}

const fn keeping(case: Case) -> Case {
    Case { path: DataPath::PersistentOrMap, ..case }
}

const fn beyond(case: Case) -> Case {
    Case { path: DataPath::PersistentOrCopy, ..case }
}

const fn direct(case: Case) -> Case {
    Case { direct: true, ..case }
}

impl Case {
    /// Returns the shape of the queue: a slot for each request in flight, each large enough for
    /// one.
    pub(crate) fn shape(&self) -> Shape {
        let pages_per_slot = self.bytes.div_ceil(PAGE_SIZE).max(Shape::LEAST.pages_per_slot);
        Shape { ring_pages: self.depth.div_ceil(32).next_power_of_two(), pages_per_slot }
    }
}

/// Measures every case whose name contains `only`, with `runs` pairs each.
///
/// # Errors
/// io_uring is not available, or `dir` has no space for the image.
pub fn run(dir: &Path, runs: usize, only: &str) -> Result<Vec<Row>> {
    let path = image(dir)?;
    let mut rows = Vec::new();
    for case in CASES.iter().filter(|case| case.name.contains(only)) {
        let mut disk = Attached::new(dir, &path, case)?;
        let pairs: Result<Vec<_>> = (0..runs as u64)
            .map(|seed| {
                heat(&path)?;
                let reference = raw(&path, case, seed)?;
                heat(&path)?;
                let ours = rate(case, disk.drive(case, seed, Until::Time(SLICE))?);
                Ok((ours, reference))
            })
            .collect();
        let unit = if case.bytes > 4096 { "MB/s" } else { "IOPS" };
        rows.push(paired("disk", case.name, "raw io_uring", unit, &pairs?));
    }
    Ok(rows)
}

/// Returns a guest's configuration with memory for 32 requests of 1 MiB: 8192 pages, and as many
/// grants.
fn guest_config() -> DomainConfig {
    DomainConfig::new("guest").memory_pages(16_384).grant_frames(64)
}

/// Creates the image.
///
/// # Errors
/// `dir` has no space for its 256 MiB.
pub fn image(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("disk.img");
    let mut file = File::create(&path)?;
    let chunk: Vec<u8> = (0..1 << 20).map(|i| (i % 251) as u8).collect();
    for _ in 0..IMAGE >> 20 {
        file.write_all(&chunk).context("writing the 256 MiB benchmark image")?;
    }
    file.sync_all()?;
    Ok(path)
}

/// Reads the whole image into the page cache, from which the kernel may have evicted pages.
fn heat(path: &Path) -> Result<()> {
    let mut buf = vec![0; 1 << 20];
    let mut file = File::open(path)?;
    while file.read(&mut buf)? > 0 {}
    Ok(())
}

/// The sequence of offsets of a run's requests.
struct Offsets {
    rng: Pcg64Mcg,
    next: u64,
    case: (u64, bool),
}

impl Offsets {
    fn new(case: &Case, seed: u64) -> Self {
        let rng = Pcg64Mcg::seed_from_u64(seed);
        Self { rng, next: 0, case: (case.bytes as u64, case.sequential) }
    }

    fn next(&mut self) -> u64 {
        let (bytes, sequential) = self.case;
        let places = IMAGE / bytes;
        let place = if sequential {
            self.next = (self.next + 1) % places;
            self.next
        } else {
            self.rng.random_range(0..places)
        };
        place * bytes
    }
}

fn rate(case: &Case, done: Done) -> f64 {
    if case.bytes > 4096 { done.per_second() * case.bytes as f64 / 1e6 } else { done.per_second() }
}

/// Runs the reference: `depth` requests in flight on a bare io_uring, one submission per batch.
fn raw(path: &Path, case: &Case, seed: u64) -> Result<f64> {
    pin(0);
    let flags = if case.direct { OFlags::DIRECT } else { OFlags::empty() };
    let mut options = File::options();
    options.read(true).write(case.write).custom_flags(flags.bits() as i32);
    let file = options.open(path)?;
    let mut uring = Uring::new(case.depth as u32)?;
    let id = uring.add_file(file.into());
    let mut offsets = Offsets::new(case, seed);
    let mut idle: Vec<PrivateBuf> =
        (0..case.depth).map(|_| PrivateBuf::page_aligned(case.bytes)).collect();
    let mut requests = 0;
    let begin = Instant::now();
    while begin.elapsed() < SLICE {
        for buf in idle.drain(..) {
            let at = offsets.next();
            let begun = if case.write {
                uring.write(id, at, [whole(buf)], 0)
            } else {
                uring.read(id, at, [whole(buf)], 0)
            };
            ensure!(begun.is_ok(), "more requests than slots");
        }
        uring.wait(None)?;
        let mut failed = None;
        requests += uring.reap(|done| {
            if done.result != Ok(case.bytes as u32) {
                failed = Some(done.result);
            }
            idle.extend(done.segments.drain(..).map(|s| s.buf));
        }) as u64;
        ensure!(failed.is_none(), "raw io_uring: {failed:?}");
    }
    Ok(rate(case, Done { count: requests, time: begin.elapsed() }))
}

/// A disk attached through the hosted hypervisor. Fields are dropped in this order: the backend's
/// worker stops before the frontend revokes its grants.
pub struct Attached {
    _worker: Worker,
    front: Queue<Domain>,
    _driver: Domain,
    _hypervisor: Hypervisor,
    spin: Spin,
}

impl Attached {
    /// Attaches the image for a case.
    ///
    /// # Errors
    /// A part of the path cannot be set up.
    pub fn new(dir: &Path, image: &Path, case: &Case) -> Result<Self> {
        let hypervisor = Hypervisor::start(dir.join("state"))?;
        let guest_id = hypervisor.create_domain(guest_config())?;
        let driver_id = hypervisor.create_domain(DomainConfig::new("driver"))?;
        let guest = Domain::join(dir.join("state"), guest_id)?;
        let driver = Domain::join(dir.join("state"), driver_id)?;
        let front = Queue::with_shape(guest, driver_id, 51712, case.shape())?;
        let options = ImageOptions { read_only: !case.write, direct: case.direct };
        let image = Image::open(image, options)?;
        let ring = driver.map(guest_id, front.ring_grefs(), Access::ReadWrite)?;
        let ring = BackRing::attach(ring, Abi::X86_64.slot_size())?;
        let record = QueueRecord::private(&ring, Abi::X86_64)?;
        let parts = QueueParts {
            frontend: guest_id,
            disk: Arc::new(DiskState::new(image.geometry())),
            grants: driver.clone(),
            data_path: case.path,
            ring,
            channel: driver.bind_interdomain(guest_id, front.channel().port())?,
            abi: Abi::X86_64,
            max_indirect_segments: 256,
            record,
            stats: Arc::new(Stats::default()),
        };
        // A thread inherits the affinity of its creator.
        pin(1);
        let worker = worker::start("bench-disk", parts, Arc::new(image), Arc::new(|| ()))?;
        pin(0);
        let spin = Spin::default();
        Ok(Self { _worker: worker, front, _driver: driver, _hypervisor: hypervisor, spin })
    }

    /// Submits requests until the run is over, and waits for all responses.
    ///
    /// # Errors
    /// A request fails.
    pub fn drive(&mut self, case: &Case, seed: u64, until: Until) -> Result<Done> {
        pin(0);
        Load { front: &mut self.front, spin: &mut self.spin, case }
            .drive(seed, |begin, requests| until.is_over(begin, requests))
    }
}

/// A frontend's queue, and the workload that it submits.
pub struct Load<'a> {
    /// The queue; no slot is in use.
    pub front: &'a mut Queue<Domain>,
    /// State of the frontend's busy polling.
    pub spin: &'a mut Spin,
    /// The workload.
    pub case: &'a Case,
}

impl Load<'_> {
    /// Submits requests until the run is over, and waits for all responses. `is_over` is called with
    /// the time of the start and the number of responses.
    ///
    /// # Errors
    /// A request fails.
    pub fn drive(
        &mut self,
        seed: u64,
        mut is_over: impl FnMut(Instant, u64) -> bool,
    ) -> Result<Done> {
        let case = self.case;
        let mut offsets = Offsets::new(case, seed);
        let mut idle: Vec<SlotId> = Vec::with_capacity(case.depth);
        while idle.len() < case.depth {
            idle.push(self.front.reserve().context("more requests than slots")?);
        }
        let mut requests = 0;
        let begin = Instant::now();
        while !is_over(begin, requests) {
            for slot in idle.drain(..) {
                let (sector, bytes) = (offsets.next() / 512, case.bytes);
                let op = if case.write {
                    Op::Write { sector, bytes }
                } else {
                    Op::Read { sector, bytes }
                };
                self.front.start(slot, op)?;
            }
            self.front.publish()?;
            requests += self.answers(case.wait, &mut idle)?;
        }
        let time = begin.elapsed();
        while self.front.in_flight() > 0 {
            self.answers(case.wait, &mut idle)?;
        }
        for slot in idle {
            self.front.release(slot);
        }
        Ok(Done { count: requests, time })
    }

    /// Waits for at least one response.
    fn answers(&mut self, wait: Wait, idle: &mut Vec<SlotId>) -> Result<u64> {
        let front = &mut *self.front;
        match wait {
            Wait::Spin => while !front.has_answers()? {},
            Wait::Hybrid if self.spin.until(|| front.has_answers())? => {}
            Wait::Hybrid | Wait::Sleep => {
                while !front.final_check()? {
                    self.spin.sleeping();
                    front.channel().wait(None)?;
                    front.channel().take()?;
                }
            }
        }
        let mut failed = 0;
        let count = front.poll(|slot, _, status| {
            failed += u64::from(status != Status::Okay);
            idle.push(slot);
        })?;
        ensure!(failed == 0, "{failed} requests failed");
        Ok(count as u64)
    }
}
