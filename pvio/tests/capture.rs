//! `pvio capture` and `pvio stats` with a running `pvio run`, in its own network namespace.
#![allow(missing_docs, reason = "tests")]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

fn pvio() -> Command {
    Command::new(env!("CARGO_BIN_EXE_pvio"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Returns whether this machine can run the test; prints the reason if not.
fn can_run(test: &str) -> bool {
    let works = |program: &str, args: &[&str]| {
        Command::new(program).args(args).output().is_ok_and(|out| out.status.success())
    };
    let why = if !rustix::process::geteuid().is_root() || !works("unshare", &["-n", "true"]) {
        "no network namespace; run as root, with util-linux"
    } else if !Path::new("/dev/net/tun").exists() {
        "no /dev/net/tun; modprobe tun"
    } else if !works("tshark", &["-v"]) {
        "no tshark; apt install tshark"
    } else if !works("curl", &["-V"]) {
        "no curl; apt install curl"
    } else {
        return true;
    };
    let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {why}");
    false
}

/// A running `pvio run` with a NIC, in its own network namespace.
struct Machine {
    run: Child,
    dir: tempfile::TempDir,
}

impl Machine {
    fn start(words: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // `unshare` executes the program, so the process id stays the same.
        let mut run = Command::new("unshare");
        run.args(["-n", env!("CARGO_BIN_EXE_pvio"), "run", "--nic", "--state-dir"]).arg(dir.path());
        let mut run = run.args(words).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(run.stdout.take().unwrap()).lines();
        let ready = lines.map_while(Result::ok).any(|line| line.starts_with("ready"));
        assert!(ready, "pvio exited before it was ready");
        Self { run, dir }
    }

    fn inside(&self, line: &[&str]) -> Output {
        let pid = self.run.id().to_string();
        Command::new("nsenter").args(["-t", &pid, "-n"]).args(line).output().unwrap()
    }

    fn fetch(&self) -> bool {
        let url = "http://10.107.0.2/.pvio/status.json";
        self.inside(&["curl", "-sf", "-m", "10", url]).status.success()
    }

    fn capture(&self, args: &[&str]) -> Command {
        let mut capture = pvio();
        capture.arg("capture").args(args).arg("--state-dir").arg(self.dir.path());
        capture
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.run);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.run.wait();
    }
}

fn tshark(file: &Path, args: &[&str]) -> Vec<String> {
    let out = Command::new("tshark").arg("-r").arg(file).args(args).output().unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
    text(&out.stdout).lines().map(str::to_owned).collect()
}

#[test]
fn nic_of_threads_is_captured_with_limits_and_errors_are_reported() {
    if can_run("nic_of_threads_is_captured_with_limits_and_errors_are_reported") {
        check_captures("--isolation=thread");
    }
}

#[test]
fn nic_of_process_is_captured_with_limits_and_errors_are_reported() {
    if can_run("nic_of_process_is_captured_with_limits_and_errors_are_reported") {
        check_captures("--isolation=process");
    }
}

fn check_captures(isolation: &str) {
    let machine = Machine::start(&[isolation, "--nic-options", "guard=mac"]);
    let list = machine.capture(&[]).output().unwrap();
    assert_eq!(text(&list.stdout), "vif2.0\n", "{}", text(&list.stderr));
    let file = machine.dir.path().join("a.pcapng");
    let path = file.to_str().unwrap();
    assert!(machine.fetch(), "the guard lets the guest through");

    // Until SIGINT.
    let mut capture = machine.capture(&["vif2.0", "-w", path]).spawn().unwrap();
    while std::fs::metadata(&file).map_or(0, |file| file.len()) == 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(machine.fetch());
    let second = machine.capture(&["vif2.0", "-w", "-"]).output().unwrap();
    let why = text(&second.stderr);
    assert!(why.contains("captured already") && second.status.code() == Some(2), "{why}");
    let pid = rustix::process::Pid::from_child(&capture);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert!(capture.wait().unwrap().success());
    let http = tshark(
        &file,
        &["-Y", "http", "-T", "fields", "-e", "http.request.uri", "-e", "http.response.code"],
    );
    let all = http.join("\n");
    assert!(all.contains("/.pvio/status.json") && all.contains("200"), "{all}");
    let ways = tshark(&file, &["-Y", "tcp", "-T", "fields", "-e", "frame.packet_flags_direction"]);
    assert!(ways.iter().any(|way| way.contains('1')) && ways.iter().any(|way| way.contains('2')));

    // With a limit of packets and of bytes per packet.
    let capture = machine.capture(&["vif2.0", "-w", path, "--count", "5", "--snaplen", "60"]);
    let mut capture = { capture }.spawn().unwrap();
    while capture.try_wait().unwrap().is_none() {
        assert!(machine.fetch());
    }
    let lens = tshark(&file, &["-T", "fields", "-e", "frame.cap_len"]);
    assert_eq!(lens.len(), 5);
    assert!(lens.iter().all(|len| len.parse::<u32>().unwrap() <= 60), "{lens:?}");

    let none = machine.capture(&["vif9.0", "-w", "-"]).output().unwrap();
    let why = text(&none.stderr);
    assert!(
        why.contains("vif9.0") && why.contains("vif2.0") && none.status.code() == Some(2),
        "{why}"
    );
    // The captured traffic has been counted as well, and there is a rate.
    let stats = |more: &[&str]| {
        let mut stats = pvio();
        stats.args(["stats", "vif2.0", "--json"]).args(more).arg("--state-dir");
        stats.arg(machine.dir.path());
        stats
    };
    let told: Vec<serde_json::Value> =
        serde_json::from_slice(&stats(&[]).output().unwrap().stdout).unwrap();
    let queue = &told[0]["queues"][0];
    let counted = |name: &str| queue[name].as_u64().unwrap();
    assert!(counted("tx-packets") > 0 && counted("rx-bytes") > 60, "{queue}");
    assert_eq!(queue["dropped"]["tx-spoof-mac"], 0);
    let mut again = stats(&["--every", "1"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(again.stdout.take().unwrap()).lines();
    let mut rate = 0;
    while rate == 0 {
        assert!(machine.fetch());
        let line: serde_json::Value =
            serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        rate = line["per_second"]["tx-packets"].as_u64().unwrap();
    }
    let pid = rustix::process::Pid::from_child(&again);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert!(again.wait().unwrap().success());
    let nobody = tempfile::tempdir().unwrap();
    let nobody = pvio().args(["capture", "--state-dir"]).arg(nobody.path()).output().unwrap();
    assert!(text(&nobody.stderr).contains("no driver domain responds"));
    // Only root and this user may use the control socket.
    use std::os::unix::fs::PermissionsExt;
    let door = std::fs::metadata(machine.dir.path().join("control.sock")).unwrap();
    assert_eq!(door.permissions().mode() & 0o777, 0o600);
    let nobody = ["setpriv", "--reuid", "65534", "--clear-groups", env!("CARGO_BIN_EXE_pvio")];
    let mut other = Command::new(nobody[0]);
    other.args(&nobody[1..]).args(["capture", "--state-dir"]).arg(machine.dir.path());
    assert!(!other.output().is_ok_and(|out| out.status.success()));
}

#[test]
fn capture_goes_on_after_process_of_nic_is_killed() {
    if !can_run("capture_goes_on_after_process_of_nic_is_killed") {
        return;
    }
    let machine = Machine::start(&["--isolation=process"]);
    let file = machine.dir.path().join("a.pcapng");
    let mut capture = machine.capture(&["vif2.0", "-w", file.to_str().unwrap()]).spawn().unwrap();
    while std::fs::metadata(&file).map_or(0, |file| file.len()) == 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let process = || -> Option<i32> {
        let mut pvio = pvio();
        let out = pvio.args(["confinement", "--json", "vif2.0", "--state-dir"]);
        let out = out.arg(machine.dir.path()).output().unwrap();
        let all: serde_json::Value = serde_json::from_slice(&out.stdout).ok()?;
        let nic = all.as_array()?.iter().find(|entry| entry["device"] == "vif2.0")?;
        i32::try_from(nic["pid"].as_u64()?).ok()
    };
    let url = |path: &str| format!("http://10.107.0.2/{path}");
    let fetch = |path: &str| {
        let fetched = machine.inside(&["curl", "-sf", "-m", "20", &url(path)]);
        assert!(fetched.status.success(), "{}", text(&fetched.stderr));
    };
    fetch("index.html");
    let killed = process().unwrap();
    let pid = rustix::process::Pid::from_raw(killed).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    while process().is_none_or(|pid| pid == killed) {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // The successor may receive the capture after it serves.
    let is_captured = || {
        let bytes = std::fs::read(&file).unwrap();
        bytes.windows(10).any(|bytes| bytes == b"/hello.txt")
    };
    while !is_captured() {
        fetch("hello.txt");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let pid = rustix::process::Pid::from_child(&capture);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert!(capture.wait().unwrap().success());
    let paths = tshark(&file, &["-Y", "http.request", "-T", "fields", "-e", "http.request.uri"]);
    assert_eq!(paths.first().map(String::as_str), Some("/index.html"));
    assert_eq!(paths.last().map(String::as_str), Some("/hello.txt"));
}

#[test]
fn invalid_nic_arguments_are_rejected_before_start() {
    for (words, why) in [
        (["--nic-options", "guard=perhaps"], "expected guard=off, guard=mac or guard=ip"),
        (["--nic-share", "up=fast"], "\"up=fast\" of --nic-share"),
        (["--nic-uplink", "lan"], "\"lan\" of --nic-uplink"),
    ] {
        let out = pvio().args(["run", "--nic"]).args(words).output().unwrap();
        let said = text(&out.stderr);
        assert!(said.contains(why) && out.status.code() == Some(2), "{said}");
    }
}

#[test]
fn pvio_options_key_changes_running_nic() {
    use pvio_xenbus::Xenstore as _;
    if !can_run("pvio_options_key_changes_running_nic") {
        return;
    }
    let machine = Machine::start(&[]);
    assert!(machine.fetch());
    let socket = machine.dir.path().join("xenstore.sock");
    let mut xs = pvio_xenbus::client::Client::connect(&socket).unwrap();
    let path = "/local/domain/1/backend/vif/2/0/pvio-options";
    let url = "http://10.107.0.2/.pvio/status.json";
    let quick = || machine.inside(&["curl", "-sf", "-m", "1", url]).status.success();
    let log = || std::fs::read_to_string(machine.dir.path().join("driver.log")).unwrap();
    let until_logged = |word: &str, times: usize| {
        while log().matches(word).count() < times {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    };
    xs.write(path, b"loss=100").unwrap();
    until_logged("changed settings applied", 1);
    assert!(!quick(), "request succeeded with loss=100");
    xs.write(path, b"loss=100,guard=x").unwrap();
    until_logged("changed settings rejected", 1);
    assert!(!quick(), "request succeeded with the old options");
    xs.write(path, b"switch=elsewhere").unwrap();
    until_logged("changed settings rejected", 2);
    xs.write(path, b"delay=2ms").unwrap();
    until_logged("changed settings applied", 2);
    assert!(machine.fetch());
}
