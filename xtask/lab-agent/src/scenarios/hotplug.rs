//! Devices that come and go while others work; drivers that let go and take up again.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{BOTH, DISKS, Guests, NICS, Scenario};
use crate::dom0::disk::{Access, Disk, Medium};
use crate::dom0::guest::Guest;
use crate::dom0::lab::{LONG, Lab, SHORT};
use crate::dom0::xs;
use crate::sys;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "hotplug-disk",
        proves: "disks attached, used and detached under I/O on others leave nothing behind",
        backends: DISKS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: disk,
    },
    Scenario {
        name: "hotplug-nic",
        proves: "NICs attached, used and detached under traffic on others leave nothing behind",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: nic,
    },
    Scenario {
        name: "driver-reload",
        proves: "frontends unbound and bound, unloaded and loaded, find their devices as before",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: reload,
    },
];

/// What goes on meanwhile.
fn load() -> Value {
    json!({ "disks": ["xvda"], "echoes": ["10.0.0.1"] })
}

fn stopped(guest: &mut Guest) -> Result<()> {
    let rounds = guest.ask("load-stop", Value::Null, LONG).context("the load on other devices")?;
    ensure!(rounds.as_array().is_some_and(|it| it.iter().all(|n| *n != 0)), "no load: {rounds}");
    Ok(())
}

fn disk(lab: &mut Lab) -> Result<()> {
    let backend = lab.backend;
    lab.shared()?.guest.ask("load-start", load(), SHORT)?;
    let before = lab.settled()?;
    for round in 0..2 {
        let disk = Disk::new(16, backend, Medium::Device)?;
        let line = disk.line("xvdd", Access::Write, backend)?;
        let guest = &mut lab.shared()?.guest;
        let domain = guest.domain.to_string();
        sys::succeed(&["xl", "block-attach", &domain, &line], SHORT)?;
        guest.ask("disk-wait", json!("xvdd"), SHORT)?;
        let list = sys::succeed(&["xl", "block-list", &domain], SHORT)?;
        ensure!(list.contains("51760"), "xl does not list the new disk: {list}");
        let order = json!({ "name": "xvdd", "seed": round, "requests": 40, "mib": 8 });
        guest.ask("disk-scribble", order, LONG)?;
        sys::succeed(&["xl", "block-detach", &domain, "xvdd"], SHORT)?;
        guest.ask("disk-gone", json!("xvdd"), SHORT)?;
        lab.nothing_left(&before)?;
    }
    stopped(&mut lab.shared()?.guest)
}

fn nic(lab: &mut Lab) -> Result<()> {
    let address = "10.0.2.1/24";
    sys::succeed(&["ip", "address", "replace", address, "dev", "xenbr0"], SHORT)?;
    lab.shared()?.guest.ask("load-start", load(), SHORT)?;
    let before = lab.settled()?;
    for _ in 0..2 {
        let guest = &mut lab.shared()?.guest;
        let domain = guest.domain.to_string();
        let attach = ["xl", "network-attach", &domain, "bridge=xenbr0", "script=vif-bridge"];
        sys::succeed(&attach, SHORT)?;
        guest.ask("nic-up", json!({ "name": "eth2", "address": "10.0.2.2/24" }), SHORT)?;
        let echo = json!({ "server": "10.0.2.1", "sizes": [8, 1472, 9000], "rounds": 5 });
        guest.ask("nic-echo", echo, SHORT)?;
        sys::succeed(&["xl", "network-detach", &domain, "2"], SHORT)?;
        guest.ask("nic-gone", json!("eth2"), SHORT)?;
        lab.nothing_left(&before)?;
    }
    stopped(&mut lab.shared()?.guest)
}

fn reload(lab: &mut Lab) -> Result<()> {
    lab.shared()?;
    let before = lab.settled()?;
    let shared = lab.shared()?;
    let guest = &mut shared.guest;
    let pattern = |write: bool| json!({ "name": "xvdb", "seed": 31, "mib": 4, "write": write });
    guest.ask("disk-verify", pattern(true), LONG)?;
    for _ in 0..2 {
        for (driver, device, node) in [("vbd", "vbd-51728", "vbd/51728"), ("vif", "vif-1", "vif/1")]
        {
            let order = json!({ "driver": driver, "device": device });
            guest.ask("driver-unbind", order.clone(), SHORT)?;
            starts_over(guest, node)?;
            guest.ask("driver-bind", order, SHORT)?;
            connected(guest, node)?;
        }
        back(guest, &pattern(false))?;
    }
    let nics = ["vif/0", "vif/1"];
    let disks = ["vbd/51712", "vbd/51728", "vbd/51744"];
    for (module, nodes) in [("xen_netfront", &nics[..]), ("xen_blkfront", &disks[..])] {
        guest.ask("module-unload", json!(module), SHORT)?;
        nodes.iter().try_for_each(|node| starts_over(guest, node))?;
        guest.ask("module", json!(module), SHORT)?;
        nodes.iter().try_for_each(|node| connected(guest, node))?;
    }
    back(guest, &pattern(false))?;
    shared.bring_up_nics()?;
    lab.nothing_left(&before)
}

/// Once both ends of a device let go, says for the frontend that it starts over, which Linux's
/// blkfront does not do by itself; the backend then waits for it anew.
fn starts_over(guest: &Guest, node: &str) -> Result<()> {
    let front = format!("/local/domain/{}/device/{node}", guest.domain);
    let back = xs::must_read(&format!("{front}/backend"))?;
    xs::wait_for(&format!("{front}/state"), &["6"], SHORT).context("let go by the frontend")?;
    xs::wait_for(&format!("{back}/state"), &["6", "2"], SHORT).context("let go by the backend")?;
    xs::write(&format!("{front}/state"), "1")?;
    xs::wait_for(&format!("{back}/state"), &["2"], SHORT).context("waited for by the backend")
}

fn connected(guest: &Guest, node: &str) -> Result<()> {
    let state = format!("/local/domain/{}/device/{node}/state", guest.domain);
    xs::wait_for(&state, &["4"], SHORT).context("taken up again")
}

/// Disk and NIC work, and hold what they held.
fn back(guest: &mut Guest, pattern: &Value) -> Result<()> {
    guest.ask("disk-wait", json!("xvdb"), SHORT)?;
    guest.ask("disk-verify", pattern.clone(), LONG)?;
    let address = format!("{}/24", crate::dom0::lab::address(guest, 1));
    guest.ask("nic-up", json!({ "name": "eth1", "address": address }), SHORT)?;
    let echo = json!({ "server": "10.0.1.1", "sizes": [64, 1472, 9000], "rounds": 3 });
    guest.ask("nic-echo", echo, SHORT).map(drop)
}
