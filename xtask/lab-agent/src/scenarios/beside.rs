//! pvio's own kinds of backend, together with Linux's backends, which serve the standard kinds.

use anyhow::{Result, ensure};
use serde_json::json;

use super::{BOTH, Guests, PVIO, Scenario};
use crate::dom0::backend::Backend;
use crate::dom0::disk::{Access, Disk, Medium};
use crate::dom0::guest::{Guest, Spec};
use crate::dom0::lab::{LONG, Lab, NIC, SHORT, address};
use crate::dom0::xs;
use crate::sys;

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "own-kinds",
    proves: "a guest uses a disk and a NIC of Linux's backends and one each of pvio's own kinds, \
             added by pvio attach-disk",
    backends: PVIO,
    kinds: BOTH,
    guests: Guests::Own,
    run: own_kinds,
}];

/// `xvdb`
const NUMBER: &str = "51728";

fn own_kinds(lab: &mut Lab) -> Result<()> {
    // pvio detects the loaded backends and does not serve their kinds.
    lab.backends().serve_beside_kernel()?;
    let before = lab.settled()?;
    let linux = Disk::new(16, Backend::Linux, Medium::Device)?;
    let ours = Disk::new(16, Backend::Pvio, Medium::File)?;
    let mut spec = Spec::new(lab.kind, Backend::Linux);
    spec.disks = vec![linux.line("xvda", Access::Write, Backend::Linux)?];
    spec.nics = vec![NIC.to_owned()];
    let mut guest = Guest::start(&spec)?;
    let domain = guest.domain.to_string();
    let place = format!("[iops=5000]raw:{}", ours.image.display());
    let pvio = |words: &[&str]| sys::succeed(&[&["pvio"], words].concat(), SHORT);
    pvio(&["attach-disk", &domain, &place, "--vdev", "xvdb"])?;
    attach_nic(&guest)?;

    for (name, disk) in [("xvda", &linux), ("xvdb", &ours)] {
        guest.ask("disk-wait", json!(name), SHORT)?;
        let order = json!({ "name": name, "seed": 81, "requests": 100, "mib": 8 });
        let sum = guest.ask("disk-scribble", order, LONG)?;
        ensure!(sum == disk.sum(8)?, "{name}: image checksum differs from the guest's");
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
    pvio(&["set-disk", &domain, "xvdb", "iops=none,latency=1ms"])?;
    let listed = pvio(&["list", &domain])?;
    ensure!(listed.contains("xvdb") && listed.contains("latency=1ms"), "pvio list: {listed}");
    guest.ask(
        "disk-verify",
        json!({ "name": "xvdb", "seed": 8, "mib": 1, "write": true }),
        LONG,
    )?;
    pvio(&["detach-disk", &domain, "xvdb"])?;
    guest.ask("disk-gone", json!("xvdb"), SHORT)?;
    // The toolstack that created the device removes it.
    let nic = back(&guest, "pvio-vif", "1");
    xs::write(&format!("{nic}/online"), "0")?;
    xs::write(&format!("{nic}/state"), "5")?;
    xs::wait_for(&format!("{nic}/state"), &["6"], SHORT)?;
    xs::remove(&nic)?;
    xs::remove_empty(&nic)?;
    xs::remove(&front(&guest))?;
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)
}

fn front(guest: &Guest) -> String {
    format!("/local/domain/{}/device/vif/1", guest.domain)
}

fn back(guest: &Guest, kind: &str, number: &str) -> String {
    format!("/local/domain/0/backend/{kind}/{}/{number}", guest.domain)
}

/// Writes frontend and backend nodes of a NIC as libxl does; each may be read by the other domain.
fn attach_nic(guest: &Guest) -> Result<()> {
    let id = guest.domain.to_string();
    let mac = format!("00:16:3e:70:00:{:02x}", guest.domain % 256);
    let (front, back) = (front(guest), back(guest, "pvio-vif", "1"));
    let fronts = [("backend", back.as_str()), ("backend-id", "0"), ("handle", "1"), ("mac", &mac)];
    let backs = [
        ("frontend", front.as_str()),
        ("frontend-id", &id),
        ("online", "1"),
        ("handle", "1"),
        ("mac", &mac),
        ("bridge", "xenbr0"),
    ];
    for (dir, perms, keys) in [
        (&front, [format!("n{id}"), "r0".to_owned()], &fronts[..]),
        (&back, ["n0".to_owned(), format!("r{id}")], &backs[..]),
    ] {
        xs::write(dir, "")?;
        xs::allow(dir, &perms)?;
        for (key, value) in keys {
            xs::write(&format!("{dir}/{key}"), value)?;
        }
    }
    // Both sides' nodes exist before either state is written.
    xs::write(&format!("{back}/state"), "1")?;
    xs::write(&format!("{front}/state"), "1")
}
