//! Measurements by the guest's own clock: under `-icount`, it counts instructions and is
//! independent of the host's load.

use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use super::{DISKS, Guests, NICS, PV, Scenario, policies};
use crate::dom0::backend::Backend;
use crate::dom0::disk::Medium;
use crate::dom0::guest::{Guest, Spec};
use crate::dom0::lab::{LONG, Lab, NIC, SHORT, address};
use crate::net;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "bench-disk",
        proves: "requests per second of the guest's time, for every data path policy",
        backends: DISKS,
        kinds: PV,
        guests: Guests::Own,
        run: disk,
    },
    Scenario {
        name: "bench-nic",
        proves: "packets and bits per second of the guest's time, both ways",
        backends: NICS,
        kinds: PV,
        guests: Guests::Own,
        run: nic,
    },
];

/// Number of runs of each measurement.
const RUNS: usize = 3;
const MIB: u64 = 64;

/// Workloads of a disk: name, bytes of a request, requests in flight, number of requests.
const REQUESTS: &[(&str, usize, usize, u64)] = &[
    ("4 KiB, depth 1", 4 << 10, 1, 400),
    ("64 KiB, depth 1", 64 << 10, 1, 200),
    ("1 MiB, depth 1", 1 << 20, 1, 40),
    ("4 KiB, depth 32", 4 << 10, 32, 1600),
    ("64 KiB, depth 32", 64 << 10, 32, 400),
];

fn disk(lab: &mut Lab) -> Result<()> {
    if lab.backend != Backend::Pvio {
        let medium = Medium::File;
        return disk_as(lab, word(lab.backend), medium);
    }
    for (name, words) in policies::DISKS {
        lab.serve(words)?;
        disk_as(lab, &format!("pvio {name}"), Medium::Device)?;
    }
    lab.serve(&[])?;
    disk_as(lab, "pvio, a file", Medium::File)
}

fn word(backend: Backend) -> &'static str {
    match backend {
        Backend::Pvio => "pvio",
        Backend::Linux => "linux",
        Backend::Qdisk => "qdisk",
        Backend::PvioDm => "pvio-dm",
    }
}

/// Measures a disk of a new guest; the rows have this name.
fn disk_as(lab: &mut Lab, name: &str, medium: Medium) -> Result<()> {
    let (disk, line) = lab.disk("xvda", MIB, medium)?;
    let mut spec = Spec::new(lab.kind, lab.backend);
    spec.disks = vec![line];
    let mut guest = Guest::start(&spec)?;
    guest.ask("disk-wait", json!("xvda"), SHORT)?;
    // Allocates the image's memory now, not during the measurement.
    guest.ask("disk-blank", json!({ "name": "xvda", "mib": MIB }), LONG)?;
    for (case, size, depth, requests) in REQUESTS {
        for write in [false, true] {
            let order = |requests: u64| {
                json!({ "name": "xvda", "write": write, "size": size, "depth": depth,
                        "requests": requests, "mib": MIB })
            };
            guest.ask("measure-disk", order(requests / 8), LONG)?;
            let mut rates = Vec::new();
            for _ in 0..RUNS {
                let seconds = guest.ask("measure-disk", order(*requests), LONG)?;
                rates.push(*requests as f64 / seconds.as_f64().context("seconds")?);
            }
            let case = format!("disk {}, {case}", if write { "write" } else { "read" });
            lab.rows.push(row(&case, name, "requests/s", &rates));
        }
    }
    lab.watched(guest, |guest| guest.power_off())?;
    drop(disk);
    Ok(())
}

fn row(case: &str, name: &str, unit: &str, rates: &[f64]) -> Value {
    json!({ "case": case, "backend": name, "unit": unit, "rates": rates })
}

const DOM0: &str = "10.0.0.1";

fn nic(lab: &mut Lab) -> Result<()> {
    if lab.backend != Backend::Pvio {
        return nic_as(lab, word(lab.backend));
    }
    for (name, words) in policies::NICS {
        lab.serve(words)?;
        nic_as(lab, &format!("pvio {name}"))?;
    }
    Ok(())
}

/// Measures a NIC of a new guest; the rows have this name.
fn nic_as(lab: &mut Lab, name: &str) -> Result<()> {
    let mut spec = Spec::new(lab.kind, lab.backend);
    spec.nics = vec![NIC.to_owned()];
    let mut guest = Guest::start(&spec)?;
    let own = address(&guest, 0);
    guest.ask("nic-up", json!({ "name": "eth0", "address": format!("{own}/24") }), SHORT)?;
    for (size, packets) in [(64, 4000), (1400, 3000)] {
        let mut rates = (Vec::new(), Vec::new());
        for run in 0..RUNS {
            let port = 6000 + u16::try_from(run)?;
            rates.0.push(sent(&mut guest, port, size, packets)?);
            rates.1.push(received(&mut guest, &own, port, size, packets)?);
        }
        let case = format!("nic, UDP of {size} B");
        lab.rows.push(row(&format!("{case} from the guest"), name, "packets/s", &rates.0));
        lab.rows.push(row(&format!("{case} to the guest"), name, "packets/s", &rates.1));
    }
    let mut rates = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        rates.0.push(poured(&mut guest)?);
        rates.1.push(drained(&mut guest)?);
        let order = json!({ "server": DOM0, "size": 64, "rounds": 300 });
        let seconds = guest.ask("measure-echo", order, LONG)?;
        rates.2.push(300.0 / seconds.as_f64().context("seconds")?);
    }
    lab.rows.push(row("nic, TCP from the guest", name, "Mbit/s", &rates.0));
    lab.rows.push(row("nic, TCP to the guest", name, "Mbit/s", &rates.1));
    lab.rows.push(row("nic, 64 B there and back", name, "rounds/s", &rates.2));
    lab.watched(guest, |guest| guest.power_off())
}

/// Returns the packets per second that dom0 receives from a guest that sends without pauses.
fn sent(guest: &mut Guest, port: u16, size: usize, packets: u64) -> Result<f64> {
    let counter = thread::spawn(move || net::count(port));
    // The receiver is listening by then.
    thread::sleep(Duration::from_millis(200));
    let order = json!({ "server": DOM0, "port": port, "size": size, "packets": packets });
    guest.ask("measure-blast", order, LONG)?;
    let (packets, seconds) = counter.join().map_err(|_| anyhow!("the counter panicked"))??;
    Ok(packets as f64 / seconds)
}

/// Returns the packets per second that the guest receives from dom0.
fn received(guest: &mut Guest, to: &str, port: u16, size: usize, packets: u64) -> Result<f64> {
    let to = to.to_owned();
    let sender = thread::spawn(move || {
        // The guest is listening by then.
        thread::sleep(Duration::from_millis(500));
        net::blast((&to, port), size, packets)
    });
    let counted = guest.ask("measure-count", json!(port), LONG)?;
    sender.join().map_err(|_| anyhow!("the sender panicked"))??;
    let number = |key: &str| counted[key].as_f64().context("a number");
    Ok(number("packets")? / number("seconds")?)
}

const BULK: u64 = 16 << 20;

/// Returns the Mbit/s of one connection from the guest.
fn poured(guest: &mut Guest) -> Result<f64> {
    let listener = TcpListener::bind((DOM0, 0))?;
    let port = listener.local_addr()?.port();
    let taker = thread::spawn(move || net::swallow(listener.accept()?.0));
    guest.ask("measure-pour", json!({ "server": DOM0, "port": port, "bytes": BULK }), LONG)?;
    let (bytes, seconds) = taker.join().map_err(|_| anyhow!("the taker panicked"))??;
    Ok(bytes as f64 * 8.0 / 1e6 / seconds)
}

/// Returns the Mbit/s of one connection to the guest.
fn drained(guest: &mut Guest) -> Result<f64> {
    use std::io::Write;
    let listener = TcpListener::bind((DOM0, 0))?;
    let port = listener.local_addr()?.port();
    let giver = thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        let piece = vec![0x5a; 64 << 10];
        for _ in 0..BULK / piece.len() as u64 {
            stream.write_all(&piece)?;
        }
        Ok(())
    });
    let taken = guest.ask("measure-drain", json!([DOM0, port]), LONG)?;
    giver.join().map_err(|_| anyhow!("the giver panicked"))??;
    let number = |key: &str| taken[key].as_f64().context("a number");
    Ok(number("bytes")? * 8.0 / 1e6 / number("seconds")?)
}
