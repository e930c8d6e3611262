//! IPv6, jumbo frames, VLAN tags, multicast groups.

use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::undo::{Undo, ip};
use super::{ensure_long, packets_at, transfer, transfer_at, vif};
use crate::dom0::guest::Guest;
use crate::dom0::lab::{LONG, Lab, SHORT, address};
use crate::net::datagrams::{self, Group, Send, Taken, Taker};
use crate::net::{self, counters};
use crate::scenarios::{BOTH, Guests, NICS, Scenario};
use crate::sys::modules;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "nic-ipv6",
        proves: "neighbour discovery, datagrams and TCP segments longer than the MTU pass over \
                 IPv6",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: ipv6,
    },
    Scenario {
        name: "nic-jumbo",
        proves: "frames of 9014 bytes pass both ways unfragmented, and longer ones do not",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: jumbo,
    },
    Scenario {
        name: "nic-vlan",
        proves: "VLAN-tagged frames reach the same tag at the bridge and at the vif, and no other \
                 tag",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: vlan,
    },
    Scenario {
        name: "nic-multicast",
        proves: "the bridge learns the guest's multicast groups: only their frames reach its NIC",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: multicast,
    },
];

const BULK: u64 = 4 << 20;

fn ipv6(lab: &mut Lab) -> Result<()> {
    const SERVER: &str = "fd00::1";
    let guest = &mut lab.shared()?.guest;
    let mut undo = Undo::default();
    for name in ["lo", "xenbr0"] {
        undo.sysctl(&format!("net/ipv6/conf/{name}/disable_ipv6"), "0")?;
    }
    undo.ip(
        &format!("-6 address add {SERVER}/64 dev xenbr0 nodad"),
        &format!("-6 address del {SERVER}/64 dev xenbr0"),
    )?;
    let own = format!("fd00::2:{}", guest.domain);
    guest.program(&format!("ip -6 address replace {own}/64 dev eth0 nodad"))?;
    let echoes = net::Echoes::at(SERVER)?;
    guest.ask("echo-at", json!(own), SHORT)?;
    // Both sides look up the neighbour again, with multicast.
    guest.program("ip -6 neighbour flush dev eth0")?;
    ip("-6 neighbour flush dev xenbr0")?;
    let sizes = [8, 18, 60, 1000, 1451, 1452, 1453, 4096, 9000, 65_507];
    guest.ask("nic-echo", json!({ "server": SERVER, "sizes": sizes, "rounds": 3 }), LONG)?;
    let socket = net::client(&own)?;
    for size in sizes {
        net::echo(&socket, size, 2_000 + size as u64)?;
    }
    let mac = guest.ask("nic-up", json!({ "name": "eth0", "address": addressed(guest) }), SHORT)?;
    let known = ip(&format!("-6 neighbour show to {own} dev xenbr0"))?;
    ensure!(
        known.contains(mac.as_str().context("an address")?),
        "neighbour entry is {known}, not {mac}"
    );
    let said =
        guest.program(&format!("ping -6 -n -q -c 3 -i 0.2 -W 5 -p a55a -s 9000 {SERVER}"))?;
    ensure!(said.contains(" 0% packet loss"), "ping: {said}");
    let features = guest.program("ethtool -k eth0")?;
    ensure!(features.contains("tx-tcp6-segmentation: on"), "no TSO over IPv6: {features}");
    let listener = TcpListener::bind((SERVER, 0))?;
    let (sent, received) = packets_at(guest, SERVER, listener, BULK)?;
    lab.rows = vec![json!({ "packets sent": sent, "received": received, "of bytes": BULK })];
    ensure_long(sent, BULK).context("TSO from the guest")?;
    ensure_long(received, BULK).context("TSO to the guest")?;
    let guest = &mut lab.shared()?.guest;
    guest.program("ethtool -K eth0 tso off gso off gro off tx off")?;
    transfer_at(guest, SERVER, TcpListener::bind((SERVER, 0))?, BULK / 4)?;
    guest.program("ethtool -K eth0 tx on gro on gso on tso on")?;
    guest.program(&format!("ip -6 address del {own}/64 dev eth0"))?;
    drop(echoes);
    Ok(())
}

fn addressed(guest: &Guest) -> String {
    format!("{}/24", address(guest, 0))
}

/// Returns the number of fragments that dom0 and the guest have created and reassembled.
fn fragments(guest: &mut Guest) -> Result<u64> {
    let mut sum = 0;
    for counter in ["FragCreates", "ReasmReqds"] {
        sum += counters::protocol("Ip", counter)?;
        let there = guest.ask("protocol-counter", json!(["Ip", counter]), SHORT)?;
        sum += there.as_u64().context("a number")?;
    }
    Ok(sum)
}

fn jumbo(lab: &mut Lab) -> Result<()> {
    let guest = &mut lab.shared()?.guest;
    let mut undo = Undo::default();
    let name = vif(guest, 0);
    for name in [name.as_str(), "xenbr0"] {
        let set = |mtu: u32| format!("link set {name} mtu {mtu}");
        undo.ip(&set(9000), &set(1500))?;
    }
    guest.program("ip link set eth0 mtu 9000")?;
    let before = fragments(guest)?;
    let sizes = [1472, 1473, 4096, 8192, 8971, 8972];
    // The kernel does not fragment datagrams that fit into the MTU.
    guest.ask("nic-echo", json!({ "server": "10.0.0.1", "sizes": sizes, "rounds": 4 }), LONG)?;
    let socket = net::client(&address(guest, 0))?;
    for (round, size) in sizes.iter().cycle().take(24).enumerate() {
        net::echo(&socket, *size, 3_000 + round as u64)?;
    }
    let ping = "ping -n -q -M do -c 3 -i 0.2 -W 5 -p a55a";
    let said = guest.program(&format!("{ping} -s 8972 10.0.0.1"))?;
    ensure!(said.contains(" 0% packet loss"), "ping: {said}");
    let longer = guest.program(&format!("{ping} -s 8973 10.0.0.1"));
    ensure!(longer.is_err(), "a packet of 9001 bytes was sent with an MTU of 9000: {longer:?}");
    let after = fragments(guest)?;
    ensure!(after == before, "{} fragments were created or reassembled", after - before);
    // Without offloads, every long segment is a long frame.
    guest.program("ethtool -K eth0 tso off gso off gro off")?;
    let listener = TcpListener::bind(("10.0.0.1", 0))?;
    let (sent, received) = packets_at(guest, "10.0.0.1", listener, BULK)?;
    guest.program("ethtool -K eth0 gro on gso on tso on")?;
    transfer(guest, BULK)?;
    guest.program("ip link set eth0 mtu 1500")?;
    lab.rows = vec![json!({ "frames sent": sent, "received": received, "of bytes": BULK })];
    ensure_long(sent, BULK).context("frames from the guest")?;
    ensure_long(received, BULK).context("frames to the guest")
}

fn vlan(lab: &mut Lab) -> Result<()> {
    modules::load("8021q")?;
    let guest = &mut lab.shared()?.guest;
    guest.ask("module", json!("8021q"), SHORT)?;
    let mut undo = Undo::default();
    let under = [("xenbr0".to_owned(), 0, 5), (vif(guest, 1), 1, 6)];
    for (below, nic, tag) in &under {
        undo.ip(
            &format!("link add link {below} name tag{tag} type vlan id {tag}"),
            &format!("link del tag{tag}"),
        )?;
        ip(&format!("address add 10.0.{tag}.1/24 dev tag{tag}"))?;
        ip(&format!("link set tag{tag} up"))?;
        let name = format!("eth{nic}.{tag}");
        guest.program(&format!("ip link add link eth{nic} name {name} type vlan id {tag}"))?;
        let order = json!({ "name": name, "address": format!("10.0.{tag}.2/24") });
        guest.ask("nic-up", order, SHORT)?;
    }
    for (_, nic, tag) in &under {
        let server = format!("10.0.{tag}.1");
        let sizes = [8, 18, 60, 1000, 1471, 1472, 1473, 4096, 9000, 65_507];
        let order = json!({ "server": server, "sizes": sizes, "rounds": 3 });
        guest.ask("nic-echo", order, LONG).with_context(|| format!("tag {tag}"))?;
        let socket = net::client(&format!("10.0.{tag}.2"))?;
        for size in sizes {
            net::echo(&socket, size, 4_000 + size as u64).with_context(|| format!("tag {tag}"))?;
        }
        transfer_at(guest, &server, TcpListener::bind((server.as_str(), 0))?, BULK)?;
        let order = json!([format!("eth{nic}.{tag}"), "rx_bytes"]);
        let tagged = guest.ask("nic-counter", order, SHORT)?.as_u64();
        ensure!(tagged > Some(BULK), "the guest received only {tagged:?} bytes with tag {tag}");
        let tagged = counters::interface(&format!("tag{tag}"), "rx_bytes")?;
        ensure!(tagged > BULK, "dom0 received only {tagged} bytes with tag {tag}");
    }
    // The same network on another VLAN is separate.
    ip("address add 10.0.7.1/24 dev tag5")?;
    guest.program("ip link add link eth0 name eth0.7 type vlan id 7")?;
    guest.ask("nic-up", json!({ "name": "eth0.7", "address": "10.0.7.2/24" }), SHORT)?;
    let other = guest.program("ping -n -q -c 3 -i 0.2 -W 1 10.0.7.1");
    let no = other.as_ref().err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(no.contains("100% packet loss"), "frames of VLAN 7 reached VLAN 5: {other:?}");
    for name in ["eth0.5", "eth1.6", "eth0.7"] {
        guest.program(&format!("ip link del {name}"))?;
    }
    Ok(())
}

const GROUP: Ipv4Addr = Ipv4Addr::new(239, 1, 2, 3);
const PORT: u16 = 5400;
const COUNT: u64 = 200;

fn multicast(lab: &mut Lab) -> Result<()> {
    let guest = &mut lab.shared()?.guest;
    let mut undo = Undo::default();
    // The bridge forwards multicast frames only to members once it has a querier. Its timeouts must
    // be set before that.
    for (quick, usual) in [
        ("mcast_query_response_interval 50", "mcast_query_response_interval 1000"),
        ("mcast_startup_query_interval 100", "mcast_startup_query_interval 3125"),
        ("mcast_last_member_interval 20", "mcast_last_member_interval 100"),
        ("mcast_snooping 1 mcast_querier 1", "mcast_snooping 1 mcast_querier 0"),
    ] {
        let set = |words| format!("link set xenbr0 type bridge {words}");
        undo.ip(&set(quick), &set(usual))?;
    }
    undo.ip("route add 239.1.2.0/24 dev xenbr0", "route del 239.1.2.0/24 dev xenbr0")?;
    guest.program("ip route replace 239.1.2.0/24 dev eth0")?;
    std::thread::sleep(Duration::from_secs(2));

    let by: Ipv4Addr = address(guest, 0).parse()?;
    let group = json!({ "group": GROUP, "by": by });
    let (taken, frames, other) = heard(guest, &group)?;
    all(&taken).context("guest as group member")?;
    ensure!(frames >= taken.count, "{frames} frames sent to the NIC, {taken:?} received");
    ensure!(other < COUNT / 4, "{other} of {COUNT} frames reached a NIC that is not in the group");
    // The guest leaves the group when its socket is closed.
    std::thread::sleep(Duration::from_secs(2));
    let (taken, left, _) = heard(guest, &Value::Null)?;
    ensure!(taken.count == 0, "datagrams received after leaving the group: {taken:?}");
    ensure!(
        left < COUNT / 4,
        "{left} of {COUNT} frames reached the NIC after the guest left the group"
    );
    lab.rows = vec![json!({ "frames in the group": frames, "beside": other, "after": left })];

    let guest = &mut lab.shared()?.guest;
    let taker = Taker::start(PORT, 51, Some(Group::new(GROUP, Ipv4Addr::new(10, 0, 0, 1))))?;
    let order = json!({ "server": GROUP, "port": PORT, "size": 1000, "count": COUNT, "seed": 51,
                        "rest": 20 });
    guest.ask("datagrams-send", order, SHORT)?;
    let taken = taker.end()?;
    all(&taken).context("datagrams sent by the guest")?;
    guest.program("ip route del 239.1.2.0/24 dev eth0").map(drop)
}

/// Checks that all datagrams from the first received one on have arrived. The first ones may be
/// lost, until the bridge knows the member.
fn all(taken: &Taken) -> Result<()> {
    let whole = taken.next == COUNT && taken.count == COUNT - taken.first && taken.late == 0;
    ensure!(whole && taken.count > COUNT / 2, "{taken:?} of {COUNT}");
    Ok(())
}

/// Sends to the group, with or without the guest as a member. Returns what the guest received, and
/// the number of frames to its first and to its second NIC.
fn heard(guest: &mut Guest, group: &Value) -> Result<(Taken, u64, u64)> {
    let order = json!({ "port": PORT, "seed": 52, "group": group });
    guest.ask("datagrams-start", order, SHORT)?;
    // The bridge processes the membership report.
    std::thread::sleep(Duration::from_secs(1));
    let (first, second) = (vif(guest, 0), vif(guest, 1));
    let count = |name: &str| counters::interface(name, "tx_packets");
    let before = (count(&first)?, count(&second)?);
    let server = GROUP.to_string();
    let order = Send { server, port: PORT, size: 1000, count: COUNT, seed: 52, rest: 20 };
    datagrams::send(&order)?;
    // The NIC must work in any case.
    net::echo(&net::client(&address(guest, 0))?, 1000, 53)?;
    let after = (count(&first)?, count(&second)?);
    let taken = guest.ask("datagrams-end", Value::Null, SHORT)?;
    Ok((serde_json::from_value(taken)?, after.0 - before.0, after.1 - before.1))
}
