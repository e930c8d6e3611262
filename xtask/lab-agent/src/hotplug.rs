//! Hotplug scripts that `xl` runs when a device is added or removed. Debian's own scripts hang
//! without udev.

use std::env;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::dom0::xs;
use crate::sys;

const QUICK: Duration = Duration::from_secs(20);

/// Runs a script by its name, with `add`, `remove`, `online` or `offline`.
///
/// # Errors
/// The device is not available; `xl` reads the reason from xenstore.
pub fn run(script: &str, verb: &str) -> Result<()> {
    let node = env::var("XENBUS_PATH").context("XENBUS_PATH")?;
    let outcome = match (script, verb) {
        ("block", "add") => block(&node),
        ("vif-bridge", "online" | "add") => vif(&node),
        (_, "remove" | "offline") => Ok(()),
        _ => bail!("{script} does not know {verb}"),
    };
    if let Err(error) = &outcome {
        let _ = xs::write(&format!("{node}/hotplug-error"), &format!("{error:#}"));
        let _ = xs::write(&format!("{node}/hotplug-status"), "error");
    }
    outcome
}

/// Writes the device number of the path to the backend's nodes.
fn block(node: &str) -> Result<()> {
    let path = xs::must_read(&format!("{node}/params"))?;
    let number = fs::metadata(&path).context(path.clone())?.rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    xs::write(&format!("{node}/physical-device"), &format!("{major:x}:{minor:x}"))?;
    xs::write(&format!("{node}/physical-device-path"), &path)?;
    connected(node)
}

/// Adds an interface to its bridge.
fn vif(node: &str) -> Result<()> {
    let name = env::var("vif").context("vif")?;
    let bridge = xs::must_read(&format!("{node}/bridge"))?;
    sys::succeed(&["ip", "link", "set", &name, "up", "master", &bridge], QUICK)?;
    connected(node)
}

fn connected(node: &str) -> Result<()> {
    xs::write(&format!("{node}/hotplug-status"), "connected")
}
