//! NICs with both ends on one thread. Frames arrive once, in order and complete, and a peer may end
//! at any step.
//!
//! | module | contents |
//! |---|---|
//! | [`world`] | domains, the toolstack, possible actions |
//! | [`daemon`] | the driver domain: [`pvio_netback`] as the real daemon runs it |
//! | `guest` | a guest: [`pvio_netfront`] under traffic |
//! | [`wire`] | the cable between the two vifs, and the record of each frame |

pub mod actions;
pub mod daemon;
mod guest;
pub mod wire;
pub mod world;

use pvio_sim::{Sim, settle, storm};
use world::{Faults, NetWorld};

/// Number of actions before a world settles: many short runs find more than few long ones.
const STEPS: [u64; 4] = [100, 200, 400, 1000];

/// Runs a storm, then settles, then removes all devices in the regular way.
pub fn run(sim: &mut Sim, faults: Faults) -> u64 {
    sim.note(format_args!("{faults:?}"));
    let mut world = NetWorld::new(faults);
    let steps = sim.pick(&STEPS);
    storm(&mut world, sim, steps);
    settle(&mut world, sim, 20_000);
    let received = world.received();
    world.assert_all_is_told();
    world.send_by_every_queue();
    settle(&mut world, sim, 20_000);
    world.end();
    settle(&mut world, sim, 20_000);
    world.assert_nothing_is_left();
    received
}

/// Runs NICs with any faults that the seed selects.
pub fn any(sim: &mut Sim) {
    let faults = Faults::some(sim);
    run(sim, faults);
}
