//! NICs that pvio connects to something other than a bridge of the kernel, and the guard.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::many::{started, talk};
use super::transfer;
use super::undo::ip;
use crate::dom0::guest::{Guest, Spec};
use crate::dom0::lab::{LONG, Lab, SHORT, address};
use crate::dom0::xs;
use crate::net;
use crate::scenarios::hotplug::{attach_nic, detach_nic, network};
use crate::scenarios::{BOTH, Guests, PVIO, Scenario};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "nic-switch",
        proves: "two guests communicate through pvio's own switch, without a tap, and with dom0 \
                 through its uplink",
        backends: PVIO,
        kinds: BOTH,
        guests: Guests::Own,
        run: switch,
    },
    Scenario {
        name: "nic-guard",
        proves: "a guarded NIC sends only with its own MAC and IP addresses",
        backends: PVIO,
        kinds: BOTH,
        guests: Guests::Shared,
        run: guard,
    },
];

fn switch(lab: &mut Lab) -> Result<()> {
    let before = lab.settled()?;
    lab.serve(&["--nic-options", "switch=lab", "--nic-uplink", "lab=uplink0@xenbr0"])?;
    let mut spec = Spec::new(lab.kind, lab.backend);
    spec.nics = vec!["script=vif-pvio".to_owned()];
    let mut guests = [started(&spec)?, started(&spec)?];
    for guest in &guests {
        let tap = format!("/sys/class/net/vif{}.0", guest.domain);
        ensure!(!std::fs::exists(&tap)?, "{tap} exists");
    }
    let off = "ethtool -K eth0 tso off gso off gro off tx off";
    let on = "ethtool -K eth0 tx on gro on gso on tso on";
    // Switched on in both guests, off in the first, off in both, off in the second.
    for (guest, words) in [(0, on), (0, off), (1, off), (0, on)] {
        guests[guest].program(words)?;
        talk(&mut guests, 1 << 20).with_context(|| format!("{words} in guest {guest}"))?;
    }
    let sizes = [8, 18, 60, 1472, 1473, 4096, 9000, 65_507];
    let server = address(&guests[1], 0);
    guests[1].ask("echo-serve", Value::Null, SHORT)?;
    guests[0].ask("nic-echo", json!({ "server": server, "sizes": sizes, "rounds": 3 }), LONG)?;
    for guest in &mut guests {
        let echo = json!({ "server": "10.0.0.1", "sizes": sizes, "rounds": 2 });
        guest.ask("nic-echo", echo, LONG).context("through the uplink")?;
        transfer(guest, 1 << 20).context("through the uplink")?;
    }
    for guest in guests {
        lab.watched(guest, |guest| guest.power_off())?;
    }
    // No resource of the guests is left; the daemon keeps the switch and its uplink until it ends.
    lab.settled()?;
    lab.serve(&[])?;
    lab.nothing_left(&before)
}

/// Returns whether echoes arrive for datagrams that the guest sends from this address.
fn answered(guest: &mut Guest, own: &str) -> Result<bool> {
    // Neither side uses a cached MAC address.
    guest.program("ip neighbour flush dev eth2")?;
    ip("neighbour flush dev xenbr0")?;
    let order = json!({ "own": own, "server": format!("10.0.2.1:{}", net::ECHO) });
    guest.ask("nic-answered", order, SHORT)?.as_bool().context("true or false")
}

/// Changes the MAC address of a guest's NIC; netfront only permits it while the interface is down.
fn set_mac(guest: &mut Guest, mac: &str) -> Result<()> {
    for words in ["down", &format!("address {mac}"), "up"] {
        guest.program(&format!("ip link set eth2 {words}"))?;
    }
    Ok(())
}

fn guard(lab: &mut Lab) -> Result<()> {
    const OWN: &str = "10.0.2.2";
    const OTHER: &str = "10.0.2.3";
    lab.shared()?;
    let before = lab.settled()?;
    let undo = network()?;
    let guest = &mut lab.shared()?.guest;
    attach_nic(guest, &format!("ip={OWN}"))?;
    let back = format!("/local/domain/0/backend/vif/{}/2", guest.domain);
    let mac = xs::must_read(&format!("{back}/mac"))?;
    guest.program(&format!("ip address add {OTHER}/24 dev eth2"))?;
    for (guard, own_mac_only, own_ip_only) in
        [("off", false, false), ("ip", true, true), ("mac", true, false), ("off", false, false)]
    {
        // Changed while the NIC is connected.
        xs::write(&format!("{back}/pvio-options"), &format!("guard={guard}"))?;
        std::thread::sleep(Duration::from_millis(500));
        ensure!(answered(guest, OWN)?, "guard={guard}: no echo for own address {OWN}");
        let heard = answered(guest, OTHER)?;
        ensure!(heard != own_ip_only, "guard={guard}: echo for other address {OTHER}: {heard}");
        set_mac(guest, "00:16:3e:00:00:99")?;
        let heard = answered(guest, OWN)?;
        ensure!(heard != own_mac_only, "guard={guard}: echo for other MAC address: {heard}");
        set_mac(guest, &mac)?;
    }
    ensure!(answered(guest, OWN)?, "no echo for own address {OWN} at the end");
    detach_nic(guest)?;
    drop(undo);
    lab.nothing_left(&before)
}
