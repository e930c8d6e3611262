//! Operations that other threads execute: no operation and no completion is lost.

use pvio_blkback::engine::{BlockEngine, EngineError, Io};
use pvio_ring::IoSeg;
use pvio_ring::shm::{HeapMemory, Region, SharedMemory};
use pvio_storage::engine::offload::ThreadPool;
use pvio_storage::engine::offload::{BudgetUsage, DATA_MOST, Executor, Job, Offload};
use pvio_storage::engine::ram::RamDisk;
use pvio_storage::engine::wait::{WaitEngine, Waiting};
use std::sync::Arc;

#[test]
fn completions_of_concurrent_threads_are_all_reaped() {
    const DEPTH: u32 = 12;
    let disk = Arc::new(RamDisk::new(1 << 20).unwrap());
    let pool: Arc<dyn Executor> = Arc::new(ThreadPool::start("t", 4, disk.clone()).unwrap());
    let (load, geometry) = (Arc::default(), disk.geometry(false));
    let engine = Offload::<HeapMemory>::new(pool, geometry, DEPTH, &load).unwrap();
    let completions = engine.completions().unwrap();
    let mut engine = Waiting::new(engine, Some(completions)).unwrap();
    for _ in 0..20_000 {
        for tag in 0..DEPTH {
            engine.submit(tag, Io::Flush, &mut vec![]).unwrap();
        }
        engine.kick();
        let mut seen = 0u32;
        while seen != (1 << DEPTH) - 1 {
            engine.wait_due(None).unwrap();
            engine.reap(&mut |tag, result, _| {
                assert_eq!((result, seen >> tag & 1), (Ok(()), 0));
                seen |= 1 << tag;
            });
        }
    }
}

/// Processes jobs with a function of the test.
struct Answers(fn(Job));

impl Executor for Answers {
    fn execute(&self, jobs: &mut dyn Iterator<Item = Job>) {
        jobs.for_each(self.0);
    }
}

#[test]
fn failed_offloaded_read_leaves_guest_memory_and_returns_segments() {
    let answer = |mut job: Job| {
        let write = matches!(job.io, Io::Write { .. });
        if write {
            assert_eq!(job.data, [&[1; 512][..], &[2; 1024]].concat());
        } else {
            job.data.fill(9);
        }
        job.finish(if write { Ok(()) } else { Err(EngineError::Os(5)) });
    };
    let geometry = RamDisk::new(1 << 20).unwrap().geometry(false);
    let mut engine = Offload::new(Arc::new(Answers(answer)), geometry, 2, &Arc::default()).unwrap();
    let page = HeapMemory::pages(1);
    page.fill(512, 512, 1).unwrap();
    page.fill(2048, 1024, 2).unwrap();
    let seg = |offset, len| IoSeg { buf: page.clone(), offset, len };
    for (tag, io) in [(0, Io::Write { sector: 0 }), (1, Io::Read { sector: 0 })] {
        engine.submit(tag, io, &mut vec![seg(512, 512), seg(2048, 1024)]).unwrap();
        engine.kick();
        let mut over = Vec::new();
        engine.reap(&mut |tag, result, segments| over.push((tag, result, segments.len())));
        let expected = if tag == 0 { Ok(()) } else { Err(EngineError::Os(5)) };
        assert_eq!(over, [(tag, expected, 2)]);
    }
    let mut bytes = [0; 512];
    page.read_bytes(512, &mut bytes).unwrap();
    assert_eq!(bytes, [1; 512]);
    // A segment outside of its buffer is rejected, and reported.
    engine.submit(0, Io::Write { sector: 0 }, &mut vec![seg(4000, 512)]).unwrap();
    engine.kick();
    let mut over = Vec::new();
    engine.reap(&mut |tag, result, _| over.push((tag, result)));
    assert_eq!(over, [(0, Err(EngineError::Os(14)))]);
}

#[test]
fn dropped_job_completes_as_lost() {
    let geometry = RamDisk::new(1 << 20).unwrap().geometry(false);
    let mut engine =
        Offload::<HeapMemory>::new(Arc::new(Answers(drop)), geometry, 1, &Arc::default()).unwrap();
    engine.submit(0, Io::Flush, &mut vec![]).unwrap();
    engine.kick();
    let mut over = Vec::new();
    engine.reap(&mut |tag, result, _| over.push((tag, result)));
    assert_eq!(over, [(0, Err(EngineError::Lost))]);
}

#[test]
fn load_counts_jobs_until_reaped_or_queue_is_dropped() {
    /// Holds the jobs it receives.
    #[derive(Default)]
    struct Keeps(std::sync::Mutex<Vec<Job>>);
    impl Executor for Keeps {
        fn execute(&self, jobs: &mut dyn Iterator<Item = Job>) {
            self.0.lock().unwrap().extend(jobs);
        }
    }
    let (kept, load) = (Arc::<Keeps>::default(), Arc::new(BudgetUsage::new((3, 7))));
    let geometry = RamDisk::new(1 << 20).unwrap().geometry(false);
    let engine = || Offload::new(kept.clone(), geometry, 8, &load).unwrap();
    let (mut one, mut other) = (engine(), engine());
    let jobs = 2 * (8 + DATA_MOST as u64 / 4096);
    let limits = |used: [u64; 2]| {
        [("table-bytes", 3, 7), ("jobs", used[0], jobs), ("job-bytes", used[1], 2 << 20)]
    };
    assert_eq!(load.budgets(), limits([0, 0]));
    let seg = |pages| {
        let buf = HeapMemory::pages(pages);
        IoSeg { len: buf.len(), offset: 0, buf }
    };
    one.submit(0, Io::Write { sector: 0 }, &mut vec![seg(17)]).unwrap();
    one.submit(1, Io::Flush, &mut vec![]).unwrap();
    one.kick();
    other.submit(0, Io::Read { sector: 8 }, &mut vec![seg(1)]).unwrap();
    other.kick();
    // 68 KiB are two jobs.
    assert_eq!(load.budgets(), limits([4, (64 + 4 + 4) << 10]));
    for job in kept.0.lock().unwrap().drain(..3) {
        job.finish(Ok(()));
    }
    let mut over = 0;
    one.reap(&mut |_, _, _| over += 1);
    assert_eq!((over, load.budgets()[1]), (2, ("jobs", 1, jobs)));
    drop((one, other));
    let gone = [("table-bytes", 3, 7), ("jobs", 0, 0), ("job-bytes", 0, 0)];
    assert_eq!(load.budgets(), gone);
}
