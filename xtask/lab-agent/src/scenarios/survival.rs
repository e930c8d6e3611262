//! Backends that die under load, and the effect on their guests.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::life::{ready, went_on};
use super::{BOTH, Guests, NICS, PV, PVIO, Scenario};
use crate::dom0::backend::Backend;
use crate::dom0::disk::{Access, Disk, Medium};
use crate::dom0::guest::{Guest, Kind, Programs, Spec};
use crate::dom0::lab::{LONG, Lab, SHORT};
use crate::sys;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "survival-daemon",
        proves: "after pvio serve is killed under load, three times, its guest continues to use \
                 disk and NIC",
        backends: PVIO,
        kinds: BOTH,
        guests: Guests::Own,
        run: daemon,
    },
    Scenario {
        name: "survival-second",
        proves: "a second pvio serve is rejected naming the first one's process; guests of the \
                 first continue",
        backends: PVIO,
        kinds: PV,
        guests: Guests::Own,
        run: second,
    },
    Scenario {
        name: "attach-taken",
        proves: "xl block-attach of an image in use by another guest is rejected, and succeeds \
                 after that guest detached it",
        backends: PVIO,
        kinds: PV,
        guests: Guests::Own,
        run: taken,
    },
    Scenario {
        name: "attach-refused",
        proves: "a disk rejected by xl's hotplug script can be attached after xl block-detach, \
                 once its image exists",
        backends: NICS,
        kinds: PV,
        guests: Guests::Own,
        run: refused,
    },
    Scenario {
        name: "survival-domain",
        proves: "after a driver domain is destroyed under load and restored, the next guest finds \
                 its disk",
        backends: PVIO,
        kinds: BOTH,
        guests: Guests::Own,
        run: domain,
    },
];

fn second(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let (mut guest, disk) = ready(lab, lab.kind)?;
    let load = json!({ "disks": ["xvda"], "echoes": ["10.0.0.1"] });
    guest.ask("load-start", load, SHORT)?;
    let first = lab.backends().pvio().context("pvio serve does not run")?;
    for _ in 0..2 {
        let ran = sys::run(&["/usr/bin/pvio", "serve"], SHORT)?;
        ensure!(!ran.status.success(), "a second daemon was started: {}", ran.output);
        ensure!(ran.output.contains(&first.to_string()), "{}", ran.output);
    }
    went_on(&mut guest)?;
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)?;
    drop(disk);
    Ok(())
}

/// A disk that another guest uses is rejected while `xl` waits, with the reason in its output.
fn taken(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let disk = Disk::new(16, lab.backend, Medium::File)?;
    let line = disk.line("xvdf", Access::Write, lab.backend)?;
    let (mut guest, own) = ready(lab, lab.kind)?;
    let (mut other, others) = ready(lab, lab.kind)?;
    sys::succeed(&["xl", "block-attach", &guest.name, &line], SHORT)?;
    guest.ask("disk-wait", json!("xvdf"), SHORT)?;
    let refused = sys::run(&["xl", "block-attach", &other.name, &line], LONG)?;
    ensure!(!refused.status.success(), "xl attached an image in use: {}", refused.output);
    guest.ask(
        "disk-scribble",
        json!({ "name": "xvdf", "seed": 67, "requests": 30, "mib": 4 }),
        LONG,
    )?;
    sys::succeed(&["xl", "block-detach", &guest.name, "xvdf"], SHORT)?;
    guest.ask("disk-gone", json!("xvdf"), SHORT)?;
    attach_again(&mut other, &line, &disk)?;
    for guest in [guest, other] {
        lab.watched(guest, |guest| guest.power_off())?;
    }
    drop((own, others, disk));
    lab.nothing_left(&before)
}

/// The hotplug script rejects a disk whose image does not exist, with every backend.
fn refused(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let (disk, line) = lab.disk("xvdf", 16, Medium::Device)?;
    let (mut guest, own) = ready(lab, lab.kind)?;
    let missing = Disk::by_pvio("xvdf", "rw", "/tmp/missing.img");
    let refused = sys::run(&["xl", "block-attach", &guest.name, &missing], LONG)?;
    ensure!(!refused.status.success(), "xl attached a missing image: {}", refused.output);
    ensure!(
        refused.output.contains("No such file"),
        "xl reports another reason: {}",
        refused.output
    );
    attach_again(&mut guest, &line, &disk)?;
    lab.watched(guest, |guest| guest.power_off())?;
    drop((own, disk));
    lab.nothing_left(&before)
}

/// Attaches `xvdf` after its hotplug script rejected it. libxl keeps the nodes of such a device
/// until `xl block-detach`, with every backend.
fn attach_again(guest: &mut Guest, line: &str, disk: &Disk) -> Result<()> {
    let left = sys::run(&["xl", "block-attach", &guest.name, line], LONG)?;
    ensure!(
        left.output.contains("already exists"),
        "libxl has no nodes of the rejected device: {}",
        left.output
    );
    sys::succeed(&["xl", "block-detach", &guest.name, "xvdf"], SHORT)?;
    sys::succeed(&["xl", "block-attach", &guest.name, line], SHORT)?;
    guest.ask("disk-wait", json!("xvdf"), SHORT)?;
    guest.ask("disk-blank", json!({ "name": "xvdf", "mib": 4 }), LONG)?;
    let order = json!({ "name": "xvdf", "seed": 71, "requests": 30, "mib": 4 });
    let sum = guest.ask("disk-scribble", order, LONG)?;
    ensure!(sum == disk.sum(4)?, "image checksum differs from the guest's");
    Ok(())
}

fn daemon(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let (mut guest, disk) = ready(lab, lab.kind)?;
    for _ in 0..3 {
        let load = json!({ "disks": ["xvda"], "echoes": ["10.0.0.1"], "lossy": true });
        guest.ask("load-start", load, SHORT)?;
        lab.backends().kill_pvio()?;
        // The guest's requests accumulate in the rings.
        std::thread::sleep(Duration::from_secs(1));
        lab.serve(&[])?;
        went_on(&mut guest)?;
    }
    let echo = json!({ "server": "10.0.0.1", "sizes": [64, 1472], "rounds": 3 });
    guest.ask("nic-echo", echo, SHORT)?;
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)?;
    drop(disk);
    Ok(())
}

const SAVED: &str = "/tmp/driver.save";
/// The driver domain's address on its bridge.
const BRIDGE: &str = "10.0.9.1";

fn domain(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    // Its storage is a disk of dom0, so that the data survives the domain.
    let (storage, line) = lab.disk("xvda", 32, Medium::Device)?;
    let mut spec = Spec::new(Kind::Pv, lab.backend);
    (spec.programs, spec.disks) = (Programs::Pvio, vec![line]);
    spec.lines = vec!["driver_domain=1".into()];
    let mut driver = Guest::start(&spec)?;
    driver.ask("disk-wait", json!("xvda"), SHORT)?;
    driver.ask("backend-serve", json!(format!("{BRIDGE}/24")), SHORT)?;
    driver.ask("echo-serve", Value::Null, SHORT)?;
    sys::succeed(&["xl", "save", "-c", "-D", &driver.name, SAVED], LONG)?;
    driver.ask("hello", Value::Null, LONG)?;

    let mut guest = guest_of(&driver, lab.kind)?;
    let pattern = |write: bool| json!({ "name": "xvda", "seed": 43, "mib": 4, "write": write });
    guest.ask("disk-verify", pattern(true), LONG)?;
    let load = json!({ "disks": ["xvda"], "echoes": [BRIDGE], "lossy": true });
    guest.ask("load-start", load, SHORT)?;

    driver.destroy()?;
    std::thread::sleep(Duration::from_secs(2));
    // By default, libxl does not reuse a domain number for a minute.
    let restore = format!("LIBXL_DOMID_REUSE_TIMEOUT=0 xl restore {SAVED}");
    sys::succeed(&["sh", "-c", &restore], LONG)?;
    driver.reattach()?;
    let revived = sys::succeed(&["pvio", "revive", &driver.name], SHORT)?;
    ensure!(revived.contains("2 backends"), "pvio revive: {revived}");

    // The in-flight records were in the domain's memory, so no session can be resumed, and Linux's
    // frontends do not reconnect.
    lab.watched(guest, |guest| {
        guest.destroy()?;
        guest.wait_gone(SHORT)
    })?;
    let mut guest = guest_of(&driver, lab.kind)?;
    guest.ask("disk-verify", pattern(false), LONG)?;
    let echo = json!({ "server": BRIDGE, "sizes": [64, 1472], "rounds": 3 });
    guest.ask("nic-echo", echo, SHORT)?;
    lab.watched(guest, |guest| guest.power_off())?;
    lab.watched(driver, |driver| driver.power_off())?;
    std::fs::remove_file(SAVED)?;
    lab.nothing_left(&before)?;
    drop(storage);
    Ok(())
}

/// Starts a guest whose disk and NIC are served by a driver domain.
fn guest_of(driver: &Guest, kind: Kind) -> Result<Guest> {
    let mut spec = Spec::new(kind, Backend::Pvio);
    // The page cache of a destroyed domain is lost, so no data may be only there.
    let disk = Disk::elsewhere("/dev/xvda", "xvda", Access::Write);
    spec.disks = vec![format!("backend={},direct-io-safe,{disk}", driver.name)];
    spec.nics = vec![format!("backend={},bridge=xenbr0,script=vif-bridge", driver.name)];
    let mut guest = Guest::start(&spec)?;
    guest.ask("disk-wait", json!("xvda"), SHORT)?;
    guest.ask("nic-up", json!({ "name": "eth0", "address": "10.0.9.2/24" }), SHORT)?;
    Ok(guest)
}
