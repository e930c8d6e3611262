//! What the host is told, and asked for: files in the folder shared with it, where no line of a
//! console can get into another.

use std::fs::{self, File};
use std::io::Write;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::lab::{Lab, Outcome};
use crate::sys::uptime;

const SHARE: &str = "/share";

/// The host, as seen from dom0.
pub struct Host {
    events: File,
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
        Ok(Self { events })
    }

    /// The scenarios to run.
    pub fn plan(&self) -> Result<Vec<String>> {
        let text = fs::read_to_string(format!("{SHARE}/plan"))?;
        serde_json::from_str(&text).context("the plan")
    }

    /// dom0 is up.
    pub fn ready(&self) -> Result<()> {
        self.say(&json!({ "event": "ready", "uptime": uptime::seconds() }))
    }

    /// A scenario starts.
    pub fn started(&self, id: &str) -> Result<()> {
        self.say(&json!({ "event": "start", "scenario": id }))
    }

    /// A scenario is over; of one that failed, the logs are kept.
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
