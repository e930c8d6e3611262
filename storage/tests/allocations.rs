//! A queue that has served every kind of request makes no further allocations. They are counted on
//! every data path, with a real io_uring and the hosted platform, driven on the test's own thread.

use pvio_blkback::{DataPath, DiskState, Progress, QueueParts, QueueRecord, Stats};
use pvio_blkfront::{FlushBy, Op, Queue, QueueLimits, Shape};
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{Access, GrantMapper};
use pvio_hosted::{Domain, DomainConfig, Hypervisor};
use pvio_ring::BackRing;
use pvio_ring::proto::blkif::{Abi, Status};
use pvio_storage::engine::wait::WaitEngine;
use pvio_storage::image::{Image, ImageOptions};
use std::sync::Arc;

const DISK: u64 = 16 << 20;
/// Pages of a slot: requests of this size are indirect.
const PAGES: usize = 64;

/// Fills the ring with requests of every kind and size. Returns their number.
fn ask(front: &mut Queue<Domain>, round: u64) -> usize {
    let sectors = DISK / 512;
    let mut asked = 0;
    while let Some(slot) = front.reserve() {
        let n = round * 32 + asked as u64;
        let bytes = [512, 4096, 45056, PAGES * 4096][asked % 4];
        let sector = n * 97 % (sectors - 512);
        let op = match asked % 7 {
            0..=2 => Op::Read { sector, bytes },
            3 | 4 => Op::Write { sector, bytes },
            5 => Op::Discard { sector, sectors: 8 },
            _ => Op::Flush,
        };
        front.start(slot, op).unwrap();
        asked += 1;
    }
    front.publish().unwrap();
    asked
}

/// Returns the number of allocations while `rounds` full rings of requests are served.
fn allocations(path: DataPath, warm_up: u64, rounds: u64) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let hypervisor = Hypervisor::start(dir.path().join("state")).unwrap();
    let driver_id = hypervisor.create_domain(DomainConfig::new("driver")).unwrap();
    let guest_id = hypervisor.create_domain(DomainConfig::new("guest")).unwrap();
    let join = |id| Domain::join(hypervisor.state_dir(), id).unwrap();
    let (driver, guest) = (join(driver_id), join(guest_id));
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(DISK).unwrap();
    let image = Image::open(file.path(), ImageOptions::default()).unwrap();
    let shape = Shape { ring_pages: 1, pages_per_slot: PAGES };
    let mut front = Queue::with_shape(guest, driver_id, 51712, shape).unwrap();
    front.limit(QueueLimits {
        segments: PAGES,
        flush: FlushBy::Flush,
        discard: true,
        ..front.limits()
    });
    let ring = driver.map(guest_id, front.ring_grefs(), Access::ReadWrite).unwrap();
    let ring = BackRing::attach(ring, Abi::X86_64.slot_size()).unwrap();
    let slots = ring.layout().slots();
    let record = QueueRecord::private(&ring, Abi::X86_64).unwrap();
    let parts = QueueParts {
        frontend: guest_id,
        disk: Arc::new(DiskState::new(image.geometry())),
        grants: driver.clone(),
        data_path: path,
        ring,
        channel: driver.bind_interdomain(guest_id, front.channel().port()).unwrap(),
        abi: Abi::X86_64,
        max_indirect_segments: PAGES as u32,
        record,
        stats: Arc::new(Stats::default()),
    };
    let mut back = pvio_blkback::Queue::new(parts, image.engine(slots).unwrap());
    let mut counted = 0;
    for round in 0..warm_up + rounds {
        let asked = ask(&mut front, round);
        let served = allocation_counter::measure(|| {
            while back.poll(128).unwrap() == Progress::Some || back.in_flight() > 0 {
                if back.in_flight() > 0 {
                    back.engine_mut().wait_due(None).unwrap();
                }
            }
        });
        if round >= warm_up {
            counted += served.count_total;
        }
        let mut over = Vec::new();
        front.poll(|slot, _, status| over.push((slot, status))).unwrap();
        assert_eq!(over.len(), asked);
        for (slot, status) in over {
            assert_eq!(status, Status::Okay);
            front.release(slot);
        }
        let _ = front.channel().take();
    }
    counted
}

#[test]
fn warm_queue_allocates_nothing_per_request_on_every_data_path() {
    const ROUNDS: u64 = 64;
    // A list may still have to grow beyond its previous maximum. This happens only a few times,
    // while one allocation for each request of any kind would be hundreds.
    const GROWTH: u64 = 4;
    for path in DataPath::ALL {
        // The counter works: the first round does allocate.
        assert!(allocations(path, 0, 1) > GROWTH, "{path:?}");
        let more = allocations(path, 8, ROUNDS);
        assert!(more <= GROWTH, "{path:?}: {more} allocations for {} requests", 32 * ROUNDS);
    }
}
