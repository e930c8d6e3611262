//! A network namespace for measurements, in which interfaces can be created without an effect on
//! the host.

use anyhow::{Context, Result, ensure};
use std::process::Command;

/// Set if the program runs in the new network namespace.
const INSIDE: &str = "PVIO_BENCH_NETNS";

/// Returns whether this program still has to [`enter`] a namespace.
#[must_use]
pub fn outside() -> bool {
    std::env::var_os(INSIDE).is_none()
}

/// Runs this program again, in a new network namespace, and waits for it.
///
/// # Errors
/// `unshare` is not installed, or the program fails.
pub fn enter() -> Result<()> {
    let mut command = Command::new("unshare");
    if !rustix::process::getuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.arg("--net").arg(std::env::current_exe()?).args(std::env::args_os().skip(1));
    let status = command.env(INSIDE, "1").status().context("unshare (util-linux) is needed")?;
    ensure!(status.success(), "in the network namespace: {status}");
    Ok(())
}
