//! Runs simulations from seeds; `cargo xtask sim` builds and starts it.

#![forbid(unsafe_code)]

use clap::Parser;
use pvio_simulator::explore::{Explored, Replay, Seeds, World, explore, replay};
use std::hash::{BuildHasher, RandomState};
use std::process::ExitCode;
use std::time::Duration;

/// Simulates guests, backends, xenstore and their faults on one thread for each seed.
#[derive(Parser)]
struct Args {
    /// Number of seeds to run.
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    seeds: u64,
    /// Start no seed after this time.
    #[arg(long, value_name = "MINUTES")]
    minutes: Option<f64>,
    /// The first seed; a random one if it is not given.
    #[arg(long, value_name = "SEED")]
    start: Option<u64>,
    /// What to simulate.
    #[arg(long, value_enum, default_value = "all")]
    world: World,
    /// Run one seed again, reduce its failure, and print the trace.
    #[arg(long, value_name = "SEED")]
    replay: Option<u64>,
    /// With `--replay`: also print the trace of the whole run.
    #[arg(long, requires = "replay")]
    whole: bool,
    /// Plant each fault, or those named, and print after how many seeds it is found.
    #[cfg(pvio_planted)]
    #[arg(long, value_name = "FAULT", num_args = 0..)]
    planted: Option<Vec<String>>,
    /// With `--planted`: also write the rows to this file.
    #[cfg(pvio_planted)]
    #[arg(long, value_name = "FILE", requires = "planted")]
    table: Option<std::path::PathBuf>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    #[cfg(pvio_planted)]
    if let Some(names) = &args.planted {
        return planted(&args, names);
    }
    match args.replay {
        Some(seed) => match replay(seed, args.world) {
            Some(replay) => show(&replay, args.whole),
            None => {
                println!("seed {seed} does not fail");
                return ExitCode::SUCCESS;
            }
        },
        None => {
            let start = args.start.unwrap_or_else(|| RandomState::new().hash_one(0u64) >> 16);
            let limit = args.minutes.map_or(Duration::MAX, |m| Duration::from_secs_f64(m * 60.0));
            println!("start seed {start}");
            let seeds = Seeds { start, count: args.seeds, limit, world: args.world };
            let explored = explore(seeds);
            let Explored { runs, time, .. } = &explored;
            println!(
                "{runs} seeds in {:.1} s, {:.1} per second",
                time.as_secs_f64(),
                explored.rate()
            );
            let Some((seed, failure)) = explored.failure else { return ExitCode::SUCCESS };
            println!("\nseed {seed} fails: {}\n    at {}", failure.what, failure.place);
            let world = args.world.to_string();
            println!("to run it again: cargo xtask sim --world {world} --replay {seed}\n");
            match replay(seed, args.world) {
                Some(replay) => show(&replay, false),
                None => println!("the seed does not fail again: the run is not repeatable"),
            }
        }
    }
    ExitCode::FAILURE
}

#[cfg(pvio_planted)]
fn planted(args: &Args, names: &[String]) -> ExitCode {
    use pvio_ring::planted::{Fault, plant};
    use pvio_simulator::planted::Search;

    let named = |fault: &&Fault| names.is_empty() || names.contains(&format!("{fault:?}"));
    let faults: Vec<Fault> = Fault::ALL.iter().filter(named).copied().collect();
    if let (Some(seed), [fault]) = (args.replay, faults.as_slice()) {
        plant(Some(*fault));
        replay(seed, args.world).iter().for_each(|replay| show(replay, args.whole));
        return ExitCode::SUCCESS;
    }
    let (start, world) = (args.start.unwrap_or_default(), args.world);
    let limit = args.minutes.map_or(Duration::MAX, |m| Duration::from_secs_f64(m * 60.0));
    let (mut rows, mut missed) = (String::new(), 0);
    for fault in faults {
        let search = Search::of(fault, Seeds { start, count: args.seeds, limit, world });
        let (seconds, seed) = (search.explored.time, search.explored.failure.as_ref().map(|f| f.0));
        println!("{search} {seed:?}, {:.1} s", seconds.as_secs_f64());
        rows += &format!("{search}\n");
        missed += usize::from(!search.is_found());
    }
    if let Some(table) = &args.table {
        std::fs::write(table, rows).expect("the table is written");
    }
    println!("{missed} not found");
    if missed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn show(Replay { whole, shrunk }: &Replay, all: bool) {
    if all {
        println!("{}\n{}\n    at {}\n", whole.trace, whole.what, whole.place);
    }
    let [before, after] = [whole, shrunk].map(|failure| failure.trace.lines().count());
    println!("reduced from {before} to {after} lines:\n{}", shrunk.trace);
    println!("{}\n    at {}", shrunk.what, shrunk.place);
}
