//! A NIC under floods.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::dom0::lab::{LONG, Lab, SHORT, address};
use crate::net::datagrams::{self, Send, Taken, Taker};
use crate::net::{self, counters};
use crate::scenarios::{BOTH, Guests, NICS, Scenario};
use crate::sys::run::Flake;

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "nic-flood",
    proves: "floods both ways keep data and order correct, and the NIC continues to work",
    backends: NICS,
    kinds: BOTH,
    guests: Guests::Shared,
    run: flood,
}];

/// Returns the number of missing echoes if ping itself may have lost them: none, or at most those that
/// did not fit into ping's socket (four large ones) while the guest was not scheduled. ping sends one
/// every 10 ms then.
fn lost_by_ping(said: &str) -> Option<u64> {
    let (sent, rest) = said.split_once(" packets transmitted, ")?;
    let sent: u64 = sent.rsplit(char::is_whitespace).next()?.parse().ok()?;
    let received: u64 = rest.split(' ').next()?.parse().ok()?;
    let slowest: f64 = said.split("rtt ").nth(1)?.split('/').nth(5)?.parse().ok()?;
    let lost = sent.checked_sub(received)?;
    (lost == 0 || lost as f64 <= slowest / 10.0 - 4.0).then_some(lost)
}

fn flood(lab: &mut Lab) -> Result<()> {
    const COUNT: u64 = 6000;
    const SIZE: usize = 1400;
    let guest = &mut lab.shared()?.guest;
    let mut rows = Vec::new();
    let vif = format!("vif{}.0", guest.domain);
    let before = counters::interface(&vif, "tx_dropped")?;
    for size in [56, 1472, 8000] {
        let ping = format!("ping -f -n -q -c 1500 -W 5 -p a55a -s {size} 10.0.0.1");
        let said = guest.program(&ping)?;
        ensure!(!said.contains("wrong data") && !said.contains("DUP"), "ping: {said}");
        let lost = lost_by_ping(&said);
        if lost.is_some_and(|lost| lost > 0) {
            return Err(Flake(format!("the guest was not scheduled during a ping: {said}")).into());
        }
        ensure!(lost == Some(0), "ping of {size} bytes: {said}");
    }
    let dropped = counters::interface(&vif, "tx_dropped")? - before;
    ensure!(dropped == 0, "{dropped} packets to the guest were dropped");
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
        // More is sent than the queues can hold. What arrives must be intact and in order.
        for taken in [&up, &down] {
            ensure!(
                taken.late == 0,
                "{} of {} datagrams arrived out of order",
                taken.late,
                taken.count
            );
            ensure!(taken.count > COUNT / 100, "only {} of {COUNT} datagrams arrived", taken.count);
        }
        net::echo(&net::client(&address(guest, 0))?, SIZE, seed).context("echo after a flood")?;
    }
    lab.rows = rows;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::lost_by_ping;

    #[test]
    fn lost_pings_are_excused_only_by_long_pause() {
        let said = |received, slowest| {
            format!(
                "PING 10.0.0.1 (10.0.0.1) 8000(8028) bytes of data.\n\n--- 10.0.0.1 ping statistics ---\n\
                 1500 packets transmitted, {received} received, 0.06% packet loss, time 7063ms\n\
                 rtt min/avg/max/mdev = 1.949/4.280/{slowest}/5.341 ms, pipe 6, ipg/ewma 4.711/3.671 ms\n"
            )
        };
        assert_eq!(lost_by_ping(&said(1500, "3.001")), Some(0));
        assert_eq!(lost_by_ping(&said(1499, "131.557")), Some(1));
        assert_eq!(lost_by_ping(&said(1490, "131.557")), None);
        assert_eq!(lost_by_ping(&said(1499, "42.000")), None);
        assert_eq!(lost_by_ping("ping: no"), None);
    }
}
