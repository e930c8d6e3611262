//! The real command, a real disk image, a real guest.
//!
//! Everything runs in a network namespace of its own, which goes away with everything in it
//! whatever happens.
//!
//! | module | holds |
//! |---|---|
//! | [`serve`] | a disk image's files, fetched from the guest; a clean end |
//! | [`faults`] | a domain killed while it works |
//! | [`inputs`] | what the command says when it cannot do what it is asked |
//! | [`scratch`] | `pvio check` |
//! | [`machine`] | the command running, and what must not be left of it |
//! | [`fetch`] | files by curl, compared with a folder |
//! | [`image`] | the folder, and disk images made of it |
//! | [`netns`] | the network namespace |
//! | [`proc`] | processes, as `/proc` shows them |

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

/// What every check uses.
struct World {
    /// The command, built in release.
    pvio: PathBuf,
    /// Room on a disk, whose path is short enough for a Unix socket's.
    dir: TempDir,
    net: NetNs,
}

impl World {
    fn dir(&self) -> &Path {
        self.dir.path()
    }
}

/// Builds the command and puts it through everything.
pub fn run() -> Result<Report> {
    if let Some(why) = hindrance() {
        return Ok(Report::skipped(why));
    }
    let pvio = exec::pvio()?;
    // On a disk if there is one: io_uring on a file in memory is another path in the kernel.
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

/// Why none of this can run here, and what would help.
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

/// The checks so far, counted one by one.
#[derive(Default)]
struct Checks(Report);

impl Checks {
    /// Runs one and says what came of it; `None` if it failed.
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
