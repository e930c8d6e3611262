//! The confinement of processes, as it is configured.

use pvio_confinement::{Enforcement, FileAccess, Layers, ProcessKind, Root, User};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The confinement of all processes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Confinement {
    /// The user of the processes; this process's if `None`.
    pub user: Option<User>,
    /// What happens at a system call that is not allowed.
    pub enforcement: Enforcement,
    /// Directory of the control group of the processes.
    pub cgroup: Option<PathBuf>,
}

/// The confinement of one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confined {
    /// The layers that are applied before there are threads.
    pub layers: Layers,
    /// What happens at a system call that is not allowed.
    pub enforcement: Enforcement,
}

impl Confinement {
    /// Returns the confinement of a process.
    #[must_use]
    pub fn of(&self, kind: ProcessKind) -> Confined {
        let mut layers = Layers::of(kind);
        (layers.user, layers.cgroup) = (self.user, self.cgroup.clone());
        Confined { layers, enforcement: self.enforcement }
    }

    /// Returns the confinement of an image helper that may open files below these directories, for
    /// writing as well if the disk consists of several files that are written (VMDK). It
    /// keeps its user: the files of images belong to any.
    #[must_use]
    pub fn of_helper(&self, roots: Vec<PathBuf>, write: bool) -> Confined {
        let mut confined = self.of(ProcessKind::ImageHelper);
        let root = |path| Root { path, write };
        confined.layers.files = FileAccess::Below(roots.into_iter().map(root).collect());
        confined.layers.user = None;
        confined
    }
}
