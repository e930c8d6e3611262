//! Operations are held while the storage is full: a recording engine with a manual clock.

use pvio_blkback::engine::clock::Manual;
use pvio_blkback::engine::{BlockEngine, Done, EngineError, Full, Geometry, Io, Segments};
use pvio_ring::IoSeg;
use pvio_ring::shm::{HeapMemory, Region};
use pvio_storage::engine::pause::{FIRST_PAUSE, LAST_PAUSE, PauseState, Pausing};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const FULL: EngineError = EngineError::Os(28);
const QUOTA: EngineError = EngineError::Os(122);
const TABLES: EngineError = EngineError::StorageFull(28);

/// Records submitted operations, and completes them when the test determines.
#[derive(Default)]
struct Recorder {
    /// Operations in flight.
    flying: Vec<(u32, Segments<HeapMemory>)>,
    log: Vec<u32>,
    over: VecDeque<(u32, Result<(), EngineError>)>,
}

/// The wrapper over a recorder.
struct Bench {
    engine: Pausing<HeapMemory, Shared, Manual>,
    inner: Shared,
    state: Arc<PauseState>,
    clock: Manual,
}

#[derive(Clone, Default)]
struct Shared(Arc<std::sync::Mutex<Recorder>>);

impl Shared {
    fn with<T>(&self, call: impl FnOnce(&mut Recorder) -> T) -> T {
        call(&mut self.0.lock().unwrap())
    }
}

impl BlockEngine<HeapMemory> for Shared {
    fn geometry(&self) -> Geometry {
        Geometry::new(1 << 20)
    }

    fn submit(&mut self, tag: u32, _: Io, list: &mut Segments<HeapMemory>) -> Result<(), Full> {
        self.with(|inner| {
            inner.log.push(tag);
            inner.flying.push((tag, std::mem::take(list)));
        });
        Ok(())
    }

    fn kick(&mut self) {}

    fn reap(&mut self, done: &mut Done<'_, HeapMemory>) {
        self.with(|inner| {
            while let Some((tag, result)) = inner.over.pop_front() {
                let place = inner.flying.iter().position(|(flying, _)| *flying == tag).unwrap();
                let (_, mut segments) = inner.flying.remove(place);
                done(tag, result, &mut segments);
            }
        });
    }
}

impl Bench {
    fn new() -> Self {
        let (inner, clock) = (Shared::default(), Manual::default());
        let state = Arc::new(PauseState::new("raw:/image"));
        let engine = Pausing::new(inner.clone(), Arc::clone(&state), clock.clone());
        Self { engine, inner, state, clock }
    }

    fn submit(&mut self, tag: u32, io: Io) {
        let mut segments = Vec::new();
        if !matches!(io, Io::Flush) {
            let buf = HeapMemory::pages(1);
            buf.fill(0, 4096, tag as u8).unwrap();
            segments.push(IoSeg { buf, offset: 0, len: 4096 });
        }
        self.engine.submit(tag, io, &mut segments).unwrap();
    }

    fn write(&mut self, tag: u32) {
        self.submit(tag, Io::Write { sector: 8 });
    }

    /// Completes operations in flight, and returns what the wrapper reports.
    fn complete(
        &mut self,
        results: &[(u32, Result<(), EngineError>)],
    ) -> Vec<(u32, Result<(), EngineError>)> {
        self.inner.with(|inner| inner.over.extend(results));
        let mut found = Vec::new();
        self.engine.reap(&mut |tag, result, segments| {
            if let Some(segment) = segments.first() {
                let mut byte = [0];
                segment.buf.read_bytes(0, &mut byte).unwrap();
                assert_eq!(u32::from(byte[0]), tag, "another operation's data");
            }
            found.push((tag, result));
        });
        found
    }

    /// Returns the tags that were submitted since the last time.
    fn submitted(&self) -> Vec<u32> {
        self.inner.with(|inner| std::mem::take(&mut inner.log))
    }

    fn wait(&mut self, time: Duration) {
        assert_eq!(self.engine.deadline(), Some(time));
        self.clock.advance(time);
    }
}

#[test]
fn failed_write_is_repeated_with_growing_delays_until_there_is_space() {
    let mut bench = Bench::new();
    bench.write(1);
    assert_eq!(bench.complete(&[(1, Err(FULL))]), []);
    assert!(bench.state.is_paused() && bench.engine.pauses().is_paused);
    assert_eq!(bench.submitted(), [1]);
    let mut delay = FIRST_PAUSE;
    for _ in 0..6 {
        bench.wait(delay);
        assert_eq!(bench.complete(&[]), []);
        assert_eq!(bench.submitted(), [1]);
        assert_eq!(bench.engine.deadline(), None, "an attempt is in flight");
        assert_eq!(bench.complete(&[(1, Err(QUOTA))]), []);
        delay = (delay * 2).min(LAST_PAUSE);
    }
    assert_eq!(delay, LAST_PAUSE);
    bench.wait(delay);
    bench.complete(&[]);
    assert_eq!(bench.complete(&[(1, Ok(()))]), [(1, Ok(()))]);
    let pauses = bench.engine.pauses();
    assert_eq!((pauses.is_paused, pauses.count), (false, 1));
    assert_eq!(pauses.time, Duration::from_millis(100 + 200 + 400 + 800 + 3000));
    assert!(!bench.state.is_paused());
    assert_eq!(bench.engine.deadline(), None);
}

#[test]
fn operations_after_held_write_wait_in_order_and_reads_do_not() {
    let mut bench = Bench::new();
    for tag in 1..=3 {
        bench.write(tag);
    }
    assert_eq!(bench.complete(&[(1, Err(FULL)), (3, Ok(()))]), [(3, Ok(()))]);
    bench.write(4);
    bench.submit(5, Io::Flush);
    bench.submit(6, Io::Read { sector: 8 });
    bench.submit(7, Io::Discard { sector: 8, sectors: 8, secure: false });
    bench.submit(8, Io::WriteZeroes { sector: 8, sectors: 8 });
    assert_eq!(bench.submitted(), [1, 2, 3, 6]);
    assert_eq!(bench.complete(&[(6, Ok(()))]), [(6, Ok(()))]);
    // One that was in flight fails as well.
    assert_eq!(bench.complete(&[(2, Err(FULL))]), []);
    bench.wait(FIRST_PAUSE);
    assert_eq!(bench.complete(&[]), []);
    assert_eq!(bench.submitted(), [1], "one operation finds out");
    assert_eq!(bench.complete(&[(1, Ok(()))]), [(1, Ok(()))]);
    assert_eq!(bench.submitted(), [2]);
    bench.write(9);
    assert_eq!(bench.submitted(), [], "a failed operation has not completed");
    assert_eq!(bench.complete(&[(2, Ok(()))]), [(2, Ok(()))]);
    assert_eq!(bench.submitted(), [4, 5, 7, 8, 9]);
    assert!(!bench.state.is_paused());
}

#[test]
fn held_flush_is_repeated_after_all_held_writes_have_completed() {
    let mut bench = Bench::new();
    bench.submit(1, Io::Flush);
    bench.write(2);
    assert_eq!(bench.complete(&[(1, Err(TABLES)), (2, Err(FULL))]), []);
    bench.submitted();
    bench.wait(FIRST_PAUSE);
    bench.complete(&[]);
    assert_eq!(bench.submitted(), [2]);
    assert_eq!(bench.complete(&[(2, Ok(()))]), [(2, Ok(()))]);
    assert_eq!(bench.submitted(), [1]);
    assert_eq!(bench.complete(&[(1, Ok(()))]), [(1, Ok(()))]);
}

#[test]
fn other_errors_and_lost_flushes_are_reported() {
    let mut bench = Bench::new();
    let eio = Err(EngineError::Os(5));
    bench.write(1);
    bench.submit(2, Io::Flush);
    bench.submit(3, Io::Read { sector: 8 });
    let results = [(1, eio), (2, Err(FULL)), (3, Err(FULL))];
    assert_eq!(bench.complete(&results), results);
    // A write that fails otherwise when it is repeated.
    bench.write(4);
    bench.complete(&[(4, Err(FULL))]);
    bench.wait(FIRST_PAUSE);
    bench.complete(&[]);
    assert_eq!(bench.complete(&[(4, eio)]), [(4, eio)]);
    assert!(!bench.state.is_paused());
}

#[test]
fn held_operations_are_reported_if_they_are_not_to_be_held_any_more() {
    let mut bench = Bench::new();
    let changes = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&changes);
    bench.state.on_change(move || {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    bench.write(1);
    bench.complete(&[(1, Err(FULL))]);
    bench.write(2);
    bench.state.set_holds(false);
    assert_eq!(bench.complete(&[]), [(1, Err(FULL))]);
    assert_eq!(bench.submitted(), [1, 2]);
    assert_eq!(bench.complete(&[(2, Err(FULL))]), [(2, Err(FULL))]);
    assert!(!bench.state.is_paused());
    assert_eq!(changes.load(Ordering::Relaxed), 2);
}

#[test]
fn engine_dropped_during_pause_is_not_counted_as_paused() {
    let mut bench = Bench::new();
    bench.write(1);
    bench.complete(&[(1, Err(FULL))]);
    let Bench { engine, state, .. } = bench;
    assert!(state.is_paused());
    drop(engine);
    assert!(!state.is_paused());
}
