//! Processes of a hosted machine are killed while its disk is verified, at random moments, after each
//! system call of a poll, and after each instruction that publishes responses: raw and qcow2, pages
//! mapped for single requests and persistently.
//!
//! `PVIO_KILL_ROUNDS=25` makes 500 kills at random, and all of the others: `pvio check` gives up at a supervisor that ends more than five
//! times a minute, so each round has a new machine, and at most four kills of a supervisor.
#![allow(missing_docs, reason = "tests")]

mod machine;
#[cfg(target_arch = "x86_64")]
mod places;
#[cfg(target_arch = "x86_64")]
mod steps;

use machine::{Check, KINDS, Pauses, Random, Victim, print};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Most and fewest kills of a round: as many as the machine has time for.
const KILLS: usize = 20;
const FEWEST: usize = 6;
/// Duration of the workload of a round, in seconds.
const SECONDS: u64 = 18;
/// Time of a round after which nothing is killed: the last successor must begin to serve.
const LAST_KILL: Duration = Duration::from_secs(SECONDS - 4);

/// Returns the victims of a round.
fn victims() -> [Victim; KILLS] {
    let mut all = [Victim::Device; KILLS];
    (all[2], all[10]) = (Victim::Supervisor, Victim::Supervisor);
    (all[5], all[15]) = (Victim::Helper, Victim::Both);
    all
}

#[test]
fn session_goes_on_while_device_process_and_supervisor_are_killed() {
    let rounds: usize =
        std::env::var("PVIO_KILL_ROUNDS").map_or(1, |rounds| rounds.parse().unwrap());
    let start = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
    println!("seed {start}");
    let (mut random, mut all, mut count) = (Random(u64::from(start)), Pauses::new(), 0);
    // A single round takes another kind each time.
    let first = usize::try_from(random.below(KINDS.len() as u64)).unwrap();
    for round in 0..rounds {
        let dir = tempfile::tempdir().unwrap();
        let kind = KINDS[(first + round) % KINDS.len()];
        let seed = 1 + random.below(1 << 32);
        let Some(mut check) = Check::start(dir.path(), kind, seed, SECONDS) else { continue };
        let mut kills = Vec::new();
        let begin = Instant::now();
        for victim in victims() {
            if begin.elapsed() > LAST_KILL {
                break;
            }
            sleep(Duration::from_millis(50 + random.below(400)));
            kills.push(check.kill(victim));
            check.wait_until_served(kills[kills.len() - 1]);
        }
        assert!(kills.len() >= FEWEST, "only {kills:?}");
        let helpers = kills.iter().filter(|(victim, _)| *victim == Victim::Helper).count();
        count += kills.len() + helpers;
        all.extend(check.finish(&kills));
    }
    println!("{count} kills");
    print(&all);
}

#[cfg(not(target_arch = "x86_64"))]
#[test]
fn session_goes_on_after_each_system_call_and_instruction() {
    eprintln!("SKIPPED: single steps are implemented for x86-64 only");
}
