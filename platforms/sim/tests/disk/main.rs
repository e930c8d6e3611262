//! Disks with both ends on one thread. Requests complete once, data read is data written, and a
//! peer may end at any step.
//!
//! | module | contents |
//! |---|---|
//! | [`world`] | domains and the toolstack |
//! | [`choices`] | possible actions and faults |
//! | [`daemon`] | the driver domain: [`pvio_blkback`] as the real daemon runs it |
//! | [`queues`] | the queues of a session, which the scheduler polls |
//! | [`guest`] | a guest: [`pvio_blkfront`] under a workload |
//! | [`hostile_guest`], [`hostile_back`] | peers that violate every rule |
//! | [`medium`] | storage with a volatile cache, and the engine in front of it |
//! | [`model`] | contents that a read may return |

#![forbid(unsafe_code)]

mod choices;
mod daemon;
mod guest;
mod hostile_back;
mod hostile_guest;
mod medium;
mod model;
mod queues;
mod world;

use choices::{Faults, Kind, queues};
use pvio_blkback::Policy;
use pvio_sim::{Failure, Sim, attempt, run_seeds, settle, storm};
use queues::{Flaw, take_resumed};
use std::collections::BTreeMap;
use world::DiskWorld;

/// Runs a storm, then settles, then removes all devices in the regular way.
fn run(sim: &mut Sim, disks: &[Kind], faults: Faults) -> u64 {
    sim.note(format_args!("{disks:?}, {faults:?}"));
    let mut world = DiskWorld::new(sim, disks, faults);
    storm(&mut world, sim, 2000);
    settle(&mut world, sim, 20_000);
    world.flush_by_every_queue(sim);
    settle(&mut world, sim, 20_000);
    world.end();
    settle(&mut world, sim, 20_000);
    world.assert_nothing_is_left();
    world.checked()
}

#[test]
fn disks_without_faults_lose_no_request() {
    run_seeds("disks_without_faults_lose_no_request", 40, |sim| {
        let faults =
            Faults { policy: sim.pick(&Policy::ALL), queues: queues(sim), ..Faults::default() };
        let checked = run(sim, &[Kind::Honest; 2], faults);
        assert!(checked > 0, "no request was verified");
    });
}

#[test]
fn disks_survive_death_of_peers_at_any_step() {
    run_seeds("disks_survive_death_of_peers_at_any_step", 100, |sim| {
        let faults = Faults::some(sim);
        run(sim, &[Kind::Honest; 2], faults);
    });
}

#[test]
fn multi_queue_sessions_are_resumed_at_any_step_of_daemon_death() {
    let name = "multi_queue_sessions_are_resumed_at_any_step_of_daemon_death";
    let mut resumed = 0;
    let runs = run_seeds(name, 25, |sim| {
        let faults = resuming(sim, Flaw::None);
        run(sim, &[Kind::Honest], faults);
        resumed += take_resumed();
    });
    println!("{resumed} sessions of several queues were resumed");
    assert!(u64::from(resumed) > runs);
}

/// Returns the faults of a daemon that is often killed, and whose successors resume sessions of 2
/// to 4 queues.
fn resuming(sim: &mut Sim, flaw: Flaw) -> Faults {
    let (policy, queues) = (sim.pick(&Policy::ALL), 2 + sim.index(3));
    Faults { crash: true, resume: true, often: 10, queues, flaw, policy, ..Faults::default() }
}

#[test]
fn wrongly_resumed_queues_are_detected() {
    for flaw in [Flaw::SwapsRecords, Flaw::ResumesOneQueue] {
        let failure = first_failure(|sim| {
            let faults = resuming(sim, flaw);
            run(sim, &[Kind::Honest], faults)
        });
        let failure = failure.unwrap_or_else(|| panic!("flaw {flaw:?} was not detected"));
        println!("{flaw:?}: {}", failure.what);
    }
}

#[test]
fn disk_simulation_is_deterministic_by_seed() {
    for seed in 0..5 {
        let run = |sim: &mut Sim| {
            let faults = Faults::some(sim);
            run(sim, &[Kind::Honest; 2], faults)
        };
        let (first, second) = (attempt(seed, run), attempt(seed, run));
        assert_eq!(first.map_err(|f| f.what), second.map_err(|f| f.what), "seed {seed}");
    }
}

/// Runs seeds until one fails, and returns its failure.
fn first_failure(mut run: impl FnMut(&mut Sim) -> u64) -> Option<Failure> {
    (0..20).find_map(|seed| attempt(seed, &mut run).err())
}

#[test]
fn lost_wakeup_is_detected_as_deadlock() {
    let flaws = [Flaw::NoFinalCheck, Flaw::NeverNotifies];
    for (flaw, policy) in flaws.into_iter().flat_map(|flaw| Policy::ALL.map(|p| (flaw, p))) {
        let faults = Faults { flaw, policy, ..Faults::default() };
        let failure = first_failure(|sim| run(sim, &[Kind::Honest], faults));
        let failure = failure.unwrap_or_else(|| panic!("flaw {flaw:?} was not detected"));
        assert!(failure.what.starts_with("deadlock: "), "{flaw:?}: {}", failure.what);
        assert!(failure.trace.contains("Work"), "{}", failure.trace);
    }
}

#[test]
fn lost_write_or_flush_is_detected() {
    let flaws = [Flaw::ForgetsWrites, Flaw::ForgetsFlushes];
    for (flaw, policy) in flaws.into_iter().flat_map(|flaw| Policy::ALL.map(|p| (flaw, p))) {
        let faults = Faults { flaw, policy, kill_driver: true, often: 3, ..Faults::default() };
        let failure = first_failure(|sim| run(sim, &[Kind::Honest], faults));
        let failure = failure.unwrap_or_else(|| panic!("flaw {flaw:?} was not detected"));
        assert!(failure.what.starts_with("sector "), "{flaw:?}: {}", failure.what);
    }
}

#[test]
fn hostile_peers_are_closed_with_reason_and_others_continue() {
    let name = "hostile_peers_are_closed_with_reason_and_others_continue";
    let mut reasons = BTreeMap::<String, u32>::new();
    let runs = run_seeds(name, 75, |sim| {
        let disks = [Kind::Honest, Kind::HostileGuest, Kind::HostileBack];
        let faults = Faults { often: 1, ..Faults::some(sim) };
        sim.note(format_args!("{faults:?}"));
        let mut world = DiskWorld::new(sim, &disks, faults);
        for _ in 0..3 {
            storm(&mut world, sim, 1000);
            settle(&mut world, sim, 20_000);
            world.assert_memory_is_bounded();
            for code in [1, 2].map(|i| world.errors(i)).into_iter().flatten() {
                *reasons.entry(code).or_default() += 1;
            }
        }
        world.end();
        settle(&mut world, sim, 20_000);
        world.assert_nothing_is_left();
        assert!(world.checked() > 0, "the honest disk was not used");
    });
    if runs > 50 {
        for code in
            ["ring-producer-overflow", "unknown-response-id", "front-rings-kept", "handshake"]
        {
            assert!(reasons.contains_key(code), "no peer was closed for {code}: {reasons:?}");
        }
    }
    println!("{reasons:?}");
}
