//! dom0 as a router between a guest and a network namespace that verifies every checksum.

use std::fs::File;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::json;

use super::undo::{Undo, ip};
use super::{SEGMENT, ensure_long, packets_at, transfer_at};
use crate::dom0::guest::Guest;
use crate::dom0::lab::{LONG, Lab, SHORT, address};
use crate::net::{self, counters};
use crate::scenarios::{BOTH, Guests, NICS, Scenario};
use crate::sys::{self, modules};

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "nic-forward",
    proves: "packets that a guest leaves to offloads have correct checksums after dom0 has routed \
             them",
    backends: NICS,
    kinds: BOTH,
    guests: Guests::Shared,
    run: forward,
}];

/// Name of the namespace, dom0's address and the namespace's address on the link between them.
const SPACE: &str = "beyond";
const NEAR: &str = "10.0.9.1";
const FAR: &str = "10.0.9.2";
const BULK: u64 = 4 << 20;

/// Runs a function in the namespace; sockets that it creates stay there.
fn beyond<T: Send + 'static>(what: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let thread = thread::spawn(move || {
        let space = File::open(format!("/run/netns/{SPACE}")).context(SPACE)?;
        move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network))?;
        what()
    });
    thread.join().map_err(|_| anyhow!("a thread in the namespace panicked"))?
}

/// Returns the number of packets with a wrong checksum that the namespace, dom0 and the guest have
/// counted.
fn wrong(guest: &mut Guest) -> Result<u64> {
    const COUNTERS: [(&str, &str); 3] =
        [("Udp", "InCsumErrors"), ("Tcp", "InCsumErrors"), ("Icmp", "InCsumErrors")];
    let mut sum = beyond(|| {
        COUNTERS.iter().map(|(protocol, it)| counters::protocol(protocol, it)).sum::<Result<u64>>()
    })?;
    for counter in COUNTERS {
        let there = guest.ask("protocol-counter", json!(counter), SHORT)?;
        sum += there.as_u64().context("a number")?;
    }
    Ok(sum)
}

/// Creates the namespace at the other end of a pair of interfaces, neither of which has checksum or
/// segmentation offload.
fn wire(undo: &mut Undo) -> Result<()> {
    modules::load("veth")?;
    undo.later(|| {
        // `ip` mounts the directory on itself, to share the mounts below it.
        let _ = rustix::mount::unmount("/run/netns", rustix::mount::UnmountFlags::DETACH);
        let _ = std::fs::remove_dir("/run/netns");
    });
    undo.ip(&format!("netns add {SPACE}"), &format!("netns del {SPACE}"))?;
    undo.ip(&format!("link add near type veth peer name far netns {SPACE}"), "link del near")?;
    undo.sysctl("net/ipv4/ip_forward", "1")?;
    ip(&format!("address add {NEAR}/24 dev near"))?;
    ip("link set near up")?;
    for words in [
        format!("address add {FAR}/24 dev far"),
        "link set lo up".to_owned(),
        "link set far up".to_owned(),
        format!("route add default via {NEAR}"),
    ] {
        ip(&format!("-n {SPACE} {words}"))?;
    }
    let off = ["tx", "off", "tso", "off", "gso", "off"];
    sys::succeed(&[&["ethtool", "-K", "near"], &off[..]].concat(), SHORT)?;
    let there = ["ip", "netns", "exec", SPACE, "ethtool", "-K", "far"];
    sys::succeed(&[&there[..], &off[..]].concat(), SHORT)?;
    Ok(())
}

fn forward(lab: &mut Lab) -> Result<()> {
    let guest = &mut lab.shared()?.guest;
    let mut undo = Undo::default();
    wire(&mut undo)?;
    guest.program("ip route replace 10.0.9.0/24 via 10.0.0.1 dev eth0")?;
    let features = guest.program("ethtool -k eth0")?;
    for on in ["tx-checksumming: on", "tcp-segmentation-offload: on"] {
        ensure!(features.contains(on), "the guest's NIC lacks {on}: {features}");
    }
    let before = wrong(guest)?;
    let echoes = beyond(|| net::Echoes::at(FAR))?;
    let sizes = [8, 9, 17, 60, 1000, 1471, 1472, 1473, 4096, 9000, 65_507];
    guest.ask("nic-echo", json!({ "server": FAR, "sizes": sizes, "rounds": 3 }), LONG)?;
    let to = address(guest, 0);
    let socket: UdpSocket = beyond(move || net::client(&to))?;
    for size in sizes {
        net::echo(&socket, size, 5_000 + size as u64)?;
    }
    let listener = || beyond(|| TcpListener::bind((FAR, 0)).context("listen"));
    let (sent, _) = packets_at(guest, FAR, listener()?, BULK)?;
    ensure_long(sent, BULK).context("TSO of the guest's NIC was not used")?;
    // Without TSO, the guest computes the checksums (`tx off`) or leaves them blank (`tx on`).
    guest.program("ethtool -K eth0 tso off")?;
    let (cut, _) = packets_at(guest, FAR, listener()?, BULK / 8)?;
    ensure!(
        cut >= BULK / 8 / SEGMENT,
        "{cut} packets without TSO: fewer than the segments of the transfer"
    );
    for step in ["tx off", "tx on", "tso on"] {
        guest.program(&format!("ethtool -K eth0 {step}"))?;
        transfer_at(guest, FAR, listener()?, BULK / 8).context(step)?;
    }
    let after = wrong(guest)?;
    ensure!(after == before, "{} packets had a wrong checksum", after - before);
    guest.program("ip route del 10.0.9.0/24")?;
    drop((echoes, socket, undo));
    let left = sys::succeed(&["ip", "link", "show"], SHORT)?;
    ensure!(!left.contains("near"), "interface was not removed: {left}");
    ensure!(!std::fs::exists("/run/netns")?, "/run/netns was not removed");
    lab.rows = vec![json!({ "packets sent": sent, "of bytes": BULK, "wrong checksums": 0 })];
    Ok(())
}
