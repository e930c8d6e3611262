//! Engine wrappers, tested with a manual clock and with fio.

use crate::support::{Rng, has, text, tool};
use pvio_blkback::engine::clock::{Clock, Manual};
use pvio_blkback::engine::{BlockEngine, Done, EngineError, Full, Geometry, Io, Segments};
use pvio_ring::IoSeg;
use pvio_ring::shm::HeapMemory;
use pvio_runtime::{BucketRate, WaitPoint as _, Wrapper};
use pvio_storage::engine::faults::{FaultPlan, FaultSwitch, Faults};
use pvio_storage::engine::ram::{RamDisk, RamEngine};
use pvio_storage::engine::throttle::{Quota, SharedLimit, Throttle, ThrottleLimits, Throttles};
use pvio_storage::engine::trace::{Trace, Traced};
use pvio_storage::engine::wait::{WaitEngine, Waiting};
use pvio_storage::image::{Image, ImageOptions};
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

type Ram = Waiting<RamEngine<HeapMemory>>;

fn ram() -> Ram {
    let disk = Arc::new(RamDisk::new(1 << 20).unwrap());
    let geometry = disk.geometry(false);
    Waiting::new(RamEngine::new(disk, geometry), None).unwrap()
}

fn page(bytes: usize) -> Vec<IoSeg<HeapMemory>> {
    vec![IoSeg { buf: HeapMemory::pages(11), offset: 0, len: bytes }]
}

fn done(engine: &mut impl BlockEngine<HeapMemory>) -> Vec<(u32, Result<(), EngineError>)> {
    let mut done = Vec::new();
    engine.reap(&mut |tag, result, _| done.push((tag, result)));
    done
}

fn tags(engine: &mut impl BlockEngine<HeapMemory>) -> Vec<u32> {
    done(engine).into_iter().map(|(tag, _)| tag).collect()
}

#[test]
fn throttle_permits_burst_then_rate_and_never_delays_flushes() {
    let clock = Manual::default();
    let rate = BucketRate::per_second(10, 3);
    let throttles = Arc::new(Throttles::new(ThrottleLimits::of_all(Some(rate), None)));
    let mut engine =
        Throttle::new(ram(), Arc::new(SharedLimit::new(throttles)), clock.clone()).unwrap();
    for tag in 0..6 {
        engine.submit(tag, Io::Read { sector: 0 }, &mut page(512)).unwrap();
    }
    engine.submit(9, Io::Flush, &mut vec![]).unwrap();
    engine.kick();
    assert_eq!(tags(&mut engine), [9, 0, 1, 2]);
    let wait = engine.deadline().expect("deadline of delayed operations");
    assert!(wait <= Duration::from_millis(100), "{wait:?}");
    clock.advance(Duration::from_millis(99));
    assert_eq!(tags(&mut engine), [3], "operation on a partial token leaves a debt");
    assert_eq!(tags(&mut engine), [] as [u32; 0]);
    clock.advance(Duration::from_millis(1));
    clock.advance(engine.deadline().unwrap());
    assert_eq!(tags(&mut engine), [4]);
    clock.advance(Duration::from_secs(3600));
    assert_eq!(tags(&mut engine), [5]);
    assert_eq!(engine.deadline(), None);
}

/// An engine; while it is reaped for the third time, the limits are changed.
struct ChangedMeanwhile {
    ram: Ram,
    share: Arc<SharedLimit>,
    reaps: u32,
}

impl BlockEngine<HeapMemory> for ChangedMeanwhile {
    fn geometry(&self) -> Geometry {
        self.ram.geometry()
    }

    fn submit(
        &mut self,
        tag: u32,
        io: Io,
        segments: &mut Segments<HeapMemory>,
    ) -> Result<(), Full> {
        self.ram.submit(tag, io, segments)
    }

    fn kick(&mut self) {
        self.ram.kick();
    }

    fn reap(&mut self, done: &mut Done<'_, HeapMemory>) {
        self.reaps += 1;
        if self.reaps == 3 {
            self.share.wake();
            self.ram.wait(Some(Duration::ZERO)).unwrap();
        }
        self.ram.reap(done);
    }
}

impl Wrapper for ChangedMeanwhile {
    type Inner = Ram;

    fn inner(&mut self) -> &mut Ram {
        &mut self.ram
    }
}

#[test]
fn change_of_limits_while_operations_are_released_does_not_disarm_the_throttle() {
    let clock = Manual::default();
    let rate = BucketRate::per_second(10, 1);
    let throttles = Throttles::new(ThrottleLimits::of_all(Some(rate), None));
    let share = Arc::new(SharedLimit::new(Arc::new(throttles)));
    let engine = ChangedMeanwhile { ram: ram(), share: share.clone(), reaps: 0 };
    let mut engine = Throttle::new(engine, share.clone(), clock.clone()).unwrap();
    for tag in 0..2 {
        engine.submit(tag, Io::Read { sector: 0 }, &mut page(512)).unwrap();
    }
    engine.kick();
    assert_eq!(tags(&mut engine), [0]);
    clock.advance(Duration::from_secs(1));
    assert_eq!(tags(&mut engine), [1], "released by the second reap, completed by the third");
    // The next change ends the wait.
    share.wake();
    let begin = std::time::Instant::now();
    engine.wait(Some(Duration::from_secs(60))).unwrap();
    assert!(begin.elapsed() < Duration::from_secs(30), "the change was not noticed");
}

#[test]
fn throttle_of_two_queues_keeps_configured_byte_rate() {
    let clock = Manual::default();
    let limits = ThrottleLimits::of_all(
        Some(BucketRate::per_second(1000, 50)),
        Some(BucketRate::per_second(1 << 20, 1 << 20)),
    );
    // Two queues of a disk share the limits.
    let share = Arc::new(SharedLimit::new(Arc::new(Throttles::new(limits))));
    let mut engines = [0, 1].map(|_| Throttle::new(ram(), share.clone(), clock.clone()).unwrap());
    let (mut begun, mut over, mut bytes) = (0u64, 0u64, 0u64);
    let mut rng = Rng(1);
    let mut sizes = std::collections::VecDeque::new();
    let begin = clock.now();
    while over < 3000 {
        for engine in &mut engines {
            // There is always a backlog, with sizes for which the byte limit applies.
            while begun < over + 64 {
                let size = 512 << rng.below(6);
                sizes.push_back(size);
                engine.submit(0, Io::Write { sector: 0 }, &mut page(size)).unwrap();
                begun += 1;
            }
            engine.kick();
        }
        for engine in &mut engines {
            engine.reap(&mut |_, result, segments| {
                assert_eq!(result, Ok(()));
                bytes += segments[0].len as u64;
                over += 1;
            });
        }
        let waits = engines.iter().filter_map(BlockEngine::<HeapMemory>::deadline);
        clock.advance(waits.min().unwrap_or_default());
    }
    let seconds = (clock.now() - begin).as_secs_f64();
    let most = seconds * f64::from(1 << 20) + f64::from(1 << 20) + 32768.0;
    assert!(bytes as f64 <= most, "{bytes} bytes in {seconds} s");
    assert!(bytes as f64 >= seconds * f64::from(1 << 20), "{bytes} bytes in {seconds} s");
}

#[test]
fn changed_throttle_limits_wake_waiting_engine() {
    // One byte per second.
    let limits = ThrottleLimits::of_all(None, Some(BucketRate::per_second(1, 1)));
    let throttles = Arc::new(Throttles::new(limits));
    let clock = Manual::default();
    let share = Arc::new(SharedLimit::new(throttles.clone()));
    let mut engine = Throttle::new(ram(), share, clock.clone()).unwrap();
    for tag in 0..2 {
        engine.submit(tag, Io::Write { sector: 0 }, &mut page(45056)).unwrap();
    }
    engine.kick();
    assert_eq!(tags(&mut engine), [0]);
    assert!(engine.deadline().unwrap() > Duration::from_secs(40_000));
    let changer = std::thread::spawn(move || throttles.set(ThrottleLimits::default()));
    // Without a wakeup this would take half a day.
    let mut over = Vec::new();
    while over.is_empty() {
        engine.wait_due(None).unwrap();
        over = tags(&mut engine);
    }
    assert_eq!(over, [1]);
    changer.join().unwrap();
}

#[test]
fn fault_injection_is_deterministic_by_seed_and_delays_completions() {
    let plan = FaultPlan {
        latency: Duration::from_millis(5),
        jitter: Duration::from_millis(10),
        reads: 0,
        writes: 250_000,
        flushes: 1_000_000,
        errno: 5,
    };
    let run = |seed| {
        let clock = Manual::default();
        let mut engine = Faults::new(ram(), &FaultSwitch::new(plan), seed, clock.clone());
        let mut found = Vec::new();
        for tag in 0..64 {
            let (io, mut segments) = match tag % 3 {
                0 => (Io::Read { sector: 0 }, page(512)),
                1 => (Io::Write { sector: 8 }, page(512)),
                _ => (Io::Flush, vec![]),
            };
            engine.submit(tag, io, &mut segments).unwrap();
        }
        engine.kick();
        while let Some(wait) = {
            let now = done(&mut engine);
            found.extend(now.into_iter().map(|(tag, result)| (tag, result, clock.now())));
            engine.deadline()
        } {
            clock.advance(wait);
        }
        found
    };
    let found = run(7);
    assert_eq!(found, run(7), "same faults for the same seed");
    assert_ne!(found, run(8));
    assert_eq!(found.len(), 64);
    assert!(found.iter().all(|f| f.2 >= plan.latency && f.2 <= plan.latency + plan.jitter));
    let failed = |kind: u32| {
        found.iter().filter(|f| f.0 % 3 == kind && f.1 == Err(EngineError::Os(5))).count()
    };
    assert_eq!((failed(0), failed(2)), (0, 21));
    assert!((1..21).contains(&failed(1)), "{}", failed(1));
}

/// A file whose contents the test can read.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn throttle_limits_reads_and_writes_independently() {
    let clock = Manual::default();
    let rate = |per_second| Some(BucketRate::per_second(per_second, 1));
    let limits = ThrottleLimits {
        writes: Quota { operations: rate(1), bytes: None },
        reads: Quota { operations: rate(1000), bytes: None },
        ..ThrottleLimits::default()
    };
    let share = Arc::new(SharedLimit::new(Arc::new(Throttles::new(limits))));
    let mut engine = Throttle::new(ram(), share, clock.clone()).unwrap();
    for tag in 0..4 {
        engine.submit(tag, Io::Write { sector: 0 }, &mut page(512)).unwrap();
        engine.submit(tag + 10, Io::Read { sector: 0 }, &mut page(512)).unwrap();
    }
    engine.kick();
    assert_eq!(tags(&mut engine), [10, 0]);
    // A bucket with a fraction of a token releases one more operation, and is in debt then.
    clock.advance(engine.deadline().unwrap());
    assert_eq!(tags(&mut engine), [11, 1]);
    for tag in 12..14 {
        clock.advance(engine.deadline().unwrap());
        assert_eq!(tags(&mut engine), [tag], "read was delayed by a write");
    }
    assert!(clock.now() < Duration::from_millis(10), "{:?}", clock.now());
    clock.advance(engine.deadline().unwrap());
    assert_eq!(tags(&mut engine), [2]);
    assert!(clock.now() >= Duration::from_secs(1), "{:?}", clock.now());
}

/// Returns the number of completed operations of each of two disks with shared limits, if the first
/// always has sixteen queued and is polled first, and the other has `depth` queued.
fn shared_by_two(limits: ThrottleLimits, depth: u64, sizes: [usize; 2]) -> [u64; 2] {
    let clock = Manual::default();
    let throttles = Arc::new(Throttles::new(limits));
    let mut engines = [0, 1].map(|_| {
        let share = Arc::new(SharedLimit::new(throttles.clone()));
        Throttle::new(ram(), share, clock.clone()).unwrap()
    });
    let (mut queued, mut over) = ([0u64; 2], [0u64; 2]);
    while over[0] + over[1] < 2000 {
        for (n, engine) in engines.iter_mut().enumerate() {
            while queued[n] < [16, depth][n] {
                let io = if n == 0 { Io::Write { sector: 0 } } else { Io::Read { sector: 0 } };
                engine.submit(0, io, &mut page(sizes[n])).unwrap();
                queued[n] += 1;
            }
            engine.kick();
            let count = tags(engine).len() as u64;
            (queued[n], over[n]) = (queued[n] - count, over[n] + count);
        }
        let waits = engines.iter().filter_map(BlockEngine::<HeapMemory>::deadline);
        clock.advance(waits.min().unwrap_or_default());
    }
    over
}

#[test]
fn disks_with_shared_limit_get_equal_parts() {
    let rate = |per_second, burst| Some(BucketRate::per_second(per_second, burst));
    let over = shared_by_two(ThrottleLimits::of_all(rate(1000, 1), None), 1, [512, 512]);
    assert!(over[0].abs_diff(over[1]) <= 20, "operations: {over:?}");
    // With a byte limit, the disk with smaller operations may execute more of them.
    let over = shared_by_two(ThrottleLimits::of_all(None, rate(1 << 20, 512)), 8, [4096, 1024]);
    let ratio = over[1] as f64 / over[0] as f64;
    assert!((3.8..4.2).contains(&ratio), "bytes: {over:?}");
}

#[test]
fn idle_or_dropped_disk_does_not_block_shared_limit() {
    let clock = Manual::default();
    let limits = ThrottleLimits::of_all(Some(BucketRate::per_second(100, 1)), None);
    let throttles = Arc::new(Throttles::new(limits));
    let engine = || {
        let share = Arc::new(SharedLimit::new(throttles.clone()));
        Throttle::new(ram(), share, clock.clone()).unwrap()
    };
    let (mut stuck, mut quick) = (engine(), engine());
    for tag in 0..3 {
        quick.submit(tag, Io::Read { sector: 0 }, &mut page(512)).unwrap();
        stuck.submit(tag, Io::Read { sector: 0 }, &mut page(512)).unwrap();
    }
    quick.kick();
    assert_eq!(tags(&mut quick), [0]);
    stuck.kick();
    assert_eq!(tags(&mut stuck), [] as [u32; 0]);
    // From here on it is the other disk's turn, which does nothing.
    let begin = clock.now();
    let mut over = Vec::new();
    while over.is_empty() {
        clock.advance(quick.deadline().unwrap());
        over = tags(&mut quick);
    }
    assert!(clock.now() - begin < Duration::from_millis(30), "{:?}", clock.now());
    drop(stuck);
    clock.advance(Duration::from_millis(10));
    assert_eq!(tags(&mut quick), [2]);
}

#[test]
fn limits_and_faults_changed_at_run_time_take_effect() {
    let clock = Manual::default();
    let (share, switch) =
        (Arc::new(SharedLimit::new(Arc::default())), Arc::new(FaultSwitch::default()));
    let faults = Faults::new(ram(), &switch, 1, clock.clone());
    let mut engine = Throttle::new(faults, share.clone(), clock.clone()).unwrap();
    let read = |engine: &mut Throttle<_, _, _>, tag| {
        engine.submit(tag, Io::Read { sector: 0 }, &mut page(512)).unwrap();
        engine.kick();
        done(engine)
    };
    assert_eq!(read(&mut engine, 0), [(0, Ok(()))]);
    switch.set(FaultPlan { reads: 1_000_000, errno: 5, ..FaultPlan::default() });
    assert_eq!(read(&mut engine, 1), [(1, Err(EngineError::Os(5)))]);
    switch.set(FaultPlan { latency: Duration::from_secs(9), ..FaultPlan::default() });
    assert_eq!(read(&mut engine, 2), []);
    assert_eq!(engine.deadline(), Some(Duration::from_secs(9)));
    switch.set(FaultPlan::default());
    share.wake();
    engine.wait_due(None).unwrap();
    assert_eq!(tags(&mut engine), [2], "delayed operation completes after latency is removed");
    let limits = ThrottleLimits::of_all(Some(BucketRate::per_second(1, 1)), None);
    share.throttles().set(limits);
    assert_eq!(read(&mut engine, 3), [(3, Ok(()))]);
    assert_eq!(read(&mut engine, 4), []);
    share.throttles().set(ThrottleLimits::default());
    engine.wait_due(None).unwrap();
    assert_eq!(tags(&mut engine), [4]);
}

#[test]
fn trace_of_disk_is_replayed_by_fio() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target");
    std::fs::File::create(&target).unwrap().set_len(1 << 20).unwrap();
    let (clock, out) = (Manual::default(), Shared::default());
    let trace = Arc::new(Trace::new(Box::new(out.clone()), text(&target), &clock).unwrap());
    let mut engine = Traced::new(ram(), trace.clone(), clock.clone());
    for i in 0..40 {
        clock.advance(Duration::from_micros(250));
        let (io, mut segments) = match i % 5 {
            0 => (Io::Flush, vec![]),
            1 | 2 => (Io::Read { sector: i * 8 }, page(4096)),
            _ => (Io::Write { sector: i * 8 }, page(8192)),
        };
        engine.submit(0, io, &mut segments).unwrap();
        engine.kick();
        assert_eq!(done(&mut engine), [(0, Ok(()))]);
    }
    trace.flush().unwrap();
    let log = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines[0], "fio version 3 iolog");
    assert_eq!(lines[4], format!("500 {} read 4096 4096", text(&target)));
    if !has("fio", "fio") {
        return;
    }
    let file = dir.path().join("trace.log");
    std::fs::write(&file, &log).unwrap();
    let args = [
        "--name=replay",
        "--output-format=terse",
        "--ioengine=psync",
        "--bs=4k",
        &format!("--read_iolog={}", text(&file)),
    ];
    let told = String::from_utf8(tool("fio", &args).stdout).unwrap();
    let fields: Vec<&str> = told.lines().find(|l| l.starts_with('3')).unwrap().split(';').collect();
    // KiB read and written: 16 of 4 KiB, 16 of 8 KiB.
    assert_eq!((fields[4], fields[5], fields[46]), ("0", "64", "128"), "{told}");
}

#[test]
fn image_with_throttle_faults_and_trace_applies_all() {
    let limits = ThrottleLimits::of_all(Some(BucketRate::per_second(5000, 1)), None);
    let share = Arc::new(SharedLimit::new(Arc::new(Throttles::new(limits))));
    let plan = FaultPlan {
        latency: Duration::from_micros(200),
        flushes: 1_000_000,
        errno: 28,
        ..FaultPlan::default()
    };
    let out = Shared::default();
    let image = Image::open_disk(&"ram:1M".parse().unwrap(), ImageOptions::default()).unwrap();
    let image = image
        .throttled(share)
        .with_faults(Arc::new(FaultSwitch::new(plan)), 1)
        .traced(Box::new(out.clone()), "/dev/x")
        .unwrap();
    let mut engine = image.engine::<HeapMemory>(32).unwrap();
    for tag in 0..20 {
        engine.submit(tag, Io::Write { sector: 0 }, &mut page(512)).unwrap();
    }
    engine.submit(20, Io::Flush, &mut vec![]).unwrap();
    engine.kick();
    let mut over = Vec::new();
    while over.len() < 21 {
        engine.wait_due(None).unwrap();
        over.extend(done(&mut engine));
    }
    assert!(over.contains(&(20, Err(EngineError::Os(28)))));
    assert_eq!(over.iter().filter(|(_, result)| result.is_ok()).count(), 20);
    drop((engine, image));
    let log = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
    assert_eq!(log.matches(" write 0 512").count(), 20);
}
