//! How pvio accesses guest pages.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::nic::transfer;
use super::{BOTH, Guests, PVIO, Scenario};
use crate::dom0::backend::Words;
use crate::dom0::disk::Medium;
use crate::dom0::guest::{Guest, Spec};
use crate::dom0::lab::{LONG, Lab, NIC, SHORT, address};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "disk-policies",
        proves: "disk data is correct with every data path policy: map, copy, persistent grants",
        backends: PVIO,
        kinds: BOTH,
        guests: Guests::Own,
        run: disks,
    },
    Scenario {
        name: "nic-policies",
        proves: "packet data is correct with every data path policy: map, copy",
        backends: PVIO,
        kinds: BOTH,
        guests: Guests::Own,
        run: nics,
    },
];

/// Configurations for disks: name in the measurements, and arguments of `pvio serve`.
pub const DISKS: &[(&str, Words)] = &[
    ("map", &["--disk-policy", "map"]),
    ("copy", &["--disk-policy", "copy"]),
    ("persistent-or-map", &["--disk-policy", "persistent-or-map"]),
    ("persistent-or-copy", &["--disk-policy", "persistent-or-copy"]),
    ("copy, as-done", &["--disk-policy", "copy", "--disk-answers", "as-done"]),
];

/// Configurations for NICs, likewise.
pub const NICS: &[(&str, Words)] =
    &[("copy", &["--nic-policy", "copy"]), ("map", &["--nic-policy", "map"])];

fn disks(lab: &mut Lab) -> Result<()> {
    for (name, words) in DISKS {
        lab.serve(words)?;
        disk(lab).with_context(|| format!("disks with policy {name}"))?;
    }
    Ok(())
}

fn nics(lab: &mut Lab) -> Result<()> {
    for (name, words) in NICS {
        lab.serve(words)?;
        nic(lab).with_context(|| format!("NICs with policy {name}"))?;
    }
    Ok(())
}

fn nic(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let mut spec = Spec::new(lab.kind, lab.backend);
    spec.nics = vec![NIC.to_owned()];
    let mut guest = Guest::start(&spec)?;
    let address = format!("{}/24", address(&guest, 0));
    guest.ask("nic-up", json!({ "name": "eth0", "address": address }), SHORT)?;
    let sizes = [8, 64, 1000, 1472, 1473, 4096, 16_384, 65_507];
    guest.ask("nic-echo", json!({ "server": "10.0.0.1", "sizes": sizes, "rounds": 5 }), LONG)?;
    transfer(&mut guest, 4 << 20)?;
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)
}

fn disk(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let (device, first) = lab.disk("xvda", 16, Medium::Device)?;
    let (file, second) = lab.disk("xvdb", 16, Medium::File)?;
    let mut spec = Spec::new(lab.kind, lab.backend);
    spec.disks = vec![first, second];
    let mut guest = Guest::start(&spec)?;
    for (name, disk) in [("xvda", &device), ("xvdb", &file)] {
        guest.ask("disk-wait", json!(name), SHORT)?;
        let order = json!({ "name": name, "seed": 51, "requests": 120, "mib": 8 });
        let sum = guest.ask("disk-scribble", order, LONG)?;
        ensure!(sum == disk.sum(8)?, "{name}: image checksum differs from the guest's");
    }
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)
}
