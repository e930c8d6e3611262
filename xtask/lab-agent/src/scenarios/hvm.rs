//! A guest with a device model, whose kernel nevertheless uses PV devices.

use anyhow::{Result, ensure};
use serde_json::json;

use super::{Guests, NICS, Scenario};
use crate::dom0::disk::Medium;
use crate::dom0::guest::{Guest, Kind, Spec};
use crate::dom0::lab::{LONG, Lab, SHORT, address};

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "hvm-guest",
    proves: "the PV drivers of an HVM guest transfer disk and network data correctly",
    backends: NICS,
    kinds: &[Kind::Hvm],
    guests: Guests::Own,
    run: hvm,
}];

fn hvm(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    // The device model would also emulate the first four disks.
    let (disk, line) = lab.disk("xvde", 16, Medium::Device)?;
    let mut spec = Spec::new(lab.kind, lab.backend);
    spec.disks = vec![line];
    spec.nics = vec!["bridge=xenbr0,script=vif-bridge,type=vif".to_owned()];
    let mut guest = Guest::start(&spec)?;
    guest.ask("disk-wait", json!("xvde"), SHORT)?;
    let order = json!({ "name": "xvde", "seed": 71, "requests": 100, "mib": 8 });
    let sum = guest.ask("disk-scribble", order, LONG)?;
    ensure!(sum == disk.sum(8)?, "image checksum differs from the guest's");
    let address = format!("{}/24", address(&guest, 0));
    guest.ask("nic-up", json!({ "name": "eth0", "address": address }), SHORT)?;
    let echo = json!({ "server": "10.0.0.1", "sizes": [8, 64, 1472, 9000], "rounds": 3 });
    guest.ask("nic-echo", echo, SHORT)?;
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)
}
