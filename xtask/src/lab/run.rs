//! Runs scenarios one after another, in several boots if necessary.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use super::agent::{self, Case};
use super::boot::{Boot, Machine};
use super::cache::Cache;
use super::choose::choose;
use super::queue::{Order, Queue};
use super::report::Row;
use super::{kernels, needs, report, write_image};
use crate::exec;
use crate::report::{Counts, Report};

/// Timeout of a scenario; twice the duration of the slowest one.
const SCENARIO: Duration = Duration::from_secs(180);
/// Timeout of a boot; four times its duration.
const UP: Duration = Duration::from_secs(90);
/// Timeout of dom0's reports that it is alive, which it sends every two seconds.
const STILL: Duration = Duration::from_secs(60);
/// Factor of the timeouts when QEMU counts instructions.
const SLOWER: u32 = 5;

/// Options of a run.
pub struct Options {
    /// File to write the rows to.
    pub json: Option<PathBuf>,
    /// The `pvio` to test, if it is not to be built.
    pub pvio: Option<PathBuf>,
    /// Keep the logs.
    pub keep: bool,
    /// Number of parallel machines.
    pub jobs: usize,
    /// Run the benchmark scenarios, with QEMU counting instructions.
    pub bench: bool,
}

/// An event of dom0 in the shared directory.
#[derive(Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
enum Event {
    Ready { uptime: f64 },
    End { scenario: String, result: String, reason: String, logs: Value, rows: Vec<Value> },
    Done { uptime: f64 },
}

/// Runs the scenarios that `words` select; the inner `Err` is the reason why the lab is not
/// available here.
///
/// # Errors
/// Something does not build, the words select nothing, or a signal requested a stop.
pub fn scenarios(words: &[String], options: &Options) -> Result<Result<Vec<Row>, String>> {
    let cases = choose(words, agent::cases()?, options.bench)?;
    if let Some(why) = needs::ensure(true)? {
        return Ok(Err(why));
    }
    let rows = run(&cases, options)?;
    println!("\n{}", report::table(&rows));
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&rows)?;
        fs::write(file, text + "\n").with_context(|| file.display().to_string())?;
    }
    Ok(Ok(rows))
}

/// Cases that are checks: all of pvio, and those of other backends that are needed to distinguish a
/// failure of the lab from one of pvio. `cargo xtask lab run all` also runs the others.
const CHECKED: &[&str] = &[
    ":pvio:",
    "disk-verify:pvio-dm:pv",
    "disk-fs:pvio-dm:pv",
    "own-blkfront:pvio-dm:pv",
    "disk-verify:linux:pv",
    "nic-sizes:linux:pv",
    "disk-verify:qdisk:pv",
];

/// The slowest cases are checks with only one guest type each. `cargo xtask lab run all` also runs
/// these, with the other type.
const WITH_THE_OTHER_KIND: &[&str] = &[
    "storage-direct:pvio:pv",
    "storage-nbd:pvio:pv",
    "storage-raw:pvio:pvh",
    "storage-qcow2:pvio:pvh",
    "matrix-direct:pvio:pv",
    "matrix-qcow2:pvio:pv",
    "matrix-raw:pvio:pvh",
    "matrix-nbd:pvio:pvh",
    "nic-policies:pvio:pv",
    "disk-policies:pvio:pvh",
    "disk-polled:pvio:pv",
    "disk-secure:pvio:pvh",
    "nic-fair:pvio:pv",
    "nic-peers:pvio:pvh",
    "nic-guard:pvio:pv",
    "nic-switch:pvio:pvh",
    "nic-rate:pvio:pvh",
    "life-five:pvio:pv",
    "life-pause:pvio:pvh",
    "kernel-5.10:pvio:pvh",
    "kernel-6.12:pvio:pv",
    "migrate-disk:pvio:pvh",
];

/// Runs the cases that are checks.
///
/// # Errors
/// Something does not build, or a signal requested a stop.
pub fn check(install: bool, options: &Options) -> Result<Report> {
    if let Some(why) = needs::ensure(install)? {
        return Ok(Report::skipped(why));
    }
    let checked: Vec<String> = CHECKED.iter().map(|&word| word.to_owned()).collect();
    let mut cases = choose(&checked, agent::cases()?, false)?;
    cases.retain(|case| !WITH_THE_OTHER_KIND.contains(&case.id.as_str()));
    let rows = run(&cases, options)?;
    let mut all = Report::default();
    for row in rows {
        let line = format!("{}: {}", row.scenario, row.reason);
        all = all.and(match row.result.as_str() {
            "passed" => Report { counts: Counts::PASSED, ..Report::default() },
            "skipped" => Report::skipped(line),
            _ => Report::failed(line + "\n"),
        });
    }
    Ok(all)
}

fn run(cases: &[Case], options: &Options) -> Result<Vec<Row>> {
    let cache = Cache::fill()?;
    let dir = tempfile::Builder::new().prefix("pvio-lab-").tempdir()?;
    let image = write_image(&cache, options.pvio.clone(), dir.path())?;
    let kernels = dir.path().join("kernels");
    kernels::provide(&cache, cases, &kernels)?;
    let queue = Queue::new(cases);
    let mut sessions = Vec::new();
    for machine in 0..options.jobs.clamp(1, cases.len().max(1)) {
        let dir = dir.path().join(format!("machine{}", machine + 1));
        fs::create_dir(&dir)?;
        let (cache, image, queue, icount) = (&cache, image.as_path(), &queue, options.bench);
        let (kernels, boots, ends, rows) = (kernels.as_path(), 0, 0, Vec::new());
        sessions.push(MachineRun {
            cache,
            image,
            kernels,
            dir,
            machine,
            queue,
            icount,
            boots,
            ends,
            rows,
        });
    }
    let outcome: Result<()> = thread::scope(|scope| {
        let machines: Vec<_> =
            sessions.iter_mut().map(|session| scope.spawn(|| session.all())).collect();
        let mut ends = machines.into_iter().map(|machine| machine.join());
        ends.try_for_each(|end| end.map_err(|_| anyhow!("a machine's thread panicked"))?)
    });
    let mut rows: Vec<_> = sessions.into_iter().flat_map(|session| session.rows).collect();
    // A case that was running when its machine was abandoned has no row.
    for case in cases.iter().filter(|_| outcome.is_ok()) {
        if rows.iter().all(|row| row.scenario != case.id) {
            let (scenario, result) = (case.id.clone(), "failed".to_owned());
            let reason = "no result was received; see the log of its machine".to_owned();
            rows.push(Row { scenario, result, seconds: 0.0, retries: 0, reason, rows: Vec::new() });
        }
    }
    rows.sort_by_key(|row| cases.iter().position(|case| case.id == row.scenario));
    if options.keep {
        println!("    consoles and logs are in {}", dir.keep().display());
    }
    outcome.map(|()| rows)
}

/// The boots of one machine.
struct MachineRun<'a> {
    cache: &'a Cache,
    image: &'a Path,
    /// The directory of other kernels for dom0.
    kernels: &'a Path,
    dir: PathBuf,
    machine: usize,
    queue: &'a Queue,
    icount: bool,
    boots: u32,
    /// Number of scenarios with a result.
    ends: usize,
    rows: Vec<Row>,
}

impl MachineRun<'_> {
    /// Boots until there are no more cases.
    fn all(&mut self) -> Result<()> {
        let mut barren = 0;
        while !self.queue.is_empty() {
            let before = self.ends;
            self.boot()?;
            // One boot without a result may be the emulator's fault.
            barren = if before == self.ends { barren + 1 } else { 0 };
            ensure!(barren < 2, "Xen did not boot twice in a row");
        }
        Ok(())
    }

    fn name(&self) -> String {
        let machine = self.dir.file_name().unwrap_or_default().display();
        format!("{machine}, boot {}", self.boots)
    }

    /// Boots once and runs cases until the end or a failure of the machine.
    fn boot(&mut self) -> Result<()> {
        self.boots += 1;
        let share = self.dir.join(format!("share{}", self.boots));
        fs::create_dir(&share)?;
        kernels::share(self.kernels, &share)?;
        let Self { cache, image, icount, .. } = *self;
        let machine = Machine { cache, image, share: &share, words: "", icount };
        let log = format!("console{}.log", self.boots);
        let boot = machine.start(&self.dir, &log)?;
        let outcome = self.follow(&boot, &share);
        if let Err(error) = &outcome {
            println!("    {}: {error:#}; its last words:\n{}", self.name(), boot.tail(30));
        }
        exec::go_on()
    }

    /// Processes the events of dom0 until it is done.
    fn follow(&mut self, boot: &Boot, share: &Path) -> Result<()> {
        let mut events = Events { path: share.join("events"), read: 0 };
        let mut running: Option<(Order, Instant)> = None;
        let mut orders = File::create(share.join("orders"))?;
        let mut since = Instant::now();
        let slower = if self.icount { SLOWER } else { 1 };
        loop {
            exec::go_on()?;
            // Checked before the events are read, so that the last ones are not missed.
            let ended = boot.ended()?;
            for event in events.fresh()? {
                since = Instant::now();
                match event {
                    Event::Ready { uptime } => {
                        println!("    {}: dom0 is up, {uptime:.1} s of its time", self.name());
                        running = self.give(&mut orders)?;
                    }
                    Event::End { scenario, result, reason, logs, rows } => {
                        let (order, start) = running.take().context("nothing was to run")?;
                        ensure!(order.case.id == scenario, "{scenario} was not to run");
                        let seconds = start.elapsed().as_secs_f64();
                        let row = Row { scenario, result, seconds, retries: 0, reason, rows };
                        self.ended(order, row, &logs);
                        running = self.give(&mut orders)?;
                    }
                    Event::Done { uptime } => {
                        println!("    {}: done, {uptime:.1} s of its time", self.name());
                        return Ok(());
                    }
                }
            }
            let limit = if running.is_some() { SCENARIO } else { UP } * slower;
            let still = stood_still(share).is_some_and(|still| still > STILL * slower);
            let trouble = if ended {
                "the machine ended"
            } else if still {
                "the whole machine stood still"
            } else if since.elapsed() > limit {
                "nothing for too long"
            } else {
                std::thread::sleep(Duration::from_millis(100));
                continue;
            };
            if let Some((order, start)) = running {
                let scenario = order.case.id.clone();
                let seconds = start.elapsed().as_secs_f64();
                let reason = format!("{trouble}; dom0's last words:\n{}", boot.tail(30));
                let result = if ended || still { "flake" } else { "failed" }.to_owned();
                let rows = Vec::new();
                let row = Row { scenario, result, seconds, retries: 0, reason, rows };
                self.ended(order, row, &Value::Null);
            }
            bail!("{trouble}");
        }
    }

    /// Records the result of a case, or queues it to be run once more.
    fn ended(&mut self, order: Order, mut row: Row, logs: &Value) {
        self.ends += 1;
        let Order { case, retries, before } = order;
        row.retries = retries;
        if row.result == "flake" && retries == 0 {
            println!("    again {}: {}", row.scenario, row.reason);
            self.queue.again(Order { case, retries: 1, before: row.reason });
            return;
        }
        if row.result == "flake" {
            row.result = "failed".to_owned();
        }
        if retries > 0 && row.reason.is_empty() {
            row.reason = format!("the first time: {before}");
        }
        println!("{}", report::line(&row));
        if row.result == "failed" {
            print!("{}", report::logs(logs));
        }
        self.rows.push(row);
    }

    /// Sends dom0 the next case, or that there are no more.
    fn give(&self, orders: &mut File) -> Result<Option<(Order, Instant)>> {
        let order = self.queue.next(self.machine);
        let line = serde_json::to_string(&order.as_ref().map(|order| &order.case.id))?;
        orders.write_all(format!("{line}\n").as_bytes()).context("tell dom0")?;
        Ok(order.map(|order| (order, Instant::now())))
    }
}

/// Returns the time since dom0's last report that it is alive; `None` before the first one.
fn stood_still(share: &Path) -> Option<Duration> {
    fs::metadata(share.join("alive")).ok()?.modified().ok()?.elapsed().ok()
}

/// A file to which dom0 appends one JSON object per line.
struct Events {
    path: PathBuf,
    read: u64,
}

impl Events {
    /// Returns the events that were not read yet.
    fn fresh(&mut self) -> Result<Vec<Event>> {
        let Ok(mut file) = File::open(&self.path) else { return Ok(Vec::new()) };
        file.seek(SeekFrom::Start(self.read))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        self.read += whole as u64;
        let lines = bytes[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        lines.map(|line| serde_json::from_slice(line).context("what dom0 says")).collect()
    }
}
