//! The state directory: every socket and log of one machine, and the hypervisor that owns it.

use pvio_daemon::control::default_root;
use pvio_daemon::failure::Failure;
use pvio_hosted::Hypervisor;
use pvio_recordfile::PrivateDir;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The in-flight records in a state directory.
pub const RECORDS: &str = "inflight";

/// The directory. One that nobody named is removed with it, unless there is reason to look inside.
#[derive(Debug)]
pub struct Home {
    dir: Arc<PrivateDir>,
    is_temporary: Arc<AtomicBool>,
}

impl Home {
    /// The directory the user named, or one for a machine of that name, with a hypervisor in it.
    /// Nothing in the directory is touched if another is alive there.
    ///
    /// # Errors
    /// A [`Failure`] when it cannot be made, is not this user's alone, or another hypervisor is alive
    /// in it.
    pub fn claim(named: Option<&Path>, name: &str) -> Result<(Self, Hypervisor), Failure> {
        if name.is_empty() || name.contains(['/', '\0']) || name.starts_with('.') {
            return Err(Failure::input(
                format!("{name:?} cannot be a guest's name"),
                "use letters, digits, '-', '_' and '.', as in --name web-1",
            ));
        }
        let path = match named {
            Some(path) => path.to_owned(),
            None => private(&default_root())?.path().join(name),
        };
        let dir = Arc::new(private(&path)?);
        let started = Hypervisor::start(dir.path());
        let hypervisor = started.map_err(|e| Failure::of(e).as_input())?;
        Ok((Self { dir, is_temporary: Arc::new(AtomicBool::new(named.is_none())) }, hypervisor))
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &PrivateDir {
        &self.dir
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// It is not removed: there is something to be read in it.
    pub fn keep(&self) {
        self.is_temporary.store(false, Ordering::Release);
    }

    /// What has to be done for nothing to stay behind, for whoever ends the process at once.
    #[must_use]
    pub fn sweep(&self) -> Sweep {
        Sweep { dir: Arc::clone(&self.dir), is_temporary: Arc::clone(&self.is_temporary) }
    }
}

/// Opens a directory for sockets and logs, which is made if need be.
///
/// # Errors
/// A [`Failure`] when it cannot be made or is not this user's alone.
pub fn private(path: &Path) -> Result<PrivateDir, Failure> {
    PrivateDir::create(path).map_err(|e| {
        let failure = Failure::of(format!("the state directory cannot be used: {e}")).as_input();
        let help =
            if failure.help.is_empty() { "name one that can be written" } else { &failure.help };
        Failure { help: format!("{help} (--state-dir)"), ..failure }
    })
}

/// Takes away what would stay behind.
#[derive(Debug)]
pub struct Sweep {
    dir: Arc<PrivateDir>,
    is_temporary: Arc<AtomicBool>,
}

impl Sweep {
    /// Does it; the sockets go with the hypervisor, unless there is no time for that.
    pub fn now(&self, with_sockets: bool) {
        let remove = |name: &str| drop(self.dir.remove(name));
        if with_sockets {
            ["hypervisor.sock", "xenstore.sock", "control.sock"].into_iter().for_each(remove);
        }
        if self.is_temporary.load(Ordering::Acquire) {
            ["driver.log", "guest.log", "check.log", "demo.img"].into_iter().for_each(remove);
            // All of it is the driver domain's own.
            let _ = std::fs::remove_dir_all(self.dir.by_descriptor(RECORDS));
            // Only if nothing else is in there.
            let _ = self.dir.remove_empty();
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.sweep().now(false);
    }
}
