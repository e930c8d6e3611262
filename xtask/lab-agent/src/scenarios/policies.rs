//! How pvio reaches guests' pages.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{BOTH, Guests, PVIO, Scenario};
use crate::dom0::disk::Medium;
use crate::dom0::guest::{Guest, Spec};
use crate::dom0::lab::{LONG, Lab, SHORT};

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "disk-policies",
    proves: "pages mapped, copied, kept mapped: each way, every byte of a disk is right",
    backends: PVIO,
    kinds: BOTH,
    guests: Guests::Own,
    run: policies,
}];

/// What `pvio serve --disk-policy` knows.
pub const POLICIES: &[&str] = &["map", "copy", "persistent-or-map", "persistent-or-copy"];

fn policies(lab: &mut Lab) -> Result<()> {
    for policy in POLICIES {
        lab.serve(Some(policy))?;
        one(lab).with_context(|| format!("--disk-policy {policy}"))?;
    }
    Ok(())
}

fn one(lab: &mut Lab) -> Result<()> {
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
        ensure!(sum == disk.sum(8)?, "{name}: the image holds something else");
    }
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)
}
