//! Tests with pvio's frontend.

use crate::rig::{BACK, FRONT, Mem, PATHS, SECTORS, large, pair, run, serve};
use pvio_blkback::DataPath;
use pvio_blkfront::{Op, Queue as Front, SLOT_BYTES, Shape};
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_ring::proto::blkif::{Abi, Status};
use pvio_sim::LocalMachine;

#[test]
fn writes_of_every_size_read_back_and_leave_no_mapping() {
    PATHS.into_iter().for_each(every_size);
}

fn every_size(path: DataPath) {
    let (machine, mut front, mut back) = pair(path, Mem::zeroed(SECTORS));
    let mut sector = 0;
    for sectors in [1, 7, 8, 9, 16, 87, 88] {
        let bytes = sectors * 512;
        let data: Vec<u8> = (0..bytes).map(|i| (i * 7 + sectors) as u8).collect();
        let slot = front.reserve().unwrap();
        front.fill(slot, 0, &data).unwrap();
        front.start(slot, Op::Write { sector, bytes }).unwrap();
        front.publish().unwrap();
        run(&mut back);
        let answered = front.poll(|_, _, status| assert_eq!(status, Status::Okay)).unwrap();
        assert_eq!(answered, 1);
        front.fill(slot, 0, &[0; SLOT_BYTES]).unwrap();
        front.start(slot, Op::Read { sector, bytes }).unwrap();
        front.publish().unwrap();
        run(&mut back);
        front.poll(|_, _, status| assert_eq!(status, Status::Okay)).unwrap();
        let mut got = vec![0; bytes];
        front.fetch(slot, 0, &mut got).unwrap();
        assert_eq!(got, data, "{sectors} sectors");
        front.release(slot);
        sector += sectors as u64;
    }
    // The ring and, if mappings are cached, the pages of one slot.
    let mapped = if path.caches() { 12 } else { 1 };
    assert_eq!(machine.domain(BACK).pages_mapped(), mapped, "{path}");
    drop(back);
    assert_eq!(machine.domain(BACK).pages_mapped(), 0);
    drop(front);
    assert_eq!(machine.domain(FRONT).pages_granted(), 0);
    assert_eq!(machine.domain(FRONT).pages_allocated(), 0);
}

#[test]
fn batch_of_requests_sends_one_notification_each_way() {
    PATHS.into_iter().for_each(a_batch);
}

fn a_batch(path: DataPath) {
    let (machine, mut front, mut back) = pair(path, Mem::zeroed(SECTORS));
    run(&mut back);
    assert!(!back.final_check().unwrap());
    front.final_check().unwrap();
    let (guest, driver) = (machine.domain(FRONT), machine.domain(BACK));
    let before = (guest.events_sent(), driver.events_sent());
    for _ in 0..front.depth() {
        let slot = front.reserve().unwrap();
        front.start(slot, Op::Read { sector: 0, bytes: 4096 }).unwrap();
    }
    assert!(front.reserve().is_none(), "as many slots as the ring holds");
    front.publish().unwrap();
    run(&mut back);
    assert_eq!((guest.events_sent() - before.0, driver.events_sent() - before.1), (1, 1));
    assert_eq!(front.poll(|_, _, status| assert_eq!(status, Status::Okay)).unwrap(), 32);
}

#[test]
fn requests_without_response_are_resubmitted_to_next_backend() {
    PATHS.into_iter().for_each(replayed);
}

fn replayed(path: DataPath) {
    let (machine, mut front, mut back) = pair(path, Mem::zeroed(SECTORS));
    run(&mut back);
    let mut slots = Vec::new();
    for i in 0..5_u8 {
        let slot = front.reserve().unwrap();
        front.fill(slot, 0, &[i + 1; 1024]).unwrap();
        front.start(slot, Op::Write { sector: u64::from(i) * 2, bytes: 1024 }).unwrap();
        slots.push(slot);
    }
    front.publish().unwrap();
    // The driver domain dies with five requests in the ring.
    drop(back);
    machine.kill(BACK);
    let driver = machine.domain(BACK);
    let mut again = front.replay(BACK).unwrap();
    drop(front);
    again.publish().unwrap();
    let channel = driver.bind_interdomain(FRONT, again.channel().port()).unwrap();
    let mut back =
        serve(driver, again.ring_grefs(), channel, Abi::X86_64, path, 0, Mem::zeroed(SECTORS));
    run(&mut back);
    let mut answered = Vec::new();
    again
        .poll(|slot, _, status| {
            assert_eq!(status, Status::Okay);
            answered.push(slot);
        })
        .unwrap();
    assert_eq!(answered, slots);
    for i in 0..5 {
        let at = i * 1024;
        assert_eq!(back.engine_mut().bytes()[at..at + 1024], [i as u8 + 1; 1024]);
    }
}

#[test]
fn multi_page_ring_of_large_requests_is_served() {
    for path in PATHS {
        let shape = Shape { ring_pages: 4, pages_per_slot: 64 };
        let (machine, mut front, mut back) = large(path, shape, Mem::zeroed(128 * 8 * 64));
        assert_eq!((front.depth(), front.slot_bytes()), (128, 256 << 10));
        let content = |slot: usize| vec![slot as u8 + 1; 256 << 10];
        for write in [true, false] {
            while let Some(slot) = front.reserve() {
                let (sector, bytes) = (slot.index() as u64 * 512, 256 << 10);
                let op =
                    if write { Op::Write { sector, bytes } } else { Op::Read { sector, bytes } };
                let data = if write { content(slot.index()) } else { vec![0; bytes] };
                front.fill(slot, 0, &data).unwrap();
                front.start(slot, op).unwrap();
            }
            front.publish().unwrap();
            run(&mut back);
            let mut done = Vec::new();
            front
                .poll(|slot, _, status| {
                    assert_eq!(status, Status::Okay);
                    done.push(slot);
                })
                .unwrap();
            assert_eq!(done.len(), 128, "{path}");
            for slot in done {
                let mut seen = vec![0; 256 << 10];
                front.fetch(slot, 0, &mut seen).unwrap();
                assert_eq!(seen, content(slot.index()), "{path}");
                front.release(slot);
            }
        }
        let kept = back.cached_mappings();
        assert!(kept <= pvio_blkback::pages::cached_max(128), "{kept}, {path}");
        drop(back);
        drop(front);
        assert_eq!(machine.domain(BACK).pages_mapped(), 0);
        assert_eq!(machine.domain(FRONT).pages_allocated(), 0);
    }
}

#[test]
fn invalid_ring_shapes_are_rejected_and_leave_no_grants() {
    let machine = LocalMachine::new();
    for (ring_pages, pages_per_slot) in [(0, 11), (3, 11), (64, 11), (1, 10), (1, 4097)] {
        let shape = Shape { ring_pages, pages_per_slot };
        assert!(Front::with_shape(machine.domain(FRONT), BACK, 51712, shape).is_err());
    }
    assert_eq!(machine.domain(FRONT).pages_granted(), 0);
    assert_eq!(machine.domain(FRONT).pages_allocated(), 0);
}
