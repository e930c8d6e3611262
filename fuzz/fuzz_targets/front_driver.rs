//! The drivers of a disk's and a NIC's frontend, with a hostile backend: arbitrary keys, states, rings and
//! responses, and removal at any time.
//!
//! A step never fails for what others write. A device whose backend has unmapped everything releases all of
//! its memory.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_blkfront::{Disk, Op, RequestedFeatures};
use pvio_event_channel::{EventChannels, Port};
use pvio_fuzz::world::{Rewrite, World};
use pvio_fuzz::{FRONT, Scribble};
use pvio_grant_table::{Access, GrantMapper, GrantRef};
use pvio_netfront::{Checksum, Nic};
use pvio_sim::LocalDomain;
use pvio_sim::local::events::LocalChannel;
use pvio_sim::local::memory::LocalMapping;
use pvio_xenbus::XenbusState;
use pvio_xenbus::driver::{FrontendClass, FrontendDriver, Life};
use pvio_xenbus::handshake::common::{BackendKind, switch_state};
use pvio_xenbus::handshake::{vbd, vif};

#[derive(Arbitrary, Debug)]
struct Input {
    nic: bool,
    several: bool,
    extras: bool,
    actions: Vec<Action>,
}

#[derive(Arbitrary, Debug)]
enum Action {
    Rewrite(Rewrite),
    Toolstack(Rewrite),
    /// The backend writes a correct offer and enters InitWait.
    Offer(u8),
    /// The backend describes the device, maps what it finds, and enters Connected.
    Connect {
        describes: bool,
        sectors: u64,
        size: u8,
    },
    State(u8),
    Scribble(u8, Scribble),
    Unmap,
    Step,
    /// The guest uses the device.
    Use(u8),
    Close,
    Remove,
}

fuzz_target!(|input: Input| {
    if input.nic {
        let world = World::new(BackendKind::Vif);
        let mut nic = Nic::new(world.domains.front.clone()).with_headroom(256).choosing_groups();
        nic = if input.several { nic.with_queues(2).splitting_channels() } else { nic };
        nic = if input.extras { nic.taking_gso() } else { nic.without_staging() };
        run(world, nic, input.actions, use_nic);
    } else {
        let world = World::new(BackendKind::Vbd);
        let requested = RequestedFeatures {
            queues: if input.several { 2 } else { 1 },
            ..RequestedFeatures::default()
        };
        let disk = Disk::with(world.domains.front.clone(), requested);
        run(world, disk, input.actions, use_disk);
    }
});

fn run<C: FrontendClass>(
    mut world: World,
    class: C,
    actions: Vec<Action>,
    mut each: impl FnMut(&mut C, u8),
) {
    let mut driver = Some(FrontendDriver::new(world.addr, class));
    let back = world.addr.backend_path();
    let mut mapped: Vec<LocalMapping> = Vec::new();
    let mut channels: Vec<LocalChannel> = Vec::new();
    for action in actions.into_iter().take(48) {
        match action {
            Action::Rewrite(rewrite) => world.rewrite(&rewrite, false),
            Action::Toolstack(rewrite) => world.rewrite(&rewrite, true),
            Action::Offer(bits) => offer(&mut world, bits),
            Action::Connect { describes, sectors, size } => {
                map(&mut world, &mut mapped, &mut channels);
                if describes && world.addr.kind == BackendKind::Vbd {
                    let disk = vbd::BackDisk {
                        sectors,
                        info: vbd::DiskInfo::default(),
                        sector_size: 512 << (size % 8),
                        physical_sector_size: 4096,
                        offer: vbd::BackOffer { flush: true, ..vbd::BackOffer::default() },
                    };
                    let _ = disk.write(&mut world.back, &back);
                }
                let _ = switch_state(&mut world.back, &back, XenbusState::Connected);
            }
            Action::State(state) => {
                let state = XenbusState::ALL[usize::from(state) % XenbusState::ALL.len()];
                let _ = switch_state(&mut world.back, &back, state);
            }
            Action::Scribble(which, scribble) => {
                if !mapped.is_empty() {
                    let which = usize::from(which) % mapped.len();
                    scribble.write(&mapped[which]);
                }
            }
            Action::Unmap => {
                mapped.clear();
                channels.clear();
            }
            Action::Step => step(&mut driver, &mut world),
            Action::Use(how) => {
                if let Some(driver) = &mut driver {
                    each(driver.class_mut(), how);
                }
            }
            Action::Close => {
                if let Some(driver) = &mut driver {
                    driver.close(&mut world.front).expect("xenstore works");
                }
            }
            Action::Remove => world.remove(),
        }
    }
    // The backend releases everything, and the frontend ends.
    mapped.clear();
    channels.clear();
    step(&mut driver, &mut world);
    drop(driver);
    let own = [world.pages.clone()];
    drop(own);
    let front = &world.domains.front;
    assert_eq!(front.pages_granted(), world.grefs.len(), "grants that the frontend leaks");
    assert_eq!(front.ports_open(), world.channels.len(), "ports that the frontend leaks");
}

fn offer(world: &mut World, bits: u8) {
    let back = world.addr.backend_path();
    let bit = |at: u8| bits >> at & 1 == 1;
    let _ = if world.addr.kind == BackendKind::Vbd {
        let offer = vbd::BackOffer {
            flush: bit(0),
            persistent: bit(1),
            max_indirect_segments: bit(2).then_some(32),
            max_queues: bit(3).then_some(2),
            max_ring_page_order: bit(4).then_some(1),
            ..vbd::BackOffer::default()
        };
        offer.write(&mut world.back, &back)
    } else {
        let offer = vif::BackOffer {
            sg: bit(0),
            split_event_channels: bit(1),
            max_queues: bit(2).then_some(2),
            ctrl_ring: bit(3),
            rx_copy: true,
            ..vif::BackOffer::default()
        };
        offer.write(&mut world.back, &back)
    };
    let _ = switch_state(&mut world.back, &back, XenbusState::InitWait);
}

/// Maps what the frontend has written, as far as it can be mapped.
fn map(world: &mut World, mapped: &mut Vec<LocalMapping>, channels: &mut Vec<LocalChannel>) {
    let front = world.addr.frontend_path();
    let (mut grefs, mut ports) = (Vec::new(), Vec::new());
    if world.addr.kind == BackendKind::Vbd {
        let offer = vbd::BackOffer::default();
        if let Ok(request) = vbd::FrontRequest::read(&mut world.back, &front, &offer) {
            for queue in request.queues {
                grefs.extend(queue.ring_refs);
                ports.push(queue.event_channel);
            }
        }
    } else if let Ok(request) =
        vif::FrontRequest::read(&mut world.back, &front, &vif::BackOffer::default())
    {
        for queue in request.queues {
            grefs.extend([queue.tx_ring_ref, queue.rx_ring_ref]);
            match queue.events {
                vif::EventChannels::Shared(port) => ports.push(port),
                vif::EventChannels::Split { tx, rx } => ports.extend([tx, rx]),
            }
        }
    }
    let domain = &world.domains.back;
    let pages = grefs
        .iter()
        .filter_map(|gref| domain.map(FRONT, &[GrantRef(*gref)], Access::ReadWrite).ok());
    mapped.extend(pages);
    channels
        .extend(ports.iter().filter_map(|port| domain.bind_interdomain(FRONT, Port(*port)).ok()));
}

/// Steps the driver until nothing is left to do.
fn step<C: FrontendClass>(driver: &mut Option<FrontendDriver<C>>, world: &mut World) {
    for round in 0.. {
        let Some(stepped) = driver else { return };
        match stepped.step(&mut world.front).expect("xenstore works") {
            Life::Gone => *driver = None,
            Life::Alive => return,
            Life::More => assert!(round < 100, "a driver is never idle"),
        }
    }
}

fn use_disk(disk: &mut Disk<LocalDomain>, how: u8) {
    for number in 0..disk.queues() {
        let Some(queue) = disk.queue_at(number) else { continue };
        if let Some(slot) = queue.reserve() {
            let (sector, bytes) = (u64::from(how), usize::from(how % 90) * 512);
            let op = match how % 3 {
                0 => Op::Read { sector, bytes },
                1 => Op::Write { sector, bytes },
                _ => Op::Flush,
            };
            if queue.start(slot, op).is_err() {
                queue.release(slot);
            }
        }
        let _ = queue.publish();
        let mut done = Vec::new();
        let _ = queue.poll(|slot, _, _| done.push(slot));
        done.into_iter().for_each(|slot| queue.release(slot));
    }
}

fn use_nic(nic: &mut Nic<LocalDomain>, how: u8) {
    for queue in nic.queues() {
        let _ = queue.send(&vec![how; 14 + usize::from(how) * 20], Checksum::Unknown);
        for _ in 0..8 {
            if !matches!(queue.receive(|frame, _| frame.len()), Ok(Some(_))) {
                break;
            }
        }
        let _ = queue.publish();
        let _ = queue.final_check();
    }
    nic.ask_headroom(u16::from(how) * 8);
    let _ = (nic.hearing(), nic.has_news(), nic.fault());
}
