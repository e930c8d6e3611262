//! NICs: all sizes, both directions, with and without offloads.
//!
//! | module | contents |
//! |---|---|
//! | [`wire`] | IPv6, jumbo frames, VLAN tags, multicast groups |
//! | [`forward`] | dom0 as a router |
//! | [`pace`] | floods |
//! | [`rate`] | rate limits, of one NIC and of several together |
//! | [`many`] | several queues, traffic between guests |
//! | [`plugged`] | pvio's own switch, and its guard |
//! | [`undo`] | restores the configuration of dom0 after a scenario |

pub mod forward;
pub mod many;
pub mod pace;
pub mod plugged;
pub mod rate;
pub mod undo;
pub mod wire;

use std::net::TcpListener;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::json;

use super::{BOTH, Guests, NICS, Scenario};
use crate::dom0::guest::Guest;
use crate::dom0::lab::{LONG, Lab, SHORT, address};
use crate::net::counters;
use crate::{net, sys};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "nic-sizes",
        proves: "datagrams and pings of 8 B to 64 KiB pass two NICs both ways, with every byte \
                 compared",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: sizes,
    },
    Scenario {
        name: "nic-bulk",
        proves: "TCP and UDP both ways by iperf3, and 16 MiB both ways with equal checksums",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: bulk,
    },
    Scenario {
        name: "nic-offloads",
        proves: "data is correct with checksum offload, SG, TSO, GSO and GRO switched off and on \
                 in the guest",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: offloads,
    },
];

/// Each offload is switched off in addition to those before it, then all are switched on again.
const STEPS: &[&str] = &[
    "tso off", "gso off", "gro off", "sg off", "tx off", "tx on", "sg on", "gro on", "gso on",
    "tso on",
];

/// Sizes around each boundary: shortest frame, page, MTU, fragments, the longest datagram.
const SIZES: &[usize] = &[
    8, 17, 18, 19, 60, 64, 128, 256, 512, 1000, 1471, 1472, 1473, 2048, 4054, 4096, 8192, 9000,
    16_384, 32_768, 65_000, 65_507,
];

fn sizes(lab: &mut Lab) -> Result<()> {
    let guest = &mut lab.shared()?.guest;
    for nic in 0..2 {
        let server = format!("10.0.{nic}.1");
        guest.ask("nic-echo", json!({ "server": server, "sizes": SIZES, "rounds": 3 }), LONG)?;
        let socket = net::client(&address(guest, nic))?;
        for size in SIZES {
            net::echo(&socket, *size, 1_000 + *size as u64)?;
        }
    }
    for size in [0, 56, 1472, 1473, 9000, 65_507] {
        let ping = format!("ping -n -q -c 3 -i 0.2 -W 5 -p a55a -s {size} 10.0.0.1");
        let said = guest.program(&ping)?;
        ensure!(said.contains(" 0% packet loss"), "ping of {size} bytes: {said}");
    }
    Ok(())
}

fn bulk(lab: &mut Lab) -> Result<()> {
    let guest = &mut lab.shared()?.guest;
    transfer(guest, 16 << 20)?;
    let mut rows = Vec::new();
    for words in ["-t 3", "-t 3 -R", "-t 2 -u -b 8M -l 1400", "-t 2 -u -b 8M -l 1400 -R"] {
        let server = thread::spawn(|| sys::succeed(&["iperf3", "-s", "-1", "-p", "5201"], LONG));
        // It does not report when it is listening.
        thread::sleep(Duration::from_millis(1500));
        let seen = iperf(guest, "10.0.0.1", words)?;
        server.join().map_err(|_| anyhow!("the server's thread panicked"))??;
        rows.push(json!({ "iperf3": words, "receiver": seen }));
    }
    lab.rows = rows;
    Ok(())
}

/// Runs iperf3 in a guest as client of a listening one; returns the line with the receiver's
/// result.
fn iperf(guest: &mut Guest, server: &str, words: &str) -> Result<String> {
    let said = guest.program(&format!("iperf3 -c {server} -p 5201 {words}"))?;
    let line = said.lines().rfind(|line| line.trim_end().ends_with("receiver"));
    let line =
        line.with_context(|| format!("iperf3 {words} printed no receiver line: {said}"))?.trim();
    let got = line.split_whitespace().collect::<Vec<_>>();
    let bytes = got.iter().position(|word| word.ends_with("Bytes")).context(line.to_owned())?;
    let bytes: f64 = got[bytes.saturating_sub(1)].parse().context(line.to_owned())?;
    ensure!(bytes > 0.0, "iperf3 {words}: no data was received: {line}");
    if words.contains("-u") {
        let lost = got.iter().find_map(|word| word.split_once('/')?.0.parse::<u64>().ok());
        let all = got.iter().find_map(|word| word.split_once('/')?.1.parse::<u64>().ok());
        let (lost, all) = lost.zip(all).context(line.to_owned())?;
        ensure!(lost < all / 2, "iperf3 {words}: {lost} of {all} datagrams were lost");
    }
    Ok(line.to_owned())
}

/// Transfers `bytes` in each direction, with checksums on both sides.
pub fn transfer(guest: &mut Guest, bytes: u64) -> Result<()> {
    let listener = TcpListener::bind("10.0.0.1:0")?;
    transfer_at(guest, "10.0.0.1", listener, bytes)
}

/// Does the same with a server and its listener.
fn transfer_at(guest: &mut Guest, server: &str, listener: TcpListener, bytes: u64) -> Result<()> {
    send_at(guest, server, listener.try_clone()?, bytes)?;
    receive_at(guest, server, listener, bytes)
}

/// Sends `bytes` from the guest to a server and its listener; compares the checksums of both sides.
fn send_at(guest: &mut Guest, server: &str, listener: TcpListener, bytes: u64) -> Result<()> {
    let port = listener.local_addr()?.port();
    let receiver = thread::spawn(move || net::receive(&listener, 21));
    let order = json!({ "server": server, "port": port, "bytes": bytes, "seed": 21 });
    let sent = guest.ask("tcp-send", order, LONG)?;
    let (received, sum) = receiver.join().map_err(|_| anyhow!("the receiver panicked"))??;
    ensure!(
        received == bytes && sent == sum,
        "{received} of {bytes} bytes received, checksum {sum}, sent {sent}"
    );
    Ok(())
}

/// Sends `bytes` from a server and its listener to the guest; compares the checksums of both sides.
fn receive_at(guest: &mut Guest, server: &str, listener: TcpListener, bytes: u64) -> Result<()> {
    let port = listener.local_addr()?.port();
    let sender = thread::spawn(move || -> Result<String> {
        let (stream, _) = listener.accept().context("accept")?;
        net::pour(stream, bytes, 22)
    });
    let order = json!({ "server": server, "port": port, "seed": 22 });
    let received = guest.ask("tcp-receive", order, LONG)?;
    let sent = sender.join().map_err(|_| anyhow!("the sender panicked"))??;
    let expected = json!({ "bytes": bytes, "sum": sent });
    ensure!(received == expected, "the guest received {received} instead of {expected}");
    Ok(())
}

fn vif(guest: &Guest, nic: usize) -> String {
    format!("vif{}.{nic}", guest.domain)
}

/// Largest TCP payload of a packet of 1500 bytes.
const SEGMENT: u64 = 1460;

/// Transfers `bytes` each way and returns the number of packets that the guest's first NIC sent, as dom0
/// counts them, and that it received. Each direction is counted alone: the other one's acknowledgements
/// depend on timing.
fn packets_at(
    guest: &mut Guest,
    server: &str,
    listener: TcpListener,
    bytes: u64,
) -> Result<(u64, u64)> {
    let name = vif(guest, 0);
    let here = || counters::interface(&name, "rx_packets");
    let before = here()?;
    send_at(guest, server, listener.try_clone()?, bytes)?;
    let sent = here()? - before;
    let there = |guest: &mut Guest| -> Result<u64> {
        let count = guest.ask("nic-counter", json!(["eth0", "rx_packets"]), SHORT)?;
        count.as_u64().context("a number")
    };
    let before = there(guest)?;
    receive_at(guest, server, listener, bytes)?;
    Ok((sent, there(guest)? - before))
}

/// Checks that some packets were longer than 1500 bytes: this number of shorter ones cannot carry `bytes`,
/// at any speed.
fn ensure_long(packets: u64, bytes: u64) -> Result<()> {
    let most = bytes / SEGMENT;
    ensure!(
        packets < most,
        "{packets} packets for {most} segments: none was longer than 1500 bytes"
    );
    Ok(())
}

fn offloads(lab: &mut Lab) -> Result<()> {
    let mut rows = Vec::new();
    let guest = &mut lab.shared()?.guest;
    let some: Vec<_> = SIZES.iter().step_by(4).collect();
    for step in STEPS {
        let start = Instant::now();
        guest.program(&format!("ethtool -K eth0 {step}"))?;
        let echo = json!({ "server": "10.0.0.1", "sizes": some, "rounds": 1 });
        guest.ask("nic-echo", echo, SHORT)?;
        transfer(guest, 1 << 20).with_context(|| format!("after `ethtool -K eth0 {step}`"))?;
        rows.push(json!({ "after": step, "seconds": start.elapsed().as_secs_f64() }));
    }
    lab.rows = rows;
    Ok(())
}
