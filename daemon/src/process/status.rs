//! What a supervisor knows of a device's process, for reports.

use pvio_confinement::{Applied, Report};
use serde_json::{Value, json};

/// The process that serves a device.
#[derive(Debug, Clone, Default)]
pub struct ProcessStatus {
    /// Its number; `None` while none runs.
    pid: Option<u32>,
    /// How many processes were replaced because they died, in the current session.
    replaced: u64,
    /// The layers of its confinement, as it reported them.
    applied: Option<Applied>,
    is_logged: bool,
}

/// Where a device is served.
#[derive(Debug, Clone)]
pub enum ServedBy {
    /// By threads of the supervisor; the reason if processes are configured.
    Threads(Option<&'static str>),
    /// By a process of its own.
    Process(ProcessStatus),
}

impl Default for ServedBy {
    fn default() -> Self {
        Self::Threads(None)
    }
}

impl ProcessStatus {
    /// Notes which process serves the device.
    pub const fn set_process(&mut self, pid: Option<u32>, replaced: u64) {
        (self.pid, self.replaced) = (pid, replaced);
    }

    /// Notes the layers that the process has reported. Those that are missing are logged once for
    /// each device.
    pub fn set_applied(&mut self, device: &str, applied: Applied) {
        let failed = applied.failed();
        if !failed.is_empty() && !std::mem::replace(&mut self.is_logged, true) {
            let missing: Vec<String> = failed
                .iter()
                .map(|(layer, _)| format!("{layer} ({})", applied.outcome(*layer)))
                .collect();
            let missing = missing.join(", ");
            tracing::info!(device, missing, "the device process lacks layers of its confinement");
        }
        self.applied = Some(applied);
    }
}

impl ServedBy {
    /// Returns the confinement of the device: what its process reported, and what `/proc` shows.
    #[must_use]
    pub fn confinement(&self) -> Value {
        let status = match self {
            Self::Threads(reason) => return json!({ "isolation": "thread", "reason": reason }),
            Self::Process(status) => status,
        };
        let missing = status.applied.iter().flat_map(Applied::failed);
        let missing: Vec<Value> =
            missing.map(|(layer, why)| json!({ "layer": layer, "why": why })).collect();
        let report = status.pid.map(Report::of).transpose();
        let mut found = json!({
            "isolation": "process",
            "pid": status.pid,
            "replaced": status.replaced,
            "missing": missing,
        });
        match report {
            Ok(None) => {}
            Ok(Some(mut report)) => {
                report.applied.clone_from(&status.applied);
                found["contradictions"] = json!(report.contradictions());
                found["process"] = json!(report);
            }
            // It has just ended.
            Err(error) => found["unreadable"] = error.to_string().into(),
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvio_confinement::{Layer, Outcome};

    #[test]
    fn report_names_layer_that_kernel_contradicts() {
        let mut status = ProcessStatus::default();
        status.set_process(Some(std::process::id()), 2);
        let mut applied = Applied::default();
        applied.record(Layer::SystemCalls, Outcome::Applied("137 calls".into()));
        status.set_applied("vbd-1-51712", applied);
        let found = ServedBy::Process(status).confinement();
        assert_eq!((&found["replaced"], &found["pid"]), (&2.into(), &std::process::id().into()));
        // This process has no filter.
        assert_eq!(found["contradictions"], json!(["system-calls"]));
        assert_eq!(found["process"]["no_new_privileges"], false);
    }

    #[test]
    fn ended_process_is_reported_as_unreadable() {
        let mut status = ProcessStatus::default();
        status.set_process(Some(u32::MAX), 0);
        let found = ServedBy::Process(status).confinement();
        assert!(found["unreadable"].is_string() && found["process"].is_null(), "{found}");
    }
}
