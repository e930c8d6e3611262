//! pvio's own kinds of backend, beside Linux's, which are loaded and serve what is theirs.

use anyhow::{Result, ensure};
use serde_json::json;

use super::{BOTH, Guests, PVIO, Scenario};
use crate::dom0::backend::Backend;
use crate::dom0::disk::{Access, Disk, Medium};
use crate::dom0::guest::{Guest, Spec};
use crate::dom0::lab::{LONG, Lab, NIC, SHORT, address};
use crate::dom0::xs;

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "own-kinds",
    proves: "a disk and a NIC of Linux's backends and one each of pvio's kinds, in one guest",
    backends: PVIO,
    kinds: BOTH,
    guests: Guests::Own,
    run: own_kinds,
}];

/// `xvdb`
const NUMBER: &str = "51728";

fn own_kinds(lab: &mut Lab) -> Result<()> {
    // pvio sees what is loaded, and leaves that to it.
    lab.backends().serve_beside_kernel()?;
    let before = lab.settled()?;
    let linux = Disk::new(16, Backend::Linux, Medium::Device)?;
    let ours = Disk::new(16, Backend::Pvio, Medium::File)?;
    let mut spec = Spec::new(lab.kind, Backend::Linux);
    spec.disks = vec![linux.line("xvda", Access::Write, Backend::Linux)?];
    spec.nics = vec![NIC.to_owned()];
    let mut guest = Guest::start(&spec)?;
    attach_disk(&guest, &ours)?;
    attach_nic(&guest)?;

    for (name, disk) in [("xvda", &linux), ("xvdb", &ours)] {
        guest.ask("disk-wait", json!(name), SHORT)?;
        let order = json!({ "name": name, "seed": 81, "requests": 100, "mib": 8 });
        let sum = guest.ask("disk-scribble", order, LONG)?;
        ensure!(sum == disk.sum(8)?, "{name}: the image holds something else");
    }
    for (nic, name) in ["eth0", "eth1"].iter().enumerate() {
        let address = format!("{}/24", address(&guest, nic));
        guest.ask("nic-up", json!({ "name": name, "address": address }), SHORT)?;
        let server = format!("10.0.{nic}.1");
        let echo = json!({ "server": server, "sizes": [8, 64, 1472, 9000], "rounds": 3 });
        guest.ask("nic-echo", echo, SHORT)?;
    }
    for (kind, number) in [("vbd", "51712"), ("pvio-vbd", NUMBER), ("vif", "0"), ("pvio-vif", "1")]
    {
        let state = xs::must_read(&format!("{}/state", back(&guest, kind, number)))?;
        ensure!(state == "4", "{kind} {number} is in state {state}");
    }
    // The toolstack that made them takes them away.
    for (class, number) in [("vbd", NUMBER), ("vif", "1")] {
        let back = back(&guest, &format!("pvio-{class}"), number);
        xs::write(&format!("{back}/online"), "0")?;
        xs::write(&format!("{back}/state"), "5")?;
        xs::wait_for(&format!("{back}/state"), &["6"], SHORT)?;
        xs::remove(&back)?;
        xs::remove_empty(&back)?;
        xs::remove(&front(&guest, class, number))?;
    }
    guest.ask("disk-gone", json!("xvdb"), SHORT)?;
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)
}

fn front(guest: &Guest, class: &str, number: &str) -> String {
    format!("/local/domain/{}/device/{class}/{number}", guest.domain)
}

fn back(guest: &Guest, kind: &str, number: &str) -> String {
    format!("/local/domain/0/backend/{kind}/{}/{number}", guest.domain)
}

fn attach_disk(guest: &Guest, disk: &Disk) -> Result<()> {
    let image = disk.image.display().to_string();
    let keys = [("params", image.as_str()), ("mode", "w"), ("type", "phy"), ("dev", "xvdb")];
    let fronts = [("virtual-device", NUMBER), ("device-type", "disk")];
    attach(guest, "vbd", NUMBER, &fronts, &keys)
}

fn attach_nic(guest: &Guest) -> Result<()> {
    let mac = format!("00:16:3e:70:00:{:02x}", guest.domain % 256);
    let keys = [("handle", "1"), ("mac", mac.as_str()), ("bridge", "xenbr0")];
    attach(guest, "vif", "1", &[("handle", "1"), ("mac", &mac)], &keys)
}

/// Writes both ends as libxl does: each may be read by the other's domain.
fn attach(
    guest: &Guest,
    class: &str,
    number: &str,
    fronts: &[(&str, &str)],
    backs: &[(&str, &str)],
) -> Result<()> {
    let id = guest.domain.to_string();
    let (front, back) =
        (front(guest, class, number), back(guest, &format!("pvio-{class}"), number));
    let to_front = [("backend", back.as_str()), ("backend-id", "0")];
    let to_back = [("frontend", front.as_str()), ("frontend-id", &id), ("online", "1")];
    for (dir, perms, keys) in [
        (&front, [format!("n{id}"), "r0".to_owned()], [&to_front[..], fronts].concat()),
        (&back, ["n0".to_owned(), format!("r{id}")], [&to_back[..], backs].concat()),
    ] {
        xs::write(dir, "")?;
        xs::allow(dir, &perms)?;
        for (key, value) in keys {
            xs::write(&format!("{dir}/{key}"), value)?;
        }
    }
    // Both ends are there before either is told.
    xs::write(&format!("{back}/state"), "1")?;
    xs::write(&format!("{front}/state"), "1")
}
