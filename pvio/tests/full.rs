//! The file system of a disk's image is full for some time while the disk is verified.
#![allow(missing_docs, reason = "tests")]

use rustix::process::{Pid, Signal, getuid, kill_process};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
/// Size of the disk, of the file system, and of the file that fills most of it, in MiB.
const DISK: u64 = 24;
const FILE_SYSTEM: u64 = 40;
const FILLER: u64 = 34;

fn pvio() -> Command {
    Command::new(env!("CARGO_BIN_EXE_pvio"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A check of a disk on a file system of its own, which only this check and its processes see.
struct Check {
    child: Child,
    state: PathBuf,
    mounted: PathBuf,
}

impl Check {
    /// Returns `None` if there is no program that creates the image.
    fn start(dir: &Path, format: &str) -> Option<Self> {
        let (state, mounted) = (dir.join("state"), dir.join("mounted"));
        fs::create_dir(&mounted).unwrap();
        let image = mounted.join("disk");
        let create = match format {
            "raw" => format!("truncate -s {DISK}M {}", image.display()),
            _ => format!("qemu-img create -q -f {format} {} {DISK}M", image.display()),
        };
        if format != "raw" && Command::new("qemu-img").arg("--version").output().is_err() {
            eprintln!("SKIPPED: {format}: qemu-img is not there; install qemu-utils");
            return None;
        }
        let script = format!(
            "mount -t tmpfs -o size={FILE_SYSTEM}M tmpfs {at} && {create} && \
             fallocate -l {FILLER}M {at}/filler && exec \"$@\"",
            at = mounted.display(),
        );
        let disk = format!("{format}:{}", image.display());
        let child = Command::new("unshare")
            .args(["--mount", "sh", "-ec", &script, "sh", env!("CARGO_BIN_EXE_pvio"), "check"])
            .args(["--json", "--seed", "1", "--seconds", "4", "--disk", &disk, "--overwrite"])
            .arg("--state-dir")
            .arg(&state)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Some(Self { child, state, mounted })
    }

    /// Returns the path of a file on the file system.
    fn file(&self, name: &str) -> PathBuf {
        let there = self.mounted.join(name);
        let root = PathBuf::from(format!("/proc/{}/root", self.child.id()));
        root.join(there.strip_prefix("/").unwrap())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.state.join("driver.log")).unwrap_or_default()
    }

    fn wait_until(&mut self, what: &str, is: impl Fn(&Self) -> bool) {
        let begin = Instant::now();
        while !is(self) {
            let ended = self.child.try_wait().unwrap();
            let late = begin.elapsed() > PATIENCE;
            assert!(ended.is_none() && !late, "not {what}, {ended:?}: {}", self.log());
            sleep(Duration::from_millis(20));
        }
    }

    /// Returns the sum of a counter over all queues of the disk.
    fn counter(&self, name: &str) -> u64 {
        let out = pvio().args(["stats", "--json", "--state-dir"]).arg(&self.state).output();
        let Ok(all) = serde_json::from_slice::<Vec<Value>>(&out.unwrap().stdout) else { return 0 };
        let queues = all.iter().filter_map(|device| device["queues"].as_array()).flatten();
        queues.filter_map(|queue| queue[name].as_u64()).sum()
    }

    fn is_paused(&self) -> bool {
        self.counter("paused") > 0
    }

    fn kill_device(&self) {
        let out = pvio().args(["confinement", "--json", "--state-dir"]).arg(&self.state).output();
        let all: Vec<Value> = serde_json::from_slice(&out.unwrap().stdout).unwrap();
        let device = all.iter().find(|entry| entry["device"].is_string()).unwrap();
        let pid = i32::try_from(device["pid"].as_i64().unwrap()).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }
}

#[test]
fn disk_on_full_file_system_is_paused_and_resumes_when_there_is_space() {
    if !getuid().is_root() {
        eprintln!("SKIPPED: no file system can be mounted; run as root");
        return;
    }
    for (format, kills) in [("raw", 3), ("qcow2", 0)] {
        let dir = tempfile::tempdir().unwrap();
        let Some(mut check) = Check::start(dir.path(), format) else { continue };
        check.wait_until("paused", Check::is_paused);
        // Requests that are held do not count as the reason for the end of their process.
        for kill in 1..=kills {
            check.kill_device();
            let served = |check: &Check| check.log().matches("session resumed").count() >= kill;
            check.wait_until("resumed", served);
            check.wait_until("paused again", Check::is_paused);
        }
        if format == "raw" {
            let binary = dir.path().join("pvio");
            fs::copy(env!("CARGO_BIN_EXE_pvio"), &binary).unwrap();
            let mut upgrade = pvio();
            upgrade.arg("upgrade").arg(&binary).arg("--state-dir").arg(&check.state);
            let upgraded = upgrade.output().unwrap();
            let why = text(&upgraded.stderr);
            assert!(upgraded.status.success(), "{why}\n{}", check.log());
            println!("upgrade during a pause: {}", text(&upgraded.stdout));
            check.wait_until("paused after an upgrade", Check::is_paused);
        }
        let error = |check: &Check| check.log().contains("storage-full");
        check.wait_until("reported", error);
        sleep(Duration::from_millis(300));
        assert!(check.is_paused(), "{}", check.log());
        fs::remove_file(check.file("filler")).unwrap();
        check.wait_until("resumed", |check| !check.is_paused());
        let millis = check.counter("paused-ms");
        assert!(millis >= 300, "{millis} ms");
        let out = check.child.wait_with_output().unwrap();
        let log = fs::read_to_string(dir.path().join("state/driver.log")).unwrap_or_default();
        assert!(out.status.success(), "{format}: {}\n{log}", text(&out.stderr));
        let report: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(report["ok"], true, "{report}");
        assert_eq!(report["mismatches"], 0, "{report}");
        assert_eq!(report["sessions"], 1, "{report}");
    }
}
