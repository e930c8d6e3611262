//! The layers that a process has applied.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;

/// One layer of confinement.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layer {
    /// Membership of a control group.
    Cgroup,
    /// Resource limits (`setrlimit`).
    Limits,
    /// A user namespace. Needed only by a process that is not root, for the other namespaces.
    UserNamespace,
    /// A mount namespace.
    MountNamespace,
    /// A network namespace without interfaces.
    NetworkNamespace,
    /// An IPC namespace.
    IpcNamespace,
    /// A UTS namespace.
    UtsNamespace,
    /// A PID namespace. See [`spawn`](crate::spawn()).
    PidNamespace,
    /// An empty, read-only root directory.
    EmptyRoot,
    /// An unprivileged user and group, without supplementary groups.
    User,
    /// Empty capability sets: effective, permitted, inheritable, ambient.
    Capabilities,
    /// An empty capability bounding set.
    BoundingSet,
    /// `no_new_privs`.
    NoNewPrivileges,
    /// No core dump, and no tracing by processes of the same user (`PR_SET_DUMPABLE`).
    NotDumpable,
    /// Landlock.
    Landlock,
    /// A seccomp filter.
    SystemCalls,
}

impl Layer {
    /// All layers, in the order in which they are applied.
    pub const ALL: [Self; 16] = [
        Self::Cgroup,
        Self::Limits,
        Self::UserNamespace,
        Self::MountNamespace,
        Self::NetworkNamespace,
        Self::IpcNamespace,
        Self::UtsNamespace,
        Self::PidNamespace,
        Self::EmptyRoot,
        Self::User,
        Self::Capabilities,
        Self::BoundingSet,
        Self::NoNewPrivileges,
        Self::NotDumpable,
        Self::Landlock,
        Self::SystemCalls,
    ];

    /// Returns the name of the layer in options, logs and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroup",
            Self::Limits => "limits",
            Self::UserNamespace => "user-namespace",
            Self::MountNamespace => "mount-namespace",
            Self::NetworkNamespace => "network-namespace",
            Self::IpcNamespace => "ipc-namespace",
            Self::UtsNamespace => "uts-namespace",
            Self::PidNamespace => "pid-namespace",
            Self::EmptyRoot => "empty-root",
            Self::User => "user",
            Self::Capabilities => "capabilities",
            Self::BoundingSet => "bounding-set",
            Self::NoNewPrivileges => "no-new-privileges",
            Self::NotDumpable => "not-dumpable",
            Self::Landlock => "landlock",
            Self::SystemCalls => "system-calls",
        }
    }

    /// Returns the layer of that [name](Self::name).
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|layer| layer.name() == name)
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Why a layer is missing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The kernel was built without it, or is too old.
    NotBuilt,
    /// The kernel has it, but it is switched off.
    NotEnabled,
    /// The process lacks the right to apply it.
    NotPermitted,
    /// Only the parent can apply it.
    ByParent,
    /// Another error of the system.
    Failed,
}

impl Reason {
    /// Returns the reason for an error number.
    #[must_use]
    pub fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOSYS | libc::EINVAL) => Self::NotBuilt,
            Some(libc::EOPNOTSUPP | libc::ENOSPC) => Self::NotEnabled,
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted,
            _ => Self::Failed,
        }
    }
}

/// A layer that could not be applied.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Missing {
    /// The kind of the reason.
    pub reason: Reason,
    /// The step that failed and the system's error.
    pub detail: String,
}

/// What became of a layer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It is applied, with these values.
    Applied(String),
    /// It was configured, but could not be applied.
    Missing(Missing),
    /// It was not configured.
    NotConfigured,
}

impl Outcome {
    pub(crate) fn missing(step: &str, error: &io::Error) -> Self {
        let reason = Reason::of(error);
        Self::Missing(Missing { reason, detail: format!("{step}: {error}") })
    }

    pub(crate) fn of(
        done: Result<impl Into<String>, (impl AsRef<str>, impl Into<io::Error>)>,
    ) -> Self {
        match done {
            Ok(detail) => Self::Applied(detail.into()),
            Err((step, error)) => Self::missing(step.as_ref(), &error.into()),
        }
    }

    /// Returns whether the layer is applied.
    #[must_use]
    pub const fn is_applied(&self) -> bool {
        matches!(self, Self::Applied(_))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Applied(detail) if detail.is_empty() => f.write_str("applied"),
            Self::Applied(detail) => write!(f, "applied: {detail}"),
            Self::Missing(Missing { reason, detail }) => {
                let reason = match reason {
                    Reason::NotBuilt => "not supported by this kernel",
                    Reason::NotEnabled => "not enabled in this kernel",
                    Reason::NotPermitted => "not permitted",
                    Reason::ByParent => "only the parent can apply it",
                    Reason::Failed => "failed",
                };
                write!(f, "missing: {reason}: {detail}")
            }
            Self::NotConfigured => f.write_str("not configured"),
        }
    }
}

/// The layers of a process, as its start-up found them.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Applied(Vec<(Layer, Outcome)>);

impl Applied {
    /// Records a layer. A later outcome replaces an earlier one.
    pub fn record(&mut self, layer: Layer, outcome: Outcome) {
        match self.0.iter_mut().find(|(known, _)| *known == layer) {
            Some((_, known)) => *known = outcome,
            None => self.0.push((layer, outcome)),
        }
    }

    /// Returns what became of a layer.
    #[must_use]
    pub fn outcome(&self, layer: Layer) -> &Outcome {
        let found = self.0.iter().find(|(known, _)| *known == layer);
        found.map_or(&Outcome::NotConfigured, |(_, outcome)| outcome)
    }

    /// Returns whether a layer is applied.
    #[must_use]
    pub fn has(&self, layer: Layer) -> bool {
        self.outcome(layer).is_applied()
    }

    /// Iterates over the recorded layers.
    pub fn iter(&self) -> impl Iterator<Item = (Layer, &Outcome)> {
        self.0.iter().map(|(layer, outcome)| (*layer, outcome))
    }

    /// Returns the layers of `minimum` that are not applied, each with its outcome.
    #[must_use]
    pub fn missing(&self, minimum: &[Layer]) -> Vec<(Layer, Outcome)> {
        let missing = minimum.iter().filter(|layer| !self.has(**layer));
        missing.map(|layer| (*layer, self.outcome(*layer).clone())).collect()
    }

    /// Returns the layers that were configured but could not be applied.
    #[must_use]
    pub fn failed(&self) -> Vec<(Layer, &Missing)> {
        let failed = self.iter().filter_map(|(layer, outcome)| match outcome {
            Outcome::Missing(missing) => Some((layer, missing)),
            _ => None,
        });
        failed.collect()
    }

    /// Returns the result as JSON on one line.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

impl fmt::Display for Applied {
    /// One line for each layer.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (layer, outcome)) in self.iter().enumerate() {
            let end = if index == 0 { "" } else { "\n" };
            write!(f, "{end}{layer:<18} {outcome}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layer_name_is_its_name_in_json() {
        for layer in Layer::ALL {
            assert_eq!(Layer::named(layer.name()), Some(layer));
            let json = serde_json::to_string(&layer).unwrap();
            assert_eq!(json, format!("\"{layer}\""));
        }
        assert_eq!(Layer::named("seccomp"), None);
    }

    #[test]
    fn missing_layers_are_those_of_the_minimum_that_are_not_applied() {
        let mut applied = Applied::default();
        applied.record(Layer::User, Outcome::Applied("uid 990".into()));
        let denied = io::Error::from_raw_os_error(libc::EPERM);
        applied.record(Layer::MountNamespace, Outcome::missing("unshare", &denied));
        assert!(applied.missing(&[Layer::User]).is_empty());
        let missing = applied.missing(&[Layer::MountNamespace, Layer::User, Layer::Landlock]);
        let layers: Vec<_> = missing.iter().map(|(layer, _)| *layer).collect();
        assert_eq!(layers, [Layer::MountNamespace, Layer::Landlock]);
        assert!(matches!(&missing[0].1, Outcome::Missing(m) if m.reason == Reason::NotPermitted));
        assert_eq!(missing[1].1, Outcome::NotConfigured);
        assert_eq!(applied.failed().len(), 1);
        assert_eq!(serde_json::from_str::<Applied>(&applied.to_json()).unwrap(), applied);
        assert_eq!(
            applied.to_string(),
            "user               applied: uid 990\n\
             mount-namespace    missing: not permitted: unshare: Operation not permitted (os error 1)"
        );
    }

    #[test]
    fn later_outcome_replaces_the_earlier_one() {
        let mut applied = Applied::default();
        applied.record(Layer::SystemCalls, Outcome::NotConfigured);
        applied.record(Layer::SystemCalls, Outcome::Applied(String::new()));
        assert_eq!(applied.iter().count(), 1);
        assert_eq!(applied.to_string(), "system-calls       applied");
    }
}
