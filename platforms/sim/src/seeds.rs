//! Runs with many seeds, and the replay of one of them.

use crate::sim::Sim;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Environment variable: replay only the run with this seed.
const SEED: &str = "PVIO_SIM_SEED";
/// Environment variable: number of seeds to run, instead of the test's number.
const RUNS: &str = "PVIO_SIM_RUNS";

/// Failed run.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Message of its panic.
    pub what: String,
    /// End of its trace.
    pub trace: String,
}

/// Runs one seed. Returns the result of `run` and the hash of the trace, or the panic.
///
/// # Errors
/// A [`Failure`].
pub fn attempt<R>(seed: u64, run: impl FnOnce(&mut Sim) -> R) -> Result<(R, u64), Failure> {
    let mut sim = Sim::new(seed);
    // Only the trace is used after a panic, and it is consistent after every line.
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

/// Runs seeds `0..count`, each separately. The environment variable `PVIO_SIM_RUNS` sets another
/// count, `PVIO_SIM_SEED` replays one seed only. `name` is the test's name, for the command that
/// replays a failed run. Returns the number of runs, for a test that checks whether an event
/// occurred in any of them.
///
/// # Panics
/// If a run fails: with its panic message, the end of its trace, and the command that replays it.
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
/// If the variable holds another value, so that a typo is not taken for a replay.
fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    let number = text.trim().parse();
    Some(number.unwrap_or_else(|_| panic!("{variable} is not a number: `{text}`")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seed_determines_run() {
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
    fn failed_run_reports_seed_and_last_decisions() {
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
