//! `pvio check`: a verified workload on a disk, through frontend, backend and storage.

use crate::args::CommonArgs;
use crate::domain::work::Report;
use crate::machine::devices::DiskConfig;
use crate::machine::home::Home;
use crate::machine::{Machine, MachineEvent, Plan};
use crate::scratch;
use clap::Args;
use pvio_daemon::disks::args::disk;
use pvio_daemon::failure::{Failure, say, say_aside};
use pvio_daemon::startup;
use pvio_daemon::units::human;
use pvio_storage::image::{Disk, Image};
use std::ffi::OsString;

/// Arguments of `pvio check`.
#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    /// Scratch disk; its contents are destroyed. A path, or `[OPTIONS]FORMAT:PATH` with any format and
    /// option of docs/disks.md
    #[arg(long, value_name = "DISK", value_parser = disk())]
    pub disk: Disk,
    /// Overwrite an image that is not blank
    #[arg(long)]
    pub overwrite: bool,
    /// Duration of the workload, in seconds
    #[arg(long, value_name = "N", default_value_t = 10, conflicts_with = "requests")]
    pub seconds: u64,
    /// Number of requests to complete, instead of a duration
    #[arg(long, value_name = "N")]
    pub requests: Option<u64>,
    /// Requests in flight
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=32))]
    pub depth: u16,
    /// Seed of the workload; the same seed produces the same requests
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    /// Arguments of both commands.
    pub common: CommonArgs,
}

/// Runs the command.
///
/// # Errors
/// A [`Failure`] if the image may not be overwritten, a component fails, or data read differs from
/// the data written.
pub fn check(args: &CheckArgs) -> Result<(), Failure> {
    startup::prepare()?;
    let disk = args.common.disk(&args.disk)?;
    if disk.options.read_only == Some(true) {
        let what = "the disk cannot be checked: a check overwrites it, and it is read-only";
        return Err(Failure::input(what, "leave ro out, or write [overlay]DISK"));
    }
    let image = Image::open_as(&disk).map_err(|e| Failure::of(e).as_input())?;
    let not_blank = match scratch::must_be_blank(&disk, image) {
        Err(_) if args.overwrite || scratch::is_overlay(&disk) => true,
        blank => blank.map(|()| false)?,
    };
    // The image is closed and unlocked here. The driver domain locks it when it opens it.
    let (home, hypervisor) = Home::claim(args.common.state_dir.as_deref(), &args.common.name)?;
    let mut words: Vec<OsString> = Vec::new();
    let mut word = |name: &str, value: String| words.extend([name.into(), value.into()]);
    word("--depth", args.depth.to_string());
    word("--seed", args.seed.to_string());
    match args.requests {
        Some(requests) => word("--requests", requests.to_string()),
        None => word("--seconds", args.seconds.to_string()),
    }
    if not_blank {
        words.push("--not-blank".into());
    }
    if args.json {
        words.push("--quiet".into());
    }
    let plan = Plan {
        name: args.common.name.clone(),
        disk: DiskConfig { disk },
        nic: None,
        guest: ("check", words),
        guest_on_terminal: true,
        isolation: args.common.isolation.clone(),
    };
    let mut machine = Machine::start(plan, home, hypervisor)?;
    let mut report = None;
    let result = loop {
        match machine.next_event() {
            Ok(MachineEvent::Ready | MachineEvent::Note(_)) => {}
            Ok(MachineEvent::DriverRestarted(how)) => {
                say_aside!(
                    "the driver domain ended ({how}) and was started again: the check continues"
                );
            }
            Ok(MachineEvent::Report(json)) => report = Some(json),
            Ok(MachineEvent::Done) => break Ok(()),
            Ok(MachineEvent::Stopped) => {
                break Err(Failure::new("the check was stopped before it finished", ""));
            }
            Err(failure) => break Err(failure),
        }
    };
    machine.shut_down();
    result?;
    let json = report.ok_or_else(|| Failure::new("the check ended without a result", ""))?;
    let report: Report = serde_json::from_str(&json).map_err(Failure::foreign)?;
    if args.json {
        say!("{json}");
    } else {
        say!("{}", summary(&report).trim_end());
    }
    outcome(&report)
}

fn outcome(report: &Report) -> Result<(), Failure> {
    if report.ok {
        return Ok(());
    }
    let first = report.first_mismatches.first().map_or("the sums differ", String::as_str);
    Err(Failure::new(
        format!("the disk returned wrong data in {} blocks; the first: {first}", report.mismatches),
        "keep the image and the seed: the same --seed repeats the workload",
    ))
}

fn summary(r: &Report) -> String {
    format!(
        "requests  {} ({} reads, {} writes, {} flushes) in {:.1} s\n\
         moved     {} read, {} written\n\
         rate      {:.0} IOPS, {:.1} MB/s\n\
         latency   p50 {:.0} µs, p99 {:.0} µs, max {:.0} µs\n\
         verified  every read, and {} once more at the end\n\
         sha256    {}{}\n\
         {}",
        r.requests,
        r.reads,
        r.writes,
        r.flushes,
        r.seconds,
        human(r.bytes_read),
        human(r.bytes_written),
        r.iops,
        r.mb_per_s,
        r.p50_us,
        r.p99_us,
        r.max_us,
        human(r.final_bytes),
        r.sha256,
        if r.sha256 == r.sha256_expected {
            String::new()
        } else {
            format!("\n   must be {}", r.sha256_expected)
        },
        if r.sessions > 1 { format!("attached  {} times\n", r.sessions) } else { String::new() },
    )
}
