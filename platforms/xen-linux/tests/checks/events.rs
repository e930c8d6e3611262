//! Event channels.

use super::{Checks, LOST, Outcome, World, ensure, same, say};
use pvio_event_channel::{EventChannel, EventChannels, EventError, Port};
use pvio_grant_table::DomId;
use pvio_ring::shm::HeapMemory;
use pvio_runtime::Uring;
use pvio_xen_linux::Channel;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::AsFd;
use std::time::Duration;

pub fn checks() -> Checks<'static> {
    vec![
        ("event: one event is pending after bind", Box::new(pending)),
        ("event: notifications in both directions", Box::new(both_ways)),
        ("event: many notifications before a take are merged into one or two", Box::new(merged)),
        ("event: io_uring poll completes on an event", Box::new(uring)),
        ("event: notification storm causes one interrupt per take", Box::new(storm)),
        ("event: port is bound only once and only by its peer", Box::new(bound_twice)),
        ("event: notification of a closed peer is ignored", Box::new(closed)),
        ("event: port can be bound again", Box::new(anew)),
    ]
}

fn readable(channel: &Channel, ms: u32) -> Result<bool, String> {
    let time = Timespec::try_from(Duration::from_millis(ms.into())).map_err(say)?;
    Ok(poll(&mut [PollFd::new(channel, PollFlags::IN)], Some(&time)).map_err(say)? == 1)
}

/// Returns both ends, without pending events.
fn pair(world: &mut World<'_>) -> Result<(Channel, Port), String> {
    let theirs = world.peer.alloc(world.me.id())?;
    let ours = world.me.bind_interdomain(world.peer.id(), theirs).map_err(say)?;
    ensure!(ours.wait(Some(LOST)).map_err(say)?, "no event pending after bind");
    while world.peer.wait(theirs, 50)? {}
    Ok((ours, theirs))
}

fn pending(world: &mut World<'_>) -> Outcome {
    for _ in 0..20 {
        let theirs = world.peer.alloc(world.me.id())?;
        let ours = world.me.bind_interdomain(world.peer.id(), theirs).map_err(say)?;
        ensure!(readable(&ours, 0)?, "no event pending directly after bind");
        ensure!(ours.take().map_err(say)?, "readable, but no event to take");
        ensure!(!ours.take().map_err(say)?, "second event after bind");
        ensure!(!readable(&ours, 0)?, "readable after the event was taken");
    }
    Ok(())
}

fn both_ways(world: &mut World<'_>) -> Outcome {
    let (ours, theirs) = pair(world)?;
    for _ in 0..50 {
        ours.notify().map_err(say)?;
        ensure!(world.peer.wait(theirs, LOST.as_millis() as u32)?, "the peer received no event");
        world.peer.notify(theirs, 1)?;
        ensure!(ours.wait(Some(LOST)).map_err(say)?, "no event from the peer");
    }
    ensure!(
        !ours.wait(Some(Duration::from_millis(20))).map_err(say)?,
        "unexpected additional event"
    );
    Ok(())
}

fn merged(world: &mut World<'_>) -> Outcome {
    let (ours, theirs) = pair(world)?;
    world.peer.notify(theirs, 100)?;
    let mut taken = 0;
    while ours.wait(Some(Duration::from_millis(50))).map_err(say)? {
        taken += 1;
    }
    ensure!((1..=2).contains(&taken), "{taken} events were taken");
    Ok(())
}

fn uring(world: &mut World<'_>) -> Outcome {
    let (ours, theirs) = pair(world)?;
    let mut uring = Uring::<HeapMemory>::new(4).map_err(say)?;
    let file = uring.add_file(ours.as_fd().try_clone_to_owned().map_err(say)?);
    for round in 0..10 {
        uring.poll_readable(file, 7).map_err(|_| "no free slot")?;
        uring.wait(Some(Duration::from_millis(30))).map_err(say)?;
        same(&format!("round {round}: completions before the event"), uring.reap(|_| {}), 0)?;
        world.peer.notify(theirs, 1)?;
        uring.wait(Some(LOST)).map_err(say)?;
        let mut seen = Vec::new();
        uring.reap(|done| seen.push((done.token, done.result.is_ok())));
        same(&format!("round {round}: completions after the event"), seen, vec![(7, true)])?;
        ensure!(ours.take().map_err(say)?, "round {round}: no event to take");
    }
    Ok(())
}

/// Returns the number of interrupts of the event channels that this program has open.
fn interrupts() -> Result<u64, String> {
    let comm = std::fs::read_to_string("/proc/self/comm").map_err(say)?;
    let name = format!("evtchn:{}", comm.trim());
    let all = std::fs::read_to_string("/proc/interrupts").map_err(say)?;
    let ours = all.lines().filter(|line| line.trim_end().ends_with(&name));
    // Each line has a number for each CPU, then text.
    let counts = |line: &str| -> u64 {
        line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok()).sum()
    };
    Ok(ours.map(counts).sum())
}

fn storm(world: &mut World<'_>) -> Outcome {
    let (ours, theirs) = pair(world)?;
    let before = interrupts()?;
    world.peer.notify(theirs, 20_000)?;
    let during = interrupts()? - before;
    ensure!((1..=3).contains(&during), "{during} interrupts before the first take");
    let mut taken = 0;
    while ours.wait(Some(Duration::from_millis(50))).map_err(say)? {
        taken += 1;
    }
    ensure!((1..=2).contains(&taken), "{taken} events were taken");
    world.peer.notify(theirs, 1)?;
    ensure!(ours.wait(Some(LOST)).map_err(say)?, "no event after the storm");
    Ok(())
}

fn bound_twice(world: &mut World<'_>) -> Outcome {
    let theirs = world.peer.alloc(world.me.id())?;
    let (from, strangers) = (world.peer.id(), world.peer.alloc(DomId(3000))?);
    let bind = |domain, port| world.me.bind_interdomain(domain, port).map(|c| c.port());
    let ours = world.me.bind_interdomain(from, theirs).map_err(say)?;
    same("second bind", bind(from, theirs), Err(EventError::BadPort))?;
    same("bind of another domain's port", bind(from, strangers), Err(EventError::BadPort))?;
    for port in [0, 4095, 131_071, u32::MAX] {
        same(&format!("port {port}"), bind(from, Port(port)), Err(EventError::BadPort))?;
    }
    // The kernel rejects every domain other than the frontend with one error.
    let absent = if world.is_device { EventError::BadPort } else { EventError::NoDomain };
    same("bind to a domain that does not exist", bind(DomId(3000), theirs), Err(absent))?;
    same("bind to a reserved domain number", bind(DomId::SELF, theirs), Err(EventError::NoDomain))?;
    world.peer.notify(theirs, 1)?;
    ensure!(ours.wait(Some(LOST)).map_err(say)?, "the first binding received no event");
    Ok(())
}

fn closed(world: &mut World<'_>) -> Outcome {
    let lone = world.me.alloc_unbound(world.peer.id()).map_err(say)?;
    lone.notify().map_err(say)?;
    let (ours, theirs) = pair(world)?;
    world.peer.close(theirs)?;
    ours.notify().map_err(say)?;
    ensure!(!lone.take().map_err(say)?, "event on an unbound port");
    Ok(())
}

fn anew(world: &mut World<'_>) -> Outcome {
    let theirs = world.peer.alloc(world.me.id())?;
    for round in 0..3 {
        let ours = world.me.bind_interdomain(world.peer.id(), theirs).map_err(say)?;
        ensure!(ours.wait(Some(LOST)).map_err(say)?, "round {round}: no event pending after bind");
        ours.notify().map_err(say)?;
        ensure!(
            world.peer.wait(theirs, LOST.as_millis() as u32)?,
            "round {round}: the peer received no event"
        );
        while world.peer.wait(theirs, 20)? {}
    }
    Ok(())
}
