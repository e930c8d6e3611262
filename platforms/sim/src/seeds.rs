//! Runs with many seeds, and the replay of one of them.

use crate::choices::{Segment, Tape};
use crate::sim::{Record, Sim};
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::Once;

/// Environment variable: replay only the run with this seed.
const SEED: &str = "PVIO_SIM_SEED";
/// Environment variable: number of seeds to run, instead of the test's number.
const RUNS: &str = "PVIO_SIM_RUNS";
/// Number of lines of the trace that a failed test shows.
const SHOWN: usize = 120;

/// Failed run.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Message of its panic.
    pub what: String,
    /// File and line of its panic, if [`quiet`] was called.
    pub place: String,
    /// End of its trace.
    pub trace: String,
    /// Its choices, if it was recorded.
    pub tape: Option<Tape>,
}

/// Runs one seed. Returns the result of `run` and the hash of its choices, or the panic.
///
/// # Errors
/// A [`Failure`], with a trace: the run is repeated to record it.
pub fn attempt<R>(seed: u64, mut run: impl FnMut(&mut Sim) -> R) -> Result<(R, u64), Failure> {
    match execute(Sim::new(seed), &mut run) {
        Ok(done) => Ok(done),
        Err(first) => {
            let again = execute(Sim::recorded(seed, Record::Lines(SHOWN)), &mut run);
            Err(again
                .err()
                .unwrap_or(Failure { trace: "the run is not repeatable".into(), ..first }))
        }
    }
}

/// Runs one seed once, as `sim` says.
///
/// # Errors
/// A [`Failure`].
pub fn execute<R>(mut sim: Sim, mut run: impl FnMut(&mut Sim) -> R) -> Result<(R, u64), Failure> {
    // Only the trace is used after a panic, and it is consistent after every line.
    match catch_unwind(AssertUnwindSafe(|| run(&mut sim))) {
        Ok(result) => Ok((result, sim.choices_hash())),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let what = text.or_else(|| panic.downcast_ref::<&str>().copied());
            let what = what.unwrap_or("a panic without a message").to_string();
            let place = PLACE.take();
            Err(Failure { what, place, trace: sim.to_string(), tape: sim.take_tape() })
        }
    }
}

/// Runs the choices of a tape.
///
/// # Errors
/// A [`Failure`].
pub fn replay<R>(
    seed: u64,
    tape: &[Segment],
    lines: usize,
    run: impl FnMut(&mut Sim) -> R,
) -> Result<(R, u64), Failure> {
    execute(Sim::replayed(seed, tape, lines), run)
}

thread_local! {
    /// Place of this thread's last panic.
    static PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Makes panics print nothing and note their place, for a program that expects many of them.
pub fn quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::panic::set_hook(Box::new(|info: &PanicHookInfo<'_>| {
            let place = info.location().map(|at| format!("{}:{}", at.file(), at.line()));
            PLACE.replace(place.unwrap_or_default());
        }));
    });
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
        if let Err(Failure { what, trace, .. }) = attempt(seed, &mut run) {
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
    use crate::shrink::shrink;
    use crate::world::{Menu, World, storm};

    #[test]
    fn seed_determines_run() {
        let run = |sim: &mut Sim| (0..100).map(|_| sim.number()).collect::<Vec<_>>();
        let of = |seed| attempt(seed, run).unwrap();
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
    }

    #[test]
    fn recorded_run_is_the_same_run() {
        let run = |sim: &mut Sim| {
            sim.enter();
            for _ in 0..100 {
                sim.tick();
                let n = sim.number();
                sim.note(n);
            }
            sim.take_tape()
        };
        let (tape, hash) = execute(Sim::recorded(7, Record::Lines(10)), run).unwrap();
        assert_eq!(execute(Sim::new(7), run).unwrap().1, hash);
        let tape = tape.unwrap();
        assert_eq!(tape.len(), 101);
        assert_eq!(replay(7, &tape, 10, run).unwrap().1, hash);
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

    /// Counts to 3 if the right actions are chosen, among many others.
    struct Counter(u32);

    impl World for Counter {
        type Action = bool;

        fn menu(&mut self, menu: &mut Menu<bool>) {
            menu.may(9, || false);
            menu.may(1, || true);
        }

        fn act(&mut self, counts: bool, sim: &mut Sim) {
            self.0 += u32::from(counts && sim.below(4) > 1);
            assert!(self.0 < 3, "reached 3");
        }

        fn waiting(&self) -> Option<String> {
            None
        }
    }

    #[test]
    fn shrunk_failure_has_only_the_necessary_steps() {
        let run = |sim: &mut Sim| storm(&mut Counter(0), sim, 1000);
        let failure = attempt(1, run).unwrap_err();
        let shrunk = shrink(1, &failure, 1000, run);
        let steps = shrunk.trace.lines().count() - 1;
        assert_eq!(steps, 3, "{}", shrunk.trace);
        assert!(
            shrunk.trace.lines().skip(1).all(|line| line.ends_with("true")),
            "{}",
            shrunk.trace
        );
    }
}
