//! Notifications of the peer when a mapping is removed.

use super::{Checks, LOST, Outcome, World, ensure, same, say};
use pvio_event_channel::EventChannels;
use pvio_grant_table::{Access, GrantMapper};
use pvio_ring::shm::PAGE_SIZE;
use pvio_xen_linux::{NotifyError, UnmapNotify};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

pub fn checks() -> Checks<'static> {
    vec![
        ("unmap-notify: drop clears a byte and sends an event", Box::new(dropped)),
        ("unmap-notify: notification can be cancelled", Box::new(taken_back)),
        ("unmap-notify: invalid notification is rejected", Box::new(refused)),
        ("unmap-notify: killed process notifies its peer", Box::new(killed)),
    ]
}

fn dropped(world: &mut World<'_>) -> Outcome {
    let gref = world.peer.grant(world.me.id(), 1, Access::ReadWrite)?[0];
    world.peer.write(gref, 4, &[1; 3])?;
    let theirs = world.peer.alloc(world.me.id())?;
    let from = world.peer.id();
    let bell = world.me.bind_interdomain(from, theirs).map_err(say)?;
    while world.peer.wait(theirs, 50)? {}
    let mapping = world.me.map(from, &[gref], Access::ReadWrite).map_err(say)?;
    let what = UnmapNotify { clear_byte: Some(5), send_event: Some(&bell) };
    mapping.notify_unmap(what).map_err(say)?;
    same("before", world.peer.read(gref, 4, 3)?, vec![1; 3])?;
    ensure!(!world.peer.wait(theirs, 100)?, "event before the unmap");
    drop(mapping);
    ensure!(world.peer.wait(theirs, LOST.as_millis() as u32)?, "no event");
    same("after", world.peer.read(gref, 4, 3)?, vec![1, 0, 1])
}

fn taken_back(world: &mut World<'_>) -> Outcome {
    let gref = world.peer.grant(world.me.id(), 1, Access::ReadWrite)?[0];
    world.peer.write(gref, 4, &[1; 3])?;
    let mapping = world.me.map(world.peer.id(), &[gref], Access::ReadWrite).map_err(say)?;
    let what = UnmapNotify { clear_byte: Some(5), send_event: None };
    mapping.notify_unmap(what).map_err(say)?;
    mapping.notify_unmap(UnmapNotify::default()).map_err(say)?;
    drop(mapping);
    same("after", world.peer.read(gref, 4, 3)?, vec![1; 3])
}

fn refused(world: &mut World<'_>) -> Outcome {
    let grefs = world.peer.grant(world.me.id(), 2, Access::ReadWrite)?;
    let from = world.peer.id();
    let clear = |at| UnmapNotify { clear_byte: Some(at), send_event: None };
    let fixed = world.me.map(from, &grefs[..1], Access::ReadOnly).map_err(say)?;
    same("read-only", fixed.notify_unmap(clear(0)), Err(NotifyError::ReadOnly))?;
    let mapping = world.me.map(from, &grefs, Access::ReadWrite).map_err(say)?;
    same("last byte", mapping.notify_unmap(clear(2 * PAGE_SIZE - 1)), Ok(()))?;
    same("outside", mapping.notify_unmap(clear(2 * PAGE_SIZE)), Err(NotifyError::OutOfRange))?;
    let mut batch = Vec::new();
    world.me.map_each(from, &grefs, Access::ReadWrite, &mut |_, page| batch.push(page));
    let page = batch.pop().ok_or("no page")?.map_err(say)?;
    same("notification for a page of a batch", page.notify_unmap(clear(0)), Err(NotifyError::Batch))
}

fn killed(world: &mut World<'_>) -> Outcome {
    let Some(holder) = &world.holder else {
        println!("SKIPPED: no program to kill; run examples/selftest.rs");
        return Ok(());
    };
    let gref = world.peer.grant(world.me.id(), 1, Access::ReadWrite)?[0];
    world.peer.write(gref, 0, &[1; 2])?;
    let theirs = world.peer.alloc(world.me.id())?;
    let words = [world.peer.id().to_string(), gref.to_string(), theirs.to_string()];
    let mut child = Command::new(holder)
        .arg("hold")
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(say)?;
    let mut line = String::new();
    let out = child.stdout.take().ok_or("no output")?;
    BufReader::new(out).read_line(&mut line).map_err(say)?;
    let held = same("the child", line.trim(), "holding");
    while world.peer.wait(theirs, 50)? {}
    let seen = world.peer.read(gref, 0, 3)?;
    child.kill().map_err(say)?;
    child.wait().map_err(say)?;
    held?;
    same("while held", seen, vec![1, 1, 7])?;
    ensure!(world.peer.wait(theirs, LOST.as_millis() as u32)?, "no event");
    same("after", world.peer.read(gref, 0, 3)?, vec![0, 1, 7])
}
