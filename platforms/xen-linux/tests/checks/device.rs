//! The platform of a device process, made from descriptors.

use super::{Checks, LOST, Outcome, World, ensure, same, say};
use pvio_event_channel::{
    DeviceDescriptors, DevicePlatform, DeviceScope, EventChannel, EventChannels, EventError,
};
use pvio_grant_table::{Access, DomId, GrantMapper};
use pvio_ring::shm::Region;
use pvio_xen_linux::{EventRestriction, XenDomain};
use std::os::fd::AsFd;

pub fn checks() -> Checks<'static> {
    vec![
        ("device: evtchn descriptors are restricted to the frontend", Box::new(restricted)),
        ("device: channels are limited by the number of descriptors", Box::new(limited)),
        ("device: closed descriptors unmap and unbind; a successor continues", Box::new(successor)),
    ]
}

fn scope(frontend: DomId) -> DeviceScope {
    DeviceScope { frontend, queues: 2, channels: 4, ports: None }
}

/// Returns the platform of a device of `frontend`.
pub fn of(me: &XenDomain, frontend: DomId) -> Result<XenDomain, String> {
    let descriptors = me.device_descriptors(&scope(frontend)).map_err(say)?;
    XenDomain::from_descriptors(descriptors).map_err(say)
}

fn restricted(world: &mut World<'_>) -> Outcome {
    let frontend = world.peer.id();
    let descriptors = world.me.device_descriptors(&scope(frontend)).map_err(say)?;
    let restriction = descriptors.description.restriction();
    println!("event channels of domain {frontend}: {restriction:?}");
    if frontend == DomId::DOM0 {
        return same("restriction", restriction, EventRestriction::Dom0);
    }
    if restriction == EventRestriction::OldKernel {
        println!("SKIPPED: this kernel does not restrict evtchn descriptors");
        return Ok(());
    }
    // The kernel rejects another domain, whatever the description says.
    let mut text = serde_json::to_value(&descriptors.description).map_err(say)?;
    text["frontend"] = 3000.into();
    let description = serde_json::from_value(text).map_err(say)?;
    let fds = descriptors.fds.iter().map(|fd| fd.as_fd().try_clone_to_owned().map_err(say));
    let fds = fds.collect::<Result<_, _>>()?;
    let other = XenDomain::from_descriptors(DeviceDescriptors { description, fds }).map_err(say)?;
    let port = world.peer.alloc(world.me.id())?;
    let bound = other.bind_interdomain(DomId(3000), port).map(|channel| channel.port());
    same("bind to another domain", bound, Err(EventError::BadPort))?;
    let device = XenDomain::from_descriptors(descriptors).map_err(say)?;
    let ours = device.bind_interdomain(frontend, port).map_err(say)?;
    ensure!(ours.wait(Some(LOST)).map_err(say)?, "no event pending after bind");
    Ok(())
}

fn limited(world: &mut World<'_>) -> Outcome {
    let (device, frontend) = (of(&world.me, world.peer.id())?, world.peer.id());
    for round in 0..3 {
        let mut channels = Vec::new();
        for _ in 0..4 {
            let port = world.peer.alloc(world.me.id())?;
            channels.push(device.bind_interdomain(frontend, port).map_err(say)?);
        }
        let port = world.peer.alloc(world.me.id())?;
        let fifth = device.bind_interdomain(frontend, port).map(|channel| channel.port());
        same(&format!("round {round}: fifth channel"), fifth, Err(EventError::NoPorts))?;
        for channel in &channels {
            ensure!(channel.wait(Some(LOST)).map_err(say)?, "round {round}: no event after bind");
        }
    }
    Ok(())
}

fn successor(world: &mut World<'_>) -> Outcome {
    let (me, frontend) = (world.me.id(), world.peer.id());
    let maps = frontend != me || super::is_pv();
    let grefs = world.peer.grant(me, 1, Access::ReadWrite)?;
    let port = world.peer.alloc(me)?;
    for round in 0..3_u8 {
        let device = of(&world.me, frontend)?;
        let channel = device.bind_interdomain(frontend, port).map_err(say)?;
        ensure!(channel.wait(Some(LOST)).map_err(say)?, "round {round}: no event after bind");
        if maps {
            let page = device.map(frontend, &grefs, Access::ReadWrite).map_err(say)?;
            page.write_bytes(0, &[round]).ok_or("not writable")?;
            same("what the peer sees", world.peer.read(grefs[0], 0, 1)?, vec![round])?;
        }
        channel.notify().map_err(say)?;
        let heard = world.peer.wait(port, LOST.as_millis() as u32)?;
        ensure!(heard, "round {round}: the peer received no event");
        while world.peer.wait(port, 20)? {}
    }
    Ok(())
}
