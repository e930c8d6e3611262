//! Disks with both ends on one thread. Requests complete once, data read is data written, and a
//! peer may end at any step.
//!
//! | module | contents |
//! |---|---|
//! | [`world`] | domains and the toolstack |
//! | [`actions`], [`choices`] | possible actions and faults |
//! | [`daemon`] | the driver domain: [`pvio_blkback`] as the real daemon runs it |
//! | [`queues`] | the queues of a session, which the scheduler polls |
//! | `guest` | a guest: [`pvio_blkfront`] under a workload |
//! | `hostile_guest`, `hostile_back` | peers that violate every rule |
//! | `medium` | storage with a volatile cache, and the engine in front of it |
//! | `model` | contents that a read may return |

pub mod actions;
pub mod choices;
pub mod daemon;
mod guest;
mod hostile_back;
mod hostile_guest;
mod medium;
mod model;
pub mod queues;
pub mod world;

use choices::{Faults, Kind};
use pvio_sim::{Sim, settle, storm};
use world::DiskWorld;

/// Number of actions before a world settles: many short runs find more than few long ones.
const STEPS: [u64; 4] = [100, 200, 400, 1000];

/// Runs a storm, then settles, then removes all devices in the regular way.
pub fn run(sim: &mut Sim, disks: &[Kind], faults: Faults) -> u64 {
    sim.note(format_args!("{disks:?}, {faults:?}"));
    let mut world = DiskWorld::new(sim, disks, faults);
    let steps = sim.pick(&STEPS);
    storm(&mut world, sim, steps);
    settle(&mut world, sim, 20_000);
    world.flush_by_every_queue(sim);
    settle(&mut world, sim, 20_000);
    world.end();
    settle(&mut world, sim, 20_000);
    world.assert_nothing_is_left();
    world.checked()
}

/// Runs disks with any kinds of participants and faults that the seed selects.
pub fn any(sim: &mut Sim) {
    let disks = sim.pick(&[
        &[Kind::Honest][..],
        &[Kind::Honest; 2],
        &[Kind::Honest, Kind::HostileGuest],
        &[Kind::Honest, Kind::HostileBack],
    ]);
    let faults = Faults::some(sim);
    if disks.iter().all(|kind| *kind == Kind::Honest) {
        run(sim, disks, faults);
    } else {
        run_hostile(sim, disks, faults);
    }
}

/// Runs disks of which some have a hostile participant. Returns the codes for which they were closed.
///
/// # Panics
/// If an invariant does not hold.
pub fn run_hostile(sim: &mut Sim, disks: &[Kind], faults: Faults) -> Vec<String> {
    let mut reasons = Vec::new();
    sim.note(format_args!("{disks:?}, {faults:?}"));
    let mut world = DiskWorld::new(sim, disks, faults);
    for _ in 0..3 {
        let steps = sim.pick(&STEPS);
        storm(&mut world, sim, steps);
        settle(&mut world, sim, 20_000);
        world.assert_memory_is_bounded();
        reasons.extend((0..disks.len()).flat_map(|i| world.errors(i)));
    }
    world.end();
    settle(&mut world, sim, 20_000);
    world.assert_nothing_is_left();
    reasons
}
