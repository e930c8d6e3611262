//! Rate limits of NICs: of a single one, and shared by several.
//!
//! A guest that floods has hundreds of datagrams waiting in its ring, and only the backend delays
//! them. The received rate is therefore the backend's, however rarely the guest is scheduled.

use std::net::UdpSocket;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

use super::many::ready;
use super::undo::Undo;
use crate::dom0::guest::Guest;
use crate::dom0::lab::{LONG, Lab, SHORT};
use crate::dom0::xs;
use crate::net::datagrams;
use crate::scenarios::hotplug::{attach_nic, detach_nic, network};
use crate::scenarios::{BOTH, Guests, PVIO, Scenario};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "nic-rate",
        proves: "a guest transmits at its `rate` within 5 %, also after the rate is changed",
        backends: PVIO,
        kinds: BOTH,
        guests: Guests::Shared,
        run: rate,
    },
    Scenario {
        name: "nic-fair",
        proves: "four flooding guests with a shared rate get equal parts and use all of it",
        backends: PVIO,
        kinds: BOTH,
        guests: Guests::Own,
        run: fair,
    },
];

/// Payload of a datagram in bytes, and its headers in a frame.
const SIZE: usize = 1400;
const HEADERS: u64 = 14 + 20 + 8;

/// Creates a socket of dom0 whose buffer does not overflow while dom0 is busy.
fn socket(address: &str, undo: &mut Undo) -> Result<UdpSocket> {
    undo.sysctl("net/core/rmem_default", "8388608")?;
    Ok(UdpSocket::bind((address, 0))?)
}

/// Starts a flood from a guest to that socket.
fn flood(guest: &mut Guest, socket: &UdpSocket, seed: u64) -> Result<()> {
    let to = socket.local_addr()?;
    let order = json!({ "server": to.ip(), "port": to.port(), "size": SIZE, "seed": seed });
    guest.ask("flood-start", order, SHORT).map(drop)
}

/// Returns the bytes of frames per second that arrive during `length`, after a delay of `after`.
fn per_second(socket: &UdpSocket, seed: u64, after: Duration, length: Duration) -> Result<f64> {
    let from = Instant::now() + after;
    let (bytes, count) = datagrams::came(socket, seed, from, from + length)?;
    let bytes = (bytes + count * HEADERS) as f64;
    Ok(bytes / length.as_secs_f64())
}

fn rate(lab: &mut Lab) -> Result<()> {
    /// The burst of 128 KiB has been used by then.
    const SPENT: Duration = Duration::from_secs(2);
    const LENGTH: Duration = Duration::from_secs(10);
    const SEED: u64 = 33;
    lab.shared()?;
    let before = lab.settled()?;
    let mut undo = network()?;
    let guest = &mut lab.shared()?.guest;
    attach_nic(guest, "rate=2Mb/s")?;
    let socket = socket("10.0.2.1", &mut undo)?;
    flood(guest, &socket, SEED)?;
    let node = format!("/local/domain/0/backend/vif/{}/2/rate", guest.domain);
    let written = xs::must_read(&node)?;
    ensure!(written == "12500,50000", "xl wrote {written} for 2 Mb/s");
    let mut rows = Vec::new();
    for (words, expected) in [(None, 250_000.0), (Some("50000,50000"), 1_000_000.0)] {
        if let Some(words) = words {
            xs::write(&node, words)?;
        }
        let seen = per_second(&socket, SEED, SPENT, LENGTH)?;
        rows.push(json!({ "bytes a second": expected, "seen": seen }));
        let off = (seen / expected - 1.0) * 100.0;
        ensure!(off.abs() < 5.0, "{seen:.0} bytes a second of {expected:.0}: {off:.1} % off");
    }
    guest.ask("flood-end", Value::Null, SHORT)?;
    detach_nic(guest)?;
    drop((socket, undo));
    lab.rows = rows;
    lab.nothing_left(&before)
}

fn fair(lab: &mut Lab) -> Result<()> {
    const SHARED: f64 = 600_000.0;
    lab.serve(&["--nic-share", "lab=600k", "--nic-options", "share=lab"])?;
    let before = lab.settled()?;
    let mut guests = (0..4).map(|_| ready(lab, 1)).collect::<Result<Vec<_>>>()?;
    let mut undo = Undo::default();
    let sockets = (0..4).map(|_| socket("10.0.0.1", &mut undo)).collect::<Result<Vec<_>>>()?;
    for (seed, (guest, socket)) in guests.iter_mut().zip(&sockets).enumerate() {
        flood(guest, socket, seed as u64)?;
    }
    // All four, then three, which get the fourth one's share.
    for senders in [4, 3] {
        if senders == 3 {
            guests[3].ask("flood-end", Value::Null, LONG)?;
        }
        let seen = parts(&sockets[..senders])?;
        let all: f64 = seen.iter().sum();
        let percent: Vec<f64> =
            seen.iter().map(|part| (part / SHARED * 1000.0).round() / 10.0).collect();
        lab.rows.push(json!({ "senders": senders, "percent of the rate": percent }));
        let off = (all / SHARED - 1.0) * 100.0;
        ensure!(off.abs() < 5.0, "{all:.0} bytes a second of {SHARED:.0}: {off:.1} % off");
        let due = 100.0 / senders as f64;
        let fair = percent.iter().all(|part| (part / due - 1.0).abs() < 0.2);
        ensure!(fair, "expected {due:.0} % of the rate for each guest, measured {percent:?}");
    }
    for guest in &mut guests[..3] {
        guest.ask("flood-end", Value::Null, LONG)?;
    }
    drop((sockets, undo));
    for guest in guests {
        lab.watched(guest, |guest| guest.power_off())?;
    }
    lab.nothing_left(&before)
}

/// Returns the bytes per second that each socket receives, over the same period. The seed of a
/// flood is the index of its socket.
fn parts(sockets: &[UdpSocket]) -> Result<Vec<f64>> {
    const SPENT: Duration = Duration::from_secs(3);
    const LENGTH: Duration = Duration::from_secs(10);
    let takers: Vec<_> = (0..)
        .zip(sockets)
        .map(|(seed, socket)| -> Result<_> {
            let socket = socket.try_clone()?;
            Ok(thread::spawn(move || per_second(&socket, seed, SPENT, LENGTH)))
        })
        .collect::<Result<_>>()?;
    let ends =
        takers.into_iter().map(|taker| taker.join().map_err(|_| anyhow!("a taker panicked"))?);
    ends.collect::<Result<_>>().context("rates of the guests")
}
