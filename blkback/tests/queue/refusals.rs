//! Invalid requests and their responses.

use crate::rig::{Hostile, Mem, PATHS, SECTORS, raw};
use pvio_blkback::DataPath;
use pvio_ring::proto::blkif::{Abi, RefusalReason, Response, Status};

#[test]
fn bad_requests_get_status_of_existing_backends_and_are_counted() {
    PATHS.into_iter().for_each(bad_requests);
}

fn bad_requests(path: DataPath) {
    use RefusalReason as R;
    // Cached mappings are writable, and serve reads as well.
    let kept = path.caches();
    let (okay, error, unknown) = (Status::Okay, Status::Error, Status::NotSupported);
    let mut h = Hostile::new(path, Abi::X86_64, Mem::zeroed(SECTORS));
    let (g, ro) = (h.data.0, h.readonly.0);
    let last = SECTORS as u64 - 8;
    let cases: Vec<(&str, Vec<u8>, Status, Option<R>)> = vec![
        ("valid read", raw(0, 1, 0, &[(g, 0, 7)]), okay, None),
        ("read of the last sectors", raw(0, 1, last, &[(g, 0, 7)]), okay, None),
        (
            "range one sector beyond the end",
            raw(0, 1, last + 1, &[(g, 0, 7)]),
            error,
            Some(R::OutOfRange),
        ),
        ("sector 2^64 - 1", raw(0, 1, u64::MAX, &[(g, 0, 7)]), error, Some(R::OutOfRange)),
        ("reserved operation 4", raw(4, 1, 0, &[(g, 0, 7)]), unknown, Some(R::UnknownOperation)),
        ("operation 255", raw(255, 1, 0, &[(g, 0, 7)]), unknown, Some(R::UnknownOperation)),
        ("no segments", raw(0, 0, 0, &[]), error, Some(R::SegmentCount)),
        ("12 segments", raw(0, 12, 0, &[(g, 0, 7); 11]), error, Some(R::SegmentCount)),
        ("255 segments", raw(1, 255, 0, &[(g, 0, 7); 11]), error, Some(R::SegmentCount)),
        ("inverted segment", raw(0, 1, 0, &[(g, 5, 4)]), error, Some(R::SegmentBounds)),
        ("segment beyond its page", raw(0, 1, 0, &[(g, 0, 8)]), error, Some(R::SegmentBounds)),
        ("reference not granted", raw(0, 1, 0, &[(400, 0, 7)]), error, Some(R::Grant)),
        ("reference beyond the table", raw(0, 1, 0, &[(u32::MAX, 0, 7)]), error, Some(R::Grant)),
        (
            "one of two references not granted",
            raw(0, 2, 0, &[(g, 0, 7), (400, 0, 7)]),
            error,
            Some(R::Grant),
        ),
        ("reading into a read-only grant", raw(0, 1, 0, &[(ro, 0, 7)]), error, Some(R::Grant)),
        (
            "writing from a read-only grant",
            raw(1, 1, 0, &[(ro, 0, 7)]),
            if kept { error } else { okay },
            kept.then_some(R::Grant),
        ),
        ("flush without data", raw(3, 0, 0, &[]), okay, None),
        ("flush with data", raw(3, 1, 0, &[(g, 0, 7)]), okay, None),
        ("barrier without data", raw(2, 0, 0, &[]), okay, None),
        ("barrier with data", raw(2, 1, 0, &[(g, 0, 7)]), okay, None),
    ];
    for (what, request, status, reason) in cases {
        let before = reason.map(|r| h.refused(r));
        let answer = h.ask(&request);
        assert_eq!(
            (answer.status, answer.id, answer.op),
            (status, 7, request[0]),
            "{what}, {path}"
        );
        if let (Some(reason), Some(before)) = (reason, before) {
            assert_eq!(h.refused(reason), before + 1, "{what} is counted, {path}");
        }
    }
}

#[test]
fn read_only_disk_rejects_writes_and_discards() {
    let mut h = Hostile::new(DataPath::Map, Abi::X86_64, Mem::zeroed(SECTORS).read_only());
    let g = h.data.0;
    assert_eq!(h.ask(&raw(0, 1, 0, &[(g, 0, 7)])).status, Status::Okay);
    assert_eq!(h.ask(&raw(3, 0, 0, &[])).status, Status::Okay);
    for (op, count) in [(1, 1), (2, 1), (3, 1), (5, 0)] {
        assert_eq!(h.ask(&raw(op, count, 0, &[(g, 0, 7)])).status, Status::Error, "operation {op}");
    }
}

#[test]
fn discard_inside_disk_succeeds_and_beyond_end_fails() {
    let mut h = Hostile::new(DataPath::Map, Abi::X86_64, Mem::zeroed(SECTORS));
    let discard = |sector: u64, sectors: u64, secure| {
        let mut bytes = raw(5, secure, sector, &[]);
        bytes[24..32].copy_from_slice(&sectors.to_le_bytes());
        bytes
    };
    assert_eq!(h.ask(&discard(0, 8, 0)).status, Status::Okay);
    assert_eq!(
        h.ask(&discard(0, 8, 1)).status,
        Status::Okay,
        "secure discard succeeds as with Linux"
    );
    assert_eq!(h.ask(&discard(0, SECTORS as u64 + 1, 0)).status, Status::Error);
    assert_eq!(h.ask(&discard(u64::MAX, u64::MAX, 0)).status, Status::Error);
}

#[test]
fn producer_index_overflow_is_queue_fault() {
    use pvio_ring::shm::Region;
    let mut h = Hostile::new(DataPath::Map, Abi::X86_64, Mem::zeroed(SECTORS));
    h.ring.memory().store_u32(0, 1000, std::sync::atomic::Ordering::Release);
    let fault = h.back.poll(32).unwrap_err();
    assert_eq!(fault.code(), "ring-producer-overflow");
}

#[test]
fn request_in_32_bit_layout_is_decoded() {
    let mut h = Hostile::new(DataPath::Map, Abi::X86_32, Mem::zeroed(SECTORS));
    let g = h.data.0;
    let native = raw(0, 1, 8, &[(g, 0, 7)]);
    // The same fields without the padding before `id`.
    let mut packed = native[..4].to_vec();
    packed.extend(&native[8..108]);
    packed.resize(108, 0);
    assert_eq!(h.ask(&packed), Response { id: 7, op: 0, status: Status::Okay });
}
