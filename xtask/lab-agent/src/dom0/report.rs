//! What the host is told, and asked for: files in the folder shared with it, where no line of a
//! console can get into another.

use std::fs::{self, File};
use std::io::Write;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::lab::{Lab, Outcome};
use crate::sys::uptime;

const SHARE: &str = "/share";

/// How often dom0 looks whether the host has said something.
const LOOK: Duration = Duration::from_millis(50);

/// How often dom0 says that it is there.
const ALIVE: Duration = Duration::from_secs(2);

/// The host, as seen from dom0.
pub struct Host {
    events: File,
    orders: usize,
}

/// What is to be said before a shell, if this boot is for one.
pub fn shell() -> Option<String> {
    let line = fs::read_to_string("/proc/cmdline").ok()?;
    line.split_whitespace().any(|word| word == "pvio.shell").then(String::new)
}

impl Host {
    /// Events are appended to a file, one JSON object a line.
    pub fn new() -> Result<Self> {
        let events = File::options().create(true).append(true).open(format!("{SHARE}/events"))?;
        Ok(Self { events, orders: 0 })
    }

    /// Says from now on that dom0 is there, whatever a scenario waits for.
    pub fn stay_alive() {
        thread::spawn(|| {
            loop {
                // A word that is lost is followed by another.
                let _ = fs::write(format!("{SHARE}/alive"), format!("{}\n", uptime::seconds()));
                thread::sleep(ALIVE);
            }
        });
    }

    /// Waits for the host to say which scenario is next, or that there is none.
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

    /// dom0 is up, and wants to be told what to run.
    pub fn ready(&self) -> Result<()> {
        self.say(&json!({ "event": "ready", "uptime": uptime::seconds() }))
    }

    /// A scenario is over, and the next one wanted; of one that failed, the logs are kept.
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

    /// All were run.
    pub fn done(&self) -> Result<()> {
        self.say(&json!({ "event": "done", "uptime": uptime::seconds() }))
    }

    fn say(&self, event: &Value) -> Result<()> {
        let mut events = &self.events;
        events.write_all(format!("{event}\n").as_bytes()).context("tell the host")
    }
}
