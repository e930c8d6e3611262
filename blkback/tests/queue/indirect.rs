//! Indirect requests, whose segments are in separate pages.

use crate::late::late;
use crate::rig::{BACK, Hostile, INDIRECT, Mem, PATHS, Pages, SECTORS, run};
use pvio_blkback::DataPath;
use pvio_blkback::pages::PAGES_MOST;
use pvio_grant_table::{Access, GrantRef, Granter};
use pvio_ring::proto::blkif::{Abi, RefusalReason, Segment, Status};
use pvio_ring::shm::Region;

/// An indirect request in the native layout: inner operation, count, id, sector, pages.
fn indirect(op: u8, count: u16, id: u64, sector: u64, tables: &[GrantRef]) -> Vec<u8> {
    let mut bytes = vec![6, op];
    bytes.extend(count.to_le_bytes());
    bytes.extend([0xee; 4]);
    bytes.extend(id.to_le_bytes());
    bytes.extend(sector.to_le_bytes());
    bytes.extend([0xee; 4]);
    for gref in tables {
        bytes.extend(gref.0.to_le_bytes());
    }
    bytes.resize(112, 0xff);
    bytes
}

/// A guest with much memory: pages of segments, and the data pages that they refer to.
struct Big {
    tables: Pages,
    table_refs: Vec<GrantRef>,
    data: Pages,
    refs: Vec<GrantRef>,
}

impl Big {
    fn new<E: pvio_blkback::BlockEngine<crate::rig::PageBuf>>(
        h: &Hostile<E>,
        pages: usize,
    ) -> Self {
        let granted = |count| {
            let memory = h.guest.alloc_pages(count).unwrap();
            let grant = |page| h.guest.grant(BACK, &memory, page, Access::ReadWrite).unwrap();
            let refs: Vec<_> = (0..count).map(grant).collect();
            (memory, refs)
        };
        let (tables, table_refs) = granted(pages.div_ceil(512));
        let (data, refs) = granted(pages);
        let big = Self { tables, table_refs, data, refs };
        for i in 0..pages {
            big.set(i, Segment { gref: big.refs[i], first: 0, last: 7 });
        }
        big
    }

    fn set(&self, i: usize, segment: Segment) {
        self.tables.write_bytes(8 * i, &segment.write()).unwrap();
    }
}

fn hostile(path: DataPath) -> Hostile {
    Hostile::new(path, Abi::X86_64, Mem::zeroed(SECTORS))
}

#[test]
fn indirect_requests_of_all_sizes_write_and_read_back() {
    for path in PATHS {
        let mut h = hostile(path);
        let big = Big::new(&h, 512);
        for count in [1, 2, 11, 12, 511, 512] {
            let bytes: Vec<u8> =
                (0..count * 4096).map(|i| (i / 512 * 7 + i + count) as u8).collect();
            big.data.write_bytes(0, &bytes).unwrap();
            let answer = h.ask(&indirect(1, count as u16, 9, 0, &big.table_refs));
            assert_eq!((answer.op, answer.id, answer.status), (1, 9, Status::Okay), "{path}");
            assert_eq!(h.back.engine_mut().bytes()[..bytes.len()], bytes, "{count}, {path}");
            big.data.fill(0, bytes.len(), 0).unwrap();
            let answer = h.ask(&indirect(0, count as u16, 10, 0, &big.table_refs));
            assert_eq!((answer.op, answer.id, answer.status), (0, 10, Status::Okay), "{path}");
            let mut seen = vec![0; bytes.len()];
            big.data.read_bytes(0, &mut seen).unwrap();
            assert_eq!(seen, bytes, "{count}, {path}");
        }
        let moved: u64 = [1, 2, 11, 12, 511, 512].map(|pages| pages * 4096).iter().sum();
        let stats = h.back.stats();
        assert_eq!((stats.read_bytes.get(), stats.written_bytes.get()), (moved, moved));
        drop(h.back);
        assert_eq!(h.driver.pages_mapped(), 0, "{path}");
    }
}

#[test]
fn malformed_indirect_requests_are_rejected_individually() {
    use RefusalReason as R;
    for path in PATHS {
        let mut h = hostile(path);
        let big = Big::new(&h, 600);
        let t = &big.table_refs;
        let bad = [GrantRef(4000)];
        let half = [t[0], GrantRef(u32::MAX)];
        let cases: Vec<(&str, Vec<u8>, u8, R)> = vec![
            ("no segments", indirect(0, 0, 7, 0, t), 0, R::SegmentCount),
            ("one more segment than advertised", indirect(1, 601, 7, 0, t), 1, R::SegmentCount),
            (
                "one more segment than eight pages hold",
                indirect(1, 4097, 7, 0, t),
                1,
                R::SegmentCount,
            ),
            ("maximum number of segments", indirect(0, 0xffff, 7, 0, t), 0, R::SegmentCount),
            ("inner operation flush", indirect(3, 1, 7, 0, t), 3, R::UnknownOperation),
            ("inner operation barrier", indirect(2, 1, 7, 0, t), 2, R::UnknownOperation),
            ("inner operation indirect", indirect(6, 1, 7, 0, t), 6, R::UnknownOperation),
            ("inner operation undefined", indirect(255, 1, 7, 0, t), 255, R::UnknownOperation),
            ("segment page not granted", indirect(0, 1, 7, 0, &bad), 0, R::Grant),
            ("second segment page not granted", indirect(0, 513, 7, 0, &half), 0, R::Grant),
            ("range beyond the end of the disk", indirect(1, 512, 7, 8, t), 1, R::OutOfRange),
            ("largest sector number", indirect(0, 1, 7, u64::MAX, t), 0, R::OutOfRange),
        ];
        for (what, request, op, reason) in cases {
            let before = h.refused(reason);
            let answer = h.ask(&request);
            let expected = (Status::Error, 7, op);
            assert_eq!((answer.status, answer.id, answer.op), expected, "{what}, {path}");
            assert_eq!(h.refused(reason), before + 1, "{what}, {path}");
        }
        // One invalid segment among valid ones.
        for (segment, reason) in [
            (Segment { gref: big.refs[9], first: 5, last: 4 }, R::SegmentBounds),
            (Segment { gref: big.refs[9], first: 0, last: 8 }, R::SegmentBounds),
            (Segment { gref: big.refs[9], first: 255, last: 255 }, R::SegmentBounds),
            (Segment { gref: GrantRef(4000), first: 0, last: 7 }, R::Grant),
        ] {
            big.set(9, segment);
            let before = h.refused(reason);
            assert_eq!(h.ask(&indirect(1, 40, 7, 0, t)).status, Status::Error, "{path}");
            assert_eq!(h.refused(reason), before + 1, "{segment:?}, {path}");
            assert_eq!(h.ask(&indirect(1, 9, 7, 0, t)).status, Status::Okay, "{path}");
        }
        assert!(h.back.engine_mut().bytes()[9 * 4096..].iter().all(|b| *b == 0), "{path}");
        // A page of segments that is also its own data page.
        big.set(0, Segment { gref: t[0], first: 0, last: 7 });
        assert_eq!(h.ask(&indirect(0, 1, 7, 0, t)).status, Status::Okay, "{path}");
        drop(h.back);
        assert_eq!(h.driver.pages_mapped(), 0, "{path}");
    }
}

#[test]
fn indirect_page_changed_after_submission_has_no_effect() {
    for path in PATHS {
        let (mut h, may) = late(path);
        let big = Big::new(&h, 20);
        big.data.fill(0, 20 * 4096, 6).unwrap();
        h.put(&indirect(1, 20, 1, 0, &big.table_refs));
        run(&mut h.back);
        assert_eq!(h.back.in_flight(), 1);
        big.tables.fill(0, 4096, 0xff).unwrap();
        may.set(1);
        run(&mut h.back);
        assert_eq!(h.answer().unwrap().status, Status::Okay, "{path}");
        let disk = h.back.engine_mut().disk();
        assert!(disk[..20 * 4096].iter().all(|b| *b == 6) && disk[20 * 4096] == 0, "{path}");
    }
}

#[test]
fn requests_beyond_queue_page_limit_wait_for_completions() {
    for path in PATHS {
        let (mut h, may) = late(path);
        let big = Big::new(&h, 512);
        let most = PAGES_MOST / 512;
        for id in 0..32 {
            h.put(&indirect((id % 2) as u8, 512, id, 0, &big.table_refs));
        }
        run(&mut h.back);
        assert_eq!(h.back.in_flight(), most, "{path}");
        assert!(!h.back.final_check().unwrap(), "final check while all pages are in use");
        let mapped = h.driver.pages_mapped();
        assert!(mapped <= 1 + PAGES_MOST, "{mapped} pages mapped, {path}");
        let mut answered = 0;
        while answered < 32 {
            may.set(1);
            run(&mut h.back);
            let answer = h.answer().expect("response after a completion");
            assert_eq!(answer.status, Status::Okay);
            answered += 1;
            assert_eq!(h.back.in_flight(), most.min(32 - answered), "{path}");
        }
    }
}

#[test]
fn indirect_request_without_advertised_feature_is_not_supported() {
    let mut h = Hostile::without_indirect(DataPath::Map, Mem::zeroed(SECTORS));
    let big = Big::new(&h, 12);
    let answer = h.ask(&indirect(0, 12, 7, 0, &big.table_refs));
    assert_eq!((answer.status, answer.op), (Status::NotSupported, 6));
    assert_eq!(h.refused(RefusalReason::UnknownOperation), 1);
    assert_ne!(INDIRECT, 0);
}
