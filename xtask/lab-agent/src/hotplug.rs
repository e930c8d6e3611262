//! What `xl` runs when a device comes or goes. Debian's own scripts hang where there is no udev.

use std::env;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::sys;

const QUICK: Duration = Duration::from_secs(20);

/// A script by its name, asked for `add`, `remove`, `online` or `offline`.
///
/// # Errors
/// The device cannot be had; `xl` reads why in xenstore.
pub fn run(script: &str, verb: &str) -> Result<()> {
    let node = env::var("XENBUS_PATH").context("XENBUS_PATH")?;
    let outcome = match (script, verb) {
        ("block", "add") => block(&node),
        ("vif-bridge", "online" | "add") => vif(&node),
        (_, "remove" | "offline") => Ok(()),
        _ => bail!("{script} does not know {verb}"),
    };
    if let Err(error) = &outcome {
        let _ = write(&node, "hotplug-error", &format!("{error:#}"));
        let _ = write(&node, "hotplug-status", "error");
    }
    outcome
}

/// Tells the backend which device a path is.
fn block(node: &str) -> Result<()> {
    let path = sys::succeed(&["xenstore-read", &format!("{node}/params")], QUICK)?;
    let path = path.trim();
    let number = fs::metadata(path).context(path.to_owned())?.rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    write(node, "physical-device", &format!("{major:x}:{minor:x}"))?;
    write(node, "physical-device-path", path)?;
    connected(node)
}

/// Puts an interface on its bridge.
fn vif(node: &str) -> Result<()> {
    let name = env::var("vif").context("vif")?;
    let bridge = sys::succeed(&["xenstore-read", &format!("{node}/bridge")], QUICK)?;
    sys::succeed(&["ip", "link", "set", &name, "up", "master", bridge.trim()], QUICK)?;
    connected(node)
}

fn connected(node: &str) -> Result<()> {
    write(node, "hotplug-status", "connected")
}

fn write(node: &str, key: &str, value: &str) -> Result<()> {
    sys::succeed(&["xenstore-write", &format!("{node}/{key}"), value], QUICK)?;
    Ok(())
}
