//! The permission to create a tap: of this process, or as root of a new user namespace.

use pvio_daemon::failure::{Failure, say_aside};
use rustix::thread::{CapabilitySet, capabilities};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// Environment variable that marks a process inside of the new namespaces.
const INSIDE: &str = "PVIO_IN_OWN_NAMESPACE";

/// Returns whether this process and its children are in their own network namespace.
#[must_use]
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Obtains the permission to create a tap. Without it, executes this program again, with the same
/// process id, as root of a new user and network namespace; this call does not return then. To be
/// called before anything is started.
///
/// # Errors
/// A [`Failure`] if neither is possible.
pub fn for_a_tap() -> Result<(), Failure> {
    let own = capabilities(None).map_err(|e| {
        Failure::new(format!("the capabilities of this process cannot be read: {e}"), "")
    })?;
    if own.effective.contains(CapabilitySet::NET_ADMIN) {
        return Ok(());
    }
    let failure = |why: &str| {
        Failure::input(
            format!("a tap cannot be created: permission denied, and {why}"),
            "run it as root, or give the program the capability: sudo setcap cap_net_admin+ep $(command -v pvio)",
        )
    };
    if is_inside() {
        return Err(failure("not possible in a user namespace either"));
    }
    const UNSHARE: [&str; 3] = ["--user", "--map-root-user", "--net"];
    let tried = Command::new("unshare")
        .args(UNSHARE)
        .arg("true")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match tried {
        Ok(status) if status.success() => {}
        Ok(_) => return Err(failure("this system does not allow user namespaces")),
        Err(_) => return Err(failure("unshare (util-linux) is not installed")),
    }
    let program = std::env::current_exe()
        .map_err(|e| failure(&format!("this program cannot be found: {e}")))?;
    say_aside!("no permission to create a tap: continuing in a new user and network namespace");
    let mut command = Command::new("unshare");
    command.args(UNSHARE).arg(program).args(std::env::args_os().skip(1));
    let e = command.env(INSIDE, "1").exec();
    Err(failure(&format!("unshare could not be run: {e}")))
}
