//! How fast a NIC goes: as fast as it may, and as fast as it can.

use std::net::TcpListener;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

use super::vif;
use crate::dom0::guest::{Guest, Spec};
use crate::dom0::lab::{LONG, Lab, NIC, SHORT, address};
use crate::dom0::xs;
use crate::net::datagrams::{self, Send, Taken, Taker};
use crate::net::{self, counters};
use crate::scenarios::{BOTH, Guests, NICS, Scenario};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "nic-rate",
        proves: "TCP and UDP go as fast as `rate` allows, within 5 %, also when it is changed",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Own,
        run: rate,
    },
    Scenario {
        name: "nic-flood",
        proves: "floods both ways change no byte and no order, and the NIC works on",
        backends: NICS,
        kinds: BOTH,
        guests: Guests::Shared,
        run: flood,
    },
];

/// What a burst may take at first.
const WARM: Duration = Duration::from_millis(1500);
const LENGTH: Duration = Duration::from_secs(4);

fn rate(lab: &mut Lab) -> Result<()> {
    let mut spec = Spec::new(lab.kind, lab.backend);
    spec.nics = vec![format!("{NIC},rate=10Mb/s")];
    let mut guest = Guest::start(&spec)?;
    let own = format!("{}/24", address(&guest, 0));
    guest.ask("nic-up", json!({ "name": "eth0", "address": own }), SHORT)?;
    let node = format!("/local/domain/0/backend/vif/{}/0/rate", guest.domain);
    let of_xl = xs::must_read(&node)?;
    let mut rows = vec![json!({ "rate as xl says it": of_xl })];
    let mut wrong = Vec::new();
    // Bytes in an interval of microseconds.
    for (value, mbit) in [(of_xl.as_str(), 10.0), ("250000,50000", 40.0), ("31250,50000", 5.0)] {
        xs::write(&node, value)?;
        for (protocol, measured) in [("TCP", tcp(&mut guest)?), ("UDP", udp(&mut guest)?)] {
            rows.push(json!({ "of": protocol, "Mbit/s": mbit, "measured": measured }));
            if (measured / mbit - 1.0).abs() > 0.05 {
                wrong.push(format!("{protocol} at {mbit} Mbit/s: {measured:.2}"));
            }
        }
    }
    lab.rows = rows;
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    lab.watched(guest, |guest| guest.power_off())
}

/// Mbit/s of what the interface takes of the guest, once a burst is over.
fn measure(name: &str) -> Result<f64> {
    thread::sleep(WARM);
    let (start, before) = (Instant::now(), counters::interface(name, "rx_bytes")?);
    thread::sleep(LENGTH);
    let (seconds, after) = (start.elapsed(), counters::interface(name, "rx_bytes")?);
    Ok((after - before) as f64 * 8.0 / 1e6 / seconds.as_secs_f64())
}

fn tcp(guest: &mut Guest) -> Result<f64> {
    let listener = TcpListener::bind("10.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let order = json!({ "server": "10.0.0.1", "port": port, "bytes": 1_u64 << 40, "seed": 61 });
    guest.ask("tcp-stream", order, SHORT)?;
    let (stream, _) = listener.accept()?;
    let end = Instant::now() + WARM + LENGTH;
    let taker = thread::spawn(move || net::until(stream, 61, end));
    let measured = measure(&vif(guest, 0));
    let bytes = taker.join().map_err(|_| anyhow!("the taker panicked"))??;
    ensure!(bytes > 0, "nothing came");
    measured
}

fn udp(guest: &mut Guest) -> Result<f64> {
    const SIZE: usize = 1400;
    let taker = Taker::start(5600, 62, None)?;
    let order = json!({ "server": "10.0.0.1", "port": 5600, "size": SIZE, "count": 1_u64 << 40,
                        "seed": 62, "rest": 0, "seconds": 6 });
    guest.ask("datagrams-go", order, SHORT)?;
    let measured = measure(&vif(guest, 0));
    // It goes on for another half second.
    guest.ask("datagrams-gone", Value::Null, SHORT)?;
    let taken = taker.end()?;
    ensure!(taken.count > 0 && taken.late == 0, "{taken:?}");
    measured
}

fn flood(lab: &mut Lab) -> Result<()> {
    const COUNT: u64 = 6000;
    const SIZE: usize = 1400;
    let guest = &mut lab.shared()?.guest;
    let mut rows = Vec::new();
    for size in [56, 1472, 8000] {
        let ping = format!("ping -f -n -q -c 1500 -W 5 -p a55a -s {size} 10.0.0.1");
        let said = guest.program(&ping)?;
        ensure!(!said.contains("wrong data") && !said.contains("DUP"), "ping: {said}");
        ensure!(said.contains(" 0% packet loss"), "ping of {size} bytes: {said}");
    }
    for round in 0..3 {
        let seed = 70 + round;
        let taker = Taker::start(5601, seed, None)?;
        let order = json!({ "server": "10.0.0.1", "port": 5601, "size": SIZE, "count": COUNT,
                            "seed": seed, "rest": 0 });
        guest.ask("datagrams-send", order, LONG)?;
        let up = taker.end()?;
        guest.ask("datagrams-start", json!({ "port": 5602, "seed": seed }), SHORT)?;
        let server = address(guest, 0);
        let order =
            Send { server, port: 5602, size: SIZE, count: COUNT, seed, rest: 0, seconds: None };
        datagrams::send(&order)?;
        let down: Taken =
            serde_json::from_value(guest.ask("datagrams-end", Value::Null, SHORT)?)?;
        rows.push(json!({ "sent each way": COUNT, "up": up, "down": down }));
        // More is sent than there is room for; what does come is whole, and in order.
        for taken in [&up, &down] {
            ensure!(taken.late == 0, "{} of {} datagrams out of order", taken.late, taken.count);
            ensure!(taken.count > COUNT / 100, "{} of {COUNT} datagrams", taken.count);
        }
        net::echo(&net::client(&address(guest, 0))?, SIZE, seed).context("after a flood")?;
    }
    lab.rows = rows;
    Ok(())
}
