//! The layers of a running process, from `/proc`.

mod descriptors;
mod observed;
mod process;
#[cfg(test)]
mod tests;
mod text;

use crate::applied::Applied;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Confinement of a process as the kernel shows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Process id in the reporter's PID namespace.
    pub pid: u32,
    /// Name of the program.
    pub name: String,
    /// Number of threads.
    pub threads: u64,
    /// Real, effective, saved and file system user id.
    pub uids: Vec<u32>,
    /// Real, effective, saved and file system group id.
    pub gids: Vec<u32>,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Capability sets.
    pub capabilities: Capabilities,
    /// `no_new_privs`.
    pub no_new_privileges: bool,
    /// Mode of seccomp.
    pub seccomp: SeccompMode,
    /// Number of threads without a seccomp filter.
    pub threads_without_seccomp: u64,
    /// Whether core dumps and tracing by processes of the same user are possible. `None` for a
    /// process of user 0, of which `/proc` does not show it.
    pub dumpable: Option<bool>,
    /// For each namespace, whether it is another one than the reporter's. A namespace that cannot be
    /// read is missing.
    pub own_namespaces: BTreeMap<String, bool>,
    /// Number of entries of the root directory; `None` if it cannot be read.
    pub root_entries: Option<u64>,
    /// Soft and hard resource limits by name; `None` is unlimited.
    pub limits: BTreeMap<String, [Option<u64>; 2]>,
    /// Control groups: controllers and path of each hierarchy.
    pub cgroups: BTreeMap<String, String>,
    /// Number of open descriptors of each kind; `None` if they cannot be read.
    pub descriptors: Option<BTreeMap<String, u64>>,
    /// Memory; `None` if it cannot be read.
    pub memory: Option<Memory>,
    /// What the process reported when it started. `/proc` does not show Landlock.
    pub applied: Option<Applied>,
}

/// Capability sets as bit masks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Capabilities {
    /// `CapInh`.
    pub inheritable: u64,
    /// `CapPrm`.
    pub permitted: u64,
    /// `CapEff`.
    pub effective: u64,
    /// `CapBnd`.
    pub bounding: u64,
    /// `CapAmb`.
    pub ambient: u64,
}

/// Mode of seccomp.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SeccompMode {
    /// No filter.
    Disabled,
    /// Only `read`, `write`, `exit` and `sigreturn`.
    Strict,
    /// A filter.
    Filter,
}

/// Memory of a process in KiB (`smaps_rollup`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Memory {
    /// Proportional set size: shared pages are divided among their processes.
    pub pss_kib: u64,
    /// Resident set size.
    pub rss_kib: u64,
    /// Locked memory.
    pub locked_kib: u64,
}

impl Report {
    /// Adds what the process reported when it started.
    #[must_use]
    pub fn with_applied(mut self, applied: Applied) -> Self {
        self.applied = Some(applied);
        self
    }

    /// Returns the report as JSON on one line.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}
