//! Devices served by another guest, which is destroyed and replaced by a new one.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{BOTH, Guests, PVIO, Scenario};
use crate::dom0::disk::{Access, Disk};
use crate::dom0::guest::{Guest, Kind, Programs, Spec};
use crate::dom0::lab::{LONG, Lab, SHORT};
use crate::sys;

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "driver-domain",
    proves: "pvio in an unprivileged PV guest serves another guest; after it is killed under I/O, \
             a new driver domain serves it",
    backends: PVIO,
    kinds: BOTH,
    guests: Guests::Own,
    run: driver_domain,
}];

const IMAGE: &str = "/tmp/served.img";
const MIB: u64 = 16;
/// An address in a network of the driver domain.
const SERVER: &str = "10.0.3.1";

/// Starts an unprivileged guest as driver domain.
fn server(lab: &Lab) -> Result<Guest> {
    let mut spec = Spec::new(Kind::Pv, lab.backend);
    spec.programs = Programs::Pvio;
    spec.words = "pvio.bare".to_owned();
    spec.lines = vec!["driver_domain=1".to_owned()];
    let mut guest = Guest::start(&spec)?;
    guest.ask("image-make", json!({ "path": IMAGE, "mib": MIB }), SHORT)?;
    guest.ask("backend-serve", json!(format!("{SERVER}/24")), SHORT)?;
    guest.ask("echo-serve", Value::Null, SHORT)?;
    Ok(guest)
}

/// Returns the configuration entries of a disk and a NIC that it serves.
fn lines(server: &Guest, name: &str) -> [String; 2] {
    let server = &server.name;
    let disk = Disk::elsewhere(IMAGE, name, Access::Write);
    [format!("backend={server},{disk}"), format!("bridge=xenbr0,backend={server}")]
}

/// Verifies all data of the disk, in the guest and in the driver domain, and echoes of datagrams.
fn works(guest: &mut Guest, server: &mut Guest, disk: &str, nic: &str, host: u32) -> Result<()> {
    guest.ask("disk-wait", json!(disk), SHORT)?;
    let order = json!({ "name": disk, "seed": 61, "requests": 100, "mib": 8 });
    let sum = guest.ask("disk-scribble", order, LONG)?;
    let held = server.ask("image-sum", json!({ "path": IMAGE, "mib": 8 }), SHORT)?;
    ensure!(sum == held, "checksum of the image in the driver domain differs from the guest's");
    guest.ask("nic-up", json!({ "name": nic, "address": format!("10.0.3.{host}/24") }), SHORT)?;
    let echo = json!({ "server": SERVER, "sizes": [8, 64, 1472, 9000], "rounds": 5 });
    guest.ask("nic-echo", echo, SHORT).map(drop)
}

fn driver_domain(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let mut first = server(lab)?;
    let mut spec = Spec::new(lab.kind, lab.backend);
    let [disk, nic] = lines(&first, "xvda");
    (spec.disks, spec.nics) = (vec![disk], vec![nic]);
    let mut guest = Guest::start(&spec)?;
    works(&mut guest, &mut first, "xvda", "eth0", 2)?;
    // Without load on the disk: its outstanding requests would never complete, and Linux does not
    // close such a disk. The survival scenarios cover requests that outlive their backend.
    let load = json!({ "echoes": [SERVER], "lossy": true });
    guest.ask("load-start", load, SHORT)?;
    lab.watched(first, |first| {
        first.destroy()?;
        first.wait_gone(SHORT)
    })?;
    guest.ask("hello", Value::Null, SHORT).context("guest after its backend was killed")?;

    // Detach the devices of the dead driver domain, and attach those of the new one.
    let mut second = server(lab)?;
    let domain = guest.domain.to_string();
    sys::succeed(&["xl", "block-detach", &domain, "xvda"], SHORT)?;
    sys::succeed(&["xl", "network-detach", &domain, "0"], SHORT)?;
    guest.ask("disk-gone", json!("xvda"), SHORT)?;
    guest.ask("nic-gone", json!("eth0"), SHORT)?;
    let [disk, nic] = lines(&second, "xvdb");
    sys::succeed(&["xl", "block-attach", &domain, &disk], SHORT)?;
    let nic: Vec<_> = nic.split(',').collect();
    sys::succeed(&[&["xl", "network-attach", &domain], nic.as_slice()].concat(), SHORT)?;
    works(&mut guest, &mut second, "xvdb", "eth0", 3)
        .context("devices served by the second driver domain")?;

    lab.watched(guest, |guest| {
        guest.destroy()?;
        guest.wait_gone(Duration::from_secs(60))
    })?;
    second.ask("backend-nothing-left", Value::Null, SHORT)?;
    lab.watched(second, |second| second.power_off())?;
    lab.nothing_left(&before)
}
