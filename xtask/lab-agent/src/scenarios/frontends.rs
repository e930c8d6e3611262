//! Hostile frontends next to one that works: dom0 writes in their place what a guest could write.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{BOTH, Guests, NICS, PV, Scenario};
use crate::dom0::backend::{Backend, PVIO_LOG};
use crate::dom0::disk::{Access, Disk, Medium};
use crate::dom0::guest::{Guest, Spec};
use crate::dom0::lab::{LONG, Lab, NIC, SHORT, address, wait_until};
use crate::dom0::xs;
use crate::sys;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "hostile-disk-frontend",
        proves: "a blkfront that writes invalid keys loses only that disk, with a reason",
        backends: NICS,
        kinds: PV,
        guests: Guests::Shared,
        run: disks,
    },
    Scenario {
        name: "hostile-nic-frontend",
        proves: "a netfront that writes invalid keys loses only that NIC, with a reason",
        backends: NICS,
        kinds: PV,
        guests: Guests::Shared,
        run: nics,
    },
    Scenario {
        name: "hostile-silence",
        proves: "a guest that stops responding during I/O is reported, and its devices can be \
                 removed",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: silence,
    },
];

/// The expected result of a case.
#[derive(Clone, Copy, PartialEq)]
enum Then {
    /// The backend closes and reports an error.
    Closed,
    /// The backend may stay open, but must not serve.
    NotServed,
}

/// Keys that are written one after another. Unless `state` is among them, it is written last.
type Case = (&'static str, &'static [(&'static str, &'static str)], Then);

/// Grant 1 and port 1 of a PV guest are those of xenstore: the page can be mapped, but the channel
/// is already bound.
const DISKS: &[Case] = &[
    ("no keys", &[], Then::Closed),
    ("no event channel", &[("ring-ref", "8")], Then::Closed),
    ("text instead of numbers", &[("ring-ref", "banana"), ("event-channel", "x")], Then::Closed),
    ("negative numbers", &[("ring-ref", "-1"), ("event-channel", "-5")], Then::Closed),
    (
        "beyond 64 bits",
        &[("ring-ref", "18446744073709551617"), ("event-channel", "99999999999999999999")],
        Then::Closed,
    ),
    ("page not granted", &[("ring-ref", "4000"), ("event-channel", "1")], Then::Closed),
    (
        "invalid grant reference",
        &[("ring-ref", "4294967295"), ("event-channel", "1")],
        Then::Closed,
    ),
    ("event channel already bound", &[("ring-ref", "1"), ("event-channel", "1")], Then::Closed),
    ("event channel does not exist", &[("ring-ref", "1"), ("event-channel", "4000")], Then::Closed),
    (
        "huge ring",
        &[("ring-page-order", "200"), ("ring-ref0", "1"), ("event-channel", "1")],
        Then::Closed,
    ),
    (
        "too many queues",
        &[("multi-queue-num-queues", "4294967295"), ("ring-ref", "1"), ("event-channel", "1")],
        Then::Closed,
    ),
    (
        "unknown protocol",
        &[("protocol", "klingon"), ("ring-ref", "1"), ("event-channel", "1")],
        Then::Closed,
    ),
    (NO_STATE, &[("state", "banana")], Then::NotServed),
    ("undefined state", &[("state", "99")], Then::NotServed),
    ("Connected without keys", &[("state", "4")], Then::NotServed),
    (
        "states in reverse order",
        &[("state", "6"), ("state", "5"), ("state", "2"), ("state", "1")],
        Then::NotServed,
    ),
    ("no further state", &[("state", "1")], Then::NotServed),
    (
        "keys changed between states",
        &[
            ("ring-ref", "8"),
            ("state", "3"),
            ("ring-ref", "banana"),
            ("state", "1"),
            ("event-channel", "7"),
            ("state", "3"),
            ("state", "4"),
            ("state", "3"),
            ("ring-ref", "1"),
            ("state", "5"),
            ("state", "3"),
        ],
        Then::NotServed,
    ),
];

const NO_STATE: &str = "state is text";

/// Every netfront since 2007 writes `request-rx-copy`.
const NICS_PLAYED: &[Case] = &[
    ("no keys", &[], Then::Closed),
    (
        "text instead of numbers",
        &[("tx-ring-ref", "a"), ("rx-ring-ref", "b"), ("event-channel", "c"), COPY],
        Then::Closed,
    ),
    (
        "page not granted",
        &[("tx-ring-ref", "4000"), ("rx-ring-ref", "4001"), ("event-channel", "1"), COPY],
        Then::Closed,
    ),
    (
        "event channel already bound",
        &[("tx-ring-ref", "1"), ("rx-ring-ref", "1"), ("event-channel", "1"), COPY],
        Then::Closed,
    ),
    (
        "beyond 64 bits",
        &[
            ("tx-ring-ref", "18446744073709551617"),
            ("rx-ring-ref", "-1"),
            ("event-channel", "99999999999999999999"),
            COPY,
        ],
        Then::Closed,
    ),
    (
        "event channel does not exist",
        &[("tx-ring-ref", "1"), ("rx-ring-ref", "1"), ("event-channel", "4000"), COPY],
        Then::Closed,
    ),
    (
        "too many queues",
        &[("multi-queue-num-queues", "4294967295"), ("event-channel", "1"), COPY],
        Then::Closed,
    ),
    (
        "states in reverse order",
        &[("state", "6"), ("state", "5"), ("state", "2"), ("state", "1")],
        Then::NotServed,
    ),
    (
        "keys changed between states",
        &[
            ("tx-ring-ref", "8"),
            ("state", "4"),
            ("tx-ring-ref", "banana"),
            ("state", "1"),
            ("event-channel", "7"),
            ("state", "4"),
            ("state", "3"),
            ("rx-ring-ref", "1"),
            ("state", "5"),
            ("state", "4"),
        ],
        Then::NotServed,
    ),
    (NO_STATE, &[("state", "banana")], Then::NotServed),
    ("Initialised instead of Connected", &[("state", "3")], Then::NotServed),
    ("undefined state", &[("state", "99")], Then::NotServed),
    ("no further state", &[("state", "1")], Then::NotServed),
];
const COPY: (&str, &str) = ("request-rx-copy", "1");

/// Starts a guest without frontends; dom0 writes their nodes.
pub(super) fn bare(lab: &Lab, disks: Vec<String>, nics: usize) -> Result<Guest> {
    let mut spec = Spec::new(lab.kind, lab.backend);
    spec.words = "pvio.bare".to_owned();
    spec.disks = disks;
    spec.nics = vec![NIC.to_owned(); nics];
    Guest::start(&spec)
}

fn disks(lab: &mut Lab) -> Result<()> {
    // xen-blkback interprets this state as a removed device, and then xl cannot remove it.
    let orphans = |case: &&Case| lab.backend == Backend::Linux && case.0 == NO_STATE;
    let cases: Vec<_> = DISKS.iter().filter(|case| !orphans(case)).collect();
    let disk = Disk::new(4, lab.backend, Medium::Device)?;
    witnessed(lab, |lab| {
        // At most up to xvdp, as later disks use the extended numbering.
        for cases in cases.chunks(12) {
            let names =
                (b'a'..=b'p').take(cases.len()).map(|letter| format!("xvd{}", letter as char));
            let lines = names.map(|name| disk.line(&name, Access::Read, lab.backend));
            let guest = bare(lab, lines.collect::<Result<_>>()?, 0)?;
            for (i, case) in cases.iter().enumerate() {
                let number = (51_712 + 16 * i).to_string();
                play(lab.backend, &guest, "vbd", &number, case, &["5", "6"])?;
            }
            let domain = guest.domain.to_string();
            detach(&guest, &["xl", "block-detach", &domain, "51712"], "vbd/51712")?;
            lab.watched(guest, |guest| guest.power_off())?;
        }
        Ok(())
    })
}

fn nics(lab: &mut Lab) -> Result<()> {
    witnessed(lab, |lab| {
        // xen-netback enters state Connected even after its connection failed.
        let end: &[_] = if lab.backend == Backend::Linux { &["4", "5", "6"] } else { &["5", "6"] };
        let orphans = |case: &&Case| lab.backend == Backend::Linux && case.0 == NO_STATE;
        let cases: Vec<_> = NICS_PLAYED.iter().filter(|case| !orphans(case)).collect();
        // xl limits the time of all scripts of a guest to 10 seconds in total.
        for cases in cases.chunks(7) {
            let guest = bare(lab, Vec::new(), cases.len())?;
            for (i, case) in cases.iter().enumerate() {
                play(lab.backend, &guest, "vif", &i.to_string(), case, end)?;
            }
            let domain = guest.domain.to_string();
            detach(&guest, &["xl", "network-detach", &domain, "0"], "vif/0")?;
            lab.watched(guest, |guest| guest.power_off())?;
        }
        Ok(())
    })
}

/// Runs the cases while another guest's disk and NIC are in use; no resource of the hostile guests
/// may be left.
fn witnessed(lab: &mut Lab, play: impl FnOnce(&mut Lab) -> Result<()>) -> Result<()> {
    let load = json!({ "disks": ["xvda"], "echoes": ["10.0.0.1"], "rest": 50 });
    lab.shared()?.guest.ask("load-start", load, SHORT)?;
    let before = lab.settled()?;
    play(lab)?;
    lab.nothing_left(&before)?;
    let rounds = lab.shared()?.guest.ask("load-stop", Value::Null, LONG);
    rounds.context("load of the other guest").map(drop)
}

/// Returns the path of a backend's `error` node in dom0.
fn error_node(kind: &str, domain: u32, device: &str) -> String {
    format!("/local/domain/0/error/backend/{kind}/{domain}/{device}/error")
}

/// Runs a case with a device that the backend offers; `end` contains the accepted final states of
/// the backend.
fn play(
    backend: Backend,
    guest: &Guest,
    kind: &str,
    device: &str,
    case: &Case,
    end: &[&str],
) -> Result<()> {
    let (name, writes, then) = case;
    let domain = guest.domain;
    let front = format!("/local/domain/{domain}/device/{kind}/{device}");
    let back = format!("/local/domain/0/backend/{kind}/{domain}/{device}");
    let error = error_node(kind, domain, device);
    xs::wait_for(&format!("{back}/state"), &["2"], SHORT).context("backend enters InitWait")?;
    for (key, value) in *writes {
        xs::write(&format!("{front}/{key}"), value)?;
    }
    if !writes.iter().any(|(key, _)| *key == "state") {
        // blkfront is Initialised until it has read the disk's size; netfront reads nothing and is
        // Connected.
        let state = if kind == "vbd" { "3" } else { "4" };
        xs::write(&format!("{front}/state"), state)?;
    }
    let mut seen = (None, None);
    let patience = Duration::from_secs(if *then == Then::Closed { 20 } else { 1 });
    let closed = wait_until(patience, || {
        seen = (xs::read(&format!("{back}/state"))?, xs::read(&error)?);
        let state = seen.0.as_deref().unwrap_or_default();
        ensure!(state != "4" || end.contains(&"4"), "{kind}, {name}: the device is served");
        Ok(end.contains(&state) && seen.1.is_some())
    })?;
    if *then == Then::Closed && !closed {
        bail!("{kind}, {name}: state {:?} and error {:?} after 20 s", seen.0, seen.1);
    }
    println!("PVIO-LAB {kind}, {name}: state {:?}, error {:?}", seen.0, seen.1);
    match (backend, seen.1) {
        (Backend::Pvio, Some(why)) => logged(&back, &why),
        _ => Ok(()),
    }
}

/// Checks that the log has a line with this error of the device.
fn logged(device: &str, why: &str) -> Result<()> {
    // Fields of a log line are quoted and escaped.
    let [device_field, error_field] = [device, why].map(|value| format!("{value:?}"));
    let is_logged = |line: &str| line.contains(&device_field) && line.contains(&error_field);
    let there = wait_until(Duration::from_secs(5), || {
        Ok(std::fs::read_to_string(PVIO_LOG)?.lines().any(is_logged))
    })?;
    ensure!(there, "{device}: error {why} is in xenstore but not in the log");
    Ok(())
}

/// Pauses a guest with outstanding requests on its disk and NIC. Only the toolstack can distinguish
/// it from a slow guest.
fn silence(lab: &mut Lab) -> Result<()> {
    let disk = Disk::new(16, lab.backend, Medium::Device)?;
    witnessed(lab, |lab| {
        let mut guest = Guest::start(&Spec::new(lab.kind, lab.backend))?;
        let before = lab.settled()?;
        let domain = guest.domain.to_string();
        let line = disk.line("xvda", Access::Write, lab.backend)?;
        sys::succeed(&["xl", "block-attach", &domain, &line], SHORT)?;
        let nic: Vec<_> = NIC.split(',').collect();
        sys::succeed(&[&["xl", "network-attach", &domain], nic.as_slice()].concat(), SHORT)?;
        guest.ask("disk-wait", json!("xvda"), SHORT)?;
        let up = json!({ "name": "eth0", "address": format!("{}/24", address(&guest, 0)) });
        guest.ask("nic-up", up, SHORT)?;
        let load = json!({ "disks": ["xvda"], "echoes": ["10.0.0.1"] });
        guest.ask("load-start", load, SHORT)?;
        sys::succeed(&["xl", "pause", &domain], SHORT)?;
        sys::succeed(&["xl", "block-detach", "--force", &domain, "51712"], SHORT)?;
        // xl waits 10 seconds before it removes the NIC by force.
        sys::succeed(&["xl", "network-detach", &domain, "0"], SHORT)?;
        let error = xs::read(&error_node("vif", guest.domain, "0"))?.unwrap_or_default();
        if lab.backend == Backend::Pvio {
            ensure!(error.contains("frontend-keeps-device"), "error node is {error:?}");
            logged(&format!("/local/domain/0/backend/vif/{domain}/0"), &error)?;
        }
        // Checked while the guest still exists.
        lab.nothing_left(&before)?;
        lab.watched(guest, |guest| {
            guest.destroy()?;
            guest.wait_gone(SHORT)
        })
    })
}

/// Detaches a device with the toolstack; its frontend has no driver.
fn detach(guest: &Guest, words: &[&str], node: &str) -> Result<()> {
    let front = format!("/local/domain/{}/device/{node}", guest.domain);
    xs::write(&format!("{front}/state"), "6")?;
    let back = xs::must_read(&format!("{front}/backend"))?;
    // xl and a backend that is still closing would overwrite each other's state.
    wait_until(Duration::from_secs(3), || {
        Ok(xs::read(&format!("{back}/state"))?.as_deref() == Some("6"))
    })?;
    sys::succeed(words, SHORT)?;
    let gone = wait_until(SHORT, || Ok(xs::read(&format!("{back}/state"))?.is_none()))?;
    ensure!(gone, "{back} was not removed");
    Ok(())
}
