//! Rings: a frontend thread on core 0 and a backend thread on core 1, both polling, compared with
//! the same loops in C with the macros of Xen's own `ring.h` (`benches/c/ring_ref.c`).
//!
//! The result depends mostly on the distance between the two cores (up to a factor of four), which
//! changes on a shared machine. Only ratios of pairs measured immediately after each other are
//! meaningful.

use crate::pin::pin;
use crate::row::{Row, paired};
use anyhow::{Context, Result, bail, ensure};
use pvio_ring::proto::blkif::{self, Abi, DataOp, Head, Segment, Segments, Status};
use pvio_ring::proto::netif::{self, TxFlags};
use pvio_ring::shm::{HeapMemory, PAGE_SIZE};
use pvio_ring::{BackRing, FrontRing, GrantRef, RingLayout, Slot};
use std::hint::{black_box, spin_loop};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// Source of the reference; compiled at run time, since it needs Xen's headers.
const REFERENCE: &str = include_str!("../c/ring_ref.c");

/// Contents of the ring's slots.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Traffic {
    /// A disk read of one segment, parsed and checked, and its response.
    Blk,
    /// A packet to transmit, parsed and checked, and its response.
    Tx,
    /// 112 bytes in one direction, without responses; only the response producer index is advanced.
    Raw,
}

impl Traffic {
    const fn name(self) -> &'static str {
        match self {
            Self::Blk => "blk",
            Self::Tx => "tx",
            Self::Raw => "raw",
        }
    }

    const fn slot_size(self) -> usize {
        match self {
            Self::Blk => Abi::X86_64.slot_size(),
            Self::Tx => netif::TX_SLOT_SIZE,
            Self::Raw => 112,
        }
    }
}

/// A case.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Name of the case.
    pub name: &'static str,
    /// Contents of the ring's slots.
    pub traffic: Traffic,
    /// Number of pages of the ring.
    pub pages: usize,
    /// Maximum number of items in flight.
    pub depth: u64,
    /// Number of items per publication of a producer index.
    pub batch: u64,
    /// Total number of items, a multiple of `batch`; takes about ten milliseconds.
    pub count: u64,
}

/// Number of slices of pvio and of the reference in one pair.
const SLICES: usize = 5;

/// The cases of the suite.
pub const CASES: [Case; 6] = [
    case("blk-32-slots-depth-1", Traffic::Blk, 1, 1, 1, 80_000),
    case("blk-256-slots-publish-each", Traffic::Blk, 8, 256, 1, 128_000),
    case("blk-256-slots-publish-32", Traffic::Blk, 8, 256, 32, 1_600_000),
    case("tx-256-slots-publish-32", Traffic::Tx, 1, 256, 32, 2_560_000),
    case("one-way-112-32-slots-publish-8", Traffic::Raw, 1, 32, 8, 800_000),
    case("one-way-112-256-slots-publish-32", Traffic::Raw, 8, 256, 32, 1_280_000),
];

const fn case(
    name: &'static str,
    traffic: Traffic,
    pages: usize,
    depth: u64,
    batch: u64,
    count: u64,
) -> Case {
    Case { name, traffic, pages, depth, batch, count }
}

/// Measures every case, with `runs` pairs each; compiles the reference into `dir`.
///
/// # Errors
/// The reference cannot be compiled (no compiler, no headers) or loses an item.
pub fn run(dir: &Path, runs: usize) -> Result<Vec<Row>> {
    let reference = compile_reference(dir)?;
    CASES.iter().map(|case| run_case(case, &reference, runs)).collect()
}

/// Measures one case, compared with the program that [`compile_reference`] created.
///
/// # Errors
/// The reference fails.
pub fn run_case(case: &Case, reference: &Path, runs: usize) -> Result<Row> {
    let rate = |best: Duration| case.count as f64 / best.as_secs_f64() / 1e6;
    // A slice is distorted if the machine did other work in it. The best slices of each pair are
    // therefore compared; slices of pvio and of the reference alternate, as pairs do.
    let pair = || -> Result<_> {
        let (mut best_ours, mut best_theirs) = (Duration::MAX, Duration::MAX);
        for _ in 0..SLICES {
            best_ours = best_ours.min(ours(case)?);
            best_theirs = best_theirs.min(theirs(case, reference)?);
        }
        Ok((rate(best_ours), rate(best_theirs)))
    };
    let pairs: Result<Vec<_>> = (0..runs).map(|_| pair()).collect();
    Ok(paired("ring", case.name, "C, Xen's ring.h", "M items/s", &pairs?))
}

/// Compiles the reference into `dir`, with `-O2`.
///
/// # Errors
/// There is no compiler, or Xen's headers are not installed (Debian: `libxen-dev`).
pub fn compile_reference(dir: &Path) -> Result<PathBuf> {
    let (source, program) = (dir.join("ring_ref.c"), dir.join("ring_ref"));
    std::fs::write(&source, REFERENCE)?;
    let output = Command::new("cc")
        .args(["-O2", "-pthread", "-o"])
        .args([&program, &source])
        .output()
        .context("SKIPPED: there is no C compiler to make the reference with; install gcc")?;
    if !output.status.success() {
        let says = String::from_utf8_lossy(&output.stderr);
        bail!("SKIPPED: the reference does not compile; install libxen-dev\n{says}");
    }
    Ok(program)
}

fn theirs(case: &Case, reference: &Path) -> Result<Duration> {
    let numbers = [case.pages as u64, case.depth, case.batch, case.count].map(|n| n.to_string());
    let output = Command::new(reference).arg(case.traffic.name()).args(numbers).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let nanoseconds = String::from_utf8(output.stdout)?;
    Ok(Duration::from_nanos(nanoseconds.trim().parse()?))
}

fn ours(case: &Case) -> Result<Duration> {
    let run = Run {
        mem: HeapMemory::pages(case.pages),
        slot_size: case.traffic.slot_size(),
        case: *case,
        ready: Barrier::new(2),
    };
    let layout = RingLayout::new(case.pages * PAGE_SIZE, run.slot_size);
    let slots = layout.map_or(0, |l| u64::from(l.slots()));
    ensure!(slots >= case.depth, "the ring is too small");
    let (front, back): (End<Duration>, End<()>) = match case.traffic {
        Traffic::Blk => (blk_front, blk_back),
        Traffic::Tx => (tx_front, tx_back),
        Traffic::Raw => (raw_front, raw_back),
    };
    let (front, back) = std::thread::scope(|scope| {
        let front = scope.spawn(|| {
            pin(0);
            front(&run)
        });
        let back = scope.spawn(|| {
            pin(1);
            back(&run)
        });
        (front.join().expect("the frontend's thread"), back.join().expect("the backend's thread"))
    });
    let expected = (0..case.count).fold(0, u64::wrapping_add);
    let ((time, front), ((), back)) = (front?, back?);
    let all = [front, back].into_iter().flatten().all(|sum| sum == expected);
    ensure!(all, "items were lost or changed");
    Ok(time)
}

/// State that both sides of one measurement share.
struct Run {
    mem: HeapMemory,
    slot_size: usize,
    case: Case,
    /// Reached when the frontend has initialised the ring.
    ready: Barrier,
}

/// The function of one side: returns its measurement, and the sum of the ids in its slots, if they
/// have ids.
type End<T> = fn(&Run) -> Result<(T, Option<u64>)>;

/// Runs the frontend: pushes `batch` items whenever there is room, publishes them, and pops
/// responses.
#[inline(always)]
fn front_end(
    run: &Run,
    mut push: impl FnMut(&mut FrontRing<&HeapMemory>, u64) -> Result<()>,
    mut take: impl FnMut(Slot<'_, &HeapMemory>) -> Result<()>,
) -> Result<Duration> {
    let case = run.case;
    let ring = FrontRing::init(&run.mem, run.slot_size);
    run.ready.wait();
    let mut ring = ring?;
    let start = Instant::now();
    let (mut sent, mut done) = (0, 0);
    while done < case.count {
        if sent < case.count && sent - done + case.batch <= case.depth {
            for _ in 0..case.batch {
                push(&mut ring, sent)?;
                sent += 1;
            }
            let _ = ring.publish();
        }
        let waiting = ring.look()?;
        if waiting == 0 {
            spin_loop();
        }
        for _ in 0..waiting {
            take(ring.pop()?.context("a response was seen")?)?;
        }
        done += u64::from(waiting);
    }
    Ok(start.elapsed())
}

/// Runs the backend: responds to all requests, and publishes every `batch` responses and after the
/// last one.
#[inline(always)]
fn back_end(
    run: &Run,
    mut answer: impl FnMut(&mut BackRing<&HeapMemory>) -> Result<()>,
) -> Result<()> {
    let case = run.case;
    run.ready.wait();
    let mut ring = BackRing::attach(&run.mem, run.slot_size)?;
    let mut done = 0;
    while done < case.count {
        let waiting = ring.look()?;
        if waiting == 0 {
            spin_loop();
        }
        let mut unpublished = 0;
        for _ in 0..waiting {
            answer(&mut ring)?;
            unpublished += 1;
            if unpublished == case.batch {
                let _ = ring.publish();
                unpublished = 0;
            }
        }
        let _ = ring.publish();
        done += u64::from(waiting);
    }
    Ok(())
}

fn blk_front(run: &Run) -> Result<(Duration, Option<u64>)> {
    let mut sum = 0_u64;
    let push = |ring: &mut FrontRing<&HeapMemory>, n: u64| {
        let gref = GrantRef(8 + (n & 255) as u32);
        let segments = Segments::from_slice(&[Segment { gref, first: 0, last: 7 }]);
        let segments = segments.context("one segment")?;
        let request = blkif::Request::Data { op: DataOp::Read, id: n, sector: n * 8, segments };
        Ok(ring.push_with(|slot| request.write_to(Abi::X86_64, 0xca00, slot))?)
    };
    let time = front_end(run, push, |mut slot| {
        let response = blkif::Response::read(&mut slot)?;
        ensure!(response.status == Status::Okay, "a read failed");
        sum = sum.wrapping_add(response.id);
        Ok(())
    })?;
    Ok((time, Some(sum)))
}

fn blk_back(run: &Run) -> Result<((), Option<u64>)> {
    let mut sum = 0_u64;
    let mut segments = Segments::default();
    back_end(run, |ring| {
        let mut slot = ring.pop()?.context("a request was seen")?;
        let response = match Head::read(&mut slot, Abi::X86_64, &mut segments)? {
            Ok(Head::Data { op, id, sector }) => {
                let good = sector == id * 8 && segments.len() == 1;
                let status = if good { Status::Okay } else { Status::Error };
                blkif::Response { id, op: op.code(), status }
            }
            Ok(Head::Discard { id, .. } | Head::Indirect { id, .. }) => {
                blkif::Response { id, op: blkif::op::DISCARD, status: Status::NotSupported }
            }
            Err(refusal) => {
                blkif::Response { id: refusal.id, op: refusal.op, status: refusal.status }
            }
        };
        // A backend would use the segments, so parsing them must not be optimised away.
        black_box(&segments);
        sum = sum.wrapping_add(response.id);
        Ok(ring.push(response.write(Abi::X86_64, &mut [0; 16]))?)
    })?;
    Ok(((), Some(sum)))
}

fn tx_front(run: &Run) -> Result<(Duration, Option<u64>)> {
    let mut next = 0_u16;
    let push = |ring: &mut FrontRing<&HeapMemory>, n: u64| {
        let request = netif::TxRequest {
            gref: GrantRef(8 + (n & 255) as u32),
            offset: 64,
            flags: TxFlags::DATA_VALIDATED,
            id: n as u16,
            size: 1500,
        };
        Ok(ring.push(&request.to_bytes())?)
    };
    let time = front_end(run, push, |mut slot| {
        let response = netif::TxResponse::read(&mut slot)?;
        ensure!(response.status == netif::rsp::OKAY && response.id == next, "a packet was lost");
        next = next.wrapping_add(1);
        Ok(())
    })?;
    Ok((time, None))
}

fn tx_back(run: &Run) -> Result<((), Option<u64>)> {
    back_end(run, |ring| {
        let mut slot = ring.pop()?.context("a request was seen")?;
        let request = netif::TxRequest::read(&mut slot)?;
        let good = u32::from(request.offset) + u32::from(request.size) <= 4096
            && !request.flags.contains(TxFlags::MORE_DATA);
        let status = if good { netif::rsp::OKAY } else { netif::rsp::ERROR };
        Ok(ring.push(&netif::TxResponse { id: request.id, status }.to_bytes())?)
    })?;
    Ok(((), None))
}

fn raw_front(run: &Run) -> Result<(Duration, Option<u64>)> {
    let push = |ring: &mut FrontRing<&HeapMemory>, n: u64| {
        let mut item = [0; 112];
        for (i, word) in item.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = (n + i as u64).to_le_bytes();
        }
        Ok(ring.push(&item)?)
    };
    let time = front_end(run, push, |_| Ok(()))?;
    Ok((time, None))
}

fn raw_back(run: &Run) -> Result<((), Option<u64>)> {
    let mut sum = 0_u64;
    back_end(run, |ring| {
        let item = ring.pop()?.context("an item was seen")?.read_words::<14>()?;
        let (first, last) = (item[0], item[13]);
        sum = sum.wrapping_add(first + (last - first - 13));
        Ok(ring.push(&[])?)
    })?;
    Ok(((), Some(sum)))
}
