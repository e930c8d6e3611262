//! A failed flush is recorded: all later flushes fail.

use crate::late::late;
use crate::rig::{Hostile, PATHS, PageBuf, SECTORS, raw, run};
use pvio_blkback::engine::mem::MemEngine;
use pvio_blkback::engine::{Done, Full, Geometry, Io, Segments};
use pvio_blkback::{BlockEngine, DataPath, EngineError};
use pvio_ring::proto::blkif::{Abi, RefusalReason, Status, op};
use std::cell::Cell;
use std::rc::Rc;

const NO_SPACE: EngineError = EngineError::Os(28);

/// Counts flushes, and fails one.
struct Flushes {
    mem: MemEngine<PageBuf>,
    /// Number of flushes that succeed before one fails; later ones succeed again, as on Linux.
    until: usize,
    count: Rc<Cell<usize>>,
    failed: Option<u32>,
}

fn disk(path: DataPath, until: usize) -> (Hostile<Flushes>, Rc<Cell<usize>>) {
    disk_of(path, MemEngine::zeroed(SECTORS), until)
}

fn disk_of(
    path: DataPath,
    mem: MemEngine<PageBuf>,
    until: usize,
) -> (Hostile<Flushes>, Rc<Cell<usize>>) {
    let count = Rc::new(Cell::new(0));
    let engine = Flushes { mem, until, count: Rc::clone(&count), failed: None };
    (Hostile::new(path, Abi::X86_64, engine), count)
}

impl BlockEngine<PageBuf> for Flushes {
    fn geometry(&self) -> Geometry {
        BlockEngine::<PageBuf>::geometry(&self.mem)
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<PageBuf>) -> Result<(), Full> {
        if io == Io::Flush {
            let before = self.count.replace(self.count.get() + 1);
            if before == self.until {
                self.failed = Some(tag);
                return Ok(());
            }
        }
        self.mem.submit(tag, io, segments)
    }

    fn kick(&mut self) {}

    fn reap(&mut self, done: &mut Done<'_, PageBuf>) {
        if let Some(tag) = self.failed.take() {
            done(tag, Err(NO_SPACE), &mut Vec::new());
        }
        self.mem.reap(done);
    }
}

fn flush() -> Vec<u8> {
    raw(op::FLUSH_DISKCACHE, 0, 0, &[])
}

#[test]
fn flush_of_read_only_disk_succeeds_without_its_engine() {
    for path in PATHS {
        let (mut h, count) = disk_of(path, MemEngine::zeroed(SECTORS).read_only(), 0);
        for _ in 0..40 {
            assert_eq!(h.ask(&flush()).status, Status::Okay);
        }
        assert_eq!(count.get(), 0, "{path}");
    }
}

#[test]
fn flush_after_failed_flush_fails_without_new_storage_flush() {
    for path in PATHS {
        let (mut h, count) = disk(path, 1);
        let data = [(h.data.0, 0, 7)];
        let (write, read) = (raw(op::WRITE, 1, 8, &data), raw(op::READ, 1, 8, &data));
        assert_eq!(h.ask(&flush()).status, Status::Okay);
        assert!(!h.disk.flush_state().has_failed());
        assert_eq!(h.ask(&flush()).status, Status::Error);
        assert!(h.disk.flush_state().has_failed(), "{path}");
        // All other kinds of flushes: empty barriers, barriers and flushes with data.
        for request in [
            flush(),
            raw(op::WRITE_BARRIER, 0, 0, &[]),
            raw(op::WRITE_BARRIER, 1, 8, &data),
            raw(op::FLUSH_DISKCACHE, 1, 8, &data),
        ] {
            assert_eq!(h.ask(&request).status, Status::Error, "{path}");
        }
        assert_eq!(count.get(), 2, "{path}: number of flushes that reached the storage");
        assert_eq!(h.back.stats().failed_flushes.get(), 5, "{path}");
        assert_eq!(h.refused(RefusalReason::Engine), 5, "{path}");
        assert_eq!([h.ask(&write), h.ask(&read)].map(|r| r.status), [Status::Okay; 2]);
    }
}

#[test]
fn barrier_with_failed_final_flush_fails_every_later_flush() {
    let (mut h, count) = disk(DataPath::Map, 1);
    let barrier = raw(op::WRITE_BARRIER, 1, 8, &[(h.data.0, 0, 7)]);
    assert_eq!(h.ask(&barrier).status, Status::Error);
    assert_eq!(h.ask(&flush()).status, Status::Error);
    assert_eq!((count.get(), h.back.stats().failed_flushes.get()), (2, 2));
}

#[test]
fn flush_after_failure_on_other_queue_or_in_earlier_process_fails() {
    let (mut h, count) = disk(DataPath::Map, usize::MAX);
    assert_eq!(h.ask(&flush()).status, Status::Okay);
    h.disk.flush_state().mark_failed();
    assert_eq!(h.ask(&flush()).status, Status::Error);
    assert_eq!(count.get(), 1);
}

#[test]
fn flush_in_flight_when_another_flush_fails_fails_too() {
    let (mut h, may) = late(DataPath::Map);
    h.put(&flush());
    run(&mut h.back);
    assert_eq!((h.back.in_flight(), h.answer()), (1, None));
    h.disk.flush_state().mark_failed();
    may.set(1);
    run(&mut h.back);
    assert_eq!(h.answer().map(|response| response.status), Some(Status::Error));
}
