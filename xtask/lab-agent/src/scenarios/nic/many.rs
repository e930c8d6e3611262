//! Several of everything: queues, guests that share a bridge, guests that talk to each other.

use std::net::TcpListener;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

use super::transfer;
use crate::dom0::backend::Backend;
use crate::dom0::guest::{Guest, Spec};
use crate::dom0::lab::{LONG, Lab, NIC, SHORT, address};
use crate::dom0::xs;
use crate::net;
use crate::scenarios::{BOTH, Guests, NICS, PV, Scenario};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "nic-queues",
        proves: "a guest with two processors has two queues, and both carry what it sends and gets",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Own,
        run: queues,
    },
    Scenario {
        name: "nic-fair",
        proves: "of four guests that send all at once each gets a fair share, every byte compared",
        backends: NICS,
        kinds: PV,
        guests: Guests::Own,
        run: fair,
    },
    Scenario {
        name: "nic-peers",
        proves: "TCP from guest to guest, both ways, with offloads on and off at either end",
        backends: NICS,
        kinds: PV,
        guests: Guests::Own,
        run: peers,
    },
];

/// A guest with a NIC that has its address.
fn ready(lab: &Lab, processors: u32) -> Result<Guest> {
    let mut spec = Spec::new(lab.kind, lab.backend);
    spec.nics = vec![NIC.to_owned()];
    spec.processors = processors;
    let mut guest = Guest::start(&spec)?;
    let own = format!("{}/24", address(&guest, 0));
    guest.ask("nic-up", json!({ "name": "eth0", "address": own }), SHORT)?;
    Ok(guest)
}

fn queues(lab: &mut Lab) -> Result<()> {
    // dom0 has one processor, and a backend as many queues unless it is told.
    const LINUX: &str = "/sys/module/xen_netback/parameters/max_queues";
    if lab.backend == Backend::Linux {
        std::fs::write(LINUX, "2").context(LINUX)?;
    } else {
        lab.serve(&["--queues", "2"])?;
    }
    let guest = ready(lab, 2);
    if lab.backend == Backend::Linux {
        std::fs::write(LINUX, "1").context(LINUX)?;
    }
    let mut guest = guest?;
    let node = format!("/local/domain/{}/device/vif/0/multi-queue-num-queues", guest.domain);
    let agreed = xs::must_read(&node)?;
    ensure!(agreed == "2", "{agreed} queues");
    guest.ask("echo-serve", Value::Null, SHORT)?;
    let before = fired(&mut guest)?;
    // A connection is in one queue each way, chosen by its ports.
    for round in 0..12 {
        transfer(&mut guest, 256 << 10)?;
        let order = json!({ "server": "10.0.0.1", "sizes": [64, 1472, 9000], "rounds": 3 });
        guest.ask("nic-echo", order, SHORT)?;
        net::echo(&net::client(&address(&guest, 0))?, 1472, round)?;
    }
    let after = fired(&mut guest)?;
    lab.rows = vec![json!({ "interrupts before": before, "after": after })];
    ensure!(after.len() >= 2, "no interrupts of queues: {after:?}");
    for queue in ["-q0-", "-q1-"] {
        let count = |all: &[(String, u64)]| -> u64 {
            all.iter().filter(|(name, _)| name.contains(queue)).map(|(_, n)| n).sum()
        };
        let gone = count(&after) - count(&before);
        ensure!(gone > 20, "{gone} interrupts of vif0{queue}: {before:?}, {after:?}");
    }
    lab.watched(guest, |guest| guest.power_off())
}

fn fired(guest: &mut Guest) -> Result<Vec<(String, u64)>> {
    let all = guest.ask("nic-interrupts", json!("vif0"), SHORT)?;
    serde_json::from_value(all).context("names and numbers")
}

fn fair(lab: &mut Lab) -> Result<()> {
    const LENGTH: Duration = Duration::from_secs(12);
    // Of 25 to be had: all four share one processor with dom0, and TCP's own luck.
    const LEAST: u64 = 15;
    let mut guests = (0..4).map(|_| ready(lab, 1)).collect::<Result<Vec<_>>>()?;
    let mut streams = Vec::new();
    for (guest, seed) in guests.iter_mut().zip(80..) {
        let listener = TcpListener::bind("10.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let order = json!({ "server": "10.0.0.1", "port": port, "bytes": 1_u64 << 40,
                            "seed": seed });
        guest.ask("tcp-stream", order, SHORT)?;
        streams.push((listener.accept()?.0, seed));
    }
    // What was under way before all were is dropped by none and counted by all.
    let start = Instant::now();
    let end = start + LENGTH;
    let takers: Vec<_> = streams
        .into_iter()
        .map(|(stream, seed)| thread::spawn(move || net::until(stream, seed, end)))
        .collect();
    let mut shares = Vec::new();
    for taker in takers {
        shares.push(taker.join().map_err(|_| anyhow!("a taker panicked"))??);
    }
    let all: u64 = shares.iter().sum();
    let percent: Vec<u64> = shares.iter().map(|share| share * 100 / all.max(1)).collect();
    lab.rows = vec![json!({ "MiB": shares.iter().map(|it| it >> 20).collect::<Vec<_>>(),
                            "percent": percent })];
    ensure!(all > 4 << 20, "{all} bytes of four guests in {} s", LENGTH.as_secs());
    ensure!(percent.iter().all(|share| *share >= LEAST), "shares of {percent:?} percent");
    for guest in guests {
        lab.watched(guest, |guest| guest.power_off())?;
    }
    Ok(())
}

fn peers(lab: &mut Lab) -> Result<()> {
    const BYTES: u64 = 2 << 20;
    let mut guests = [ready(lab, 1)?, ready(lab, 1)?];
    let off = "ethtool -K eth0 tso off gso off gro off tx off";
    let on = "ethtool -K eth0 tx on gro on gso on tso on";
    // On at both ends, off at the first, at both, at the second.
    for (guest, words) in [(0, on), (0, off), (1, off), (0, on)] {
        guests[guest].program(words)?;
        for (from, to) in [(0, 1), (1, 0)] {
            let seed = 90 + from as u64;
            let port = guests[to].ask("tcp-serve", json!(seed), SHORT)?;
            let server = address(&guests[to], 0);
            let order = json!({ "server": server, "port": port, "bytes": BYTES, "seed": seed });
            let sent = guests[from].ask("tcp-send", order, LONG)?;
            let got = guests[to].ask("tcp-served", Value::Null, LONG)?;
            let expected = json!({ "bytes": BYTES, "sum": sent });
            ensure!(got == expected, "{words} at {guest}: {got} instead of {expected}");
        }
    }
    for guest in guests {
        lab.watched(guest, |guest| guest.power_off())?;
    }
    Ok(())
}
