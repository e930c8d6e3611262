//! The state directory: every socket and log of one machine, and the hypervisor that owns it.

use crate::failure::Failure;
use pvio_hosted::Hypervisor;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The in-flight records in a state directory.
pub const RECORDS: &str = "inflight";

/// The directory. One that nobody named is removed with it, unless there is reason to look inside.
#[derive(Debug)]
pub struct Home {
    path: PathBuf,
    is_temporary: Arc<AtomicBool>,
}

impl Home {
    /// The directory the user named, or one for a machine of that name, with a hypervisor in it.
    /// Nothing in the directory is touched if another is alive there.
    ///
    /// # Errors
    /// A [`Failure`] when it cannot be made, or another hypervisor is alive in it.
    pub fn claim(named: Option<&Path>, name: &str) -> Result<(Self, Hypervisor), Failure> {
        if name.is_empty() || name.contains(['/', '\0']) || name.starts_with('.') {
            return Err(Failure::input(
                format!("{name:?} cannot be a guest's name"),
                "use letters, digits, '-', '_' and '.', as in --name web-1",
            ));
        }
        let path = match named {
            Some(path) => path.to_owned(),
            None => default_root().join(name),
        };
        let failed = |e| {
            Failure::input(
                format!("the state directory {} cannot be made: {e}", path.display()),
                "name one that can be written with --state-dir",
            )
        };
        DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(failed)?;
        let path = std::path::absolute(&path).map_err(failed)?;
        let hypervisor = Hypervisor::start(&path).map_err(|e| Failure::of(e).as_input())?;
        Ok((Self { path, is_temporary: Arc::new(AtomicBool::new(named.is_none())) }, hypervisor))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// It is not removed: there is something to be read in it.
    pub fn keep(&self) {
        self.is_temporary.store(false, Ordering::Release);
    }

    /// What has to be done for nothing to stay behind, for whoever ends the process at once.
    #[must_use]
    pub fn sweep(&self) -> Sweep {
        Sweep { path: self.path.clone(), is_temporary: Arc::clone(&self.is_temporary) }
    }
}

/// Takes away what would stay behind.
#[derive(Debug)]
pub struct Sweep {
    path: PathBuf,
    is_temporary: Arc<AtomicBool>,
}

impl Sweep {
    /// Does it; the sockets go with the hypervisor, unless there is no time for that.
    pub fn now(&self, with_sockets: bool) {
        let remove = |name: &str| drop(fs::remove_file(self.path.join(name)));
        if with_sockets {
            ["hypervisor.sock", "xenstore.sock", "control.sock"].into_iter().for_each(remove);
        }
        if self.is_temporary.load(Ordering::Acquire) {
            ["driver.log", "guest.log", "check.log", "demo.img"].into_iter().for_each(remove);
            // All of it is the driver domain's own.
            let _ = fs::remove_dir_all(self.path.join(RECORDS));
            // Only if nothing else is in there.
            let _ = fs::remove_dir(&self.path);
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.sweep().now(false);
    }
}

/// A folder of this user's alone, with one for each machine.
#[must_use]
pub fn default_root() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        Some(dir) if dir.is_dir() => dir.join("pvio"),
        _ => std::env::temp_dir().join(format!("pvio-{}", rustix::process::getuid().as_raw())),
    }
}
