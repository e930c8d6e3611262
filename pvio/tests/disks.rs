//! Disks of every format with every option, on a hosted machine: at its start, and attached later.
#![allow(missing_docs, reason = "tests")]

use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Lines};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, Output, Stdio};

fn pvio() -> Command {
    Command::new(env!("CARGO_BIN_EXE_pvio"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn raw(dir: &Path, name: &str, bytes: u64) -> String {
    let path = dir.join(name);
    fs::File::create(&path).unwrap().set_len(bytes).unwrap();
    path.display().to_string()
}

fn check(dir: &Path, disk: &str, more: &[&str]) -> Output {
    let mut pvio = pvio();
    pvio.args(["check", "--json", "--disk", disk, "--state-dir"]).arg(dir.join("state"));
    pvio.args(more).output().unwrap()
}

fn is_verified(out: &Output) {
    assert!(out.status.success(), "{}", text(&out.stderr));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((&report["ok"], &report["sha256"]), (&true.into(), &report["sha256_expected"]));
}

#[test]
fn check_verifies_disks_with_every_option() {
    let dir = tempfile::tempdir().unwrap();
    let image = raw(dir.path(), "a.img", 16 << 20);
    let trace = dir.path().join("trace.log");
    let traced = format!("[trace={}]ram:16M", trace.display());
    for disk in [
        &format!("[sector=4096,ring-order=0,indirect=0,policy=copy,answers=in-order]{image}"),
        &format!("[overlay,policy=persistent-or-map,queues=1,discard=off]{image}"),
        &format!("[io=sqpoll,buffered]{image}"),
        &traced,
        "[latency=1ms,jitter=1ms,iops=2000/100,read-bps=100M,write-iops=1500,group=g]ram:16M",
    ] {
        is_verified(&check(dir.path(), disk, &["--requests", "600", "--overwrite"]));
    }
    let log = fs::read_to_string(&trace).unwrap();
    assert!(log.starts_with("fio version 3 iolog\n") && log.lines().count() > 600, "{log}");
    // An existing trace is not overwritten: the next one gets another name.
    is_verified(&check(dir.path(), &traced, &["--requests", "10"]));
    assert_eq!(fs::read_to_string(&trace).unwrap(), log);
    assert!(trace.with_extension("log.1").exists());
}

#[test]
fn invalid_disk_is_rejected_in_one_line_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let image = raw(dir.path(), "a.img", 512 * 9);
    for (disk, word) in [
        ("[iops=lots]ram:1M".into(), "write iops=N[/BURST]"),
        ("[fast]ram:1M".into(), "unknown option"),
        ("[iops=5".into(), "bracket"),
        (format!("[sector=4096]{image}"), "multiple"),
        ("[io=sqpoll]ram:1M".into(), "leave the option io out"),
        (format!("[ro]{image}"), "leave ro out"),
        ("[trace=/nowhere/t]ram:1M".into(), "name a new file"),
        ("zip:/a".into(), "unknown image format"),
    ] {
        let out = check(dir.path(), &disk, &["--requests", "1"]);
        let why = text(&out.stderr);
        assert!(!out.status.success() && why.contains(word), "{disk}: {why}");
        // The text of an `error` node has the remedy after a semicolon.
        assert!(why.contains("\nhelp: ") || why.lines().count() == 1, "{why}");
    }
}

/// A running machine; stopped and waited for when dropped.
struct Machine {
    child: Child,
    state: PathBuf,
    out: Lines<BufReader<ChildStdout>>,
    notes: Lines<BufReader<ChildStderr>>,
}

impl Machine {
    fn run(dir: &Path) -> Self {
        let state = dir.join("state");
        let mut pvio = pvio();
        pvio.args(["run", "--state-dir"]).arg(&state);
        let mut child = pvio.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap()).lines();
        let notes = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut machine = Self { child, state, out, notes };
        while !machine.out.next().expect("machine is ready").unwrap().starts_with("ready") {}
        machine
    }

    fn ask(&self, words: &[&str]) -> Output {
        pvio().args(words).arg("--state-dir").arg(&self.state).output().unwrap()
    }

    fn tell(&self, words: &[&str]) -> String {
        let out = self.ask(words);
        assert!(out.status.success(), "{words:?}: {}", text(&out.stderr));
        text(&out.stdout)
    }

    fn refused(&self, words: &[&str]) -> String {
        let out = self.ask(words);
        assert!(!out.status.success(), "{words:?}: {}", text(&out.stdout));
        text(&out.stderr)
    }

    /// Returns the listed devices of that name.
    fn devices(&self, name: &str) -> Vec<Value> {
        let all: Vec<Value> = serde_json::from_str(&self.tell(&["list", "--json"])).unwrap();
        all.into_iter().filter(|device| device["device"] == name).collect()
    }

    fn note(&mut self) -> String {
        self.notes.next().expect("guest prints a line").unwrap()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

#[test]
fn disks_are_attached_changed_and_detached_while_guest_runs() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = Machine::run(dir.path());
    let demo = machine.state.join("demo.img");
    let copy = dir.path().join("copy.img");
    fs::copy(demo, &copy).unwrap();
    let copy = copy.display().to_string();

    let disk = format!("[iops=4000,overlay]{copy}");
    let told = machine.tell(&["attach-disk", "guest", &disk, "-o", "policy=copy"]);
    assert!(told.starts_with("xvdb  /local/domain/1/backend/pvio-vbd/2/51728"), "{told}");
    let note = machine.note();
    assert!(note.contains("xvdb was attached: 32.0 MiB, FAT16 \"PVIO DEMO\""), "{note}");
    let found = machine.devices("xvdb").remove(0);
    assert_eq!(found["disk"]["kept_in"], format!("raw:{copy}"));
    assert_eq!(found["disk"]["options"], "overlay=on,policy=copy,iops=4000/400");
    assert_eq!((&found["guest_state"], &found["disk"]["mode"]), (&"Connected".into(), &"w".into()));

    let told = machine.tell(&["set-disk", "guest", "xvdb", "iops=none,bps=1M"]);
    assert!(told.contains("iops=none,bps=1048576/104857"), "{told}");
    let options = machine.devices("xvdb").remove(0)["disk"]["options"].clone();
    assert_eq!(options, "overlay=on,policy=copy,iops=none,bps=1048576/104857");
    assert!(
        machine.refused(&["set-disk", "guest", "xvdb", "sector=4096"]).contains("attach it again")
    );
    assert!(machine.refused(&["set-disk", "guest", "xvdc", "iops=1"]).contains("no disk xvdc"));
    let twice = machine.refused(&["attach-disk", "guest", &copy, "--vdev", "xvdb"]);
    assert!(twice.contains("has a disk xvdb already"), "{twice}");
    assert!(
        machine.refused(&["attach-disk", "nobody", &copy]).contains("domain nobody does not exist")
    );

    // A disk that cannot be attached leaves no nodes, and the error names the reason.
    let missing = machine.refused(&["attach-disk", "guest", "/nowhere/x.img", "--vdev", "xvdd"]);
    assert!(missing.contains("/nowhere/x.img does not exist\nhelp: check the path"), "{missing}");
    assert_eq!(machine.devices("xvdd"), [] as [Value; 0]);

    for kind in ["vbd", "pvio-vbd"] {
        let args = ["attach-disk", "guest", "ram:4M", "--vdev", "xvde", "--kind", kind];
        machine.tell(&args);
        while !machine.note().contains("xvde was attached: 4.0 MiB") {}
        assert_eq!(machine.devices("xvde").remove(0)["kind"], kind);
        machine.tell(&["detach-disk", "guest", "xvde"]);
        assert_eq!(machine.devices("xvde"), [] as [Value; 0]);
        while !machine.note().contains("xvde was detached") {}
    }
    is_counted(&machine);
    machine.tell(&["detach-disk", "guest", "xvdb"]);
    while !machine.note().contains("xvdb was detached") {}
    let gone = machine.refused(&["stats", "vbd2.xvdb"]);
    assert!(
        gone.contains("device vbd2.xvdb does not exist") && gone.contains("vbd2.xvda"),
        "{gone}"
    );
    assert_eq!(machine.devices("xvdb"), [] as [Value; 0]);
    assert_eq!(machine.devices("xvda").len(), 1, "the first disk is as it was");
}

/// Checks that the guest's reads of both disks have been counted, per queue and in total.
fn is_counted(machine: &Machine) {
    let json = machine.tell(&["stats", "--json"]);
    let all: Vec<Value> = serde_json::from_str(&json).unwrap();
    let names: Vec<&str> = all.iter().filter_map(|device| device["device"].as_str()).collect();
    assert_eq!(names, ["vbd2.xvda", "vbd2.xvdb"]);
    let named = |of: &Value| {
        let budgets = of["budgets"].as_object().unwrap().iter();
        let each = |(name, one): (&String, &Value)| {
            assert!(one["used"].as_u64() <= one["limit"].as_u64(), "{name}: {one}");
            name.clone()
        };
        budgets.map(each).collect::<Vec<_>>()
    };
    let process = all.iter().find(|one| one["process"].is_u64()).unwrap();
    let budgets = ["control-connections", "file-descriptors", "kept-pages"];
    assert_eq!(named(process), [&budgets[..], &["promised-file-descriptors"]].concat());
    assert!(process["budgets"]["promised-file-descriptors"]["used"].as_u64() >= Some(2 * 48));
    for device in all.iter().filter(|one| one["device"].is_string()) {
        let budgets = ["job-bytes", "jobs", "kept-pages of the guest", "promised-file-descriptors"];
        assert_eq!(named(device), [&budgets[..], &["steps", "table-bytes"]].concat());
        let budgets = ["kept-pages", "registered-pages", "request-pages", "requests"];
        assert_eq!(named(&device["queues"][0]), budgets);
        let queues = device["queues"].as_array().unwrap();
        let sum = |name| queues.iter().filter_map(|queue| queue[name].as_u64()).sum::<u64>();
        assert!(sum("reads") > 0 && sum("read-bytes") >= 512 * sum("reads"), "{device}");
        assert_eq!((sum("writes"), queues[0]["refused"]["out-of-range"].as_u64()), (0, Some(0)));
    }
    let told = machine.tell(&["stats", "vbd2.xvdb"]);
    assert!(told.starts_with("vbd2.xvdb  /local/domain/1/backend/pvio-vbd/2/51728  "), "{told}");
    assert!(told.lines().any(|line| line.trim_start().starts_with("reads ")), "{told}");
    assert!(told.lines().any(|line| line.trim_start().starts_with("requests ")), "{told}");
    let told = machine.tell(&["stats"]);
    assert!(told.starts_with("process ") && told.contains("  file-descriptors "), "{told}");
}

/// Runs a check whose disk is changed in the meantime.
fn checked_while(disk: &str, change: &str, more: &[&str]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let mut command = pvio();
    command.args(["check", "--json", "--disk", disk, "--state-dir"]).arg(&state).args(more);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut devices = Command::new("true").output().unwrap();
    while !text(&devices.stdout).contains("Connected/Connected") {
        assert_eq!(child.try_wait().unwrap(), None, "check ended before its disk was changed");
        devices = pvio().args(["list", "--state-dir"]).arg(&state).output().unwrap();
    }
    let mut set = pvio();
    set.args(["set-disk", "guest", "xvda", change, "--state-dir"]).arg(&state);
    assert!(set.output().unwrap().status.success());
    child.wait_with_output().unwrap()
}

#[test]
fn set_disk_changes_limits_of_disk_in_use() {
    // With one operation per second, this would take hours.
    is_verified(&checked_while("[iops=1/1]ram:16M", "iops=none", &["--requests", "20000"]));
    let slow = "[latency=3600s]ram:16M";
    is_verified(&checked_while(slow, "latency=0", &["--requests", "2000"]));
}

#[test]
fn set_disk_starts_write_failures_on_disk_in_use() {
    let out = checked_while("ram:16M", "fail-writes=1000000", &["--seconds", "3000"]);
    let why = text(&out.stderr);
    assert!(!out.status.success() && why.contains("could not do Write"), "{why}");
}
