//! A network namespace for measurements, which may make interfaces there and disturb nobody.

use anyhow::{Context, Result, ensure};
use std::process::Command;

/// Set once the program runs in a network namespace of its own.
const INSIDE: &str = "PVIO_BENCH_NETNS";

/// Whether this program still has to [`enter`] a namespace.
#[must_use]
pub fn outside() -> bool {
    std::env::var_os(INSIDE).is_none()
}

/// Runs this program again, to its end, in a network namespace of its own.
///
/// # Errors
/// When there is no `unshare`, or the program fails in there.
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
