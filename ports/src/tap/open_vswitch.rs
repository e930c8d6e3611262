//! Adding a tap to an Open vSwitch bridge, with `ovs-vsctl`.
#![forbid(unsafe_code)]

use super::config::TapError;
use alloc::format;
use alloc::string::String;
use std::io::ErrorKind;
use std::process::Command;

/// Adds a tap to a bridge that is not a bridge of the kernel.
///
/// A port stays in Open vSwitch's database when its interface is removed. `--may-exist` reuses a
/// port of the same name.
///
/// # Errors
/// [`TapError::NotABridge`] if it is not an Open vSwitch bridge either, or Open vSwitch is not
/// installed.
pub(super) fn join(tap: &str, bridge: &str) -> Result<(), TapError> {
    // Not an Open vSwitch bridge, or `ovs-vsctl` is missing or fails.
    if run(&["br-exists", bridge]).is_err() {
        return Err(TapError::NotABridge(bridge.into()));
    }
    run(&["--may-exist", "add-port", bridge, tap]).map_err(|refused| match refused {
        Refused::NotInstalled => TapError::NotABridge(bridge.into()),
        Refused::Failed(text) => TapError::OpenVswitch(text),
    })
}

/// Removes a tap from its Open vSwitch bridge, if it is in one.
pub(super) fn leave(tap: &str, bridge: &str) {
    if run(&["br-exists", bridge]).is_ok()
        && let Err(Refused::Failed(text)) = run(&["--if-exists", "del-port", bridge, tap])
    {
        tracing::warn!(
            tap,
            bridge,
            error = text,
            "the port cannot be removed from Open vSwitch's database"
        );
    }
}

enum Refused {
    NotInstalled,
    Failed(String),
}

fn run(words: &[&str]) -> Result<(), Refused> {
    // The timeout covers a daemon that does not respond.
    let out = Command::new("ovs-vsctl").arg("--timeout=10").args(words).output();
    match out {
        Ok(out) if out.status.success() => Ok(()),
        Ok(out) => Err(Refused::Failed(String::from_utf8_lossy(&out.stderr).trim().into())),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(Refused::NotInstalled),
        Err(error) => Err(Refused::Failed(format!("ovs-vsctl: {error}"))),
    }
}
