//! NICs with chosen faults, and deliberate defects of the daemon, which the simulation must find.

#![forbid(unsafe_code)]

use pvio_sim::{Sim, attempt, run_seeds};
use pvio_simulator::net::actions::Flaw;
use pvio_simulator::net::daemon::take_resumed;
use pvio_simulator::net::run;
use pvio_simulator::net::wire::LANES;
use pvio_simulator::net::world::Faults;

#[test]
fn nics_without_faults_lose_no_frame() {
    run_seeds("nics_without_faults_lose_no_frame", 20, |sim| {
        let faults = Faults { queues: 1 + sim.index(LANES), ..Faults::default() };
        assert!(run(sim, faults) > 0, "nothing was sent");
    });
}

#[test]
fn nics_survive_death_of_peers() {
    run_seeds("nics_survive_death_of_peers", 40, |sim| {
        let faults = Faults::some(sim);
        run(sim, faults);
    });
}

#[test]
fn nic_sessions_are_resumed_at_any_step_of_daemon_death() {
    let mut resumed = [0; 2];
    let runs = run_seeds("nic_sessions_are_resumed_at_any_step_of_daemon_death", 35, |sim| {
        let faults = resuming(1 + sim.index(LANES), Flaw::None);
        run(sim, faults);
        let [all, several] = take_resumed();
        resumed = [resumed[0] + all, resumed[1] + several];
    });
    let [all, several] = resumed.map(u64::from);
    println!("{all} sessions were resumed, {several} of them with several queues");
    assert!(all > runs && several > runs / 2);
}

/// Returns the faults of a daemon that is often killed, for guests with at most `queues` queues.
fn resuming(queues: usize, flaw: Flaw) -> Faults {
    Faults { crash: true, often: 10, queues, flaw, ..Faults::default() }
}

#[test]
fn wrongly_resumed_queues_are_detected() {
    for flaw in [Flaw::SwapsRecords, Flaw::ResumesOneQueue] {
        let failure =
            (0..20).find_map(|seed| attempt(seed, |sim| run(sim, resuming(4, flaw))).err());
        let failure = failure.unwrap_or_else(|| panic!("flaw {flaw:?} was not detected"));
        println!("{flaw:?}: {}", failure.what);
    }
}

#[test]
fn net_simulation_is_deterministic_by_seed() {
    for seed in 0..3 {
        let run = |sim: &mut Sim| {
            let faults = Faults::some(sim);
            run(sim, faults)
        };
        let (first, second) = (attempt(seed, run), attempt(seed, run));
        assert_eq!(first.map_err(|f| f.what), second.map_err(|f| f.what), "seed {seed}");
    }
}

#[test]
fn lost_wakeup_is_detected_as_deadlock() {
    let faults = Faults { flaw: Flaw::NoFinalCheck, ..Faults::default() };
    let failure = (0..20).find_map(|seed| attempt(seed, |sim| run(sim, faults)).err());
    let failure = failure.expect("missing final check was not detected");
    assert!(failure.what.starts_with("deadlock: "), "{}", failure.what);
}
