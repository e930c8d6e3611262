//! Devices, their states and negotiated features, as read from xenstore.

use super::args::ListArgs;
use super::vdev::Vdev;
use super::{backend_error, connect, domain};
use crate::failure::{Failure, one_line, say};
use crate::inspect::put_bytes;
use crate::units::human;
use pvio_grant_table::DomId;
use pvio_storage::image::EscapedPath;
use pvio_xenbus::client::Client;
use pvio_xenbus::handshake::common::{
    BackendKind, DeviceAddr, DeviceClass, domain_name, list_backends, list_domains, read_state,
};
use pvio_xenbus::handshake::vbd::{BackDisk, FrontRequest, Mode, Negotiated, ToolstackBack};
use serde_json::{Value, json};

/// Lists the devices.
///
/// # Errors
/// There is no xenstore, or no such guest.
pub fn run(args: &ListArgs) -> Result<(), Failure> {
    let mut xs = connect(&args.store)?;
    let only = args.guest.as_ref().map(|name| domain(&mut xs, name)).transpose()?;
    let mut found = Vec::new();
    for back in list_domains(&mut xs).map_err(Failure::of)? {
        for kind in BackendKind::ALL {
            let devices = list_backends(&mut xs, kind, back).map_err(Failure::of)?;
            let selected =
                devices.into_iter().filter(|addr| only.is_none_or(|id| addr.front == id));
            for addr in selected {
                found.push(describe(&mut xs, addr));
            }
        }
    }
    if args.json {
        say!("{:#}", Value::from(found));
        return Ok(());
    }
    if found.is_empty() {
        say!("no devices");
    }
    for device in &found {
        say!("{}", summary(device));
    }
    Ok(())
}

/// Returns the description of a device; properties that cannot be read are left out.
fn describe(xs: &mut Client, addr: DeviceAddr) -> Value {
    let state = |xs: &mut Client, path: String| {
        read_state(xs, &path).map_or_else(|_| "?".into(), |state| format!("{state:?}"))
    };
    let name = |xs: &mut Client, id: DomId| domain_name(xs, id).ok().flatten();
    let mut device = json!({
        "kind": addr.kind.as_str(),
        "guest": addr.front.0,
        "guest_name": name(xs, addr.front),
        "backend": addr.back.0,
        "backend_name": name(xs, addr.back),
        "device": device_name(addr),
        "path": addr.backend_path(),
        "backend_state": state(xs, addr.backend_path()),
        "guest_state": state(xs, addr.frontend_path()),
        "error": backend_error(xs, addr),
    });
    if addr.class() == DeviceClass::Vbd
        && let (Some(disk), Some(all)) = (disk(xs, addr), device.as_object_mut())
    {
        all.insert("disk".into(), disk);
    }
    device
}

fn device_name(addr: DeviceAddr) -> String {
    match addr.class() {
        DeviceClass::Vbd => Vdev::from_number(addr.index).to_string(),
        DeviceClass::Vif => addr.index.to_string(),
    }
}

fn disk(xs: &mut Client, addr: DeviceAddr) -> Option<Value> {
    let base = addr.backend_path();
    let config = ToolstackBack::read(xs, &base).ok()?;
    let mut all = json!({
        "type": config.kind,
        "mode": if config.mode == Mode::ReadOnly { "r" } else { "w" },
        "options": Value::Null,
    });
    put_bytes(&mut all, "kept_in", &config.params);
    if let Some(options) = &config.options {
        put_bytes(&mut all, "options", options);
    }
    let served = BackDisk::read(xs, &base).ok();
    if let (Some(served), Some(all)) = (served, all.as_object_mut()) {
        all.insert("bytes".into(), served.sectors.saturating_mul(512).into());
        all.insert("sector_bytes".into(), served.sector_size.into());
        if let Ok(request) = FrontRequest::read(xs, &addr.frontend_path(), &served.offer) {
            let agreed = Negotiated::new(&served.offer, &request);
            let pages = request.queues.first().map(|queue| queue.ring_refs.len());
            all.insert("queues".into(), request.queues.len().into());
            all.insert("ring_pages".into(), pages.into());
            all.insert("persistent".into(), agreed.persistent.into());
            all.insert("indirect_segments".into(), agreed.max_indirect_segments.into());
            all.insert("discard".into(), agreed.discard.is_some().into());
        }
    }
    Some(all)
}

/// Returns the text of a key whose value is bytes, such as a path, for one line of output.
fn display_text(object: &Value, key: &str) -> Option<String> {
    let text = object[key].as_str()?;
    let has_escapes = object[format!("{key}_hex")].is_string();
    Some(if has_escapes { text.into() } else { EscapedPath::new(text).to_string() })
}

/// Returns a line such as `guest xvda  pvio-vbd in 1  Connected/Connected  64.0 MiB  rw
/// qcow2:/srv/a.qcow2`.
fn summary(device: &Value) -> String {
    let text = |key: &str| device[key].as_str().unwrap_or_default();
    let guest = device["guest_name"].as_str().map_or(device["guest"].to_string(), one_line);
    let mut line = format!(
        "{guest}  {} {}  served by {}  {}/{}",
        text("kind"),
        text("device"),
        device["backend_name"].as_str().map_or(device["backend"].to_string(), one_line),
        text("backend_state"),
        text("guest_state"),
    );
    let disk = &device["disk"];
    if let Some(bytes) = disk["bytes"].as_u64() {
        line = line + "  " + &human(bytes);
    }
    if let Some(kept_in) = display_text(disk, "kept_in") {
        line = line + "  " + disk["mode"].as_str().unwrap_or_default() + "  " + &kept_in;
    }
    if let Some(options) = display_text(disk, "options") {
        line = format!("{line}  [{options}]");
    }
    if let Some(queues) = disk["queues"].as_u64() {
        let persistent = if disk["persistent"] == true { ", persistent" } else { "" };
        line = format!("{line}  {queues} queues of {} pages{persistent}", disk["ring_pages"]);
    }
    if let Some(error) = device["error"].as_str() {
        line = line + "  error: " + &one_line(error);
    }
    line
}
