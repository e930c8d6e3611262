//! Many seeds on all cores, the reduction of a failure, and its replay.

use crate::{disk, net};
use clap::ValueEnum;
use pvio_sim::seeds::{execute, quiet};
use pvio_sim::shrink::shrink;
use pvio_sim::{Failure, Record, Sim};
use std::fmt;
use std::num::NonZero;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Number of runs that the reduction of a failure may take.
const SHRINK_RUNS: usize = 3000;
/// Number of lines of a failed run's trace.
const LINES: usize = 200_000;

/// What is simulated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum World {
    /// Disks and their guests.
    Disk,
    /// NICs and their guests.
    Net,
    /// Each seed selects one of the others.
    All,
}

impl fmt::Display for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = self.to_possible_value().expect("no world is hidden");
        f.write_str(word.get_name())
    }
}

impl World {
    /// Runs the seed of `sim`.
    ///
    /// # Panics
    /// If an invariant does not hold.
    pub fn run(self, sim: &mut Sim) {
        match self {
            Self::Disk => disk::any(sim),
            Self::Net => net::any(sim),
            Self::All if sim.below(3) == 2 => net::any(sim),
            Self::All => disk::any(sim),
        }
    }
}

/// Seeds to run.
#[derive(Clone, Copy, Debug)]
pub struct Seeds {
    pub start: u64,
    /// Largest number of seeds.
    pub count: u64,
    /// No seed is started after that time.
    pub limit: Duration,
    pub world: World,
}

/// Seeds that were run.
#[derive(Debug)]
pub struct Explored {
    pub runs: u64,
    pub time: Duration,
    /// The first seed that failed, and its message.
    pub failure: Option<(u64, Failure)>,
}

impl Explored {
    /// Returns the number of seeds per second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.runs as f64 / self.time.as_secs_f64().max(0.001)
    }
}

/// Runs seeds on all cores, each on one thread, until one fails.
#[must_use]
pub fn explore(seeds: Seeds) -> Explored {
    explore_with(seeds, || ())
}

/// Does as [`explore`]; each thread calls `prepare` first.
#[must_use]
pub fn explore_with(seeds: Seeds, prepare: impl Fn() + Sync) -> Explored {
    quiet();
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let (next, runs, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let failure: Mutex<Option<(u64, Failure)>> = Mutex::new(None);
    let begun = Instant::now();
    let work = || {
        prepare();
        while !stop.load(Ordering::Relaxed) && begun.elapsed() < seeds.limit {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= seeds.count {
                break;
            }
            let seed = seeds.start.wrapping_add(number);
            let outcome = execute(Sim::new(seed), |sim| seeds.world.run(sim));
            runs.fetch_add(1, Ordering::Relaxed);
            if let Err(found) = outcome {
                stop.store(true, Ordering::Relaxed);
                let mut first = failure.lock().expect("no thread panics with the lock");
                if first.as_ref().is_none_or(|(other, _)| seed < *other) {
                    *first = Some((seed, found));
                }
            }
        }
    };
    thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    Explored {
        runs: runs.into_inner(),
        time: begun.elapsed(),
        failure: failure.into_inner().expect("no thread panics with the lock"),
    }
}

/// A failed run, and the same failure with fewer choices.
#[derive(Debug)]
pub struct Replay {
    pub whole: Failure,
    pub shrunk: Failure,
}

/// Runs one seed again, and reduces its failure. `None` if it does not fail.
#[must_use]
pub fn replay(seed: u64, world: World) -> Option<Replay> {
    quiet();
    let run = |sim: &mut Sim| world.run(sim);
    let whole = execute(Sim::recorded(seed, Record::Lines(LINES)), run).err()?;
    let shrunk = shrink(seed, &whole, SHRINK_RUNS, run);
    Some(Replay { whole, shrunk })
}
