//! Joining a tap to a bridge of Open vSwitch's, by its own tool.
#![forbid(unsafe_code)]

use super::tap_config::TapError;
use alloc::format;
use alloc::string::String;
use std::io::ErrorKind;
use std::process::Command;

/// Joins a tap to a bridge that is none of the kernel's own.
///
/// A port stays in Open vSwitch's database when its interface goes. One of the same name is taken
/// up again; `--may-exist` says so.
///
/// # Errors
/// [`TapError::NotABridge`] if it is none of Open vSwitch's either, or that is not installed.
pub(super) fn join(tap: &str, bridge: &str) -> Result<(), TapError> {
    // Not one of its bridges, or nobody there to ask.
    if run(&["br-exists", bridge]).is_err() {
        return Err(TapError::NotABridge(bridge.into()));
    }
    run(&["--may-exist", "add-port", bridge, tap]).map_err(|refused| match refused {
        Refused::NotInstalled => TapError::NotABridge(bridge.into()),
        Refused::Failed(text) => TapError::OpenVswitch(text),
    })
}

/// Takes a tap out of a bridge again, if it is in one of Open vSwitch's.
pub(crate) fn leave(tap: &str, bridge: &str) {
    if run(&["br-exists", bridge]).is_ok()
        && let Err(Refused::Failed(text)) = run(&["--if-exists", "del-port", bridge, tap])
    {
        tracing::warn!(tap, bridge, text, "the port stays in Open vSwitch's database");
    }
}

enum Refused {
    NotInstalled,
    Failed(String),
}

fn run(words: &[&str]) -> Result<(), Refused> {
    // Its daemon may be dead: that is no reason to wait for it.
    let out = Command::new("ovs-vsctl").arg("--timeout=10").args(words).output();
    match out {
        Ok(out) if out.status.success() => Ok(()),
        Ok(out) => Err(Refused::Failed(String::from_utf8_lossy(&out.stderr).trim().into())),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(Refused::NotInstalled),
        Err(error) => Err(Refused::Failed(format!("ovs-vsctl: {error}"))),
    }
}
