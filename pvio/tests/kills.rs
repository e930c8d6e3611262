//! Processes of a hosted machine are killed at random moments while its disk is verified: raw and
//! qcow2, pages mapped for single requests and persistently.
//!
//! `PVIO_KILL_ROUNDS=25` makes 500 kills: `pvio run` gives up at a supervisor that ends more than five
//! times a minute, so a round has a machine of its own, and at most four kills of a supervisor.
#![allow(missing_docs, reason = "tests")]

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const PATIENCE: Duration = Duration::from_secs(60);
/// Most and fewest kills of a round: as many as the machine has time for.
const KILLS: usize = 20;
const FEWEST: usize = 6;
/// Duration of the workload of a round, in seconds.
const SECONDS: u64 = 18;
/// Time of a round after which nothing is killed: the last successor must begin to serve.
const LAST_KILL: Duration = Duration::from_secs(SECONDS - 4);

fn pvio() -> Command {
    Command::new(env!("CARGO_BIN_EXE_pvio"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Device,
    Supervisor,
    Both,
}

/// Returns the victims of a round.
fn victims() -> [Victim; KILLS] {
    let mut all = [Victim::Device; KILLS];
    (all[2], all[10]) = (Victim::Supervisor, Victim::Supervisor);
    (all[5], all[15]) = (Victim::Both, Victim::Both);
    all
}

/// Size of a disk in bytes.
const SIZE: u64 = 48 << 20;

/// A kind of disk that is verified.
#[derive(Debug, Clone, Copy)]
struct Kind {
    qcow2: bool,
    policy: &'static str,
}

/// The kinds, one for each round in turn.
const KINDS: [Kind; 4] = [
    Kind { qcow2: false, policy: "persistent-or-map" },
    Kind { qcow2: false, policy: "map" },
    Kind { qcow2: true, policy: "persistent-or-map" },
    Kind { qcow2: true, policy: "map" },
];

impl Kind {
    /// Creates the image. Returns its path and the string of the disk, or `None` if there is no program
    /// that creates it.
    fn create(self, dir: &Path) -> Option<(PathBuf, String)> {
        let image = dir.join("scratch.img");
        let format = if self.qcow2 { "qcow2" } else { "raw" };
        if self.qcow2 {
            let mut create = Command::new("qemu-img");
            create.args(["create", "-q", "-f", format]).arg(&image).arg(SIZE.to_string());
            match create.output() {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
                created => {
                    let created = created.unwrap();
                    assert!(created.status.success(), "{}", text(&created.stderr));
                }
            }
        } else {
            fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
        }
        let disk = format!("[policy={}]{format}:{}", self.policy, image.display());
        Some((image, disk))
    }

    /// Checks the metadata of an image that was written by processes that were killed: clusters may be
    /// allocated without a use, but none may be damaged.
    fn check(self, image: &Path) {
        const LEAKS_ONLY: i32 = 3;
        if self.qcow2 {
            let mut check = Command::new("qemu-img");
            let ran = check.args(["check", "-f", "qcow2"]).arg(image).output().unwrap();
            let sound = ran.status.success() || ran.status.code() == Some(LEAKS_ONLY);
            assert!(sound, "{}\n{}", text(&ran.stdout), text(&ran.stderr));
        }
    }
}

/// A running check.
struct Check {
    child: Child,
    state: PathBuf,
}

impl Check {
    fn start(dir: &Path, disk: &str, seed: u64) -> Self {
        let state = dir.join("state");
        let mut pvio = pvio();
        pvio.args([
            "check",
            "--json",
            "--seed",
            &seed.to_string(),
            "--seconds",
            &SECONDS.to_string(),
            "--disk",
        ]);
        pvio.arg(disk).arg("--overwrite").arg("--state-dir").arg(&state);
        let child = pvio.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        Self { child, state }
    }

    /// Returns the supervisor and the process of the disk, if both run.
    fn processes(&self) -> Option<(u64, u64)> {
        let mut pvio = pvio();
        let out = pvio.args(["confinement", "--json", "--state-dir"]).arg(&self.state).output();
        let all: Vec<Value> = serde_json::from_slice(&out.unwrap().stdout).ok()?;
        let device = all.iter().find(|entry| entry["device"].is_string())?;
        Some((all[0]["pid"].as_u64()?, device["pid"].as_u64()?))
    }

    fn kill(&mut self, victim: Victim) -> SystemTime {
        let begin = Instant::now();
        loop {
            if self.child.try_wait().unwrap().is_some() {
                let mut why = String::new();
                self.child.stderr.take().unwrap().read_to_string(&mut why).unwrap();
                panic!("the check ended before all kills: {why}\n{}", self.log());
            }
            assert!(begin.elapsed() < PATIENCE, "there are no processes: {}", self.log());
            let Some((supervisor, device)) = self.processes() else { continue };
            let pids = match victim {
                Victim::Device => vec![device],
                Victim::Supervisor => vec![supervisor],
                Victim::Both => vec![supervisor, device],
            };
            let now = SystemTime::now();
            let kill = |pid: &u64| {
                let pid = Pid::from_raw(i32::try_from(*pid).unwrap()).unwrap();
                kill_process(pid, Signal::KILL).is_ok()
            };
            // One that has just ended is not counted.
            if pids.iter().all(kill) {
                return now;
            }
        }
    }

    /// Waits until a successor serves. A request that was in flight in two dead processes is answered
    /// with an error, so the requests are given time to complete.
    fn wait_until_served(&self, kill: (Victim, SystemTime)) {
        let begin = Instant::now();
        while pauses(&[kill], &resumed(&self.log())).iter().any(|pause| *pause > 60_000.0) {
            assert!(begin.elapsed() < PATIENCE, "nothing serves after {kill:?}: {}", self.log());
            sleep(Duration::from_millis(5));
        }
        sleep(Duration::from_millis(200));
    }

    fn log(&self) -> String {
        fs::read_to_string(self.state.join("driver.log")).unwrap_or_default()
    }
}

/// Returns the times at which a session was resumed or the guest had connected again, in seconds of
/// the day.
fn resumed(log: &str) -> Vec<f64> {
    let serves = |line: &&str| line.contains("session resumed") || line.contains("to=Connected");
    let lines = log.lines().filter(serves);
    lines.filter_map(time_of_day).collect()
}

/// Returns the time of a line of a log, `2026-01-31T12:00:00.123456Z …`, in seconds of the day.
fn time_of_day(line: &str) -> Option<f64> {
    let time = line.split_once('T')?.1.split_once('Z')?.0;
    let mut parts = time.split(':').map(|part| part.parse::<f64>().ok());
    let (hours, minutes, seconds) = (parts.next()??, parts.next()??, parts.next()??);
    Some((hours * 60.0 + minutes) * 60.0 + seconds)
}

/// Returns the pauses in milliseconds: from each kill of a process of the disk to the moment when its
/// successor has resumed the session.
fn pauses(kills: &[(Victim, SystemTime)], resumed: &[f64]) -> Vec<f64> {
    const DAY: f64 = 86_400.0;
    let of = |(victim, at): &(Victim, SystemTime)| {
        let at = at.duration_since(UNIX_EPOCH).unwrap().as_secs_f64() % DAY;
        let later = resumed.iter().map(|then| (then - at).rem_euclid(DAY) * 1000.0);
        (*victim != Victim::Supervisor).then(|| later.fold(f64::INFINITY, f64::min))
    };
    let mut all: Vec<f64> = kills.iter().filter_map(of).collect();
    all.sort_by(f64::total_cmp);
    all
}

/// A sequence of pseudo-random numbers (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

#[test]
fn session_goes_on_while_device_process_and_supervisor_are_killed() {
    let rounds: usize =
        std::env::var("PVIO_KILL_ROUNDS").map_or(1, |rounds| rounds.parse().unwrap());
    let start = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
    println!("seed {start}");
    let (mut random, mut all, mut count) = (Random(u64::from(start)), Vec::new(), 0);
    // A single round takes another kind each time.
    let first = usize::try_from(random.below(KINDS.len() as u64)).unwrap();
    for round in 0..rounds {
        let dir = tempfile::tempdir().unwrap();
        let kind = KINDS[(first + round) % KINDS.len()];
        let Some((image, disk)) = kind.create(dir.path()) else {
            eprintln!("SKIPPED: {kind:?}: qemu-img is not there; install qemu-utils");
            continue;
        };
        let mut check = Check::start(dir.path(), &disk, 1 + random.below(1 << 32));
        let begin = Instant::now();
        while !check.log().contains("to=Connected") {
            assert!(begin.elapsed() < PATIENCE, "not connected: {}", check.log());
            sleep(Duration::from_millis(5));
        }
        let mut kills = Vec::new();
        let begin = Instant::now();
        for victim in victims() {
            if begin.elapsed() > LAST_KILL {
                break;
            }
            sleep(Duration::from_millis(50 + random.below(400)));
            kills.push((victim, check.kill(victim)));
            check.wait_until_served(kills[kills.len() - 1]);
        }
        assert!(kills.len() >= FEWEST, "only {kills:?}");
        count += kills.len();
        let Check { child, state } = check;
        let out = child.wait_with_output().unwrap();
        let log = fs::read_to_string(state.join("driver.log")).unwrap_or_default();
        assert!(out.status.success(), "round {round}, {kind:?}: {}\n{log}", text(&out.stderr));
        let report: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(report["ok"], true, "{report}");
        assert_eq!(report["mismatches"], 0, "{report}");
        kind.check(&image);
        // A hosted domain ends with its last process; the guest then connects again.
        let both = kills.iter().filter(|(victim, _)| *victim == Victim::Both).count();
        assert!(report["sessions"].as_u64().unwrap() <= 1 + both as u64, "{report}");
        let pauses = pauses(&kills, &resumed(&log));
        assert!(pauses.iter().all(|pause| *pause < 60_000.0), "{pauses:?}\n{log}");
        println!(
            "round {round}, {kind:?}: {} kills, pause median {:.0} ms, max {:.0} ms; slowest request {} µs",
            kills.len(),
            pauses[pauses.len() / 2],
            pauses[pauses.len() - 1],
            report["max_us"]
        );
        all.extend(pauses);
    }
    if all.is_empty() {
        return;
    }
    all.sort_by(f64::total_cmp);
    let (median, max) = (all[all.len() / 2], all[all.len() - 1]);
    println!("{count} kills: pause median {median:.0} ms, max {max:.0} ms");
}
