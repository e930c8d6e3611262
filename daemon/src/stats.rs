//! `pvio stats`: the counters of the disks and NICs of a running driver domain.

use crate::control::client::{connection_lost, request};
use crate::failure::{Failure, say};
use crate::stop::{Stop, Wakeup, sleep};
use clap::Args;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::BufRead;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Arguments of `pvio stats`.
#[derive(Debug, Clone, Args)]
pub struct StatsArgs {
    /// Only these devices, such as vbd7.xvda (xvda of guest 7) or vif7.0
    #[arg(value_name = "DEVICE")]
    pub devices: Vec<String>,
    /// As JSON, with the counters of each queue
    #[arg(long)]
    pub json: bool,
    /// Repeat every N seconds with the increase per second; Ctrl-C ends it
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub every: Option<u64>,
    /// The state directory of a pvio run, instead of that of the only running pvio serve or pvio
    /// run
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// Counters by name; those with a reason have it after a space: `refused out-of-range`.
type Counters = BTreeMap<String, u64>;

/// The counters that are gauges, so that they have no rate.
const GAUGES: &[&str] = &["kept-pages", "registered-pages", "paused"];

/// Runs the command.
///
/// # Errors
/// There is no driver domain, or it has no such device.
pub fn run(args: &StatsArgs) -> Result<(), Failure> {
    let Some(seconds) = args.every else {
        let devices = read(args)?;
        if args.json {
            say!("{:#}", Value::from(devices));
            return Ok(());
        }
        devices.iter().for_each(|device| say!("{}", paragraph(device, &sum(device))));
        if devices.iter().all(is_process) {
            say!("no devices");
        }
        return Ok(());
    };
    let wakeup = Wakeup::new()?;
    let stop = Stop::on_signal(wakeup.clone())?;
    let (period, mut last) = (Duration::from_secs(seconds), BTreeMap::new());
    let mut next = Instant::now();
    while !stop.is_requested() {
        let now = Instant::now();
        if now < next {
            sleep(&[wakeup.as_fd()], Some(next - now))?;
            wakeup.take();
            continue;
        }
        next = now + period;
        let devices = read(args)?;
        for device in &devices {
            let (all, name) = (sum(device), device_name(device).to_owned());
            let before = last.insert(name, (now, all.clone()));
            // A device's first counters cover its whole lifetime.
            let Some((then, before)) = before else { continue };
            let rates = rates(&all, &before, now - then);
            if args.json {
                let mut line =
                    serde_json::json!({ "per_second": rates, "budgets": budgets(device) });
                let key = if is_process(device) { "process" } else { "device" };
                line[key] = device[key].clone();
                say!("{line}");
            } else {
                say!("{}", paragraph(device, &rates));
            }
        }
    }
    Ok(())
}

/// Reads the entries of the requested devices; without any, those of the process and of all devices.
fn read(args: &StatsArgs) -> Result<Vec<Value>, Failure> {
    let (_stream, answer) = request(args.state_dir.as_deref(), "stats")?;
    let mut all = Vec::new();
    for line in answer.lines() {
        let line = line.map_err(connection_lost)?;
        let device = serde_json::from_str(&line).map_err(|e| {
            let what = format!("the driver domain's response is invalid: {e}");
            Failure::new(what, "use the same version of pvio")
        })?;
        all.push(device);
    }
    let name = |device: &Value| device_name(device).to_owned();
    if let Some(missing) = args.devices.iter().find(|&word| !all.iter().any(|d| name(d) == *word)) {
        let known: Vec<String> = all.iter().filter(|entry| !is_process(entry)).map(name).collect();
        let known = if known.is_empty() { "none".into() } else { known.join(", ") };
        let what = format!("the device {missing} does not exist");
        return Err(Failure::input(what, format!("name one of: {known}")));
    }
    all.retain(|device| args.devices.is_empty() || args.devices.contains(&name(device)));
    Ok(all)
}

/// Returns the name of a device; that of the process is empty.
fn device_name(device: &Value) -> &str {
    text(device, "device")
}

/// Returns whether an entry is that of the process, not of a device.
fn is_process(entry: &Value) -> bool {
    !entry["process"].is_null()
}

fn text<'a>(device: &'a Value, key: &str) -> &'a str {
    device[key].as_str().unwrap_or_default()
}

/// Returns the sums over all queues, and the counts of the device's events: `event state-changes`.
fn sum(device: &Value) -> Counters {
    let mut all = Counters::new();
    let mut add = |name: String, n: &Value| {
        let total = all.entry(name).or_default();
        *total = u64::wrapping_add(*total, n.as_u64().unwrap_or_default());
    };
    let queues = device["queues"].as_array().into_iter().flatten();
    let queues = queues.filter_map(Value::as_object).flatten();
    for (name, value) in queues.filter(|(name, _)| *name != "budgets") {
        match value.as_object() {
            Some(reasons) => reasons.iter().for_each(|(why, n)| add(format!("{name} {why}"), n)),
            None => add(name.clone(), value),
        }
    }
    for (name, n) in device["events"].as_object().into_iter().flatten() {
        add(format!("event {name}"), n);
    }
    all
}

/// Returns usage and limit of each budget: the sums over all queues, and those of the device.
fn budgets(device: &Value) -> BTreeMap<String, [u64; 2]> {
    let mut all = BTreeMap::<String, [u64; 2]>::new();
    let queues = device["queues"].as_array().into_iter().flatten();
    let lists = queues.chain([device]).filter_map(|entry| entry["budgets"].as_object());
    for (name, budget) in lists.flatten() {
        let total = all.entry(name.clone()).or_default();
        for (sum, key) in total.iter_mut().zip(["used", "limit"]) {
            *sum = sum.saturating_add(budget[key].as_u64().unwrap_or_default());
        }
    }
    all
}

/// Returns the increase per second of each counter, and the current value of gauges.
fn rates(now: &Counters, before: &Counters, time: Duration) -> Counters {
    let rate = |(name, n): (&String, &u64)| {
        if GAUGES.contains(&name.as_str()) {
            return (name.clone(), *n);
        }
        // A smaller value belongs to a new device of the same name.
        let added = n.checked_sub(before.get(name).copied().unwrap_or_default()).unwrap_or(*n);
        (name.clone(), (added as f64 / time.as_secs_f64()).round() as u64)
    };
    now.iter().map(rate).collect()
}

/// Returns the device's name, its budgets, and its counters that are not zero.
fn paragraph(device: &Value, counters: &Counters) -> String {
    let queues = device["queues"].as_array().map_or(0, Vec::len);
    let mut lines = match device["process"].as_u64() {
        Some(process) => format!("process {process}"),
        None => format!("{}  {}  queues {queues}", device_name(device), text(device, "path")),
    };
    for (name, [used, limit]) in budgets(device) {
        if (used, limit) != (0, 0) {
            lines += &format!("\n  {name:<28} {used:>16} of {limit}");
        }
    }
    for (name, n) in counters.iter().filter(|(_, n)| **n != 0) {
        lines += &format!("\n  {name:<28} {n:>16}");
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn stats_sum_queues_and_list_reasons_separately() {
        let queue =
            |reads: u64, empty: u64| json!({ "reads": reads, "refused": { "empty": empty } });
        let device = json!({
            "device": "vbd1.xvda",
            "path": "/x",
            "queues": [queue(1, 0), queue(2, 3)],
            "events": { "errors": 2 },
        });
        let all = sum(&device);
        let told = [("reads", 3), ("refused empty", 3), ("event errors", 2)];
        assert_eq!(all, told.map(|(name, n)| (name.into(), n)).into());
        let told = paragraph(&device, &all);
        assert!(told.starts_with("vbd1.xvda  /x  queues 2\n"), "{told}");
        assert_eq!(told.lines().count(), 4);
    }

    #[test]
    fn stats_sum_budgets_of_queues_and_show_limits() {
        let queue = |used: u64| json!({ "budgets": { "requests": { "used": used, "limit": 8 } } });
        let device = json!({
            "device": "vbd1.xvda",
            "path": "/x",
            "queues": [queue(0), queue(5)],
            "budgets": { "steps": { "used": 0, "limit": 100 }, "jobs": { "used": 0, "limit": 0 } },
        });
        assert_eq!(sum(&device), Counters::new(), "budgets are not counted as counters");
        let told = paragraph(&device, &sum(&device));
        let lines: Vec<String> = told
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(lines, ["vbd1.xvda /x queues 2", "requests 5 of 16", "steps 0 of 100"]);
        let process =
            json!({ "process": 7, "budgets": { "kept-pages": { "used": 1, "limit": 2 } } });
        let told = paragraph(&process, &sum(&process));
        assert!(told.starts_with("process 7\n  kept-pages"), "{told}");
    }

    #[test]
    fn stats_rates_use_differences_except_for_levels() {
        let at =
            |reads, kept| Counters::from([("reads".into(), reads), ("kept-pages".into(), kept)]);
        let second = Duration::from_secs(2);
        assert_eq!(rates(&at(110, 7), &at(10, 900), second), at(50, 7));
        // The device was created again between the two reads.
        assert_eq!(rates(&at(10, 7), &at(100, 7), second), at(5, 7));
    }
}
