//! End-to-end tests: the release build of the command, real disk images, a hosted guest.
//!
//! Everything runs in a network namespace, which is deleted at the end together with all processes
//! in it.
//!
//! | module | contents |
//! |---|---|
//! | [`serve`] | a disk image's files, fetched from the guest; an orderly shutdown |
//! | [`faults`] | domains that are killed while in use |
//! | [`inputs`] | the command's messages for invalid input |
//! | [`scratch`] | `pvio check` |
//! | [`machine`] | the running command, and what must be removed when it ends |
//! | [`fetch`] | files fetched with curl, compared with a directory |
//! | [`image`] | the directory, and disk images with its files |
//! | [`netns`] | the network namespace |
//! | [`proc`] | processes in `/proc` |

mod faults;
mod fetch;
mod image;
mod inputs;
mod machine;
mod netns;
mod proc;
mod scratch;
mod serve;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::report::{Counts, Report};
use crate::{exec, tools};
use netns::NetNs;

/// State that all checks share.
struct World {
    /// Path of the command, built in release mode.
    pvio: PathBuf,
    /// A directory on a disk, with a path short enough for a Unix socket.
    dir: TempDir,
    net: NetNs,
}

impl World {
    fn dir(&self) -> &Path {
        self.dir.path()
    }
}

/// Builds the command and runs all checks.
pub fn run() -> Result<Report> {
    if let Some(why) = hindrance() {
        return Ok(Report::skipped(why));
    }
    let pvio = exec::pvio()?;
    // On a disk, if available: io_uring on a file of a tmpfs uses another path in the kernel.
    let var = Path::new("/var/tmp");
    let base = if var.is_dir() { var.to_path_buf() } else { std::env::temp_dir() };
    let dir = tempfile::Builder::new().prefix("pvio-e2e-").tempdir_in(base)?;
    let world = World { pvio, dir, net: NetNs::add().context("a network namespace")? };
    let mut checks = Checks::default();
    serve::run(&world, &mut checks)?;
    scratch::run(&world, &mut checks)?;
    inputs::run(&world, &mut checks)?;
    faults::run(&world, &mut checks)?;
    Ok(checks.0)
}

/// Returns the reason why the tests cannot run here, with the remedy.
fn hindrance() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("network namespaces and taps need root; run it by sudo".to_owned());
    }
    if !Path::new("/dev/net/tun").exists() {
        return Some("no /dev/net/tun; modprobe tun".to_owned());
    }
    let programs = ["ip", "curl", "mke2fs", "mkfs.vfat", "mcopy", "xenstore-ls", "setpriv"];
    let missing: Vec<_> = programs.into_iter().filter(|name| tools::find(name).is_none()).collect();
    if !missing.is_empty() {
        return Some(format!("{} not installed; see step tools", missing.join(", ")));
    }
    let probe = NetNs::add();
    probe.err().map(|error| format!("no network namespaces here: {error:#}"))
}

/// Results so far; each check counts as one test.
#[derive(Default)]
struct Checks(Report);

impl Checks {
    /// Runs a check and prints the result; returns `None` if it failed.
    fn check<T>(&mut self, name: &str, check: impl FnOnce() -> Result<T>) -> Option<T> {
        let start = Instant::now();
        let outcome = check();
        let seconds = start.elapsed().as_secs_f64();
        match outcome {
            Ok(value) => {
                println!("    ok {name} ({seconds:.1} s)");
                self.0.counts = self.0.counts + Counts::PASSED;
                Some(value)
            }
            Err(error) => {
                println!("    FAILED {name} ({seconds:.1} s): {error:#}");
                self.0.counts = self.0.counts + Counts::FAILED;
                None
            }
        }
    }
}
