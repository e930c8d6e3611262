//! Processes of a hosted machine are killed at random moments while files are downloaded from its
//! guest, through a NIC in a process of its own.
//!
//! `PVIO_KILL_ROUNDS=20` makes 20 rounds, each with a machine of its own: `pvio run` gives up at a
//! supervisor that ends more than five times a minute.
#![allow(missing_docs, reason = "tests")]

use pvio_demo::image::DemoFile;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const PATIENCE: Duration = Duration::from_secs(60);
const NIC: &str = "vif2.0";

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

/// The victims of a round, in two parts. A tap ends with the last process that has it open, so a
/// connection can only be required to survive the first part.
const LASTING: [Victim; 5] = {
    use Victim::{Device, Supervisor};
    [Device, Device, Supervisor, Device, Device]
};
const ENDING: [Victim; 1] = [Victim::Both];

/// The victims of a round with AF_XDP: its interface exists without pvio, so connections survive.
const LASTING_AFXDP: [Victim; 6] = {
    use Victim::{Both, Device, Supervisor};
    [Device, Supervisor, Device, Both, Device, Supervisor]
};

/// Creates one interface of a veth pair for the NIC, and the other one for the host.
const VETH: &str = "ip link add x0 type veth peer name f0 && ip addr add 10.107.0.1/24 dev f0 && \
    ethtool -K f0 tx off >/dev/null && ip link set x0 up && ip link set f0 up";

/// Returns whether this machine can run the test; prints the reason if not.
fn can_run(test: &str) -> bool {
    let works = |program: &str, args: &[&str]| {
        Command::new(program).args(args).output().is_ok_and(|out| out.status.success())
    };
    let why = if !rustix::process::geteuid().is_root() || !works("unshare", &["-n", "true"]) {
        "no network namespace; run as root, with util-linux"
    } else if !Path::new("/dev/net/tun").exists() {
        "no /dev/net/tun; modprobe tun"
    } else if !works("curl", &["-V"]) {
        "no curl; apt install curl"
    } else {
        return true;
    };
    eprintln!("SKIPPED: {test}: {why}");
    false
}

/// A running `pvio run` with a NIC, in its own network namespace.
struct Machine {
    child: Child,
    state: PathBuf,
}

impl Machine {
    /// Starts a machine after the commands of `before`.
    fn start(state: PathBuf, before: &str, options: &str) -> Self {
        // `unshare` and the shell execute the program, so the process id stays the same.
        let mut run = Command::new("unshare");
        run.args(["-n", "sh", "-c", &format!("{before} && exec \"$@\""), "sh"]);
        run.args([env!("CARGO_BIN_EXE_pvio"), "run", "--nic", "--nic-options", options]);
        let mut child = run.arg("--state-dir").arg(&state).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        assert!(lines.any(|line| line.starts_with("ready")), "pvio exited: {:?}", child.wait());
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, state }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.state.join("driver.log")).unwrap_or_default()
    }

    /// Returns the supervisor and the process of the NIC, if both run and the supervisor knows the
    /// process.
    fn processes(&self) -> Option<(u64, u64)> {
        let mut pvio = Command::new(env!("CARGO_BIN_EXE_pvio"));
        let out = pvio.args(["confinement", "--json", "--state-dir"]).arg(&self.state).output();
        let all: Vec<Value> = serde_json::from_slice(&out.unwrap().stdout).ok()?;
        let nic = all.iter().find(|entry| entry["device"] == NIC)?;
        assert_eq!(nic["isolation"], "process", "{nic}");
        let pid = nic["pid"].as_u64().filter(|_| nic["process"].is_object())?;
        Some((all.first()?["pid"].as_u64()?, pid))
    }

    /// Kills, and waits until there are successors.
    fn kill(&self, victim: Victim) {
        let (supervisor, device) = self.wait_for(|_| true, victim);
        let pids = match victim {
            Victim::Device => vec![device],
            Victim::Supervisor => vec![supervisor],
            Victim::Both => vec![supervisor, device],
        };
        for pid in &pids {
            let pid = Pid::from_raw(i32::try_from(*pid).unwrap()).unwrap();
            kill_process(pid, Signal::KILL).unwrap();
        }
        let is_new = |(one, other): (u64, u64)| !pids.contains(&one) && !pids.contains(&other);
        let (next, after) = self.wait_for(is_new, victim);
        assert_eq!(next == supervisor, victim == Victim::Device, "{victim:?}: {}", self.log());
        // The process of the NIC goes on while its supervisor is replaced.
        assert_eq!(after == device, victim == Victim::Supervisor, "{victim:?}: {}", self.log());
    }

    fn wait_for(&self, is_right: impl Fn((u64, u64)) -> bool, victim: Victim) -> (u64, u64) {
        let begin = Instant::now();
        loop {
            if let Some(found) = self.processes().filter(|found| is_right(*found)) {
                return found;
            }
            assert!(begin.elapsed() < PATIENCE, "{victim:?}: {}", self.log());
            sleep(Duration::from_millis(2));
        }
    }

    fn downloads(&self, seed: u64) -> Downloads {
        let (pid, state) = (self.child.id(), Arc::new(Shared::default()));
        let shared = Arc::clone(&state);
        let files = pvio_demo::image::files();
        let work = move || {
            let mut random = Random(seed);
            while !shared.stop.load(Ordering::Acquire) {
                // The large one every other time.
                let noise = files.iter().position(|file| file.bytes.len() > 1 << 20).unwrap();
                let small = usize::try_from(random.below(files.len() as u64)).unwrap();
                let index = if random.below(2) == 0 { noise } else { small };
                download(pid, &files[index], shared.ending.load(Ordering::Acquire));
                shared.bytes.fetch_add(files[index].bytes.len() as u64, Ordering::AcqRel);
                shared.count.fetch_add(1, Ordering::AcqRel);
            }
        };
        Downloads { thread: std::thread::spawn(work), state }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let _ = self.child.wait();
    }
}

/// Downloads files one after the other, and compares their bytes.
struct Downloads {
    thread: JoinHandle<()>,
    state: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Connections may end.
    ending: AtomicBool,
    stop: AtomicBool,
    count: AtomicU64,
    bytes: AtomicU64,
}

impl Downloads {
    /// Waits until a download that begins now has completed.
    fn wait_for_next(&self, machine: &Machine) {
        let (begin, count) = (Instant::now(), self.state.count.load(Ordering::Acquire));
        while self.state.count.load(Ordering::Acquire) < count + 2 {
            assert!(!self.thread.is_finished(), "a download failed: {}", machine.log());
            assert!(begin.elapsed() < PATIENCE, "no download completes: {}", machine.log());
            sleep(Duration::from_millis(5));
        }
    }

    fn end(self) -> (u64, u64) {
        self.state.stop.store(true, Ordering::Release);
        self.thread.join().unwrap();
        (self.state.count.load(Ordering::Acquire), self.state.bytes.load(Ordering::Acquire))
    }
}

/// Downloads a file. The connection may fail, and is made again, only if `ending`.
fn download(pid: u32, file: &DemoFile, ending: bool) {
    let fetch = || -> Output {
        let mut curl = Command::new("nsenter");
        curl.args(["-t", &pid.to_string(), "-n", "curl", "-sSf", "--max-time", "30"]);
        if ending {
            // What an ended tap leaves behind is a connection without packets.
            curl.args(["--connect-timeout", "1", "--speed-limit", "1", "--speed-time", "2"]);
        }
        curl.arg(format!("http://10.107.0.2/{}", file.path)).output().unwrap()
    };
    let begin = Instant::now();
    let mut out = fetch();
    while ending && !out.status.success() && begin.elapsed() < PATIENCE {
        sleep(Duration::from_millis(50));
        out = fetch();
    }
    assert!(out.status.success(), "{}: {}", file.path, text(&out.stderr));
    assert!(out.stdout == file.bytes, "{} has other contents", file.path);
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
fn downloads_are_right_while_process_of_nic_and_supervisor_are_killed() {
    if !can_run("downloads_are_right_while_process_of_nic_and_supervisor_are_killed") {
        return;
    }
    let rounds = std::env::var("PVIO_KILL_ROUNDS").map_or(1, |rounds| rounds.parse().unwrap());
    let start = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
    println!("seed {start}");
    let mut random = Random(u64::from(start));
    for round in 0..rounds {
        let dir = tempfile::tempdir().unwrap();
        let machine = Machine::start(dir.path().join("state"), "true", "");
        let downloads = machine.downloads(random.below(1 << 32));
        downloads.wait_for_next(&machine);
        let begin = Instant::now();
        for victim in LASTING {
            sleep(Duration::from_millis(random.below(250)));
            machine.kill(victim);
        }
        downloads.wait_for_next(&machine);
        let status = status(&machine);
        let devices = status["devices"].as_array().unwrap();
        let is_kept = |device: &Value| device["state"] == "Connected" && device["reattached"] == 0;
        assert!(devices.iter().all(is_kept), "{status}");
        let lasting = begin.elapsed();
        downloads.state.ending.store(true, Ordering::Release);
        // The download in progress does not expect the end of its connection.
        downloads.wait_for_next(&machine);
        for victim in ENDING {
            sleep(Duration::from_millis(random.below(250)));
            machine.kill(victim);
            downloads.wait_for_next(&machine);
        }
        let (count, bytes) = downloads.end();
        let log = machine.log();
        let replaced = log.matches("the device process ended: it is replaced").count();
        let killed = LASTING.iter().filter(|victim| **victim == Victim::Device).count();
        assert_eq!(replaced, killed, "{log}");
        assert!(!log.contains("ended unexpectedly"), "{log}");
        println!(
            "round {round}: {} kills in {lasting:.1?}, {} of both in {:.1?}; {count} downloads, {bytes} bytes",
            LASTING.len(),
            ENDING.len(),
            begin.elapsed() - lasting
        );
    }
}

#[test]
fn afxdp_downloads_are_right_while_process_of_nic_and_supervisor_are_killed() {
    let test = "afxdp_downloads_are_right_while_process_of_nic_and_supervisor_are_killed";
    if !can_run(test) {
        return;
    }
    if !Command::new("ethtool").arg("--version").output().is_ok_and(|out| out.status.success()) {
        eprintln!("SKIPPED: {test}: no ethtool; apt install ethtool");
        return;
    }
    let begin = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
    println!("seed {begin}");
    let mut random = Random(u64::from(begin));
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::start(dir.path().join("state"), VETH, "afxdp=x0");
    let downloads = machine.downloads(random.below(1 << 32));
    downloads.wait_for_next(&machine);
    let begin = Instant::now();
    for victim in LASTING_AFXDP {
        sleep(Duration::from_millis(random.below(150)));
        machine.kill(victim);
    }
    downloads.wait_for_next(&machine);
    let status = status(&machine);
    let devices = status["devices"].as_array().unwrap();
    let is_kept = |device: &Value| device["state"] == "Connected" && device["reattached"] == 0;
    assert!(devices.iter().all(is_kept), "{status}");
    let (count, bytes) = downloads.end();
    let log = machine.log();
    assert!(log.contains("queue served by AF_XDP"), "{log}");
    assert!(!log.contains("ended unexpectedly"), "{log}");
    println!(
        "{} kills in {:.1?}; {count} downloads, {bytes} bytes",
        LASTING_AFXDP.len(),
        begin.elapsed()
    );
}

fn status(machine: &Machine) -> Value {
    let pid = machine.child.id().to_string();
    let mut curl = Command::new("nsenter");
    curl.args(["-t", &pid, "-n", "curl", "-sSf", "--max-time", "30"]);
    let out = curl.arg("http://10.107.0.2/.pvio/status.json").output().unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}
