//! A toolstack that writes invalid nodes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Guests, PV, PVIO, Scenario};
use crate::dom0::disk::{Disk, Medium};
use crate::dom0::guest::{Guest, Spec};
use crate::dom0::lab::{Lab, SHORT, wait_until};
use crate::dom0::xs;

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "hostile-toolstack",
    proves: "backend directories with invalid keys are rejected with a reason",
    backends: PVIO,
    kinds: PV,
    guests: Guests::Shared,
    run: toolstack,
}];

type Keys = &'static [(&'static str, &'static str)];

/// Changes to the keys of a valid `backend/vbd/D/N`; `-` removes a key.
const DISKS: &[(&str, Keys)] = &[
    ("frontend missing", &[("frontend", "-")]),
    ("frontend does not exist", &[("frontend", "/local/domain/4711/device/vbd/1")]),
    ("frontend-id missing", &[("frontend-id", "-")]),
    ("frontend-id is text", &[("frontend-id", "banana")]),
    ("frontend-id beyond 16 bits", &[("frontend-id", "70000")]),
    ("params missing", &[("params", "-")]),
    ("image does not exist", &[("params", "/no/such/image")]),
    ("params is a directory", &[("params", "/tmp")]),
    ("undefined mode", &[("mode", "z")]),
];
/// Only the backend writes its own state, so it may start from the beginning without reporting an
/// error.
const STATE: (&str, Keys) = ("undefined state", &[("state", "banana")]);

fn toolstack(lab: &mut Lab) -> Result<()> {
    lab.shared()?;
    let before = lab.settled()?;
    let mut spec = Spec::new(lab.kind, lab.backend);
    spec.words = "pvio.bare".to_owned();
    let guest = Guest::start(&spec)?;
    let disk_image = Disk::new(1, lab.backend, Medium::File)?;
    let image = disk_image.image.display().to_string();
    for (i, (name, keys)) in DISKS.iter().chain([&STATE]).enumerate() {
        let number = 60_000 + i;
        let seen = disk(&guest, &image, number, keys, *name != STATE.0);
        for dir in [front(&guest, number), back(&guest, number)] {
            xs::remove(&dir)?;
            xs::remove_empty(&dir)?;
        }
        seen.with_context(|| format!("disk, {name}"))?;
    }
    // Directory names that are not a domain or a device number.
    for odd in ["vbd/banana/1", "vbd/0/banana", "vbd/99999999999/1", "vif/1/-1"] {
        let dir = format!("/local/domain/0/backend/{odd}");
        xs::write(&format!("{dir}/state"), "1")?;
        std::thread::sleep(Duration::from_millis(500));
        xs::remove(&dir)?;
        xs::remove_empty(&dir)?;
    }
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)?;
    lab.shared()?.guest.ask("hello", Value::Null, SHORT).map(drop)
}

fn front(guest: &Guest, number: usize) -> String {
    format!("/local/domain/{}/device/vbd/{number}", guest.domain)
}

fn back(guest: &Guest, number: usize) -> String {
    format!("/local/domain/0/backend/vbd/{}/{number}", guest.domain)
}

/// Writes a disk's nodes and checks the result: with `reason`, an `error` node must be written.
fn disk(guest: &Guest, image: &str, number: usize, keys: Keys, reason: bool) -> Result<()> {
    let domain = guest.domain;
    let (front, back) = (front(guest, number), back(guest, number));
    let id = domain.to_string();
    let mut all = vec![
        ("frontend", front.as_str()),
        ("frontend-id", &id),
        ("params", image),
        ("mode", "r"),
        ("type", "phy"),
        ("dev", "xvdz"),
        ("device-type", "disk"),
        ("script", "/etc/xen/scripts/block-pvio"),
        ("hotplug-status", "connected"),
        ("online", "1"),
        ("state", "1"),
    ];
    for (key, value) in keys {
        all.retain(|(it, _)| it != key);
        if *value != "-" {
            // The state is written last, as by any toolstack.
            all.insert(0, (key, value));
        }
    }
    xs::write(&format!("{front}/backend"), &back)?;
    xs::write(&format!("{front}/backend-id"), "0")?;
    xs::write(&format!("{front}/state"), "1")?;
    for (key, value) in all {
        xs::write(&format!("{back}/{key}"), value)?;
    }
    let error = format!("/local/domain/0/error/backend/vbd/{domain}/{number}/error");
    let mut seen = (None, None);
    wait_until(Duration::from_secs(if reason { 5 } else { 1 }), || {
        seen = (xs::read(&format!("{back}/state"))?, xs::read(&error)?);
        Ok(reason && seen.1.is_some())
    })?;
    println!("PVIO-LAB disk {number}: state {:?}, error {:?}", seen.0, seen.1);
    ensure!(!reason || seen.1.is_some(), "no error node; backend state is {:?}", seen.0);
    ensure!(seen.0.as_deref() != Some("4"), "the device is served");
    Ok(())
}
