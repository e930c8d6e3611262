//! The command as a user runs it: three processes, one of which is killed repeatedly.
#![allow(missing_docs, reason = "tests")]

use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

fn pvio() -> Command {
    Command::new(env!("CARGO_BIN_EXE_pvio"))
}

fn scratch(dir: &Path) -> String {
    let path = dir.join("scratch.img");
    fs::File::create(&path).unwrap().set_len(48 << 20).unwrap();
    path.display().to_string()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Checks that no socket is left in the state directory.
fn no_socket_in(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(!name.ends_with(".sock"), "{name}");
    }
}

/// Returns the process of a domain, among the children of `parent`.
fn domain(parent: u32, role: &str) -> Option<i32> {
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().into_string().unwrap_or_default().parse::<i32>() else {
            continue;
        };
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words = text(&words).replace('\0', " ");
        let ours = words.contains(&format!("--parent {parent} "));
        if ours && words.starts_with(&format!("pvio domain {role} ")) {
            return Some(pid);
        }
    }
    None
}

fn kill(pid: i32, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal).unwrap();
}

fn report(out: &Output) -> Value {
    assert!(out.status.success(), "{}", text(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn check_verifies_written_data_and_requires_overwrite_option() {
    let dir = tempfile::tempdir().unwrap();
    let (image, state) = (scratch(dir.path()), dir.path().join("state"));
    let run = |more: &[&str]| {
        let mut pvio = pvio();
        pvio.args(["check", "--json", "--disk", &image, "--state-dir"]).arg(&state);
        pvio.args(["--requests", "3000"]).args(more).output().unwrap()
    };
    let first = report(&run(&[]));
    assert_eq!(first["ok"], true);
    assert_eq!(first["requests"], 3000);
    assert_eq!(first["sha256"], first["sha256_expected"]);
    assert!(first["bytes_written"].as_u64().unwrap() > 1_000_000);
    no_socket_in(&state);

    // The image is not blank any more, so it is only overwritten with `--overwrite`.
    let refused = run(&[]);
    assert_eq!(refused.status.code(), Some(2));
    let why = text(&refused.stderr);
    assert!(
        why.starts_with("pvio: ") && why.contains("\nhelp: use") && why.contains("--overwrite"),
        "{why}"
    );
    assert_eq!(why.lines().count(), 2, "{why}");
    let again = report(&run(&["--overwrite", "--depth", "1"]));
    assert_eq!(again["ok"], true);
}

/// Runs a check, and kills its driver domain twice, each time when `is_served` returns true.
fn check_with_kills(isolation: &str, is_served: impl Fn(&Path, i32, usize) -> bool) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let (image, state) = (scratch(dir.path()), dir.path().join("state"));
    let mut pvio = pvio();
    pvio.args(["check", "--json", "--disk", &image, "--seconds", "8", "--state-dir"]).arg(&state);
    pvio.arg(format!("--isolation={isolation}"));
    let child = pvio.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    for kills in 1..=2 {
        let begin = Instant::now();
        let driver = loop {
            assert!(begin.elapsed() < Duration::from_secs(60), "not served {kills} times");
            sleep(Duration::from_millis(10));
            if let Some(driver) = domain(child.id(), "driver")
                && is_served(&state, driver, kills)
            {
                break driver;
            }
        };
        kill(driver, rustix::process::Signal::KILL);
    }
    let report = report(&child.wait_with_output().unwrap());
    assert_eq!(report["ok"], true);
    no_socket_in(&state);
    report
}

#[test]
fn session_of_check_goes_on_after_driver_domain_is_killed() {
    let report = check_with_kills("process", |state, driver, _| {
        let mut pvio = pvio();
        let out = pvio.args(["confinement", "--json", "--state-dir"]).arg(state).output().unwrap();
        let all: Vec<Value> = serde_json::from_slice(&out.stdout).unwrap_or_default();
        let serves = |entry: &Value| entry["process"].is_object() && entry["pid"].is_u64();
        all.len() == 2 && all[0]["pid"] == driver && all.iter().all(serves)
    });
    assert_eq!(report["sessions"], 1, "{report}");
}

#[test]
fn check_reconnects_after_driver_domain_without_processes_is_killed() {
    // As soon as the disk is connected, the second time after the restart.
    let report = check_with_kills("thread", |state, _, kills| {
        let log = fs::read_to_string(state.join("driver.log")).unwrap_or_default();
        log.matches("to=Connected").count() >= kills
    });
    // Two, if it was killed before the frontend had noticed that it was connected.
    assert!((2..=3).contains(&report["sessions"].as_u64().unwrap()), "{report}");
}

#[test]
fn interrupted_check_leaves_no_process_or_socket() {
    let dir = tempfile::tempdir().unwrap();
    let (image, state) = (scratch(dir.path()), dir.path().join("state"));
    let mut pvio = pvio();
    pvio.args(["check", "--disk", &image, "--seconds", "60", "--state-dir"]).arg(&state);
    let child = pvio.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let id = child.id();
    let begin = Instant::now();
    while domain(id, "check").is_none() {
        assert!(begin.elapsed() < Duration::from_secs(60));
        sleep(Duration::from_millis(10));
    }
    kill(i32::try_from(id).unwrap(), rustix::process::Signal::INT);
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("stopped before it finished"), "{}", text(&out.stderr));
    assert_eq!((domain(id, "check"), domain(id, "driver")), (None, None));
    no_socket_in(&state);
}

/// A running `pvio run --nic` in its own namespaces, and the command that its output names to enter
/// them.
struct Run {
    child: Child,
    look_inside: Vec<String>,
}

impl Run {
    fn start(state: &Path, image: Option<&str>) -> Option<Self> {
        Self::start_with(state, image, &[])
    }

    fn start_with(state: &Path, image: Option<&str>, args: &[&str]) -> Option<Self> {
        // Root of another user namespace, without the permission to create taps in its network
        // namespace, as most users.
        let can =
            Command::new("unshare").args(["--user", "--map-root-user", "--net", "true"]).output();
        let curl = Command::new("curl").arg("-V").output();
        if !can.is_ok_and(|o| o.status.success())
            || curl.is_err()
            || !Path::new("/dev/net/tun").exists()
        {
            eprintln!(
                "SKIPPED: no taps in a new network namespace; install util-linux and curl, allow user namespaces, modprobe tun"
            );
            return None;
        }
        let mut pvio = Command::new("unshare");
        pvio.args(["--user", "--map-root-user", "--net"]).arg(env!("CARGO_BIN_EXE_pvio"));
        pvio.args(["run", "--nic", "--state-dir"]).arg(state).args(args);
        pvio.args(image.iter().flat_map(|image| ["--disk", image]));
        let mut child = pvio.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.find(|line| line.as_ref().is_ok_and(|line| line.starts_with("ready: ")));
        assert!(ready.is_some(), "pvio exited: {:?}", child.wait());
        // The rest is read, too, so that the pipe does not fill.
        std::thread::spawn(move || lines.for_each(drop));
        let target = child.id().to_string();
        let words = ["nsenter", "--target", &target, "--user", "--net", "--preserve-credentials"];
        Some(Self { look_inside: words.map(str::to_owned).to_vec(), child })
    }

    fn curl(&self, path: &str) -> Vec<u8> {
        let mut curl = Command::new(&self.look_inside[0]);
        curl.args(&self.look_inside[1..]).args(["curl", "-sS", "--fail", "--max-time", "60"]);
        // While the driver domain is being restarted, there is no tap.
        curl.args([
            "--retry",
            "100",
            "--retry-delay",
            "1",
            "--retry-max-time",
            "60",
            "--retry-all-errors",
        ]);
        let out = curl.arg(format!("http://10.107.0.2{path}")).output().unwrap();
        assert!(out.status.success(), "{path}: {}", text(&out.stderr));
        out.stdout
    }

    fn stop(mut self, state: &Path) {
        let id = self.child.id();
        kill(i32::try_from(id).unwrap(), rustix::process::Signal::INT);
        assert!(self.child.wait().unwrap().success());
        assert_eq!((domain(id, "guest"), domain(id, "driver")), (None, None));
        no_socket_in(state);
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Only if a test failed, so that no process is left.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn demo_is_served_again_after_driver_domain_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let Some(run) = Run::start(&state, None) else { return };
    for file in pvio_demo::image::files() {
        assert!(run.curl(&format!("/{}", file.path)) == file.bytes, "{}", file.path);
    }
    let status =
        |run: &Run| -> Value { serde_json::from_slice(&run.curl("/.pvio/status.json")).unwrap() };
    assert_eq!(status(&run)["devices"].as_array().unwrap().len(), 2);
    let killed = domain(run.child.id(), "driver").unwrap();
    kill(killed, rustix::process::Signal::KILL);
    for file in pvio_demo::image::files() {
        assert!(run.curl(&format!("/{}", file.path)) == file.bytes, "{} again", file.path);
    }
    // The page may be updated slightly later than the state changes.
    let begin = Instant::now();
    loop {
        let status = status(&run);
        // Both sessions go on in their processes.
        let is_back = |d: &Value| d["state"] == "Connected" && d["reattached"] == 0;
        let is_restarted = domain(run.child.id(), "driver").is_some_and(|pid| pid != killed);
        if is_restarted && status["devices"].as_array().unwrap().iter().all(is_back) {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "{status}");
        sleep(Duration::from_millis(20));
    }
    run.stop(&state);
}

/// Upgrades a machine while files are downloaded.
fn upgrade_during_downloads(args: &[&str], devices: usize) {
    let dir = tempfile::tempdir().unwrap();
    let (state, new) = (dir.path().join("state"), dir.path().join("new-pvio"));
    fs::copy(env!("CARGO_BIN_EXE_pvio"), &new).unwrap();
    let Some(run) = Run::start_with(&state, None, args) else { return };
    let supervisor = domain(run.child.id(), "driver").unwrap();
    let is_over = AtomicBool::new(false);
    let out = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut rounds = 0;
            while !is_over.load(Ordering::Relaxed) || rounds == 0 {
                for file in pvio_demo::image::files() {
                    assert!(run.curl(&format!("/{}", file.path)) == file.bytes, "{}", file.path);
                }
                rounds += 1;
            }
            rounds
        });
        sleep(Duration::from_millis(300));
        let out = pvio().arg("upgrade").arg(&new).arg("--state-dir").arg(&state).output().unwrap();
        sleep(Duration::from_millis(300));
        is_over.store(true, Ordering::Relaxed);
        println!("{} rounds of downloads", load.join().unwrap());
        out
    });
    let log = fs::read_to_string(state.join("driver.log")).unwrap();
    assert!(out.status.success(), "{}\n{log}", text(&out.stderr));
    print!("{}", text(&out.stdout));
    assert_eq!(text(&out.stdout).lines().count(), devices + 1, "{log}");
    assert_eq!(domain(run.child.id(), "driver"), Some(supervisor), "{log}");
    assert_eq!(fs::read_link(format!("/proc/{supervisor}/exe")).unwrap(), new);
    let status: Value = serde_json::from_slice(&run.curl("/.pvio/status.json")).unwrap();
    let goes_on = |d: &Value| d["state"] == "Connected" && d["reattached"] == 0;
    assert!(status["devices"].as_array().unwrap().iter().all(goes_on), "{status}\n{log}");
    run.stop(&state);
}

#[test]
fn downloads_go_on_during_upgrade_with_nic_of_supervisor() {
    upgrade_during_downloads(&["--nic-share", "uplink=1G", "--nic-options", "share=uplink"], 1);
}

#[test]
fn downloads_go_on_during_upgrade_with_nic_of_process() {
    upgrade_during_downloads(&[], 2);
}

#[test]
fn killed_guest_ends_machine_with_exit_code_1() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let Some(mut run) = Run::start(&state, None) else { return };
    let id = run.child.id();
    kill(domain(id, "guest").unwrap(), rustix::process::Signal::KILL);
    assert_eq!(run.child.wait().unwrap().code(), Some(1));
    assert_eq!(domain(id, "driver"), None);
    no_socket_in(&state);
}

#[test]
fn killed_launcher_ends_its_domains() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let Some(mut run) = Run::start(&state, None) else { return };
    let id = run.child.id();
    run.child.kill().unwrap();
    run.child.wait().unwrap();
    let begin = Instant::now();
    while domain(id, "guest").or(domain(id, "driver")).is_some() {
        assert!(begin.elapsed() < Duration::from_secs(30), "domains still run");
        sleep(Duration::from_millis(10));
    }
    // The directory can be used again.
    if let Some(run) = Run::start(&state, None) {
        run.stop(&state);
    }
}
