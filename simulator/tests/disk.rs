//! Disks with chosen faults, and deliberate defects of the daemon, which the simulation must find.

#![forbid(unsafe_code)]

use pvio_blkback::Policy;
use pvio_sim::{Failure, Sim, attempt, run_seeds};
use pvio_simulator::disk::actions::Flaw;
use pvio_simulator::disk::choices::{Faults, Kind, queues};
use pvio_simulator::disk::queues::take_resumed;
use pvio_simulator::disk::{run, run_hostile};
use std::collections::BTreeMap;

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
        for code in run_hostile(sim, &disks, faults) {
            *reasons.entry(code).or_default() += 1;
        }
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
