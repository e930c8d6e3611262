//! pvio's frontend with backends whose limits are lower than what its slots hold.

use crate::rig::{Mem, PATHS, large, run};
use pvio_blkback::DataPath;
use pvio_blkfront::{BackendFault, FlushBy, Op, Queue, QueueLimits, Shape, SlotId};
use pvio_ring::proto::blkif::Status;
use pvio_sim::LocalDomain;

type Front = Queue<LocalDomain>;

/// Returns the responses to all requests in flight, in the order of their slots.
fn answers(front: &mut Front, back: &mut crate::rig::Backend) -> Vec<(SlotId, Status)> {
    let mut all = Vec::new();
    loop {
        run(back);
        let count = front.poll(|slot, _, status| all.push((slot, status))).unwrap();
        if count == 0 && front.in_flight() == 0 {
            all.sort_by_key(|(slot, _)| slot.index());
            return all;
        }
    }
}

fn one(front: &mut Front, back: &mut crate::rig::Backend, op: Op) -> Status {
    let slot = front.reserve().unwrap();
    front.start(slot, op).unwrap();
    front.publish().unwrap();
    let [(answered, status)] = answers(front, back).try_into().unwrap();
    assert_eq!(answered, slot);
    front.release(slot);
    status
}

#[test]
fn frontend_splits_request_at_backend_segment_limit() {
    for path in PATHS {
        let shape = Shape { ring_pages: 1, pages_per_slot: 64 };
        let (_machine, mut front, mut back) = large(path, shape, Mem::zeroed(32 * 8 * 64));
        // Parts of 11 pages: 6 for each slot, so that most of them do not fit into the ring.
        front.limit(QueueLimits { segments: 0, sector_size: 4096, ..QueueLimits::MOST });
        assert_eq!(front.limits().segments, 11);
        let content = |slot: usize| -> Vec<u8> {
            (0..256 << 10).map(|i: usize| (i / 512 * 3 + slot) as u8).collect()
        };
        for write in [true, false] {
            while let Some(slot) = front.reserve() {
                // Not all requests have the maximum length.
                let bytes = (64 - slot.index() % 64) * 4096;
                let sector = slot.index() as u64 * 512;
                let op =
                    if write { Op::Write { sector, bytes } } else { Op::Read { sector, bytes } };
                let data = if write { content(slot.index()) } else { vec![0; bytes] };
                front.fill(slot, 0, &data[..bytes]).unwrap();
                front.start(slot, op).unwrap();
                assert!(front.in_flight() <= 32);
            }
            front.publish().unwrap();
            let done = answers(&mut front, &mut back);
            assert_eq!(done.len(), 32, "{path}");
            for (slot, status) in done {
                assert_eq!(status, Status::Okay, "{path}");
                let bytes = (64 - slot.index() % 64) * 4096;
                let mut seen = vec![0; bytes];
                front.fetch(slot, 0, &mut seen).unwrap();
                assert!(seen == content(slot.index())[..bytes], "{path}, slot {}", slot.index());
                front.release(slot);
            }
        }
        let requests: u64 = (33..=64).map(|pages: u64| pages.div_ceil(11)).sum();
        let stats = back.stats();
        assert_eq!((stats.writes.get(), stats.reads.get()), (requests, requests), "{path}");
    }
}

#[test]
fn split_request_with_failed_part_fails_as_a_whole() {
    let shape = Shape { ring_pages: 1, pages_per_slot: 64 };
    // The fourth part of 11 pages is beyond the end.
    let (_machine, mut front, mut back) = large(DataPath::Map, shape, Mem::zeroed(8 * 33));
    front.limit(QueueLimits { segments: 0, ..QueueLimits::MOST });
    let whole = Op::Write { sector: 0, bytes: 64 * 4096 };
    assert_eq!(one(&mut front, &mut back, whole), Status::Error);
    assert_eq!(back.stats().writes.get(), 3);
    // If the ring has no room for the rest of a request, the rest is not submitted.
    let slots: Vec<SlotId> = std::iter::from_fn(|| front.reserve()).collect();
    for slot in &slots {
        front.start(*slot, Op::Read { sector: 8 * 33, bytes: 64 * 4096 }).unwrap();
    }
    front.publish().unwrap();
    let done = answers(&mut front, &mut back);
    assert_eq!(done.len(), slots.len());
    assert!(done.iter().all(|(_, status)| *status == Status::Error));
    // Nothing of it is left over.
    for slot in slots {
        front.release(slot);
    }
    let part = Op::Write { sector: 0, bytes: 33 * 4096 };
    assert_eq!(one(&mut front, &mut back, part), Status::Okay);
    assert_eq!(back.stats().writes.get(), 6);
}

#[test]
fn frontend_completes_unsupported_operations_without_backend() {
    let shape = Shape::LEAST;
    let (_machine, mut front, mut back) = large(DataPath::Map, shape, Mem::zeroed(64));
    let (discard, secure) =
        (Op::Discard { sector: 0, sectors: 8 }, Op::SecureDiscard { sector: 0, sectors: 8 });
    let write = Op::Write { sector: 0, bytes: 512 };
    let all = |limits: QueueLimits| -> [(Op, Status); 4] {
        use Status::{Error, NotSupported, Okay};
        let changes = |offered| match (limits.read_only, offered) {
            (true, _) => Error,
            (false, true) => Okay,
            (false, false) => NotSupported,
        };
        let flush = if limits.flush == FlushBy::Nothing { NotSupported } else { Okay };
        [
            (discard, changes(limits.discard)),
            (secure, changes(limits.secure_discard)),
            (write, changes(true)),
            (Op::Flush, flush),
        ]
    };
    let most = QueueLimits::MOST;
    for (limits, asked) in [
        (most, 4),
        (QueueLimits { secure_discard: false, ..most }, 3),
        (QueueLimits { discard: false, secure_discard: false, ..most }, 2),
        (QueueLimits { flush: FlushBy::Nothing, ..most }, 3),
        (QueueLimits { flush: FlushBy::Barrier, ..most }, 4),
        (QueueLimits { read_only: true, ..most }, 1),
    ] {
        front.limit(limits);
        let before =
            back.stats().discards.get() + back.stats().writes.get() + back.stats().flushes.get();
        let barriers = back.stats().writes.get();
        for (op, status) in all(limits) {
            let slot = front.reserve().unwrap();
            front.start(slot, op).unwrap();
            let here = front.in_flight() == 0;
            assert_eq!(
                front.final_check().unwrap(),
                here,
                "final check reports a local completion"
            );
            assert_eq!(front.has_answers().unwrap(), here);
            front.publish().unwrap();
            let [(answered, got)] = answers(&mut front, &mut back).try_into().unwrap();
            assert_eq!((answered, got), (slot, status), "{op:?}, {limits:?}");
            front.release(slot);
        }
        let stats = back.stats();
        let after = stats.discards.get() + stats.writes.get() + stats.flushes.get();
        assert_eq!(after - before, asked, "{limits:?}");
        if limits.flush == FlushBy::Barrier {
            assert_eq!(stats.writes.get() - barriers, 2, "the write, and a barrier for the flush");
        }
    }
}

#[test]
fn response_to_request_not_yet_submitted_is_backend_fault() {
    use pvio_ring::proto::blkif::{Abi, Response};
    let shape = Shape { ring_pages: 1, pages_per_slot: 64 };
    let (_machine, mut front, back) = large(DataPath::Map, shape, Mem::zeroed(8 * 64));
    front.limit(QueueLimits { segments: 0, ..QueueLimits::MOST });
    let slots: Vec<SlotId> = (0..7).map(|_| front.reserve().unwrap()).collect();
    for slot in &slots {
        front.start(*slot, Op::Read { sector: 0, bytes: 64 * 4096 }).unwrap();
    }
    front.publish().unwrap();
    drop(back);
    // 32 requests: six of each of five slots, two of the sixth slot, and none of the last one.
    let last = slots[6].index() as u64;
    let machine = _machine;
    let driver = machine.domain(crate::rig::BACK);
    use pvio_grant_table::{Access, GrantMapper};
    let ring = driver.map(crate::rig::FRONT, front.ring_grefs(), Access::ReadWrite).unwrap();
    let mut ring = pvio_ring::BackRing::attach(ring, Abi::X86_64.slot_size()).unwrap();
    for _ in 0..32 {
        assert!(ring.pop().unwrap().is_some());
    }
    let mut bytes = [0; 16];
    let response = Response { id: last, op: 0, status: Status::Okay };
    ring.push(response.write(Abi::X86_64, &mut bytes)).unwrap();
    let _ = ring.publish();
    assert_eq!(front.poll(|_, _, _| ()), Err(BackendFault::UnknownId(last)));
}

#[test]
fn released_buffer_is_zeroed_only_if_wiping_is_enabled() {
    for wipes in [false, true] {
        let (_machine, mut front, _back) = large(DataPath::Map, Shape::LEAST, Mem::zeroed(64));
        front.wipe(wipes);
        let slot = front.reserve().unwrap();
        let all = front.slot_bytes();
        front.fill(slot, 0, &vec![0x6b; all]).unwrap();
        front.release(slot);
        let again = front.reserve().unwrap();
        assert_eq!(again, slot, "slot is the last released one");
        let mut seen = vec![1; all];
        front.fetch(again, 0, &mut seen).unwrap();
        let expected = if wipes { 0 } else { 0x6b };
        assert!(seen.iter().all(|b| *b == expected), "wipes: {wipes}");
    }
}
