//! The kernel's frontends: unloaded and loaded, unbound and bound.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use super::read;
use crate::sys::modules;

/// What this module knows, done; `None` for other verbs.
pub fn obey(verb: &str, arguments: &Value) -> Option<Result<Value>> {
    let arguments = arguments.clone();
    Some(match verb {
        "module-reload" => read(arguments).and_then(|name: String| reload(&name)),
        "driver-rebind" => read(arguments).and_then(rebind),
        "driver-unbind" => read(arguments).and_then(|it: Rebind| write(&it, "unbind")),
        _ => return None,
    })
}

fn reload(name: &str) -> Result<Value> {
    modules::unload(name)?;
    modules::load(name)?;
    Ok(Value::Null)
}

#[derive(Deserialize)]
struct Rebind {
    /// `vbd` or `vif`
    driver: String,
    /// `vbd-51712`
    device: String,
}

fn write(order: &Rebind, file: &str) -> Result<Value> {
    let path = format!("/sys/bus/xen/drivers/{}/{file}", order.driver);
    fs::write(&path, &order.device).with_context(|| format!("{path}: {}", order.device))?;
    Ok(Value::Null)
}

/// Takes a device from its driver and gives it back.
fn rebind(order: Rebind) -> Result<Value> {
    write(&order, "unbind")?;
    // The driver takes a device up only once its backend waits for it again.
    let state = format!("/sys/bus/xen/devices/{}/state", order.device);
    let start = Instant::now();
    while fs::read_to_string(&state).unwrap_or_default().trim() == "Closing" {
        ensure!(start.elapsed() < Duration::from_secs(20), "{} stays Closing", order.device);
        std::thread::sleep(Duration::from_millis(50));
    }
    write(&order, "bind")
}
