//! `pvio confinement`: the confinement of the processes of a running driver domain.

use crate::control::client::{connection_lost, request};
use crate::failure::{Failure, say};
use clap::Args;
use pvio_confinement::Report;
use serde_json::Value;
use std::io::BufRead;
use std::path::PathBuf;

/// Arguments of `pvio confinement`.
#[derive(Debug, Clone, Args)]
pub struct ConfinementArgs {
    /// Only these devices, such as vbd7.xvda (xvda of guest 7) or vif7.0
    #[arg(value_name = "DEVICE")]
    pub devices: Vec<String>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// The state directory of a pvio run, instead of that of the only running pvio serve or pvio
    /// run
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// There is no driver domain, or it has no such device.
pub fn run(args: &ConfinementArgs) -> Result<(), Failure> {
    let (_stream, answer) = request(args.state_dir.as_deref(), "confinement")?;
    let mut all: Vec<Value> = Vec::new();
    for line in answer.lines() {
        let line = line.map_err(connection_lost)?;
        all.push(serde_json::from_str(&line).map_err(invalid)?);
    }
    let names: Vec<&str> = all.iter().filter_map(|entry| entry["device"].as_str()).collect();
    if let Some(missing) = args.devices.iter().find(|name| !names.contains(&name.as_str())) {
        let known = if names.is_empty() { "none".into() } else { names.join(", ") };
        let what = format!("the device {missing} does not exist");
        return Err(Failure::input(what, format!("name one of: {known}")));
    }
    let is_chosen = |entry: &Value| match entry["device"].as_str() {
        Some(name) => args.devices.is_empty() || args.devices.iter().any(|device| device == name),
        None => args.devices.is_empty(),
    };
    all.retain(is_chosen);
    if args.json {
        say!("{:#}", Value::from(all));
        return Ok(());
    }
    for entry in &all {
        say!("{}", text(entry)?.trim_end());
    }
    Ok(())
}

/// Returns an entry as text.
fn text(entry: &Value) -> Result<String, Failure> {
    let who = entry["device"].as_str().unwrap_or("supervisor");
    let report = &entry["process"];
    let reason = entry["reason"].as_str();
    let how = match entry["isolation"].as_str() {
        None => String::new(),
        Some("process") => {
            let replaced = entry["replaced"].as_u64().unwrap_or_default();
            format!("  in a process of its own, replaced {replaced} times")
        }
        Some(_) => match reason {
            Some(reason) => format!("  by threads of the supervisor: {reason}"),
            None => "  by threads of the supervisor".into(),
        },
    };
    let mut text = format!("{who}{how}\n");
    if !report.is_null() {
        let report: Report = serde_json::from_value(report.clone()).map_err(invalid)?;
        text += &report.to_string();
    } else if let Some(error) = entry["unreadable"].as_str() {
        text += &format!("  its process cannot be read: {error}\n");
    } else if entry["isolation"] == "process" {
        text += "  no process runs\n";
    }
    Ok(text)
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn invalid(error: serde_json::Error) -> Failure {
    let what = format!("the driver domain's response is invalid: {error}");
    Failure::new(what, "use the same version of pvio")
}
