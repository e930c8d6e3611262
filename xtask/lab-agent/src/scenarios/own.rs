//! pvio's frontends in a guest's user space, with every backend.

use anyhow::{Result, ensure};
use serde_json::json;

use super::frontends::bare;
use super::{DISKS, Guests, NICS, PV, Scenario};
use crate::dom0::backend::Backend;
use crate::dom0::disk::{Access, Disk, Medium};
use crate::dom0::guest::Guest;
use crate::dom0::lab::{LONG, Lab};
use crate::dom0::xs;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "own-blkfront",
        proves: "pvio's blkfront writes; another one that replaces it after it was killed reads \
                 all data",
        backends: DISKS,
        kinds: PV,
        guests: Guests::Own,
        run: disk,
    },
    Scenario {
        name: "own-netfront",
        proves: "pvio's netfront sends and receives, also after it was killed and restarted",
        backends: NICS,
        kinds: PV,
        guests: Guests::Own,
        run: nic,
    },
    Scenario {
        name: "own-netfront-qnic",
        proves: "pvio's netfront connects to QEMU's NIC backend, which accepts its packets",
        backends: &[Backend::Qdisk],
        kinds: PV,
        guests: Guests::Own,
        run: qnic,
    },
];

const NUMBER: u32 = 51_712;

fn disk(lab: &mut Lab) -> Result<()> {
    const MIB: u64 = 4;
    let disk = Disk::new(16, lab.backend, Medium::Device)?;
    let mut guest = bare(lab, vec![disk.line("xvda", Access::Write, lab.backend)?], 0)?;
    let order = json!({ "number": NUMBER, "seed": 21, "mib": MIB });
    let sum = guest.ask("own-disk", order, LONG)?;
    ensure!(sum == disk.sum(MIB)?, "image checksum differs from the guest's");
    guest.power_off()
}

fn nic(lab: &mut Lab) -> Result<()> {
    let mut guest = bare(lab, Vec::new(), 1)?;
    let own = [10, 0, 0, own_number(&guest)];
    let order = json!({ "number": 0, "address": own, "peer": [10, 0, 0, 1] });
    guest.ask("own-nic", order, LONG)?;
    guest.power_off()
}

/// `xl` has no option for such a NIC. The QEMU process that serves the guest's disk also serves the
/// NIC once its nodes exist. The NIC is not connected to a network.
fn qnic(lab: &mut Lab) -> Result<()> {
    let disk = Disk::new(4, lab.backend, Medium::Device)?;
    let mut guest = bare(lab, vec![disk.line("xvda", Access::Write, lab.backend)?], 0)?;
    let domain = guest.domain;
    let front = format!("/local/domain/{domain}/device/vif/0");
    let back = format!("/local/domain/0/backend/qnic/{domain}/0");
    let (frontend_id, mac) = (domain.to_string(), "00:16:3e:0a:0b:0c");
    let of_guest = [("backend", back.as_str()), ("backend-id", "0"), ("mac", mac), ("state", "1")];
    make_end(&front, &of_guest, &[format!("n{domain}"), "r0".to_owned()])?;
    let of_dom0 = [
        ("frontend", front.as_str()),
        ("frontend-id", &frontend_id),
        ("online", "1"),
        ("handle", "0"),
        ("mac", mac),
        ("state", "1"),
    ];
    make_end(&back, &of_dom0, &["n0".to_owned(), format!("r{domain}")])?;
    let order = json!({ "number": 0, "address": [10, 0, 0, own_number(&guest)], "peer": null });
    let sent = guest.ask("own-nic", order, LONG);
    for base in [&front, &back] {
        xs::remove(base)?;
    }
    sent?;
    guest.power_off()
}

/// Creates the nodes of a frontend or backend without the toolstack.
fn make_end(base: &str, keys: &[(&str, &str)], who: &[String]) -> Result<()> {
    xs::write(base, "")?;
    xs::allow(base, who)?;
    for (key, value) in keys {
        let path = format!("{base}/{key}");
        xs::write(&path, value)?;
        xs::allow(&path, who)?;
    }
    Ok(())
}

/// Returns the last byte of a guest's address.
fn own_number(guest: &Guest) -> u32 {
    10 + guest.domain % 200
}
