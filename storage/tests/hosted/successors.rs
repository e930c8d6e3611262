//! Backends that take over from a predecessor with more features, with requests in flight.

use crate::machine::{Machine, PATIENCE, image};
use pvio_blkback::{Config, Policy};
use pvio_blkfront::blocking::BlockingDisk;
use pvio_blkfront::{Op, Queue, RequestedFeatures, Shape, Trust};
use pvio_event_channel::EventChannel;
use pvio_hosted::Domain;
use pvio_ring::proto::blkif::Status;
use pvio_xenbus::handshake::vbd::{Mode, ToolstackBack};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const KIB: usize = 1 << 10;

/// Returns the settings with the fewest features.
fn less(policy: Policy) -> Config {
    Config { policy, max_indirect_segments: 0, max_ring_page_order: 0, ..Config::default() }
}

#[test]
fn reconnect_to_smaller_backend_resubmits_requests_in_smaller_parts() {
    for policy in [Policy::Map, Policy::Copy, Policy::PersistentOrMap] {
        let mut machine = Machine::new(Config { policy, ..Config::default() });
        let file = image(16 << 20);
        let addr = machine.add_disk(file.path(), Mode::ReadWrite);
        let driver = machine.serve();
        let guest = machine.join(machine.guest);
        let xs = guest.xenstore().unwrap();
        let requested = Shape { ring_pages: 2, pages_per_slot: 64 };
        let mut session = BlockingDisk::attach_with(guest, xs, addr, requested, PATIENCE).unwrap();
        let queue = session.queue().unwrap();
        assert_eq!((queue.depth(), queue.slot_bytes()), (64, 256 * KIB));
        driver.end();

        // There is no backend: all requests are in the ring when the next one starts.
        let content = |slot: usize| -> Vec<u8> {
            (0..256 * KIB).map(|i| (i / 4096 * 5 + slot * 11 + 1) as u8).collect()
        };
        while let Some(slot) = queue.reserve() {
            queue.fill(slot, 0, &content(slot.index())).unwrap();
            let (sector, bytes) = (slot.index() as u64 * 512, 256 * KIB);
            queue.start(slot, Op::Write { sector, bytes }).unwrap();
        }
        queue.publish().unwrap();
        assert_eq!(queue.in_flight(), 64);
        machine.config = less(policy);
        machine.rebuild_driver(&ToolstackBack::new(addr, file.path().to_str().unwrap()));
        let driver = machine.serve();

        let mut slots = Vec::new();
        while slots.len() < 64 {
            session
                .answers(|slot, _, status| {
                    assert_eq!(status, Status::Okay, "{policy}");
                    slots.push(slot);
                })
                .unwrap();
        }
        let queue = session.queue().unwrap();
        assert_eq!((queue.shape().ring_pages, queue.limits().segments), (1, 11), "{policy}");
        assert_eq!(
            (queue.depth(), queue.slot_bytes()),
            (64, 256 * KIB),
            "slots are unchanged after reconnect"
        );
        for slot in slots {
            let mut there = vec![0; 256 * KIB];
            file.as_file().read_exact_at(&mut there, slot.index() as u64 * 256 * 1024).unwrap();
            assert!(there == content(slot.index()), "{policy}, slot {}", slot.index());
            queue.release(slot);
        }
        assert_eq!(driver.stats.writes.get(), 64 * 6, "{policy}: number of parts of 11 pages");
        let mut all = vec![0; 16 << 20];
        session.read_at(0, &mut all).unwrap();
        assert!(all == std::fs::read(file.path()).unwrap());
        session.close().unwrap();
        driver.end();
    }
}

/// Passes a queue to its thread and back.
#[derive(Default)]
struct Seat {
    to: Mutex<Option<Queue<Domain>>>,
    from: Mutex<Option<Queue<Domain>>>,
}

const SLOTS: usize = 64;
const BLOCK: usize = 16 * KIB;

fn content(number: usize, slot: usize) -> [u8; BLOCK] {
    [(slot * 7 + number + 1) as u8; BLOCK]
}

/// Writes a block with each slot and reads it back, repeatedly. Returns the queue when its
/// session is over, or when told to stop.
fn work(seat: &Seat, number: usize, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        let Some(mut queue) = seat.to.lock().unwrap().take() else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        // The reserved slots, and the last operation of each.
        let mut idle = Vec::new();
        while !queue.is_over() && !stop.load(Ordering::SeqCst) {
            while let Some(slot) = queue.reserve() {
                idle.push((slot, None));
            }
            for (slot, before) in idle.drain(..) {
                let (index, bytes) = (slot.index(), BLOCK);
                let sector = ((number * SLOTS + index) * (BLOCK / 512)) as u64;
                let (op, filled) = match before {
                    Some(Op::Write { .. }) => (Op::Read { sector, bytes }, [0; BLOCK]),
                    _ => (Op::Write { sector, bytes }, content(number, index)),
                };
                queue.fill(slot, 0, &filled).unwrap();
                queue.start(slot, op).unwrap();
            }
            queue.publish().unwrap();
            let answered = queue.poll(|slot, op, status| {
                assert_eq!(status, Status::Okay, "queue {number}");
                idle.push((slot, Some(op)));
            });
            if answered.unwrap() == 0 && !queue.final_check().unwrap() {
                // The session may end without an event.
                let _ = queue.channel().wait(Some(Duration::from_millis(20)));
                let _ = queue.channel().take();
            }
            for (slot, op) in &idle {
                if let Some(Op::Read { .. }) = op {
                    let mut seen = [0; BLOCK];
                    queue.fetch(*slot, 0, &mut seen).unwrap();
                    assert!(seen == content(number, slot.index()), "queue {number}");
                }
            }
        }
        idle.drain(..).for_each(|(slot, _)| queue.release(slot));
        *seat.from.lock().unwrap() = Some(queue);
    }
}

#[test]
fn queues_taken_by_threads_survive_backend_restarts() {
    let mut machine = Machine::new(Config { max_queues: 4, ..Config::default() });
    let file = image(8 << 20);
    let addr = machine.add_disk(file.path(), Mode::ReadWrite);
    let mut driver = Some(machine.serve());
    let guest = machine.join(machine.guest);
    let xs = guest.xenstore().unwrap();
    let shape = Shape { ring_pages: 2, pages_per_slot: 16 };
    let requested = RequestedFeatures { shape, queues: 3, trust: Trust::Never };
    let mut session =
        BlockingDisk::attach_requesting(guest, xs, addr, requested, PATIENCE).unwrap();
    assert_eq!(session.device().queues(), 3);
    assert!(session.take(3).unwrap().is_none(), "fourth queue does not exist");
    let seats: [Seat; 3] = Default::default();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Also when an assertion fails.
        let _ends = Ends(&stop);
        for (number, seat) in seats.iter().enumerate() {
            let stop = &stop;
            scope.spawn(move || work(seat, number, stop));
        }
        for config in [less(Policy::Copy), Config::default(), less(Policy::Map)] {
            for (number, seat) in seats.iter().enumerate() {
                let queue = session.take(number).unwrap().expect("queue is available");
                assert_eq!((queue.number(), queue.depth()), (number, SLOTS));
                *seat.to.lock().unwrap() = Some(queue);
            }
            let begin = Instant::now();
            let stats = driver.as_ref().map(|driver| Arc::clone(&driver.stats)).unwrap();
            while stats.writes.get() < 500 {
                assert!(begin.elapsed() < PATIENCE, "{} writes", stats.writes.get());
                session.tend(Duration::from_millis(5)).unwrap();
            }
            driver.take().unwrap().end();
            machine.config = Config { max_queues: 4, ..config };
            machine.rebuild_driver(&ToolstackBack::new(addr, file.path().to_str().unwrap()));
            driver = Some(machine.serve());
            // Some queues are returned before the next session begins, some after.
            let mut missing = vec![0, 1, 2];
            while !missing.is_empty() {
                assert!(begin.elapsed() < 2 * PATIENCE, "queues {missing:?} were not returned");
                session.tend(Duration::from_millis(5)).unwrap();
                missing.retain(|number| {
                    let back = seats[*number].from.lock().unwrap().take();
                    back.map(|queue| session.put_back(queue).unwrap()).is_none()
                });
            }
        }
        // Outstanding requests are completed for the current owner of the queue.
        for number in 0..3 {
            let mut queue = session.take(number).unwrap().expect("queue is available");
            let begin = Instant::now();
            while queue.in_use() > 0 {
                assert!(begin.elapsed() < PATIENCE, "{} slots in use", queue.in_use());
                let mut done = Vec::new();
                let each = |slot, _, status| {
                    assert_eq!(status, Status::Okay);
                    done.push(slot);
                };
                queue.poll(each).unwrap();
                done.into_iter().for_each(|slot| queue.release(slot));
            }
            session.put_back(queue).unwrap();
        }
    });
    assert_eq!(session.device().sessions(), 4);
    for (number, slot) in (0..3).flat_map(|n| (0..SLOTS).map(move |s| (n, s))) {
        let mut there = [0; BLOCK];
        file.as_file().read_exact_at(&mut there, ((number * SLOTS + slot) * BLOCK) as u64).unwrap();
        assert!(there == content(number, slot), "queue {number}, slot {slot}");
    }
    session.close().unwrap();
    driver.unwrap().end();
}

/// Stops the threads when it is dropped.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
