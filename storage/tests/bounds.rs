//! The maximum memory that a queue allocates is measured for every kind of storage, with the
//! largest ring and the maximum number of requests in flight.

#[path = "support/mod.rs"]
mod support;

use pvio_blkback::{DataPath, DiskState, Progress, QueueParts, QueueRecord, Stats};
use pvio_blkfront::{Op, Queue, Shape};
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{Access, GrantMapper};
use pvio_hosted::{Domain, DomainConfig, Hypervisor};
use pvio_ring::BackRing;
use pvio_ring::proto::blkif::{Abi, Status};
use pvio_storage::engine::faults::{FaultPlan, FaultSwitch};
use pvio_storage::engine::wait::WaitEngine;
use pvio_storage::image::{Disk, Image};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::{has, text, tool};

/// The bound in docs/vbd.md.
const MOST: u64 = 14 << 20;
const DISK: u64 = 16 << 20;
const RING_PAGES: usize = 32;
/// Pages of a request: all requests together need far more than the limit.
const PAGES: usize = 20;

/// Returns the maximum bytes allocated at a time by the thread that serves a queue of this disk.
fn most_allocated(disk: &str, path: DataPath, writes: bool) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let hypervisor = Hypervisor::start(dir.path().join("state")).unwrap();
    let slots = RING_PAGES * 32;
    let shape = Shape { ring_pages: RING_PAGES, pages_per_slot: PAGES };
    let memory = slots * (PAGES + 1) + RING_PAGES + 1024;
    let driver_id = hypervisor.create_domain(DomainConfig::new("driver")).unwrap();
    let config = DomainConfig::new("guest").memory_pages(memory as u32).grant_frames(64);
    let guest_id = hypervisor.create_domain(config).unwrap();
    let join = |id| Domain::join(hypervisor.state_dir(), id).unwrap();
    let (driver, guest) = (join(driver_id), join(guest_id));
    // No request completes before all that fit were taken.
    let plan = FaultPlan { latency: Duration::from_millis(50), ..FaultPlan::default() };
    let image = Image::open_as(&disk.parse::<Disk>().unwrap()).unwrap();
    let image = image.with_faults(Arc::new(FaultSwitch::new(plan)), 1);
    let mut front = Queue::with_shape(guest, driver_id, 51712, shape).unwrap();
    let ring = driver.map(guest_id, front.ring_grefs(), Access::ReadWrite).unwrap();
    let ring = BackRing::attach(ring, Abi::X86_64.slot_size()).unwrap();
    let record = QueueRecord::private(&ring, Abi::X86_64).unwrap();
    let channel = driver.bind_interdomain(guest_id, front.channel().port()).unwrap();
    let served = allocation_counter::measure(|| {
        let parts = QueueParts {
            frontend: guest_id,
            disk: Arc::new(DiskState::new(image.geometry())),
            grants: driver.clone(),
            data_path: path,
            ring,
            channel,
            abi: Abi::X86_64,
            max_indirect_segments: PAGES as u32,
            record,
            stats: Arc::new(Stats::default()),
        };
        let engine = image.engine(slots as u32).unwrap();
        let mut back = pvio_blkback::Queue::new(parts, engine);
        let end = Instant::now() + Duration::from_secs(300);
        // Twice: memory of grown lists must not accumulate.
        for write in [writes, false, writes, false] {
            let mut asked = 0;
            while let Some(slot) = front.reserve() {
                let (sector, bytes) = ((slot.index() % 8 * 8 * PAGES) as u64, PAGES * 4096);
                let op =
                    if write { Op::Write { sector, bytes } } else { Op::Read { sector, bytes } };
                front.start(slot, op).unwrap();
                asked += 1;
            }
            assert_eq!(asked, slots);
            front.publish().unwrap();
            let mut over = Vec::with_capacity(slots);
            while over.len() < slots {
                assert!(Instant::now() < end, "{} of {slots} are done", over.len());
                if back.poll(128).unwrap() == Progress::None {
                    back.engine_mut().wait_due(Some(Duration::from_millis(100))).unwrap();
                }
                front.poll(|slot, _, status| over.push((slot, status))).unwrap();
            }
            for (slot, status) in over {
                assert_eq!(status, Status::Okay);
                front.release(slot);
            }
            let _ = front.channel().take();
        }
    });
    served.bytes_max
}

fn check(name: &str, disk: &str, writes: bool) {
    for path in [DataPath::Map, DataPath::Copy] {
        let most = most_allocated(disk, path, writes);
        println!("{name}, {path}: {} KiB", most >> 10);
        assert!(most < MOST, "{name}, {path}: {most} bytes");
        // The counter works.
        assert!(most > 512 << 10, "{name}, {path}: only {most} bytes");
    }
}

fn sparse(dir: &Path) -> String {
    let path = dir.join("disk.img");
    std::fs::File::create(&path).unwrap().set_len(DISK).unwrap();
    text(&path).to_owned()
}

#[test]
fn queue_of_raw_disk_uses_bounded_memory() {
    let dir = tempfile::tempdir().unwrap();
    check("raw", &format!("raw:{}", sparse(dir.path())), true);
}

#[test]
fn queue_of_ram_disk_uses_bounded_memory() {
    // Writes would count the disk's own memory.
    check("ram", &format!("ram:{DISK}"), false);
}

#[test]
fn queue_of_overlay_uses_bounded_memory() {
    let dir = tempfile::tempdir().unwrap();
    check("overlay", &format!("overlay:raw:{}", sparse(dir.path())), true);
}

#[test]
fn queue_of_every_image_format_uses_bounded_memory() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, format) in [("qcow2", "qcow2"), ("vhd", "vpc"), ("vmdk", "vmdk")] {
        let path = dir.path().join(name);
        tool("qemu-img", &["create", "-q", "-f", format, text(&path), &DISK.to_string()]);
        check(name, &format!("{name}:{}", text(&path)), true);
    }
}

/// A server process that ends with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

#[test]
fn queue_of_nbd_disk_uses_bounded_memory() {
    if !has("qemu-nbd", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (sparse(dir.path()), dir.path().join("socket"));
    let arguments = ["-k", text(&socket), "-x", "disk", "-f", "raw", "-t", "-e", "8", &image];
    let _server = Server(Command::new("qemu-nbd").args(arguments).spawn().unwrap());
    let end = Instant::now() + Duration::from_secs(20);
    while UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < end, "the server does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    check("nbd", &format!("nbd+unix:///disk?socket={}", text(&socket)), true);
}
