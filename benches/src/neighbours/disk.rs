//! A guest that reads beside one that misuses its disk.

use super::machine::{Guest, Machine};
use super::pairs::{SLICE, Side, beside, compare};
use crate::disk::{CASES, Case, Load, image};
use crate::pin::pin;
use crate::row::Row;
use anyhow::{Context, Result};
use pvio_blkfront::{Op, Queue, SlotId};
use pvio_event_channel::EventChannel;
use pvio_hosted::Domain;
use pvio_runtime::Spin;
use pvio_xenbus::Xenstore;
use pvio_xenbus::handshake::common::state_path;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// What the hostile guest does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Misuse {
    /// Sends events without requests.
    Events,
    /// As many large requests as its ring holds, all the time.
    LargeRequests,
    /// Writes to a disk that is read-only.
    RejectedRequests,
    /// Flushes.
    Flushes,
    /// Closes its disk and attaches it again.
    Reconnections,
    /// Writes its device's state to xenstore.
    XenstoreWrites,
}

const MISUSES: [(&str, Misuse); 6] = [
    ("disk-beside-event-storm", Misuse::Events),
    ("disk-beside-large-requests", Misuse::LargeRequests),
    ("disk-beside-rejected-requests", Misuse::RejectedRequests),
    ("disk-beside-flushes", Misuse::Flushes),
    ("disk-beside-reconnections", Misuse::Reconnections),
    ("disk-beside-xenstore-flood", Misuse::XenstoreWrites),
];

/// What the measured guest and its honest neighbour do.
const HONEST: &str = "read-4k-qd32-hybrid";
const LARGE: &str = "read-256k-qd32-spin";

fn workload(name: &str) -> Result<&'static Case> {
    CASES.iter().find(|case| case.name == name).context("a workload of the disk suite")
}

/// Measures every case whose name contains `only`.
pub fn run(dir: &Path, runs: usize, only: &str) -> Result<Vec<Row>> {
    let selected: Vec<_> = MISUSES.iter().filter(|(name, _)| name.contains(only)).collect();
    if selected.is_empty() {
        return Ok(Vec::new());
    }
    let image = image(dir)?;
    let machine = Machine::start(dir)?;
    let [measured, honest, hostile] =
        ["measured", "honest", "hostile"].map(|name| machine.guest(name, &image));
    let (measured, honest, hostile) = (measured?, honest?, hostile?);
    let case = workload(HONEST)?;
    let mut session = measured.attach(case.shape())?;
    let mut spin = Spin::default();
    let mut seed = 0;
    let measure = |(name, misuse): &(&str, Misuse)| {
        compare(name, "IOPS", runs, |side| {
            seed += 1;
            let front = session.queue()?;
            let mut load = Load { front, spin: &mut spin, case };
            let slice = || Ok(load.drive(seed, |begin, _| begin.elapsed() >= SLICE)?.per_second());
            match side {
                Side::Honest => beside(slice, |stop| load_until(&honest, case, stop)),
                Side::Hostile => beside(slice, |stop| misuse_until(&hostile, *misuse, stop)),
            }
        })
    };
    let rows = selected.into_iter().map(measure).collect();
    session.close()?;
    rows
}

/// Submits a workload until `stop`.
fn load_until(guest: &Guest, case: &Case, stop: &AtomicBool) -> Result<()> {
    pin(0);
    let mut session = guest.attach(case.shape())?;
    let mut load = Load { front: session.queue()?, spin: &mut Spin::default(), case };
    load.drive(1, |_, _| stop.load(Ordering::Relaxed))?;
    Ok(session.close()?)
}

fn misuse_until(guest: &Guest, misuse: Misuse, stop: &AtomicBool) -> Result<()> {
    pin(0);
    let case = match misuse {
        Misuse::LargeRequests => return load_until(guest, workload(LARGE)?, stop),
        _ => workload(HONEST)?,
    };
    let mut session = guest.attach(case.shape())?;
    let go_on = || !stop.load(Ordering::Relaxed);
    match misuse {
        Misuse::LargeRequests => {}
        Misuse::Events => {
            let front = session.queue()?;
            while go_on() {
                front.channel().notify()?;
            }
        }
        Misuse::RejectedRequests => {
            keep_full(session.queue()?, Op::Write { sector: 0, bytes: 4096 }, go_on)?;
        }
        Misuse::Flushes => keep_full(session.queue()?, Op::Flush, go_on)?,
        Misuse::Reconnections => {
            while go_on() {
                session.close()?;
                session = guest.attach(case.shape())?;
            }
        }
        Misuse::XenstoreWrites => {
            let mut xs = guest.domain.xenstore()?;
            let path = state_path(&guest.addr.frontend_path());
            while go_on() {
                xs.write(&path, b"4")?;
            }
        }
    }
    Ok(session.close()?)
}

/// Keeps the ring full of one kind of request, whatever the responses are.
fn keep_full(front: &mut Queue<Domain>, op: Op, go_on: impl Fn() -> bool) -> Result<()> {
    let mut idle: Vec<SlotId> = std::iter::from_fn(|| front.reserve()).collect();
    while go_on() {
        for slot in idle.drain(..) {
            front.start(slot, op)?;
        }
        front.publish()?;
        while !front.has_answers()? && go_on() {}
        front.poll(|slot, _, _| idle.push(slot))?;
    }
    while front.in_flight() > 0 {
        front.poll(|slot, _, _| idle.push(slot))?;
    }
    idle.into_iter().for_each(|slot| front.release(slot));
    Ok(())
}
