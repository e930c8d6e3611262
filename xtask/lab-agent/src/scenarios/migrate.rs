//! Guests that are migrated under load: for a moment, two domains of the same VM have the same
//! disk.

use anyhow::{Result, ensure};
use serde_json::json;

use super::life::{ready, went_on};
use super::{BOTH, Guests, NICS, Scenario};
use crate::dom0::disk::Disk;
use crate::dom0::guest::{Guest, Kind};
use crate::dom0::lab::{LONG, Lab, SHORT};
use crate::dom0::ledger::Ledger;
use crate::dom0::xs;
use crate::sys;

const PVH: &[Kind] = &[Kind::Pvh];

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "migrate-disk",
        proves: "a guest saved under load and restored while its first domain exists continues to \
                 use disk and NIC",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Own,
        run: hand_over,
    },
    Scenario {
        name: "migrate-live",
        proves: "a guest under load that xl migrates to the same host continues to use disk and \
                 NIC",
        backends: NICS,
        kinds: PVH,
        guests: Guests::Own,
        run: live,
    },
];

/// The first domain stays, paused, until the second one is running.
fn hand_over(lab: &mut Lab) -> Result<()> {
    const SAVED: &str = "/tmp/migrated.save";
    let before = lab.settled()?;
    let (mut guest, disk) = loaded(lab)?;
    sys::succeed(&["xl", "save", "-p", &guest.name, SAVED], LONG)?;
    let mut restored = guest.restore_beside(SAVED)?;
    std::fs::remove_file(SAVED)?;
    guest.destroy()?;
    guest.wait_gone(SHORT)?;
    restored.ask("hello", json!(null), SHORT)?;
    goes_on(lab, &before, restored, &disk)
}

/// Runs `xl migrate` with a receiver on this host instead of a connection to another one.
fn live(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let (mut guest, disk) = loaded(lab)?;
    let first = guest.domain;
    sys::succeed(&["xl", "migrate", "-s", "", &guest.name, "exec xl migrate-receive"], LONG)?;
    guest.reattach()?;
    ensure!(guest.domain != first, "the guest has the same domain after the migration");
    let left = xs::read(&format!("/local/domain/{first}/name"))?;
    ensure!(left.is_none(), "the first domain still exists: {left:?}");
    goes_on(lab, &before, guest, &disk)
}

fn pattern(write: bool) -> serde_json::Value {
    json!({ "name": "xvda", "seed": 59, "mib": 4, "write": write })
}

/// Starts a guest with load on its disk and its NIC; returns it with the disk.
fn loaded(lab: &Lab) -> Result<(Guest, Disk)> {
    let (mut guest, disk) = ready(lab, lab.kind)?;
    guest.ask("disk-verify", pattern(true), LONG)?;
    let load = json!({ "disks": ["xvda"], "echoes": ["10.0.0.1"], "lossy": true });
    guest.ask("load-start", load, SHORT)?;
    Ok((guest, disk))
}

/// Checks requests from before and after the migration, and that no resource of either domain is
/// left.
fn goes_on(lab: &mut Lab, before: &Ledger, mut guest: Guest, disk: &Disk) -> Result<()> {
    went_on(&mut guest)?;
    guest.ask("disk-verify", pattern(false), LONG)?;
    guest.ask("disk-blank", json!({ "name": "xvda", "mib": 8 }), LONG)?;
    let order = json!({ "name": "xvda", "seed": 61, "requests": 100, "mib": 8 });
    let sum = guest.ask("disk-scribble", order, LONG)?;
    ensure!(sum == disk.sum(8)?, "image checksum differs from the guest's");
    let echo = json!({ "server": "10.0.0.1", "sizes": [64, 1472], "rounds": 3 });
    guest.ask("nic-echo", echo, SHORT)?;
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(before)
}
