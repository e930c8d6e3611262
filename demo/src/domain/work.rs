//! The guest that checks a disk: writes and reads at random offsets, and verifies the data read.
//!
//! The disk is divided into cells of 4 KiB. The contents of a cell are derived from the seed, the
//! cell's number and the number of times that it was written. Data of another cell, or of an
//! earlier write, is therefore detected. A cell that was never written must contain zeros, unless
//! the image was not blank.

mod cells;
mod report;

pub use report::Report;

use super::disk::failure;
use super::{ChildMessage, JoinArgs};
use crate::machine::devices::DISK;
use cells::{CELL, contents, diagnose};
use clap::Args;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pvio_blkfront::blocking::BlockingDisk;
use pvio_blkfront::{Op, SLOT_BYTES, SlotId};
use pvio_daemon::failure::Failure;
use pvio_daemon::stop::{Stop, Wakeup};
use pvio_hosted::Domain;
use pvio_ring::proto::blkif::Status;
use pvio_xenbus::client::Client;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// Number of cells of the largest request.
const MAX_CELLS: u64 = (SLOT_BYTES / CELL) as u64;
/// How long to wait for a reconnection to the driver domain.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum number of mismatches that are reported individually.
const MAX_MISMATCHES_SHOWN: usize = 5;
/// Upper bound of recorded latencies, in nanoseconds.
const MAX_NS: u64 = 120_000_000_000;

/// Arguments of `pvio domain check`.
#[derive(Debug, Args)]
pub struct WorkArgs {
    #[command(flatten)]
    /// Arguments of all child processes.
    pub join: JoinArgs,
    /// Duration in seconds
    #[arg(long)]
    pub seconds: Option<u64>,
    /// Number of requests
    #[arg(long)]
    pub requests: Option<u64>,
    /// Requests in flight
    #[arg(long)]
    pub depth: usize,
    /// Seed of the workload
    #[arg(long)]
    pub seed: u64,
    /// Cells that were never written may contain any data
    #[arg(long)]
    pub not_blank: bool,
    /// Show no progress
    #[arg(long)]
    pub quiet: bool,
}

/// Runs the check.
///
/// # Errors
/// The disk cannot be attached, or a request fails.
pub fn run(args: &WorkArgs) -> Result<(), Failure> {
    let stop = Stop::on_signal(Wakeup::new()?)?;
    let domain = super::join(&args.join)?;
    let xs = domain.xenstore().map_err(Failure::of)?;
    let session = BlockingDisk::attach(domain, xs, DISK, RECONNECT_TIMEOUT).map_err(failure)?;
    let cells = session.size() / CELL as u64;
    if cells == 0 {
        return Err(Failure::input(
            "the disk cannot be checked: it is smaller than 4096 bytes",
            "use a larger one",
        ));
    }
    ChildMessage::Ready.send();
    let mut work = Work::new(args, session, cells)?;
    work.run_workload(args, &stop)?;
    work.report.stopped = stop.is_requested();
    work.read_all()?;
    let report = work.finish();
    let json = serde_json::to_string(&report).map_err(Failure::foreign)?;
    ChildMessage::Report(json).send();
    Ok(())
}

struct Work {
    session: BlockingDisk<Domain, Client>,
    rng: Pcg64Mcg,
    seed: u64,
    cells: u64,
    depth: usize,
    can_flush: bool,
    blank: bool,
    /// Number of times that each cell was written.
    versions: BTreeMap<u64, u32>,
    cells_in_flight: HashSet<u64>,
    /// Requests in flight, by slot.
    slots: Vec<Option<InFlight>>,
    in_flight: usize,
    latency: Histogram<u64>,
    report: Report,
    bar: ProgressBar,
    cell: Vec<u8>,
    buf: Vec<u8>,
}

#[derive(Clone, Copy)]
struct InFlight {
    first: u64,
    count: u64,
    kind: Kind,
    start: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
}

impl Work {
    fn new(
        args: &WorkArgs,
        session: BlockingDisk<Domain, Client>,
        cells: u64,
    ) -> Result<Self, Failure> {
        let bar = match args.requests {
            Some(requests) => ProgressBar::new(requests),
            None => ProgressBar::new(args.seconds.unwrap_or(10) * 1000),
        };
        bar.set_draw_target(if args.quiet {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr_with_hz(5)
        });
        let style = ProgressStyle::with_template("{bar:32} {percent:>3}%  {msg}");
        bar.set_style(style.map_err(Failure::foreign)?);
        let can_flush = session.device().served().is_some_and(|disk| disk.offer.flush);
        let latency = Histogram::new_with_bounds(1, MAX_NS, 3).map_err(Failure::foreign)?;
        Ok(Self {
            session,
            rng: Pcg64Mcg::seed_from_u64(args.seed),
            seed: args.seed,
            cells,
            depth: args.depth,
            can_flush,
            blank: !args.not_blank,
            versions: BTreeMap::new(),
            cells_in_flight: HashSet::new(),
            slots: Vec::new(),
            in_flight: 0,
            latency,
            report: Report::default(),
            bar,
            cell: vec![0; CELL],
            buf: vec![0; SLOT_BYTES],
        })
    }

    /// Reads and writes at random until the duration or number of requests is reached.
    fn run_workload(&mut self, args: &WorkArgs, stop: &Stop) -> Result<(), Failure> {
        let begin = Instant::now();
        let mut started = 0;
        let mut last_progress = begin;
        loop {
            let over = match (args.requests, args.seconds) {
                (Some(requests), _) => started >= requests,
                (None, seconds) => begin.elapsed() >= Duration::from_secs(seconds.unwrap_or(10)),
            };
            let over = over || stop.is_requested();
            while !over && self.in_flight < self.depth {
                if args.requests.is_some_and(|most| started >= most) || !self.start_one()? {
                    break;
                }
                started += 1;
            }
            if self.in_flight == 0 {
                break;
            }
            self.take_answers()?;
            if last_progress.elapsed() >= Duration::from_millis(200) {
                last_progress = Instant::now();
                self.show(args, begin.elapsed());
            }
        }
        let seconds = begin.elapsed().as_secs_f64();
        let bytes = self.report.bytes_read + self.report.bytes_written;
        self.report.seconds = seconds;
        self.report.iops = self.report.requests as f64 / seconds;
        self.report.mb_per_s = bytes as f64 / 1e6 / seconds;
        Ok(())
    }

    fn show(&self, args: &WorkArgs, elapsed: Duration) {
        let done = self.report.requests;
        let position = if args.requests.is_some() { done } else { elapsed.as_millis() as u64 };
        self.bar.set_position(position);
        let seconds = elapsed.as_secs_f64();
        let bytes = (self.report.bytes_read + self.report.bytes_written) as f64;
        let us = |q| self.latency.value_at_quantile(q) as f64 / 1000.0;
        self.bar.set_message(format!(
            "{:.0} IOPS  {:.0} MB/s  p50 {:.0} µs  p99 {:.0} µs",
            done as f64 / seconds,
            bytes / 1e6 / seconds,
            us(0.5),
            us(0.99)
        ));
    }

    /// Starts a request; returns false if none can be started now.
    fn start_one(&mut self) -> Result<bool, Failure> {
        let (kind, count) = match self.rng.random_range(0..1000_u32) {
            0 if self.can_flush => (Kind::Flush, 0),
            n if n % 2 == 0 => (Kind::Write, self.count()),
            _ => (Kind::Read, self.count()),
        };
        let first = self.rng.random_range(0..=self.cells - count);
        // The result of two concurrent requests for one cell is undefined.
        if (first..first + count).any(|cell| self.cells_in_flight.contains(&cell)) {
            return Ok(self.in_flight == 0);
        }
        let queue = self.session.queue().map_err(failure)?;
        let Some(slot) = queue.reserve() else { return Ok(false) };
        if kind == Kind::Write {
            for (n, cell) in (first..first + count).enumerate() {
                let version = self.versions.entry(cell).or_insert(0);
                *version = version.wrapping_add(1);
                contents(self.seed, cell, *version, &mut self.cell);
                let _ = queue.fill(slot, n * CELL, &self.cell);
            }
        }
        self.cells_in_flight.extend(first..first + count);
        self.submit(slot, InFlight { first, count, kind, start: Instant::now() })?;
        Ok(true)
    }

    /// Returns a random request size: mostly single cells, sometimes several.
    fn count(&mut self) -> u64 {
        let most = MAX_CELLS.min(self.cells);
        if self.rng.random_range(0..4_u32) == 0 { self.rng.random_range(1..=most) } else { 1 }
    }

    fn submit(&mut self, slot: SlotId, request: InFlight) -> Result<(), Failure> {
        let (sector, bytes) = (request.first * 8, request.count as usize * CELL);
        let op = match request.kind {
            Kind::Read => Op::Read { sector, bytes },
            Kind::Write => Op::Write { sector, bytes },
            Kind::Flush => Op::Flush,
        };
        let queue = self.session.queue().map_err(failure)?;
        queue.start(slot, op).map_err(Failure::foreign)?;
        queue.publish().map_err(Failure::of)?;
        if self.slots.len() <= slot.index() {
            self.slots.resize(slot.index() + 1, None);
        }
        self.slots[slot.index()] = Some(request);
        self.in_flight += 1;
        Ok(())
    }

    /// Waits for responses, and verifies the data of reads.
    fn take_answers(&mut self) -> Result<(), Failure> {
        let mut done = Vec::new();
        let completed = self.session.answers(|slot, op, status| done.push((slot, op, status)));
        completed.map_err(failure)?;
        for (slot, op, status) in done {
            let Some(request) = self.slots.get_mut(slot.index()).and_then(Option::take) else {
                return Err(Failure::new(
                    format!("the backend completed a request that is not in flight: {op:?}"),
                    "",
                ));
            };
            self.in_flight -= 1;
            if status != Status::Okay {
                let what = format!("the backend could not do {op:?}: {status:?}");
                return Err(Failure::new(what, "see the driver domain's log"));
            }
            let took = u64::try_from(request.start.elapsed().as_nanos()).unwrap_or(MAX_NS);
            self.latency.saturating_record(took);
            let bytes = request.count * CELL as u64;
            self.report.requests += 1;
            match request.kind {
                Kind::Flush => self.report.flushes += 1,
                Kind::Write => {
                    self.report.writes += 1;
                    self.report.bytes_written += bytes;
                }
                Kind::Read => {
                    self.report.reads += 1;
                    self.report.bytes_read += bytes;
                    self.read_data(slot, request)?;
                    self.compare(request);
                }
            }
            for cell in request.first..request.first + request.count {
                self.cells_in_flight.remove(&cell);
            }
            self.session.queue().map_err(failure)?.release(slot);
        }
        Ok(())
    }

    fn read_data(&mut self, slot: SlotId, request: InFlight) -> Result<(), Failure> {
        let bytes = request.count as usize * CELL;
        self.buf.fill(0xa5);
        let queue = self.session.queue().map_err(failure)?;
        let fetched = queue.fetch(slot, 0, &mut self.buf[..bytes]);
        fetched.ok_or_else(|| Failure::new("a buffer was smaller than its request", ""))
    }

    /// Compares the data read with the expected data.
    fn compare(&mut self, request: InFlight) {
        for (n, cell) in (request.first..request.first + request.count).enumerate() {
            let version = self.versions.get(&cell).copied();
            match version {
                Some(version) => contents(self.seed, cell, version, &mut self.cell),
                None if self.blank => self.cell.fill(0),
                None => continue,
            }
            let got = &self.buf[n * CELL..(n + 1) * CELL];
            if got == self.cell {
                continue;
            }
            self.report.mismatches += 1;
            if self.report.first_mismatches.len() < MAX_MISMATCHES_SHOWN {
                let at = got.iter().zip(&self.cell).position(|(a, b)| a != b).unwrap_or(0);
                self.report.first_mismatches.push(format!(
                    "byte {}: {:#04x} instead of {:#04x} (written {} times; {})",
                    cell * CELL as u64 + at as u64,
                    got[at],
                    self.cell[at],
                    version.unwrap_or(0),
                    diagnose(self.seed, cell, version.unwrap_or(0), got),
                ));
            }
        }
    }

    /// Reads every cell that was written, in order, and computes a hash of the data.
    fn read_all(&mut self) -> Result<(), Failure> {
        self.bar.set_message("reading everything once more");
        let written: Vec<u64> = self.versions.keys().copied().collect();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for cell in written {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == cell && *count < MAX_CELLS => {
                    *count += 1
                }
                _ => runs.push((cell, 1)),
            }
        }
        let (mut got, mut expected) = (Sha256::new(), Sha256::new());
        for batch in runs.chunks(self.depth) {
            let mut submitted = Vec::new();
            for &(first, count) in batch {
                let queue = self.session.queue().map_err(failure)?;
                let Some(slot) = queue.reserve() else {
                    return Err(Failure::new("the queue has fewer slots than it reported", ""));
                };
                let request = InFlight { first, count, kind: Kind::Read, start: Instant::now() };
                self.submit(slot, request)?;
                submitted.push((slot, request));
            }
            let mut left = submitted.len();
            while left > 0 {
                let mut bad = None;
                let completed = self.session.answers(|_, op, status| {
                    if status != Status::Okay {
                        bad = Some(op);
                    }
                });
                left -= completed.map_err(failure)?.min(left);
                if let Some(op) = bad {
                    return Err(Failure::new(format!("the backend failed {op:?}"), ""));
                }
            }
            for (slot, request) in submitted {
                self.read_data(slot, request)?;
                self.compare(request);
                let bytes = request.count as usize * CELL;
                got.update(&self.buf[..bytes]);
                for cell in request.first..request.first + request.count {
                    let version = self.versions.get(&cell).copied().unwrap_or(0);
                    contents(self.seed, cell, version, &mut self.cell);
                    expected.update(&self.cell);
                }
                self.report.final_bytes += bytes as u64;
                self.slots[slot.index()] = None;
                self.in_flight -= 1;
                self.session.queue().map_err(failure)?.release(slot);
            }
        }
        self.report.sha256 = hex(&got.finalize());
        self.report.sha256_expected = hex(&expected.finalize());
        Ok(())
    }

    fn finish(mut self) -> Report {
        self.bar.finish_and_clear();
        let us = |ns: u64| ns as f64 / 1000.0;
        let report = &mut self.report;
        report.p50_us = us(self.latency.value_at_quantile(0.5));
        report.p99_us = us(self.latency.value_at_quantile(0.99));
        report.max_us = us(self.latency.max());
        report.sessions = self.session.device().sessions();
        report.ok = report.mismatches == 0 && report.sha256 == report.sha256_expected;
        self.session.set_patience(Duration::from_secs(2));
        if let Err(e) = self.session.close() {
            tracing::warn!(error = %pvio_ring::error::Report(&e), "the disk cannot be closed");
        }
        self.report
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}
