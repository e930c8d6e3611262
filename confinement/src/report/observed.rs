//! Which layers a report shows.

use super::{Report, SeccompMode};
use crate::applied::Layer;

impl Report {
    /// Returns whether the kernel shows a layer; `None` if it does not tell.
    #[must_use]
    pub fn observed(&self, layer: Layer) -> Option<bool> {
        let namespace = |name| self.own_namespaces.get(name).copied();
        let sets = &self.capabilities;
        match layer {
            Layer::UserNamespace => namespace("user"),
            Layer::MountNamespace => namespace("mnt"),
            Layer::NetworkNamespace => namespace("net"),
            Layer::IpcNamespace => namespace("ipc"),
            Layer::UtsNamespace => namespace("uts"),
            Layer::PidNamespace => namespace("pid"),
            Layer::EmptyRoot => self.root_entries.map(|entries| entries == 0),
            Layer::User => Some(
                !self.uids.is_empty()
                    && self.uids.iter().chain(&self.gids).all(|id| *id != 0)
                    && self.groups.is_empty(),
            ),
            Layer::Capabilities => {
                Some(sets.inheritable | sets.permitted | sets.effective | sets.ambient == 0)
            }
            Layer::BoundingSet => Some(sets.bounding == 0),
            Layer::NoNewPrivileges => Some(self.no_new_privileges),
            Layer::NotDumpable => self.dumpable.map(|dumpable| !dumpable),
            Layer::SystemCalls => {
                Some(self.seccomp != SeccompMode::Disabled && self.threads_without_seccomp == 0)
            }
            // A limit or a control group is no proof that it is the configured one.
            Layer::Limits | Layer::Cgroup | Layer::Landlock => None,
        }
    }

    /// Returns the layers that the process reported as applied and that the kernel shows as not
    /// applied.
    #[must_use]
    pub fn contradictions(&self) -> Vec<Layer> {
        let Some(applied) = &self.applied else { return Vec::new() };
        let contradicts =
            |layer: &Layer| applied.has(*layer) && self.observed(*layer) == Some(false);
        Layer::ALL.into_iter().filter(contradicts).collect()
    }
}
