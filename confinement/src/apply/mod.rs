//! The steps of each layer, and their order.

mod capabilities;
mod files;
mod limits;
pub mod namespaces;
mod user;

use crate::applied::{Applied, Layer, Missing, Outcome, Reason};
use crate::layers::Layers;
use std::fs;
use std::io;
use std::path::Path;

impl Layers {
    /// Applies the layers to this process, each one independently of the others.
    ///
    /// # Errors
    /// Nothing is applied if the process has several threads, or `/proc` is not there.
    pub fn apply(&self) -> Result<Applied, LayersError> {
        let threads = fs::read_dir("/proc/self/task").map_err(LayersError::NoProc)?.count();
        if threads != 1 {
            return Err(LayersError::Threads(threads));
        }
        let mut applied = Applied::default();
        let cgroup = self.cgroup.as_deref().map_or(Outcome::NotConfigured, join);
        applied.record(Layer::Cgroup, cgroup);
        // Rights are needed to raise a limit, to create a namespace and to open a directory.
        applied.record(Layer::Limits, limits::set(&self.limits));
        namespaces::enter(&self.namespaces, &mut applied);
        let ruleset = files::prepare(&self.files);
        if self.namespaces.empty_root {
            let outcome = if applied.has(Layer::MountNamespace) {
                namespaces::empty_root()
            } else {
                let detail = "it needs a mount namespace".to_owned();
                Outcome::Missing(Missing { reason: Reason::NotPermitted, detail })
            };
            applied.record(Layer::EmptyRoot, outcome);
        } else {
            applied.record(Layer::EmptyRoot, Outcome::NotConfigured);
        }
        // The bounding set needs CAP_SETPCAP, which a change of the user takes away.
        let bounding = capabilities::empty_bounding_set();
        let user = self.user.map_or(Outcome::NotConfigured, user::change);
        applied.record(Layer::User, user);
        applied.record(Layer::Capabilities, capabilities::clear());
        applied.record(Layer::BoundingSet, bounding);
        applied.record(Layer::NoNewPrivileges, capabilities::forbid_new());
        // A change of the user resets it.
        applied.record(Layer::NotDumpable, limits::forbid_dumps());
        applied.record(Layer::Landlock, files::restrict(ruleset));
        Ok(applied)
    }
}

/// Joins a control group.
fn join(directory: &Path) -> Outcome {
    let joined = fs::write(directory.join("cgroup.procs"), "0");
    Outcome::of(joined.map(|()| directory.display().to_string()).map_err(|e| ("join", e)))
}

/// Error of [`Layers::apply`].
#[derive(Debug, thiserror::Error)]
pub enum LayersError {
    /// The process has several threads. Most layers apply to one thread.
    #[error("confine the process: it has {0} threads already")]
    Threads(usize),
    /// The number of threads is unknown.
    #[error("confine the process: /proc/self/task")]
    NoProc(#[source] io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::ProcessKind;

    #[test]
    fn process_with_threads_is_not_confined() {
        // The test harness has a thread, and the test another one.
        let error = Layers::of(ProcessKind::Disk).apply().unwrap_err();
        assert!(matches!(error, LayersError::Threads(2..)), "{error}");
    }
}
