//! The memory that queues use with the largest ring is measured: anonymous memory of this process
//! as counted by the kernel. The guest's pages are shared memory, and not included.
//!
//! Each case runs in its own process, because freed memory may stay with the process.

use pvio_blkback::{DataPath, DiskState, QueueParts, QueueRecord, Stats};
use pvio_blkfront::{Op, Queue, Shape};
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{Access, GrantMapper};
use pvio_hosted::{Domain, DomainConfig, Hypervisor};
use pvio_ring::BackRing;
use pvio_ring::proto::blkif::{Abi, Status};
use pvio_storage::engine::faults::{FaultPlan, FaultSwitch};
use pvio_storage::image::{Image, ImageOptions};
use pvio_storage::worker::{self, Worker};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

const QUEUES: usize = 4;
const RING_PAGES: usize = 32;
/// Maximum memory of a queue.
const MOST: usize = 16 << 20;

/// Returns the current bytes of anonymous memory.
fn anonymous() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    let kib: usize = line.trim().trim_end_matches(" kB").parse().unwrap();
    kib << 10
}

/// Returns the maximum memory of a queue while it serves requests of `pages` pages in all slots.
fn most_held(path: DataPath, shape: Shape, pages: usize) -> usize {
    let dir = tempfile::tempdir().unwrap();
    let hypervisor = Hypervisor::start(dir.path().join("state")).unwrap();
    let slots = RING_PAGES * 32;
    let memory = slots * (shape.pages_per_slot + 1) + RING_PAGES + 1024;
    let driver_id = hypervisor.create_domain(DomainConfig::new("driver")).unwrap();
    let join = |id| Domain::join(hypervisor.state_dir(), id).unwrap();
    let driver = join(driver_id);
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(64 << 20).unwrap();
    // All of them are in flight together, because none completes before all were taken.
    let plan = FaultPlan { latency: Duration::from_millis(200), ..FaultPlan::default() };
    let image = Image::open(file.path(), ImageOptions::default())
        .unwrap()
        .with_faults(Arc::new(FaultSwitch::new(plan)), 1);
    let (disk, image) = (Arc::new(DiskState::new(image.geometry())), Arc::new(image));
    // Each has its own guest, because one guest does not have enough grants.
    let guests: Vec<_> = (0..QUEUES)
        .map(|n| {
            let config = DomainConfig::new(format!("guest{n}"));
            let config = config.memory_pages(memory as u32).grant_frames(64);
            hypervisor.create_domain(config).unwrap()
        })
        .collect();
    let mut queues: Vec<Queue<Domain>> = guests
        .iter()
        .map(|id| Queue::with_shape(join(*id), driver_id, 51712, shape).unwrap())
        .collect();
    let before = anonymous();
    let workers: Vec<Worker> = queues
        .iter()
        .zip(guests)
        .map(|(queue, guest_id)| {
            let ring = driver.map(guest_id, queue.ring_grefs(), Access::ReadWrite).unwrap();
            let ring = BackRing::attach(ring, Abi::X86_64.slot_size()).unwrap();
            let record = QueueRecord::private(&ring, Abi::X86_64).unwrap();
            let parts = QueueParts {
                frontend: guest_id,
                disk: Arc::clone(&disk),
                grants: driver.clone(),
                data_path: path,
                ring,
                channel: driver.bind_interdomain(guest_id, queue.channel().port()).unwrap(),
                abi: Abi::X86_64,
                max_indirect_segments: 4096,
                record,
                stats: Arc::new(Stats::default()),
            };
            worker::start("memory", parts, Arc::clone(&image), Arc::new(|| ())).unwrap()
        })
        .collect();
    let mut most = 0;
    // Writes, then reads of the written data; with everything grown the second time.
    for write in [true, false] {
        for queue in &mut queues {
            while let Some(slot) = queue.reserve() {
                let (sector, bytes) = ((slot.index() % 8 * 8 * pages) as u64, pages * 4096);
                let op =
                    if write { Op::Write { sector, bytes } } else { Op::Read { sector, bytes } };
                queue.start(slot, op).unwrap();
            }
            queue.publish().unwrap();
        }
        let begin = Instant::now();
        let mut left = QUEUES * slots;
        while left > 0 {
            assert!(
                begin.elapsed() < Duration::from_secs(300),
                "{left} requests without a response"
            );
            for queue in &mut queues {
                let mut done = Vec::new();
                let each = |slot, _, status| {
                    assert_eq!(status, Status::Okay);
                    done.push(slot);
                };
                left -= queue.poll(each).unwrap();
                done.into_iter().for_each(|slot| queue.release(slot));
                let _ = queue.final_check().unwrap();
            }
            most = most.max(anonymous().saturating_sub(before));
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    drop(workers);
    most / QUEUES
}

/// Selects the case in the process that this test starts.
const CASE: &str = "PVIO_TEST_MEMORY_CASE";

#[test]
fn queue_with_deepest_ring_uses_at_most_16_mib() {
    // As many pages as all slots may use together, and requests that need far more than the limit.
    let cases =
        DataPath::ALL.map(|path| [(11, 4), (20, 20)].map(|(slot, pages)| (path, slot, pages)));
    let cases = cases.as_flattened();
    if let Ok(case) = std::env::var(CASE) {
        let (path, pages_per_slot, pages) = cases[case.parse::<usize>().unwrap()];
        let held = most_held(path, Shape { ring_pages: RING_PAGES, pages_per_slot }, pages);
        println!("{path}, requests of {pages} pages: {} KiB a queue", held >> 10);
        assert!(held < MOST, "{path}, {pages} pages: {held} bytes a queue");
        // The measurement works. The minimum is the lists of 1024 slots and, where data is copied,
        // the pool; with cached mappings, only if not all pages are cached.
        let copies = path.copies() && (!path.caches() || pages > 4);
        let least = if copies { 8 << 20 } else { 512 << 10 };
        assert!(held > least, "{path}, {pages} pages: only {held} bytes a queue");
        return;
    }
    let name = "queue_with_deepest_ring_uses_at_most_16_mib";
    for case in 0..cases.len() {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", name, "--nocapture"]).env(CASE, case.to_string());
        let out = command.output().unwrap();
        let said = String::from_utf8_lossy(&out.stdout);
        print!("{said}");
        assert!(out.status.success(), "{said}{}", String::from_utf8_lossy(&out.stderr));
        assert!(said.contains("KiB a queue"), "case was not run: {said}");
    }
}
