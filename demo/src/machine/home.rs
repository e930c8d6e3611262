//! The state directory: all sockets and logs of a hosted machine, and the hypervisor in it.

use pvio_daemon::control::default_root;
use pvio_daemon::failure::Failure;
use pvio_hosted::Hypervisor;
use pvio_recordfile::PrivateDir;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Name of the directory of in-flight records in a state directory.
pub const RECORDS: &str = "inflight";
/// Directory of the sockets of device processes.
pub const DEVICES: &str = "devices";

/// The state directory. A default one is removed when dropped, unless [`Home::preserve`] was called.
#[derive(Debug)]
pub struct Home {
    dir: Arc<PrivateDir>,
    is_temporary: Arc<AtomicBool>,
}

impl Home {
    /// Claims the directory `explicit`, or the default one for a machine of that name, and starts a
    /// hypervisor in it. Nothing in the directory is changed if another hypervisor is running
    /// there.
    ///
    /// # Errors
    /// A [`Failure`] if the directory cannot be created or is not private to this user, or another
    /// hypervisor is running in it.
    pub fn claim(explicit: Option<&Path>, name: &str) -> Result<(Self, Hypervisor), Failure> {
        if name.is_empty() || name.contains(['/', '\0']) || name.starts_with('.') {
            return Err(Failure::input(
                format!("invalid name {name:?} of a guest"),
                "use letters, digits, '-', '_' and '.', as in --name web-1",
            ));
        }
        let path = match explicit {
            Some(path) => path.to_owned(),
            None => private(&default_root())?.path().join(name),
        };
        let dir = Arc::new(private(&path)?);
        let started = Hypervisor::start(dir.path());
        let hypervisor = started.map_err(|e| Failure::of(e).as_input())?;
        Ok((Self { dir, is_temporary: Arc::new(AtomicBool::new(explicit.is_none())) }, hypervisor))
    }

    /// Returns the directory.
    #[must_use]
    pub fn dir(&self) -> &PrivateDir {
        &self.dir
    }

    /// Returns the path.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Prevents the removal of the directory, because its logs are of interest.
    pub fn preserve(&self) {
        self.is_temporary.store(false, Ordering::Release);
    }

    /// Returns the cleanup for a process that exits without dropping its values.
    #[must_use]
    pub fn sweep(&self) -> Sweep {
        Sweep { dir: Arc::clone(&self.dir), is_temporary: Arc::clone(&self.is_temporary) }
    }
}

/// Opens a directory for sockets and logs; creates it if it does not exist.
///
/// # Errors
/// A [`Failure`] if it cannot be created or is not private to this user.
pub fn private(path: &Path) -> Result<PrivateDir, Failure> {
    PrivateDir::create(path).map_err(|e| {
        let failure = Failure::of(e).context("the state directory cannot be used").as_input();
        let remedy = match failure.remedy.is_empty() {
            true => "name a directory that can be written",
            false => &failure.remedy,
        };
        Failure { remedy: format!("{remedy} (--state-dir)"), ..failure }
    })
}

/// Removes the files that would remain in the state directory.
#[derive(Debug)]
pub struct Sweep {
    dir: Arc<PrivateDir>,
    is_temporary: Arc<AtomicBool>,
}

impl Sweep {
    /// Removes the files. The hypervisor removes its sockets itself, except when the process exits
    /// immediately; the driver domain removes its own, except when it is killed.
    pub fn now(&self, with_sockets: bool) {
        let remove = |name: &str| drop(self.dir.remove(name));
        remove(pvio_daemon::control::NAME);
        if with_sockets {
            ["hypervisor.sock", "xenstore.sock"].into_iter().for_each(remove);
        }
        if self.is_temporary.load(Ordering::Acquire) {
            ["driver.log", "guest.log", "check.log", "demo.img"].into_iter().for_each(remove);
            // Only the driver domain writes there.
            let _ = std::fs::remove_dir_all(self.dir.by_descriptor(RECORDS));
            let _ = std::fs::remove_dir_all(self.dir.by_descriptor(DEVICES));
            // Fails if there are other files in it.
            let _ = self.dir.remove_empty();
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.sweep().now(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_of_killed_driver_domain_is_removed_and_logs_stay() {
        let dir = tempfile::tempdir().unwrap();
        let (home, hypervisor) = Home::claim(Some(dir.path()), "test").unwrap();
        for name in ["control.sock", "driver.log"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        drop(hypervisor);
        drop(home);
        let left = std::fs::read_dir(dir.path()).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["driver.log"]);
    }
}
