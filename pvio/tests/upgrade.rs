//! `pvio upgrade` of a hosted machine while its disk is verified.
#![allow(missing_docs, reason = "tests")]

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

fn pvio() -> Command {
    Command::new(env!("CARGO_BIN_EXE_pvio"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A running check.
struct Check {
    child: Child,
    dir: tempfile::TempDir,
}

impl Check {
    /// Starts one of this many seconds, and waits until its disk is connected.
    fn start(seconds: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("scratch.img");
        fs::File::create(&image).unwrap().set_len(48 << 20).unwrap();
        let mut pvio = pvio();
        pvio.args(["check", "--json", "--seconds", &seconds.to_string(), "--disk"]).arg(image);
        pvio.arg("--state-dir").arg(dir.path().join("state"));
        let child = pvio.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let check = Self { child, dir };
        let begin = Instant::now();
        while check.processes().is_none() || !check.log().contains("to=Connected") {
            assert!(begin.elapsed() < PATIENCE, "not connected: {}", check.log());
            sleep(Duration::from_millis(5));
        }
        check
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// Returns the supervisor and the process of the disk, if both run.
    fn processes(&self) -> Option<(u64, u64)> {
        let mut pvio = pvio();
        let out = pvio.args(["confinement", "--json", "--state-dir"]).arg(self.state()).output();
        let all: Vec<Value> = serde_json::from_slice(&out.unwrap().stdout).ok()?;
        let device = all.iter().find(|entry| entry["device"].is_string())?;
        Some((all[0]["pid"].as_u64()?, device["pid"].as_u64()?))
    }

    /// Returns the number of requests that the disk has served.
    fn requests(&self) -> u64 {
        let mut pvio = pvio();
        let out = pvio.args(["stats", "--json", "--state-dir"]).arg(self.state()).output().unwrap();
        let all: Vec<Value> = serde_json::from_slice(&out.stdout).unwrap();
        let disk = all.iter().find(|entry| entry["device"].is_string()).unwrap();
        let queues = disk["queues"].as_array().unwrap();
        queues.iter().map(|queue| queue["reads"].as_u64().unwrap()).sum()
    }

    /// Waits until both processes run.
    fn wait_for_processes(&self) -> (u64, u64) {
        let begin = Instant::now();
        loop {
            if let Some(found) = self.processes() {
                return found;
            }
            assert!(begin.elapsed() < PATIENCE, "no processes: {}", self.log());
            sleep(Duration::from_millis(20));
        }
    }

    /// Copies pvio, as the new version.
    fn new_binary(&self) -> PathBuf {
        let new = self.dir.path().join("new-pvio");
        fs::copy(env!("CARGO_BIN_EXE_pvio"), &new).unwrap();
        new
    }

    /// Writes a program that prints the versions of pvio, and does something else instead of serving.
    fn script(&self, does: &str) -> PathBuf {
        let path = self.dir.path().join("script");
        let real = env!("CARGO_BIN_EXE_pvio");
        let probe = format!("#!/bin/sh\n[ \"$1\" = process ] && exec {real} \"$@\"\n{does}\n");
        fs::write(&path, probe).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn begin_upgrade(&self, binary: &Path) -> Child {
        let mut pvio = pvio();
        pvio.arg("upgrade").arg(binary).arg("--state-dir").arg(self.state());
        pvio.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn wait_until(&self, is: impl Fn() -> bool) {
        let begin = Instant::now();
        while !is() {
            assert!(begin.elapsed() < PATIENCE, "nothing happens: {}", self.log());
            sleep(Duration::from_millis(1));
        }
    }

    fn upgrade(&self, binary: &Path, timeout: u64) -> Output {
        let mut pvio = pvio();
        pvio.arg("upgrade").arg(binary).args(["--timeout", &timeout.to_string(), "--state-dir"]);
        pvio.arg(self.state()).output().unwrap()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.state().join("driver.log")).unwrap_or_default()
    }

    /// Waits for the end of the check, which saw one session and no error.
    fn finish(self) {
        let (state, dir) = (self.state(), self.dir);
        let out = self.child.wait_with_output().unwrap();
        let log = fs::read_to_string(state.join("driver.log")).unwrap_or_default();
        assert!(out.status.success(), "{}\n{log}", text(&out.stderr));
        let report: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(report["ok"], true, "{report}");
        assert_eq!(
            (&report["mismatches"], &report["sessions"]),
            (&0.into(), &1.into()),
            "{report}"
        );
        println!("slowest request {} µs", report["max_us"]);
        drop(dir);
    }
}

fn binary_of(pid: u64) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default()
}

fn kill(pid: u64) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    // A process that has just ended has the same effect.
    let _ = kill_process(pid, Signal::KILL);
}

/// Kills a process if it executes that file.
fn kills(pid: u64, binary: &Path) -> bool {
    let is_that = binary_of(pid) == binary;
    if is_that {
        kill(pid);
    }
    is_that
}

/// Returns the youngest child of a process with one thread.
fn child_of(pid: u64) -> Option<u64> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().last()?.parse().ok()
}

#[test]
fn upgrade_replaces_supervisor_and_device_process_under_load() {
    let check = Check::start(5);
    let (supervisor, before) = check.processes().unwrap();
    let (new, requests) = (check.new_binary(), check.requests());
    assert!(requests > 0);
    let out = check.upgrade(&new, 15);
    assert!(out.status.success(), "{}\n{}", text(&out.stderr), check.log());
    let report = text(&out.stdout);
    let lines: Vec<&str> = report.lines().collect();
    assert!(lines.len() == 2 && lines[0].starts_with("vbd-2-51712: "), "{report}");
    println!("{report}");
    let (same, after) = check.wait_for_processes();
    assert_eq!((same, after == before), (supervisor, false));
    assert_eq!((binary_of(same), binary_of(after)), (new.clone(), new));
    assert!(check.requests() >= requests, "the counters begin again");
    // A second upgrade to the same binary has nothing to replace.
    let out = check.upgrade(&binary_of(same), 15);
    assert!(text(&out.stdout).contains("already"), "{}\n{}", text(&out.stderr), check.log());
    assert_eq!(check.wait_for_processes(), (same, after));
    check.finish();
}

#[test]
fn new_binary_that_ends_or_hangs_is_rolled_back() {
    let check = Check::start(7);
    let processes = check.processes().unwrap();
    let old = binary_of(processes.0);
    for (does, timeout, reason) in
        [("exit 3", 15, "it ended (exit status: 3)"), ("exec sleep 60", 1, "it did not serve")]
    {
        let out = check.upgrade(&check.script(does), timeout);
        let why = text(&out.stderr);
        assert!(!out.status.success() && why.contains(reason), "{does}: {why}\n{}", check.log());
        assert_eq!(check.wait_for_processes(), processes, "{}", check.log());
        assert_eq!(binary_of(processes.0), old);
    }
    check.finish();
}

#[test]
fn upgrade_that_is_killed_at_a_step_leaves_sessions_intact() {
    let check = Check::start(8);
    // The process that waits for the trial.
    let (supervisor, device) = check.processes().unwrap();
    let client = check.begin_upgrade(&check.script("exec sleep 5"));
    check.wait_until(|| check.log().contains("upgrade requested"));
    sleep(Duration::from_millis(300));
    kill(supervisor);
    let why = text(&client.wait_with_output().unwrap().stderr);
    assert!(why.contains("interrupted"), "{why}");
    let (supervisor, same) = check.wait_for_processes();
    assert_eq!(same, device);

    // The new supervisor, right after its start.
    let new = check.new_binary();
    let client = check.begin_upgrade(&new);
    check.wait_until(|| binary_of(supervisor) == new);
    kill(supervisor);
    let why = text(&client.wait_with_output().unwrap().stderr);
    assert!(why.contains("interrupted"), "{why}");
    check.wait_for_processes();

    // The trial, which adopts the device.
    let (supervisor, device) = check.wait_for_processes();
    let client = check.begin_upgrade(&new);
    check.wait_until(|| child_of(supervisor).is_some_and(|trial| kills(trial, &new)));
    let out = client.wait_with_output().unwrap();
    assert!(text(&out.stderr).contains("signal: 9"), "{}\n{}", text(&out.stderr), check.log());
    assert_eq!(check.wait_for_processes(), (supervisor, device));

    // The old device process, while the upgrade is running.
    let client = check.begin_upgrade(&new);
    check.wait_until(|| binary_of(supervisor) == new);
    kill(device);
    let out = client.wait_with_output().unwrap();
    assert!(out.status.success(), "{}\n{}", text(&out.stderr), check.log());
    let (_, device) = check.wait_for_processes();
    assert_eq!((binary_of(supervisor), binary_of(device)), (new.clone(), new));
    check.finish();
}

#[test]
fn binary_of_other_version_is_refused_without_effect() {
    let check = Check::start(3);
    let processes = check.processes().unwrap();
    let versions =
        r#"{"pvio":"9","messages":{"current":9,"oldest":8},"records":{"current":1,"oldest":1}}"#;
    let path = check.script("");
    fs::write(&path, format!("#!/bin/sh\necho '{versions}'\n")).unwrap();
    let out = check.upgrade(&path, 5);
    let why = text(&out.stderr);
    assert!(why.contains("not compatible") && why.contains("8 to 9"), "{why}");
    assert_eq!(check.processes(), Some(processes));
    assert!(!check.log().contains("upgrade requested"));
    check.finish();
}
