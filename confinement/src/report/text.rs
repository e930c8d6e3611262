//! A report as text.

use super::{Report, SeccompMode};
use crate::applied::{Layer, Outcome};
use std::collections::BTreeMap;
use std::fmt::{self, Display};

/// Limits that matter for confinement.
const LIMITS: [&str; 8] = [
    "core-file-size",
    "open-files",
    "processes",
    "address-space",
    "data-size",
    "locked-memory",
    "file-size",
    "cpu-time",
];

impl Display for Report {
    /// A line for each property, and one for each layer.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |f: &mut fmt::Formatter<'_>, key: &str, value: &dyn Display| {
            writeln!(f, "  {key:<18} {value}")
        };
        writeln!(f, "process {} ({}), {} threads", self.pid, self.name, self.threads)?;
        let (uids, gids, groups) = (list(&self.uids), list(&self.gids), list(&self.groups));
        line(f, "user", &format_args!("uid {uids} gid {gids} groups {groups}"))?;
        let sets = &self.capabilities;
        let (effective, bounding) = (sets.effective, sets.bounding);
        line(f, "capabilities", &format_args!("effective {effective:x} bounding {bounding:x}"))?;
        let seccomp = match self.seccomp {
            SeccompMode::Disabled => "disabled",
            SeccompMode::Strict => "strict",
            SeccompMode::Filter => "filter",
        };
        let without = self.threads_without_seccomp;
        line(f, "seccomp", &format_args!("{seccomp}, threads without: {without}"))?;
        let own = self.own_namespaces.iter().filter(|(_, own)| **own).map(|(name, _)| name);
        match self.own_namespaces.is_empty() {
            true => line(f, "own namespaces", &"not readable")?,
            false => line(f, "own namespaces", &list(own))?,
        }
        let limits = LIMITS.iter().filter_map(|name| {
            let [soft, _] = self.limits.get(*name)?;
            Some(format!("{name}={}", soft.map_or("unlimited".to_owned(), |n| n.to_string())))
        });
        line(f, "limits", &list(limits))?;
        line(f, "cgroups", &pairs(&self.cgroups))?;
        match &self.descriptors {
            Some(counts) => line(f, "descriptors", &pairs(counts))?,
            None => line(f, "descriptors", &"not readable")?,
        }
        match self.memory {
            Some(memory) => line(
                f,
                "memory",
                &format_args!(
                    "{} KiB PSS, {} KiB resident, {} KiB locked",
                    memory.pss_kib, memory.rss_kib, memory.locked_kib
                ),
            )?,
            None => line(f, "memory", &"not readable")?,
        }
        writeln!(f, "  layers")?;
        for layer in Layer::ALL {
            let shown = match self.observed(layer) {
                Some(true) => "yes",
                Some(false) => "no",
                None => "unknown",
            };
            write!(f, "    {layer:<18} {shown:<8}")?;
            match self.applied.as_ref().map(|applied| applied.outcome(layer)) {
                Some(outcome @ Outcome::Applied(_)) if self.observed(layer) == Some(false) => {
                    writeln!(f, "{outcome}, which the kernel contradicts")?;
                }
                Some(outcome) => writeln!(f, "{outcome}")?,
                None => writeln!(f, "not reported")?,
            }
        }
        Ok(())
    }
}

fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<_> = items.into_iter().map(|item| item.to_string()).collect();
    if items.is_empty() { "none".to_owned() } else { items.join(" ") }
}

fn pairs<T: Display>(map: &BTreeMap<String, T>) -> String {
    list(map.iter().map(|(name, value)| format!("{name}={value}")))
}
