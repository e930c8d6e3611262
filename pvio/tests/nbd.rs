//! A disk on an NBD server, served by a process without a network, while the server, the process and
//! the supervisor are killed.
#![allow(missing_docs, reason = "tests")]

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

/// A server that has one client at a time: a connection that is not closed keeps out the next one.
struct Server(Child);

impl Server {
    fn start(dir: &Path) -> Self {
        let socket = dir.join("nbd.sock");
        let _ = fs::remove_file(&socket);
        let mut server = Command::new("qemu-nbd");
        server.args(["-x", "disk", "-f", "raw", "-t", "-k"]).arg(&socket).arg(dir.join("disk.img"));
        let server = Self(server.stderr(Stdio::null()).spawn().unwrap());
        wait(|| UnixStream::connect(&socket).is_ok(), "the server listens");
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn wait(condition: impl Fn() -> bool, what: &str) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        sleep(Duration::from_millis(5));
    }
}

/// Returns how often the log has a text.
fn count(state: &Path, text: &str) -> usize {
    fs::read_to_string(state.join("driver.log")).unwrap_or_default().matches(text).count()
}

/// Returns the value behind the last `key=` in a log.
fn last_number(log: &str, key: &str) -> Option<i32> {
    let (_, rest) = log.rsplit_once(key)?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Returns the published number of connections that were made again.
fn counted(state: &Path) -> Option<u64> {
    let mut stats = Command::new(env!("CARGO_BIN_EXE_pvio"));
    let stats = stats.args(["stats", "--json", "--state-dir"]).arg(state).output().unwrap();
    let stats: Value = serde_json::from_slice(&stats.stdout).ok()?;
    stats[1]["events"]["server-back"].as_u64()
}

fn kill(pid: i32) {
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
}

#[test]
fn data_is_right_after_server_process_and_supervisor_are_killed() {
    if Command::new("qemu-nbd").arg("--version").output().is_err() {
        eprintln!("SKIPPED: no qemu-nbd; apt-get install qemu-utils");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    fs::File::create(dir.path().join("disk.img")).unwrap().set_len(16 << 20).unwrap();
    let server = Server::start(dir.path());
    let disk = format!("nbd+unix:///disk?socket={}", dir.path().join("nbd.sock").display());
    let mut check = Command::new(env!("CARGO_BIN_EXE_pvio"));
    check.args(["check", "--json", "--overwrite", "--seconds", "5", "--disk", &disk]);
    check.arg("--state-dir").arg(&state).stdout(Stdio::piped()).stderr(Stdio::piped());
    let check = check.spawn().unwrap();
    let log = || fs::read_to_string(state.join("driver.log")).unwrap_or_default();
    let serves = "the device process serves";
    wait(|| count(&state, serves) == 1, "a process serves");
    sleep(Duration::from_millis(300));

    let back = "NBD server reconnected";
    drop(server);
    sleep(Duration::from_millis(100));
    let server = Server::start(dir.path());
    wait(|| count(&state, back) == 1, "the process is connected again");
    // A worker publishes its counters when it waits; what it has not published dies with it.
    wait(|| counted(&state) == Some(1), "the connection is counted");

    kill(last_number(&log(), "pid=").unwrap());
    wait(|| count(&state, serves) == 2, "another process serves");
    // The first request of the session connects.
    assert_eq!(count(&state, back), 2, "{}", log());

    let parent = format!("--parent {} ", check.id());
    let is_supervisor = |pid: &i32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        words.starts_with("pvio domain driver ") && words.contains(&parent)
    };
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    kill(pids.find(is_supervisor).unwrap());
    // The server returns before there is a supervisor that could connect to it.
    drop(server);
    let _server = Server::start(dir.path());
    wait(|| count(&state, back) == 3, "the process is connected again, by the next supervisor");

    // Over both processes, in memory that the second supervisor has found.
    wait(|| counted(&state) == Some(3), "three connections are counted");

    let out = check.wait_with_output().unwrap();
    assert!(out.status.success(), "{}\n{}", String::from_utf8_lossy(&out.stderr), log());
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["sha256"], report["sha256_expected"]);
    assert_eq!(count(&state, "served by threads"), 0, "{}", log());
}
