//! Each reason for rejecting a request, on every data path: the status is that of Linux's backend
//! (`drivers/block/xen-blkback`, 6.1), for the same operation, and exactly the counter of that
//! reason increases.

use crate::rig::{Hostile, Mem, PATHS, SECTORS, raw};
use pvio_blkback::engine::Discard;
use pvio_blkback::{BlockEngine, Geometry};
use pvio_ring::proto::blkif::{Abi, RefusalReason, Status};

const END: u64 = SECTORS as u64;
const ALL: [RefusalReason; 9] = [
    RefusalReason::UnknownOperation,
    RefusalReason::SegmentCount,
    RefusalReason::SegmentBounds,
    RefusalReason::OutOfRange,
    RefusalReason::Misaligned,
    RefusalReason::ReadOnly,
    RefusalReason::Grant,
    RefusalReason::Engine,
    RefusalReason::Empty,
];

fn discard(sector: u64, sectors: u64) -> Vec<u8> {
    let mut bytes = raw(5, 0, sector, &[]);
    bytes[24..32].copy_from_slice(&sectors.to_le_bytes());
    bytes
}

/// A request and its expected response; the request succeeds if there is no reason.
type Case = (Vec<u8>, Status, Option<RefusalReason>);

/// Sends requests to a disk with a changed geometry on every path; `cases` receives a valid grant
/// reference.
fn expect(change: impl Fn(&mut Geometry), cases: impl Fn(u32) -> Vec<Case>) {
    for path in PATHS {
        let engine = Mem::zeroed(SECTORS);
        let mut geometry = engine.geometry();
        change(&mut geometry);
        let mut h = Hostile::of(path, Abi::X86_64, geometry, engine);
        for (request, status, reason) in cases(h.data.0) {
            let before = ALL.map(|r| h.refused(r));
            let answer = h.ask(&request);
            let what = format!("{:?}, {path}", &request[..32]);
            // The response to an indirect request has its inner operation.
            let op = if request[0] == 6 { request[1] } else { request[0] };
            assert_eq!((answer.status, answer.op, answer.id), (status, op, 7), "{what}");
            for (r, before) in ALL.into_iter().zip(before) {
                let more = u64::from(reason == Some(r));
                assert_eq!(h.refused(r), before + more, "{r:?} of {what}");
            }
        }
        assert_eq!(h.back.in_flight(), 0);
    }
}

fn error(reason: RefusalReason) -> impl Fn(Vec<u8>) -> Case {
    move |request| (request, Status::Error, Some(reason))
}

fn done(request: Vec<u8>) -> Case {
    (request, Status::Okay, None)
}

#[test]
fn request_beyond_disk_end_is_rejected_as_out_of_range() {
    expect(
        |_| {},
        |g| {
            let page = [(g, 0, 7)];
            let mut bad: Vec<Case> = [END - 7, END, END + 1, u64::MAX - 7, u64::MAX]
                .iter()
                .flat_map(|at| [0, 1, 2, 3].map(|op| raw(op, 1, *at, &page)))
                .chain(
                    [(END, 1), (0, END + 1), (1, u64::MAX), (u64::MAX, 1), (u64::MAX, 0)]
                        .map(|(at, count)| discard(at, count)),
                )
                .map(error(RefusalReason::OutOfRange))
                .collect();
            bad.extend([raw(0, 1, END - 8, &page), discard(END - 1, 1)].map(done));
            bad
        },
    );
}

#[test]
fn request_not_aligned_to_sector_size_is_rejected_as_misaligned() {
    expect(
        |disk| disk.sector_size = 4096,
        |g| {
            let mut cases: Vec<Case> = [
                raw(0, 1, 1, &[(g, 0, 7)]),
                raw(1, 1, 4, &[(g, 0, 7)]),
                raw(0, 1, 0, &[(g, 0, 0)]),
                raw(1, 1, 8, &[(g, 0, 6)]),
                raw(0, 1, 0, &[(g, 1, 7)]),
                raw(1, 2, 0, &[(g, 0, 3), (g, 4, 7)]),
                raw(2, 1, 0, &[(g, 4, 7)]),
                raw(3, 1, 2, &[(g, 0, 7)]),
                discard(1, 8),
                discard(0, 7),
            ]
            .map(error(RefusalReason::Misaligned))
            .into();
            // Units of 512 bytes, independent of the disk's sector size.
            cases.extend(
                [raw(0, 1, 8, &[(g, 0, 7)]), raw(1, 2, END - 16, &[(g, 0, 7), (g, 0, 7)])]
                    .map(done),
            );
            cases.extend([discard(8, 16), raw(3, 0, 0, &[]), raw(2, 0, 0, &[])].map(done));
            cases.push(error(RefusalReason::OutOfRange)(raw(0, 2, END - 8, &[(g, 0, 7); 2])));
            cases
        },
    );
}

#[test]
fn empty_discard_and_transfer_without_segments_are_rejected() {
    expect(
        |_| {},
        |_| {
            let mut cases: Vec<Case> =
                [discard(0, 0), discard(END, 0)].map(error(RefusalReason::Empty)).into();
            cases.extend(
                [raw(0, 0, 0, &[]), raw(1, 0, 0, &[])].map(error(RefusalReason::SegmentCount)),
            );
            cases.extend([raw(2, 0, 0, &[]), raw(3, 0, 0, &[])].map(done));
            cases
        },
    );
}

#[test]
fn request_with_too_many_segments_is_rejected() {
    expect(
        |_| {},
        |g| {
            let full = [(g, 0, 7); 11];
            let mut cases: Vec<Case> = (0..4)
                .flat_map(|op| [12, 13, 32, 255].map(|count| raw(op, count, 0, &full)))
                .map(error(RefusalReason::SegmentCount))
                .collect();
            cases.push(done(raw(1, 11, 0, &full)));
            cases
        },
    );
}

#[test]
fn segment_inverted_or_beyond_page_is_rejected() {
    expect(
        |_| {},
        |g| {
            [(1, 0), (7, 6), (0, 8), (7, 255), (8, 8), (255, 0)]
                .into_iter()
                .flat_map(|(first, last)| {
                    [0, 1, 2, 3].map(|op| raw(op, 2, 0, &[(g, 0, 7), (g, first, last)]))
                })
                .map(error(RefusalReason::SegmentBounds))
                .chain([done(raw(0, 2, 0, &[(g, 7, 7), (g, 0, 0)]))])
                .collect()
        },
    );
}

#[test]
fn request_with_bad_grant_is_rejected() {
    expect(
        |_| {},
        |g| {
            [4000, 1, u32::MAX]
                .into_iter()
                .flat_map(|bad| [0, 1, 2, 3].map(|op| raw(op, 2, 0, &[(g, 0, 7), (bad, 0, 7)])))
                .map(error(RefusalReason::Grant))
                .chain([done(raw(0, 1, 0, &[(g, 0, 7)]))])
                .collect()
        },
    );
}

#[test]
fn unknown_or_unadvertised_operation_is_not_supported() {
    expect(
        |disk| disk.discard = None,
        |g| {
            let unknown =
                |r: Vec<u8>| (r, Status::NotSupported, Some(RefusalReason::UnknownOperation));
            let mut cases: Vec<Case> =
                [4, 7, 8, 127, 128, 255].map(|op| unknown(raw(op, 1, 0, &[(g, 0, 7)]))).into();
            // Not advertised; the range is checked first, as on Linux.
            cases.extend([unknown(discard(0, 8)), unknown(discard(0, 0))]);
            cases.push(error(RefusalReason::OutOfRange)(discard(END, 8)));
            cases
        },
    );
}

#[test]
fn write_to_read_only_disk_is_rejected_as_read_only() {
    expect(
        |disk| (disk.read_only, disk.discard) = (true, None),
        |g| {
            let page = [(g, 0, 7)];
            let mut cases: Vec<Case> =
                [raw(1, 1, 0, &page), raw(2, 1, 0, &page), raw(3, 1, 0, &page), discard(0, 8)]
                    .map(error(RefusalReason::ReadOnly))
                    .into();
            cases.extend([raw(0, 1, 0, &page), raw(3, 0, 0, &[])].map(done));
            cases
        },
    );
}

#[test]
fn failed_engine_operation_is_counted_as_engine_error() {
    // The disk is smaller than its geometry.
    expect(
        |disk| disk.sectors = END * 2,
        |g| {
            [raw(0, 1, END, &[(g, 0, 7)]), raw(1, 1, END * 2 - 8, &[(g, 0, 7)]), discard(END, 8)]
                .map(error(RefusalReason::Engine))
                .into()
        },
    );
}

#[test]
fn resized_disk_checks_requests_against_current_size() {
    for path in PATHS {
        let engine = Mem::zeroed(SECTORS);
        let mut geometry = engine.geometry();
        geometry.sectors = 8;
        geometry.discard = Some(Discard { granularity: 512, alignment: 0, secure: false });
        let mut h = Hostile::of(path, Abi::X86_64, geometry, engine);
        let g = h.data.0;
        let at = |sector| raw(1, 1, sector, &[(g, 0, 7)]);
        assert_eq!(h.ask(&at(8)).status, Status::Error, "{path}");
        assert!(h.disk.resize(16));
        assert_eq!(h.ask(&at(8)).status, Status::Okay, "{path}");
        assert!(!h.disk.resize(16) && h.disk.resize(0));
        for request in [at(0), raw(0, 1, 0, &[(g, 0, 7)]), discard(0, 1)] {
            assert_eq!(h.ask(&request).status, Status::Error, "{path}: request to an empty drive");
        }
        assert_eq!(h.ask(&raw(3, 0, 0, &[])).status, Status::Okay, "{path}");
        assert_eq!(h.refused(RefusalReason::OutOfRange), 4, "{path}");
    }
}
