//! Devices that are attached and detached while others are in use; drivers that are unbound and
//! bound again.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::nic::undo::Undo;
use super::{BOTH, DISKS, Guests, NICS, Scenario};
use crate::dom0::disk::{Access, Disk, Medium};
use crate::dom0::guest::Guest;
use crate::dom0::lab::{LONG, Lab, SHORT, Shared};
use crate::dom0::xs;
use crate::net::datagrams::{Flood, Flow, Taken, Taker};
use crate::sys;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "hotplug-disk",
        proves: "disks attached, used and detached during I/O on other disks leave no resources",
        backends: DISKS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: disk,
    },
    Scenario {
        name: "hotplug-nic",
        proves: "NICs attached, used and detached during floods both ways leave no resources",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: nic,
    },
    Scenario {
        name: "driver-reload",
        proves: "frontends that are unbound and bound, unloaded and loaded, find their devices \
                 unchanged",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: reload,
    },
];

/// The load on the other devices.
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
    const SERVER: &str = "10.0.2.1";
    let undo = network()?;
    lab.shared()?.guest.ask("load-start", load(), SHORT)?;
    let before = lab.settled()?;
    for round in 0..2 {
        let guest = &mut lab.shared()?.guest;
        attach_nic(guest, "")?;
        let echo = json!({ "server": SERVER, "sizes": [8, 1472, 9000], "rounds": 5 });
        guest.ask("nic-echo", echo, SHORT)?;
        // The NIC is detached while its transmit ring is full, and while it receives.
        let (up, down) = (70 + round, 80 + round);
        guest.ask("datagrams-start", json!({ "port": 5606, "seed": down }), SHORT)?;
        let taker = Taker::start(5605, up, None)?;
        let flow =
            json!({ "server": SERVER, "port": 5605, "size": 1400, "seed": up, "lossy": true });
        guest.ask("flood-start", flow, SHORT)?;
        let server = "10.0.2.2".to_owned();
        let flood = Flow { server, port: 5606, size: 1400, seed: down, lossy: true };
        let flood = Flood::start(flood)?;
        std::thread::sleep(Duration::from_secs(1));
        detach_nic(guest)?;
        let sent = guest.ask("flood-end", Value::Null, SHORT)?.as_u64();
        let (sent, poured) = (sent.unwrap_or_default(), flood.end()?);
        let came = taker.end()?;
        let went: Taken =
            serde_json::from_value(guest.ask("datagrams-end", Value::Null, SHORT)?)?;
        lab.rows
            .push(json!({ "sent": sent, "came": came, "sent there": poured, "came there": went }));
        for taken in [&came, &went] {
            ensure!(
                taken.count > 20 && taken.late == 0,
                "datagrams before the NIC was detached: {taken:?}"
            );
        }
        lab.nothing_left(&before)?;
    }
    drop(undo);
    stopped(&mut lab.shared()?.guest)
}

/// Sets up a third network of dom0 on the bridge: 10.0.2.1.
pub fn network() -> Result<Undo> {
    let mut undo = Undo::default();
    let address = |verb| format!("address {verb} 10.0.2.1/24 dev xenbr0");
    undo.ip(&address("add"), &address("del"))?;
    Ok(undo)
}

/// Attaches a third NIC to the shared guest, 10.0.2.2 at `eth2`; `more` has further options for
/// `xl`.
pub fn attach_nic(guest: &mut Guest, more: &str) -> Result<()> {
    let domain = guest.domain.to_string();
    let mut attach = vec!["xl", "network-attach", &domain, "bridge=xenbr0", "script=vif-bridge"];
    attach.extend(more.split_whitespace());
    sys::succeed(&attach, SHORT)?;
    let up = json!({ "name": "eth2", "address": "10.0.2.2/24" });
    guest.ask("nic-up", up, SHORT)?;
    // Linux's frontend has a carrier before its backend is connected.
    let back = xs::read(&format!("/local/domain/{domain}/device/vif/2/backend"))?;
    let back = back.context("the NIC has no backend")?;
    xs::wait_for(&format!("{back}/state"), &["4"], SHORT).context("backend enters Connected")
}

/// Detaches it.
pub fn detach_nic(guest: &mut Guest) -> Result<()> {
    let domain = guest.domain.to_string();
    sys::succeed(&["xl", "network-detach", &domain, "2"], SHORT)?;
    guest.ask("nic-gone", json!("eth2"), SHORT).map(drop)
}

fn reload(lab: &mut Lab) -> Result<()> {
    lab.shared()?;
    let before = lab.settled()?;
    let shared = lab.shared()?;
    let pattern = |write: bool| json!({ "name": "xvdb", "seed": 31, "mib": 4, "write": write });
    shared.guest.ask("disk-verify", pattern(true), LONG)?;
    for _ in 0..2 {
        let nic = json!({ "driver": "vif", "device": "vif-1" });
        shared.guest.ask("driver-unbind", nic.clone(), SHORT)?;
        shared.guest.ask("driver-bind", nic, SHORT)?;
        connected(&shared.guest, "vif/1")?;
        let disk = json!({ "driver": "vbd", "device": "vbd-51728" });
        shared.guest.ask("driver-unbind", disk, SHORT)?;
        attach_again(shared, 1)?;
        back(&mut shared.guest, &pattern(false))?;
    }
    // A module with bound devices cannot be unloaded.
    for (driver, device) in [("vif", "vif-0"), ("vif", "vif-1")] {
        let order = json!({ "driver": driver, "device": device });
        shared.guest.ask("driver-unbind", order, SHORT)?;
    }
    shared.guest.ask("module-unload", json!("xen_netfront"), SHORT)?;
    shared.guest.ask("module", json!("xen_netfront"), SHORT)?;
    for node in ["vif/0", "vif/1"] {
        connected(&shared.guest, node)?;
    }
    for (_, number) in DISKS_OF_SHARED {
        let order = json!({ "driver": "vbd", "device": format!("vbd-{number}") });
        shared.guest.ask("driver-unbind", order, SHORT)?;
    }
    shared.guest.ask("module-unload", json!("xen_blkfront"), SHORT)?;
    (0..3).try_for_each(|disk| attach_again(shared, disk))?;
    shared.guest.ask("module", json!("xen_blkfront"), SHORT)?;
    for (node, _) in DISKS_OF_SHARED {
        connected(&shared.guest, node)?;
    }
    back(&mut shared.guest, &pattern(false))?;
    shared.bring_up_nics()?;
    lab.nothing_left(&before)
}

/// Frontend nodes of the shared guest's disks, and their numbers.
const DISKS_OF_SHARED: [(&str, &str); 3] =
    [("vbd/51712", "51712"), ("vbd/51728", "51728"), ("vbd/51744", "51744")];

/// Detaches a disk after both sides have closed, and attaches it again. Linux's blkfront, unlike
/// its netfront, does not reconnect after it has closed.
fn attach_again(shared: &Shared, disk: usize) -> Result<()> {
    let (node, number) = DISKS_OF_SHARED[disk];
    let front = format!("/local/domain/{}/device/{node}", shared.guest.domain);
    let back = xs::must_read(&format!("{front}/backend"))?;
    xs::wait_for(&format!("{front}/state"), &["6"], SHORT).context("frontend enters Closed")?;
    xs::wait_for(&format!("{back}/state"), &["6", "2"], SHORT)
        .context("backend enters Closed or InitWait")?;
    let domain = shared.guest.domain.to_string();
    sys::succeed(&["xl", "block-detach", &domain, number], SHORT)?;
    sys::succeed(&["xl", "block-attach", &domain, &shared.lines[disk]], SHORT).map(drop)
}

fn connected(guest: &Guest, node: &str) -> Result<()> {
    let state = format!("/local/domain/{}/device/{node}/state", guest.domain);
    xs::wait_for(&state, &["4"], SHORT).context("frontend enters Connected again")
}

/// Checks that disk and NIC work, and that the disk's contents are unchanged.
fn back(guest: &mut Guest, pattern: &Value) -> Result<()> {
    guest.ask("disk-wait", json!("xvdb"), SHORT)?;
    guest.ask("disk-verify", pattern.clone(), LONG)?;
    let address = format!("{}/24", crate::dom0::lab::address(guest, 1));
    guest.ask("nic-up", json!({ "name": "eth1", "address": address }), SHORT)?;
    let echo = json!({ "server": "10.0.1.1", "sizes": [64, 1472, 9000], "rounds": 3 });
    guest.ask("nic-echo", echo, SHORT).map(drop)
}
