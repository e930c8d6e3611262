//! Guests that end in various ways while their devices are in use; several guests in parallel.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{BOTH, Guests, NICS, PV, PVIO, Scenario};
use crate::dom0::disk::{Disk, Medium};
use crate::dom0::guest::{Guest, Kind, Spec};
use crate::dom0::lab::{LONG, Lab, NIC, SHORT, address, wait_until};
use crate::sys;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "life-power-off",
        proves: "a guest that powers off leaves no node, grant, port, interface or thread",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Own,
        run: power_off,
    },
    Scenario {
        name: "life-crash",
        proves: "a guest that crashes during I/O leaves no node, grant, port, interface or thread",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Own,
        run: crash,
    },
    Scenario {
        name: "life-destroy",
        proves: "a guest that is destroyed during I/O leaves no node, grant, port, interface or \
                 thread",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Own,
        run: destroy,
    },
    Scenario {
        name: "life-reboot",
        proves: "a guest that reboots, on its own or by xl, finds its disk unchanged",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Own,
        run: reboot,
    },
    Scenario {
        name: "life-reboots",
        proves: "a guest that reboots five times in a row finds its disk unchanged each time",
        backends: PVIO,
        kinds: PV,
        guests: Guests::Own,
        run: reboots,
    },
    Scenario {
        name: "life-pause",
        proves: "a guest that is paused and unpaused under load, several times, continues without \
                 data loss",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Own,
        run: pause,
    },
    Scenario {
        name: "life-vcpus",
        proves: "a guest with several queues continues while its vCPUs are removed and added",
        backends: NICS,
        kinds: PV,
        guests: Guests::Own,
        run: vcpus,
    },
    Scenario {
        name: "life-many",
        proves: "16 disks and 8 NICs of one guest all work and leave no resources",
        backends: NICS,
        kinds: PV,
        guests: Guests::Own,
        run: many,
    },
    Scenario {
        name: "life-save",
        proves: "a guest that is saved during I/O and restored continues without data loss",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Own,
        run: save,
    },
    Scenario {
        name: "life-five",
        proves: "five concurrent guests, one of the other type, transfer disk and network data \
                 correctly",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Own,
        run: five,
    },
];

/// Starts a guest with a disk and a NIC.
pub(super) fn ready(lab: &Lab, kind: Kind) -> Result<(Guest, Disk)> {
    let (disk, line) = lab.disk("xvda", 16, Medium::Device)?;
    let mut spec = Spec::new(kind, lab.backend);
    spec.disks = vec![line];
    spec.nics = vec![NIC.to_owned()];
    let mut guest = Guest::start(&spec)?;
    let address = format!("{}/24", address(&guest, 0));
    guest.ask("disk-wait", json!("xvda"), SHORT)?;
    guest.ask("nic-up", json!({ "name": "eth0", "address": address }), SHORT)?;
    Ok((guest, disk))
}

/// The load until a guest ends.
fn load() -> Value {
    json!({ "disks": ["xvda"], "echoes": ["10.0.0.1"] })
}

/// Checks that the load has continued after an interruption, without an error.
pub(super) fn went_on(guest: &mut Guest) -> Result<()> {
    std::thread::sleep(Duration::from_secs(1));
    let rounds: Vec<u64> = serde_json::from_value(guest.ask("load-stop", Value::Null, LONG)?)?;
    ensure!(
        rounds.iter().all(|rounds| *rounds > 0),
        "load did not continue: rounds of disk and NIC: {rounds:?}"
    );
    Ok(())
}

fn power_off(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let (mut guest, disk) = ready(lab, lab.kind)?;
    guest.ask("load-start", load(), SHORT)?;
    guest.ask("load-stop", Value::Null, SHORT)?;
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)?;
    drop(disk);
    Ok(())
}

fn crash(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let (mut guest, disk) = ready(lab, lab.kind)?;
    guest.ask("load-start", load(), SHORT)?;
    lab.watched(guest, |guest| {
        guest.tell("crash")?;
        guest.wait_gone(SHORT)
    })?;
    lab.nothing_left(&before)?;
    drop(disk);
    Ok(())
}

fn destroy(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let (mut guest, disk) = ready(lab, lab.kind)?;
    guest.ask("load-start", load(), SHORT)?;
    lab.watched(guest, |guest| {
        guest.destroy()?;
        guest.wait_gone(SHORT)
    })?;
    lab.nothing_left(&before)?;
    drop(disk);
    Ok(())
}

fn reboot(lab: &mut Lab) -> Result<()> {
    reboot_each(lab, &[true, false])
}

fn reboots(lab: &mut Lab) -> Result<()> {
    reboot_each(lab, &[false; 5])
}

/// Reboots a guest once per entry: on its own if true, else by `xl`.
fn reboot_each(lab: &mut Lab, by_itself: &[bool]) -> Result<()> {
    let before = lab.settled()?;
    let (mut guest, disk) = ready(lab, lab.kind)?;
    let pattern = |write: bool| json!({ "name": "xvda", "seed": 41, "mib": 4, "write": write });
    guest.ask("disk-verify", pattern(true), LONG)?;
    for by_itself in by_itself {
        if *by_itself {
            guest.tell("reboot")?;
        } else {
            sys::succeed(&["xl", "reboot", &guest.name], SHORT)?;
        }
        guest.reopen()?;
        guest.ask("disk-wait", json!("xvda"), SHORT)?;
        guest.ask("disk-verify", pattern(false), LONG)?;
        let address = format!("{}/24", address(&guest, 0));
        guest.ask("nic-up", json!({ "name": "eth0", "address": address }), SHORT)?;
        let echo = json!({ "server": "10.0.0.1", "sizes": [64, 1472], "rounds": 3 });
        guest.ask("nic-echo", echo, SHORT)?;
    }
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)?;
    drop(disk);
    Ok(())
}

fn pause(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let (mut guest, disk) = ready(lab, lab.kind)?;
    let load = json!({ "disks": ["xvda"], "echoes": ["10.0.0.1"], "lossy": true });
    guest.ask("load-start", load, SHORT)?;
    for _ in 0..3 {
        sys::succeed(&["xl", "pause", &guest.name], SHORT)?;
        // Responses arrive while the guest is paused.
        std::thread::sleep(Duration::from_secs(1));
        sys::succeed(&["xl", "unpause", &guest.name], SHORT)?;
        std::thread::sleep(Duration::from_secs(1));
    }
    went_on(&mut guest)?;
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)?;
    drop(disk);
    Ok(())
}

fn vcpus(lab: &mut Lab) -> Result<()> {
    const PROCESSORS: u32 = 2;
    let before = lab.settled()?;
    let (disk, line) = lab.disk("xvda", 16, Medium::Device)?;
    let mut spec = Spec::new(lab.kind, lab.backend);
    (spec.disks, spec.nics) = (vec![line], vec![NIC.to_owned()]);
    spec.processors = PROCESSORS;
    let mut guest = Guest::start(&spec)?;
    guest.ask("disk-wait", json!("xvda"), SHORT)?;
    let address = format!("{}/24", address(&guest, 0));
    guest.ask("nic-up", json!({ "name": "eth0", "address": address }), SHORT)?;
    let load = json!({ "disks": ["xvda"], "echoes": ["10.0.0.1"], "lossy": true });
    guest.ask("load-start", load, SHORT)?;
    for (processors, expected) in [(1, "0"), (PROCESSORS, "0-1"), (1, "0"), (PROCESSORS, "0-1")] {
        sys::succeed(
            &["xl", "vcpu-set", "--ignore-host", &guest.name, &processors.to_string()],
            SHORT,
        )?;
        let followed = wait_until(SHORT, || {
            Ok(guest.ask("processors", json!(processors), SHORT)? == expected)
        })?;
        ensure!(followed, "the guest does not change to {processors} vCPUs");
    }
    went_on(&mut guest)?;
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)?;
    drop(disk);
    Ok(())
}

fn many(lab: &mut Lab) -> Result<()> {
    const NICS: usize = 8;
    const DISKS: u8 = 16;
    let before = lab.settled()?;
    let names: Vec<String> =
        (b'a'..b'a' + DISKS).map(|c| format!("xvd{}", char::from(c))).collect();
    let disks = names.iter().map(|name| lab.disk(name, 4, Medium::Device));
    let (disks, lines): (Vec<_>, Vec<_>) = disks.collect::<Result<Vec<_>>>()?.into_iter().unzip();
    let mut spec = Spec::new(lab.kind, lab.backend);
    (spec.disks, spec.nics) = (lines, vec![NIC.to_owned(); NICS]);
    spec.memory = Some(512);
    let mut guest = Guest::start(&spec)?;
    for (seed, name) in names.iter().enumerate() {
        guest.ask("disk-wait", json!(name), SHORT)?;
        let order = json!({ "name": name, "seed": 101 + seed, "mib": 2, "write": true });
        guest.ask("disk-verify", order, LONG)?;
    }
    for (seed, name) in names.iter().enumerate() {
        let order = json!({ "name": name, "seed": 101 + seed, "mib": 2, "write": false });
        guest.ask("disk-verify", order, LONG)?;
    }
    for n in 0..NICS {
        // One at a time, since they are all in the same network.
        let (name, address) = (format!("eth{n}"), format!("{}/24", address(&guest, 0)));
        guest.ask("nic-up", json!({ "name": name, "address": address }), SHORT)?;
        let echo = json!({ "server": "10.0.0.1", "sizes": [64, 1472], "rounds": 2 });
        guest.ask("nic-echo", echo, SHORT)?;
        guest.program(&format!("ip address flush dev {name}"))?;
        guest.program(&format!("ip link set {name} down"))?;
    }
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)?;
    drop(disks);
    Ok(())
}

const SAVED: &str = "/tmp/guest.save";

fn save(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let (mut guest, disk) = ready(lab, lab.kind)?;
    let pattern = |write: bool| json!({ "name": "xvda", "seed": 47, "mib": 4, "write": write });
    guest.ask("disk-verify", pattern(true), LONG)?;
    let load = json!({ "disks": ["xvda"], "echoes": ["10.0.0.1"], "lossy": true });
    guest.ask("load-start", load, SHORT)?;
    // The frontends are not closed before the guest suspends: they submit outstanding requests
    // again after the restore.
    sys::succeed(&["xl", "save", &guest.name, SAVED], LONG)?;
    // The domain and all of its resources are gone.
    lab.nothing_left(&before)?;
    sys::succeed(&["xl", "restore", SAVED], LONG)?;
    guest.reattach()?;
    went_on(&mut guest)?;
    guest.ask("disk-verify", pattern(false), LONG)?;
    let echo = json!({ "server": "10.0.0.1", "sizes": [64, 1472], "rounds": 3 });
    guest.ask("nic-echo", echo, SHORT)?;
    std::fs::remove_file(SAVED)?;
    lab.watched(guest, |guest| guest.power_off())?;
    lab.nothing_left(&before)?;
    drop(disk);
    Ok(())
}

fn five(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let mut guests = Vec::new();
    let other = if lab.kind == Kind::Pv { Kind::Pvh } else { Kind::Pv };
    for kind in [lab.kind, lab.kind, other, lab.kind, lab.kind] {
        guests.push(ready(lab, kind)?);
    }
    // Not before all have booted, since they share one processor under emulation.
    for (guest, _) in &mut guests {
        guest.ask("load-start", load(), SHORT)?;
    }
    std::thread::sleep(Duration::from_secs(5));
    for (guest, _) in &mut guests {
        let rounds = guest.ask("load-stop", Value::Null, LONG)?;
        let rounds: Vec<u64> = serde_json::from_value(rounds)?;
        ensure!(
            rounds.iter().all(|n| *n > 1),
            "{}: too few rounds of load: {rounds:?}",
            guest.name
        );
    }
    let mut disks = Vec::new();
    for (guest, disk) in guests {
        lab.watched(guest, |guest| guest.power_off())?;
        disks.push(disk);
    }
    lab.nothing_left(&before)
}
