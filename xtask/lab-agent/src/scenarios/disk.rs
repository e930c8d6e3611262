//! Disks: every byte, file systems, flushes, read-only.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{BOTH, DISKS, Guests, Scenario};
use crate::dom0::guest::Guest;
use crate::dom0::lab::{DISK_MIB, FIXED_SEED, LONG, Lab, SHORT};
use crate::pattern::Sum;

pub const SCENARIOS: &[&Scenario] = &[&Scenario {
    name: "disk-verify",
    proves: "random writes and reads of 512 B to 1 MiB come back right, and are in the image",
    backends: DISKS,
    kinds: BOTH,
    guests: Guests::Shared,
    bench: false,
    run: verify,
}];

fn verify(lab: &mut Lab) -> Result<()> {
    const MIB: u64 = 16;
    let shared = lab.shared()?;
    for (name, disk) in [("xvda", &shared.disk), ("xvdb", &shared.file)] {
        let size = shared.guest.ask("disk-wait", json!(name), SHORT)?;
        ensure!(size["sectors"] == DISK_MIB << 11, "{name} has {} sectors", size["sectors"]);
        let order = json!({ "name": name, "seed": 11, "requests": 300, "mib": MIB });
        let sum = shared.guest.ask("disk-scribble", order, LONG)?;
        ensure!(sum == sum_of(&disk.image, MIB)?, "{name}: the image holds something else");
    }
    Ok(())
}

/// The sum of an image's first MiBs.
fn sum_of(image: &Path, mib: u64) -> Result<Value> {
    let file = fs::File::open(image)?;
    let mut bytes = vec![0; 1 << 20];
    let mut sum = Sum::NEW;
    for i in 0..mib {
        file.read_exact_at(&mut bytes, i << 20).context("the image")?;
        sum.add(&bytes);
    }
    Ok(json!(sum.text()))
}
