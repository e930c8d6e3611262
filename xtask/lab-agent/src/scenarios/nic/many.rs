//! Several queues, and traffic between guests.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{iperf, transfer};
use crate::dom0::backend::Backend;
use crate::dom0::guest::{Guest, Programs, Spec};
use crate::dom0::lab::{LONG, Lab, NIC, SHORT, address};
use crate::dom0::xs;
use crate::net;
use crate::net::datagrams::Taken;
use crate::scenarios::{BOTH, Guests, NICS, Scenario};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "nic-queues",
        proves: "a guest with two vCPUs has two queues, and both carry packets in both directions",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Own,
        run: queues,
    },
    Scenario {
        name: "nic-peers",
        proves: "TCP and UDP both ways between a guest with one queue and one with two, each \
                 offload off and on",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Own,
        run: peers,
    },
];

/// Starts a guest with a NIC that has its address.
pub fn ready(lab: &Lab, processors: u32) -> Result<Guest> {
    let mut spec = Spec::new(lab.kind, lab.backend);
    spec.processors = processors;
    spec.nics = vec![NIC.to_owned()];
    started(&spec)
}

/// Starts a guest and sets the address of its first NIC.
pub fn started(spec: &Spec) -> Result<Guest> {
    let mut guest = Guest::start(spec)?;
    let own = format!("{}/24", address(&guest, 0));
    guest.ask("nic-up", json!({ "name": "eth0", "address": own }), SHORT)?;
    Ok(guest)
}

/// Lets guests that `make` creates have two queues. dom0 has one processor, and a backend offers
/// one queue per processor by default.
fn with_queues<T>(lab: &mut Lab, make: impl FnOnce(&Lab) -> Result<T>) -> Result<T> {
    const LINUX: &str = "/sys/module/xen_netback/parameters/max_queues";
    if lab.backend != Backend::Linux {
        lab.serve(&["--queues", "2"])?;
        return make(lab);
    }
    std::fs::write(LINUX, "2").context(LINUX)?;
    let made = make(lab);
    std::fs::write(LINUX, "1").context(LINUX)?;
    made
}

/// Checks the number of queues of a guest's first NIC.
fn agreed(guest: &Guest, queues: &str) -> Result<()> {
    let node = format!("/local/domain/{}/device/vif/0/multi-queue-num-queues", guest.domain);
    let agreed = xs::read(&node)?.unwrap_or_else(|| "1".to_owned());
    ensure!(agreed == queues, "{agreed} queues negotiated");
    Ok(())
}

fn queues(lab: &mut Lab) -> Result<()> {
    let mut guest = with_queues(lab, |lab| ready(lab, 2))?;
    agreed(&guest, "2")?;
    guest.ask("echo-serve", Value::Null, SHORT)?;
    let before = fired(&mut guest)?;
    // The ports of a connection select its queue in each direction.
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

fn peers(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    let mut guests = with_queues(lab, |lab| {
        let mut spec = Spec::new(lab.kind, lab.backend);
        (spec.nics, spec.programs) = (vec![NIC.to_owned()], Programs::Tools);
        spec.memory = Some(256);
        let first = started(&spec)?;
        spec.processors = 2;
        Ok([first, started(&spec)?])
    })?;
    agreed(&guests[0], "1")?;
    agreed(&guests[1], "2")?;
    talk(&mut guests, 1 << 20)?;
    for (from, to) in [(0, 1), (1, 0)] {
        let server = address(&guests[to], 0);
        for words in ["-t 2", "-t 2 -u -b 8M -l 1400"] {
            guests[to].program("iperf3 -s -1 -D -p 5201")?;
            std::thread::sleep(Duration::from_millis(1500));
            let seen = iperf(&mut guests[from], &server, words)?;
            lab.rows.push(json!({ "from": from, "iperf3": words, "receiver": seen }));
        }
    }
    // The second guest is always one step behind the first.
    for step in super::STEPS {
        guests[0].program(&format!("ethtool -K eth0 {step}"))?;
        talk(&mut guests, 128 << 10).with_context(|| format!("{step} in the first guest"))?;
        guests[1].program(&format!("ethtool -K eth0 {step}"))?;
    }
    talk(&mut guests, 128 << 10)?;
    for guest in guests {
        lab.watched(guest, |guest| guest.power_off())?;
    }
    lab.nothing_left(&before)
}

/// Transfers `bytes` with checksums, and numbered datagrams, between two guests in each direction.
pub fn talk(guests: &mut [Guest; 2], bytes: u64) -> Result<()> {
    const COUNT: u64 = 64;
    for (from, to) in [(0, 1), (1, 0)] {
        let seed = 90 + from as u64;
        let port = guests[to].ask("tcp-serve", json!(seed), SHORT)?;
        let server = address(&guests[to], 0);
        let order = json!({ "server": server, "port": port, "bytes": bytes, "seed": seed });
        let sent = guests[from].ask("tcp-send", order, LONG)?;
        let got = guests[to].ask("tcp-served", Value::Null, LONG)?;
        let expected = json!({ "bytes": bytes, "sum": sent });
        ensure!(got == expected, "{from} to {to}: {got} instead of {expected}");
        guests[to].ask("datagrams-start", json!({ "port": 5603, "seed": seed }), SHORT)?;
        let order = json!({ "server": server, "port": 5603, "size": 1400, "count": COUNT,
                            "seed": seed, "rest": 5 });
        guests[from].ask("datagrams-send", order, SHORT)?;
        let taken = guests[to].ask("datagrams-end", Value::Null, SHORT)?;
        let taken: Taken = serde_json::from_value(taken)?;
        ensure!(taken.count > COUNT / 2 && taken.late == 0, "{from} to {to}: {taken:?}");
    }
    Ok(())
}
