//! Rings within one process: the cost of push and pop alone, and between two threads. Tracks pvio's
//! own figure during development; `pvio-bench ring` compares it with C.
#![forbid(unsafe_code)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pvio_benches::pin::pin;
use pvio_ring::shm::HeapMemory;
use pvio_ring::{BackRing, FrontRing};
use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

const BATCH: u32 = 32;

fn ends(slot_size: usize) -> (FrontRing<HeapMemory>, BackRing<HeapMemory>) {
    let mem = HeapMemory::pages(8);
    let front = FrontRing::init(mem.clone(), slot_size).expect("a ring");
    (front, BackRing::attach(mem, slot_size).expect("a ring"))
}

fn push<const N: usize>(front: &mut FrontRing<HeapMemory>) {
    for i in 0..BATCH {
        front.push(black_box(&[i as u8; N])).expect("room");
    }
    let _ = front.publish();
}

fn answer<const N: usize>(back: &mut BackRing<HeapMemory>) -> u32 {
    let waiting = back.look().expect("an honest frontend");
    for _ in 0..waiting {
        let mut slot = back.pop().expect("an honest frontend").expect("a request");
        let request = slot.read_array::<N>().expect("a whole slot");
        black_box(&request);
        back.push(black_box(&[0; 4])).expect("an open request");
    }
    let _ = back.publish();
    waiting
}

fn take(front: &mut FrontRing<HeapMemory>) -> u32 {
    let waiting = front.look().expect("an honest backend");
    for _ in 0..waiting {
        let mut slot = front.pop().expect("an honest backend").expect("a response");
        black_box(slot.read_array::<4>().expect("a whole slot"));
    }
    waiting
}

/// Both sides on one thread: the instructions alone, without cache line transfers.
fn one_thread<const N: usize>(c: &mut Criterion) {
    let mut group = c.benchmark_group("ring/one-thread");
    group.throughput(Throughput::Elements(BATCH.into()));
    group.bench_function(format!("{N}-bytes"), |b| {
        let (mut front, mut back) = ends(N);
        b.iter(|| {
            push::<N>(&mut front);
            answer::<N>(&mut back);
            take(&mut front)
        });
    });
    group.finish();
}

/// Each side on its own core, with at most four batches in flight.
fn two_threads<const N: usize>(c: &mut Criterion) {
    let mut group = c.benchmark_group("ring/two-threads");
    group.throughput(Throughput::Elements(BATCH.into()));
    group.bench_function(format!("{N}-bytes"), |b| {
        let (mut front, mut back) = ends(N);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                pin(1);
                while !over.load(Ordering::Relaxed) {
                    if answer::<N>(&mut back) == 0 {
                        spin_loop();
                    }
                }
            });
            b.iter_custom(|batches| {
                let items = batches * u64::from(BATCH);
                let (mut sent, mut done) = (0, 0);
                let start = Instant::now();
                while done < items {
                    if sent < items && front.in_flight() <= 3 * BATCH {
                        push::<N>(&mut front);
                        sent += u64::from(BATCH);
                    }
                    let taken = take(&mut front);
                    if taken == 0 {
                        spin_loop();
                    }
                    done += u64::from(taken);
                }
                start.elapsed()
            });
            over.store(true, Ordering::Relaxed);
        });
    });
    group.finish();
}

fn all(c: &mut Criterion) {
    one_thread::<112>(c);
    one_thread::<12>(c);
    two_threads::<112>(c);
    two_threads::<12>(c);
}

criterion_group!(benches, all);
criterion_main!(benches);
