//! A NIC as fast as it can.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::dom0::lab::{LONG, Lab, SHORT, address};
use crate::net;
use crate::net::datagrams::{self, Send, Taken, Taker};
use crate::scenarios::{BOTH, Guests, NICS, Scenario};

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "nic-flood",
    proves: "floods both ways change no byte and no order, and the NIC works on",
    backends: NICS,
    kinds: BOTH,
    guests: Guests::Shared,
    run: flood,
}];

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
        let order = Send { server, port: 5602, size: SIZE, count: COUNT, seed, rest: 0 };
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
