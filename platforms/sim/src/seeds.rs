//! Many runs, and how to have one again.

use crate::sim::Sim;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Replays the run of this seed only.
const SEED: &str = "PVIO_SIM_SEED";
/// Runs that many seeds, whatever the test says.
const RUNS: &str = "PVIO_SIM_RUNS";

/// A run that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What it panicked with.
    pub what: String,
    /// The last of its trace.
    pub trace: String,
}

/// Runs one seed, and gives what `run` returned with the hash of the trace, or what it panicked
/// with.
///
/// # Errors
/// A [`Failure`].
pub fn attempt<R>(seed: u64, run: impl FnOnce(&mut Sim) -> R) -> Result<(R, u64), Failure> {
    let mut sim = Sim::new(seed);
    // Nothing of a run outlives it but the trace, which is whole after every line.
    match catch_unwind(AssertUnwindSafe(|| run(&mut sim))) {
        Ok(result) => Ok((result, sim.trace_hash())),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let what = text.or_else(|| panic.downcast_ref::<&str>().copied());
            let what = what.unwrap_or("a panic without words").to_string();
            Err(Failure { what, trace: sim.to_string() })
        }
    }
}

/// Runs seeds `0..count`, each by itself. `PVIO_SIM_RUNS` in the environment gives another count,
/// `PVIO_SIM_SEED` one seed to be replayed alone. `name` is the test's, to be told in the command
/// that replays a run that failed. Gives the number of runs, for a test that wants to know whether
/// something happened in any of them.
///
/// # Panics
/// When a run fails: with what it failed of, the last of its trace, and how to replay it.
pub fn run_seeds(name: &str, count: u64, mut run: impl FnMut(&mut Sim)) -> u64 {
    let seeds = match number(SEED) {
        Some(seed) => seed..=seed,
        None => 0..=number(RUNS).unwrap_or(count).saturating_sub(1),
    };
    let mut runs = 0;
    for seed in seeds {
        runs += 1;
        if let Err(Failure { what, trace }) = attempt(seed, &mut run) {
            let package = std::env::var("CARGO_PKG_NAME").unwrap_or_default();
            panic!(
                "{trace}\n{what}\n\nto have it again:\n    \
                 {SEED}={seed} cargo test -p {package} {name}\n"
            );
        }
    }
    runs
}

/// # Panics
/// When the variable holds something else, so that a typo does not pass for a replay.
fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    let number = text.trim().parse();
    Some(number.unwrap_or_else(|_| panic!("{variable} is not a number: `{text}`")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_run_and_another_seed_another() {
        let run = |sim: &mut Sim| {
            for _ in 0..100 {
                sim.tick();
                let n = sim.number();
                sim.note(n);
            }
        };
        let hash = |seed| attempt(seed, run).unwrap().1;
        assert_eq!(hash(1), hash(1));
        assert_ne!(hash(1), hash(2));
    }

    #[test]
    fn a_failure_tells_its_seed_and_its_last_decisions() {
        let failing = |sim: &mut Sim| {
            sim.note("the last straw");
            assert!(sim.seed() < 3, "the back broke");
        };
        let error = catch_unwind(|| run_seeds("camel", 10, failing)).unwrap_err();
        let text = error.downcast_ref::<String>().unwrap();
        for part in
            ["the last straw", "the back broke", "PVIO_SIM_SEED=3 cargo test -p pvio-sim camel"]
        {
            assert!(text.contains(part), "{part} is missing from {text}");
        }
    }
}
