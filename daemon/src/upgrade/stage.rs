//! The stage at which a process of an upgrade begins, in its environment.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The environment variable. Its value is an interface between versions.
pub const VARIABLE: &str = "PVIO_UPGRADE";

/// A request for an upgrade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Path of the new binary.
    pub binary: PathBuf,
    /// How long its trial may take, in seconds.
    pub timeout: u64,
}

/// The stage that a process begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// The old binary, without devices: try the new one.
    HandOver {
        /// What was requested.
        request: Request,
        /// Directory of the control socket.
        folder: PathBuf,
    },
    /// The new binary as a child of the old one: adopt all devices, and leave them when stopped.
    Trial,
    /// The new binary after its trial: move each device to a process of it.
    Replace,
    /// The old binary again, because the trial failed.
    RolledBack {
        /// Why it failed.
        reason: String,
    },
}

impl Stage {
    /// Returns the stage of this process, if it is part of an upgrade.
    #[must_use]
    pub fn current() -> Option<Self> {
        let value = std::env::var(VARIABLE).ok()?;
        match serde_json::from_str(&value) {
            Ok(stage) => Some(stage),
            Err(error) => {
                tracing::warn!(%error, "the environment has an unknown stage of an upgrade");
                None
            }
        }
    }

    /// Returns the value of the variable.
    #[must_use]
    pub fn value(&self) -> String {
        serde_json::json!(self).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_keep_their_form_between_versions() {
        assert_eq!(Stage::Trial.value(), "\"trial\"");
        assert_eq!(Stage::Replace.value(), "\"replace\"");
        let stage = Stage::RolledBack { reason: "x".into() };
        assert_eq!(serde_json::from_str::<Stage>(&stage.value()).unwrap(), stage);
    }
}
