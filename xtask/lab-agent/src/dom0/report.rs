//! Communication with the host: files in a shared directory. Unlike lines on a console, they cannot
//! be interleaved with other output.

use std::fs::{self, File};
use std::io::Write;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::lab::{Lab, Outcome};
use crate::sys::uptime;

const SHARE: &str = "/share";

/// Interval at which dom0 polls for requests of the host.
const LOOK: Duration = Duration::from_millis(50);

/// Interval at which dom0 reports that it is alive.
const ALIVE: Duration = Duration::from_secs(2);

/// The host, as seen from dom0.
pub struct Host {
    events: File,
    orders: usize,
}

/// Returns the command to run before a shell, if this boot is for a shell.
pub fn shell() -> Option<String> {
    let line = fs::read_to_string("/proc/cmdline").ok()?;
    line.split_whitespace().any(|word| word == "pvio.shell").then(String::new)
}

impl Host {
    /// Opens the file of events, which has one JSON object per line.
    pub fn new() -> Result<Self> {
        let events = File::options().create(true).append(true).open(format!("{SHARE}/events"))?;
        Ok(Self { events, orders: 0 })
    }

    /// Starts reporting that dom0 is alive, independently of the scenarios.
    pub fn stay_alive() {
        thread::spawn(|| {
            loop {
                // A lost report is followed by another one.
                let _ = fs::write(format!("{SHARE}/alive"), format!("{}\n", uptime::seconds()));
                thread::sleep(ALIVE);
            }
        });
    }

    /// Waits for the host to send the next scenario; `None` if there are no more.
    pub fn next(&mut self) -> Result<Option<String>> {
        loop {
            let text = fs::read_to_string(format!("{SHARE}/orders")).unwrap_or_default();
            let line = text.split_inclusive('\n').nth(self.orders);
            if let Some(line) = line.filter(|line| line.ends_with('\n')) {
                self.orders += 1;
                return serde_json::from_str(line).context("the host's orders");
            }
            thread::sleep(LOOK);
        }
    }

    /// Reports that dom0 has booted and is ready for a scenario.
    pub fn ready(&self) -> Result<()> {
        self.say(&json!({ "event": "ready", "uptime": uptime::seconds() }))
    }

    /// Reports the result of a scenario, with logs if it failed; the host then sends the next one.
    pub fn ended(&self, id: &str, outcome: &Outcome, lab: &Lab) -> Result<()> {
        let (result, reason, rows) = match outcome {
            Outcome::Passed(rows) => ("passed", String::new(), rows.clone()),
            Outcome::Skipped(reason) => ("skipped", reason.clone(), Vec::new()),
            Outcome::Flake(reason) => ("flake", reason.clone(), Vec::new()),
            Outcome::Failed(reason) => ("failed", reason.clone(), Vec::new()),
        };
        let logs = match outcome {
            Outcome::Passed(_) | Outcome::Skipped(_) => Value::Null,
            Outcome::Flake(_) | Outcome::Failed(_) => lab.logs(),
        };
        self.say(&json!({
            "event": "end", "scenario": id, "result": result, "reason": reason,
            "logs": logs, "rows": rows,
        }))
    }

    /// Reports that all scenarios have run.
    pub fn done(&self) -> Result<()> {
        self.say(&json!({ "event": "done", "uptime": uptime::seconds() }))
    }

    fn say(&self, event: &Value) -> Result<()> {
        let mut events = &self.events;
        events.write_all(format!("{event}\n").as_bytes()).context("tell the host")
    }
}
