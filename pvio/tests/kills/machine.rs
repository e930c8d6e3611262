//! A machine that verifies its disk, and its processes.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub const PATIENCE: Duration = Duration::from_secs(60);

fn pvio() -> Command {
    Command::new(env!("CARGO_BIN_EXE_pvio"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Victim {
    Device,
    Supervisor,
    Both,
    /// Both, and the image helper while it opens the image for their successors.
    Helper,
}

/// Size of a disk in bytes.
const SIZE: u64 = 48 << 20;

/// A kind of disk that is verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind {
    qcow2: bool,
    policy: &'static str,
}

/// The kinds, one for each round in turn.
pub const KINDS: [Kind; 4] = [
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
pub struct Check {
    child: Child,
    state: PathBuf,
    kind: Kind,
    image: PathBuf,
}

impl Check {
    /// Starts a check of a disk of this kind for a time, and waits until it is connected. Returns
    /// `None` if there is no program that creates its image.
    pub fn start(dir: &Path, kind: Kind, seed: u64, seconds: u64) -> Option<Self> {
        let Some((image, disk)) = kind.create(dir) else {
            eprintln!("SKIPPED: {kind:?}: qemu-img is not there; install qemu-utils");
            return None;
        };
        let state = dir.join("state");
        let mut pvio = pvio();
        pvio.args(["check", "--json", "--overwrite"]);
        pvio.args(["--seed", &seed.to_string(), "--seconds", &seconds.to_string()]);
        pvio.args(["--disk", &disk, "--state-dir"]).arg(&state);
        let child = pvio.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let check = Self { child, state, kind, image };
        let begin = Instant::now();
        while !check.log().contains("to=Connected") {
            assert!(begin.elapsed() < PATIENCE, "not connected: {}", check.log());
            sleep(Duration::from_millis(5));
        }
        Some(check)
    }

    /// Waits until the check ends, and verifies its result. Returns the pauses in milliseconds.
    pub fn finish(self, kills: &[(Victim, SystemTime)]) -> Pauses {
        let Self { child, state, kind, image } = self;
        let out = child.wait_with_output().unwrap();
        let log = fs::read_to_string(state.join("driver.log")).unwrap_or_default();
        assert!(out.status.success(), "{kind:?}: {}\n{log}", text(&out.stderr));
        let report: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(report["ok"], true, "{report}");
        assert_eq!(report["mismatches"], 0, "{report}");
        kind.check(&image);
        // A hosted domain ends with its last process; the guest then connects again.
        let both =
            kills.iter().filter(|(victim, _)| matches!(victim, Victim::Both | Victim::Helper));
        let both = both.count();
        assert!(report["sessions"].as_u64().unwrap() <= 1 + both as u64, "{report}");
        let all = pauses(kills, &resumed(&log));
        assert!(all.iter().all(|(_, pause)| *pause < 60_000.0), "{all:?}\n{log}");
        println!("{kind:?}: {} kills", kills.len());
        all.into_iter().map(|(victim, pause)| (kind, victim, pause)).collect()
    }

    /// Returns the supervisor and the process of the disk, if both run.
    fn processes(&self) -> Option<(u64, u64)> {
        let mut pvio = pvio();
        let out = pvio.args(["confinement", "--json", "--state-dir"]).arg(&self.state).output();
        let all: Vec<Value> = serde_json::from_slice(&out.unwrap().stdout).ok()?;
        let device = all.iter().find(|entry| entry["device"].is_string())?;
        Some((all[0]["pid"].as_u64()?, device["pid"].as_u64()?))
    }

    /// Waits for the supervisor and the process of the disk, and returns them.
    pub fn wait_for_processes(&mut self) -> (u64, u64) {
        let begin = Instant::now();
        loop {
            if self.child.try_wait().unwrap().is_some() {
                let mut why = String::new();
                self.child.stderr.take().unwrap().read_to_string(&mut why).unwrap();
                panic!("the check ended before all kills: {why}\n{}", self.log());
            }
            assert!(begin.elapsed() < PATIENCE, "there are no processes: {}", self.log());
            if let Some(processes) = self.processes() {
                return processes;
            }
        }
    }

    /// Kills once, and returns what and when. An image helper that was missed leaves both others.
    pub fn kill(&mut self, victim: Victim) -> (Victim, SystemTime) {
        loop {
            let (supervisor, device) = self.wait_for_processes();
            let pids = match victim {
                Victim::Device => vec![device],
                Victim::Supervisor => vec![supervisor],
                Victim::Both | Victim::Helper => vec![supervisor, device],
            };
            let now = SystemTime::now();
            let kill = |pid: &u64| {
                let pid = Pid::from_raw(i32::try_from(*pid).unwrap()).unwrap();
                kill_process(pid, Signal::KILL).is_ok()
            };
            // One that has just ended is not counted.
            if !pids.iter().all(kill) {
                continue;
            }
            let missed = victim == Victim::Helper && !self.kill_helper();
            return (if missed { Victim::Both } else { victim }, now);
        }
    }

    /// Kills the image helper of the next supervisor. Returns whether it ran long enough.
    fn kill_helper(&self) -> bool {
        let begin = Instant::now();
        let name = |pid: &u32| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        while begin.elapsed() < Duration::from_secs(2) {
            let supervisors = children(self.child.id());
            let mut helpers = supervisors.iter().flat_map(|pid| children(*pid));
            let Some(helper) = helpers.find(|pid| name(pid).starts_with(b"pvio: image helper"))
            else {
                continue;
            };
            let helper = Pid::from_raw(i32::try_from(helper).unwrap()).unwrap();
            if kill_process(helper, Signal::KILL).is_ok() {
                return true;
            }
        }
        false
    }

    /// Waits until a successor serves. A request that was in flight in two dead processes is answered
    /// with an error, so this also waits until those that were in flight have completed.
    pub fn wait_until_served(&self, kill: (Victim, SystemTime)) {
        let begin = Instant::now();
        let serves = || pauses(&[kill], &resumed(&self.log())).iter().all(|(_, ms)| *ms < 60_000.0);
        while !serves() || self.in_flight_before() > 0 {
            assert!(begin.elapsed() < PATIENCE, "nothing serves after {kill:?}: {}", self.log());
            sleep(Duration::from_millis(5));
        }
    }

    /// Returns the number of requests that are in flight and were in flight when a process died, from
    /// the in-flight record of the disk, which has one queue (`ring/src/inflight`).
    fn in_flight_before(&self) -> usize {
        const HEADER: usize = 8;
        const KEY_WORDS: usize = 3;
        const ENTRY: usize = 192 / 8;
        const IN_FLIGHT: u64 = 1;
        let Ok(bytes) = fs::read(self.state.join("inflight/vbd-2-51712")) else { return 0 };
        let words: Vec<u64> =
            bytes.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
        let key = usize::try_from(words[KEY_WORDS]).unwrap();
        // Header and key have whole cache lines; the number of published responses has one.
        let entries = (HEADER + key).next_multiple_of(8) + 8;
        let all = words[entries..].chunks_exact(ENTRY);
        assert_eq!(all.len(), 32, "the layout of the record");
        all.filter(|entry| entry[0] == IN_FLIGHT && entry[2] > 0).count()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.state.join("driver.log")).unwrap_or_default()
    }
}

/// Returns the children of a process.
fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let of = |task: fs::DirEntry| {
        let all = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        all.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>()
    };
    tasks.flat_map(of).collect()
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

/// The disk, what was killed, and the pause that it caused in milliseconds.
pub type Pauses = Vec<(Kind, Victim, f64)>;

/// Returns the pauses: from each kill of a process of the disk to the moment when its successor has
/// resumed the session.
fn pauses(kills: &[(Victim, SystemTime)], resumed: &[f64]) -> Vec<(Victim, f64)> {
    const DAY: f64 = 86_400.0;
    let of = |(victim, at): &(Victim, SystemTime)| {
        let at = at.duration_since(UNIX_EPOCH).unwrap().as_secs_f64() % DAY;
        let later = resumed.iter().map(|then| (then - at).rem_euclid(DAY) * 1000.0);
        (*victim, later.fold(f64::INFINITY, f64::min))
    };
    kills.iter().filter(|(victim, _)| *victim != Victim::Supervisor).map(of).collect()
}

/// Prints the median, the 99th percentile and the maximum of the pauses, by disk and victim.
pub fn print(pauses: &Pauses) {
    let mut by: BTreeMap<(Kind, Victim), Vec<f64>> = BTreeMap::new();
    for (kind, victim, pause) in pauses {
        by.entry((*kind, *victim)).or_default().push(*pause);
    }
    for ((kind, victim), mut all) in by {
        all.sort_by(f64::total_cmp);
        let at = |percent| all[(all.len() - 1) * percent / 100];
        println!(
            "{kind:?}, {victim:?}: {} pauses, median {:.0} ms, 99 % {:.0} ms, max {:.0} ms",
            all.len(),
            at(50),
            at(99),
            at(100)
        );
    }
}

/// A sequence of pseudo-random numbers (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}
