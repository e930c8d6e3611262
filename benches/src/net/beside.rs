//! A guest that transmits beside one that misuses its NIC.

use super::wire::Link;
use super::{Attached, CASES, Case};
use crate::neighbours::pairs::{SLICE, Side, beside, compare};
use crate::pin::pin;
use crate::row::Row;
use anyhow::{Context, Result};
use pvio_event_channel::EventChannel;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What the hostile guest does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Misuse {
    /// Sends events without packets.
    Events,
    /// Does not read while the host sends to it all the time. Its honest counterpart reads.
    Stall,
}

const MISUSES: [(&str, Misuse); 2] =
    [("nic-beside-event-storm", Misuse::Events), ("nic-beside-stalled-guest", Misuse::Stall)];

/// What the measured guest does.
const MEASURED: &str = "tx-1514";
const RECEIVES: &str = "rx-1514";

fn workload(name: &str) -> Result<&'static Case> {
    CASES.iter().find(|case| case.name == name).context("a workload of the net suite")
}

/// Measures every case whose name contains `only`.
///
/// # Errors
/// There is no permission to create taps in this network namespace.
pub fn run(dir: &Path, runs: usize, only: &str) -> Result<Vec<Row>> {
    let selected: Vec<_> = MISUSES.iter().filter(|(name, _)| name.contains(only)).collect();
    let attach = |name: &str, net, case| {
        Attached::with_link(&dir.join(name), case, Link::new(name, net, case)?)
    };
    let measure = |(name, misuse): &(&str, Misuse)| {
        let neighbours = workload(match misuse {
            Misuse::Events => MEASURED,
            Misuse::Stall => RECEIVES,
        })?;
        let mut measured = attach("measured", 3, workload(MEASURED)?)?;
        let mut honest = attach("honest", 4, neighbours)?;
        let mut hostile = attach("hostile", 5, neighbours)?;
        compare(name, "packets/s", runs, |side| {
            let slice = || {
                pin(0);
                Ok(measured.send(|begin, _| begin.elapsed() >= SLICE)?.per_second())
            };
            match side {
                Side::Honest => beside(slice, |stop| honest.work_until(stop)),
                Side::Hostile => beside(slice, |stop| hostile.misuse_until(*misuse, stop)),
            }
        })
    };
    selected.into_iter().map(measure).collect()
}

impl Attached {
    fn work_until(&mut self, stop: &AtomicBool) -> Result<()> {
        pin(0);
        let _sender = self.case.receive.then(|| self.link.sender(&self.case)).transpose()?;
        let is_over = |_, _| stop.load(Ordering::Relaxed);
        let done = if self.case.receive { self.receive(is_over) } else { self.send(is_over) };
        done.map(drop)
    }

    fn misuse_until(&mut self, misuse: Misuse, stop: &AtomicBool) -> Result<()> {
        pin(0);
        let _sender = self.case.receive.then(|| self.link.sender(&self.case)).transpose()?;
        while !stop.load(Ordering::Relaxed) {
            match misuse {
                Misuse::Events => self.front.channel().notify()?,
                Misuse::Stall => std::thread::sleep(Duration::from_millis(10)),
            }
        }
        Ok(())
    }
}
