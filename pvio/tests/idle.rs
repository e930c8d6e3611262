//! A machine with many disks: they can be attached, and an idle machine uses no processor time.
#![allow(missing_docs, reason = "tests")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Lines};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const PVIO: &str = env!("CARGO_BIN_EXE_pvio");
const PATIENCE: Duration = Duration::from_secs(120);

/// A running `pvio run`, and its messages on standard error.
struct Machine {
    child: Child,
    notes: Lines<BufReader<ChildStderr>>,
}

impl Machine {
    fn start(state: &Path) -> Self {
        let mut pvio = Command::new(PVIO);
        pvio.args(["run", "--state-dir"]).arg(state).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = pvio.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        assert!(lines.any(|line| line.starts_with("ready")), "pvio exited: {:?}", child.wait());
        std::thread::spawn(move || lines.for_each(drop));
        let notes = BufReader::new(child.stderr.take().unwrap()).lines();
        Self { child, notes }
    }

    /// Attaches `count` disks, and waits until the guest has read what each contains.
    fn attach(&mut self, state: &Path, image: &Path, count: usize) {
        let attached: Vec<String> = (0..count)
            .map(|_| {
                let mut attach = Command::new(PVIO);
                attach.args(["attach-disk", "guest"]).arg(format!("[ro]{}", image.display()));
                let out = attach.arg("--state-dir").arg(state).output().unwrap();
                assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
                let line = String::from_utf8(out.stdout).unwrap();
                let name = line.split_whitespace().next().unwrap().to_owned();
                let note = self.notes.next().unwrap().unwrap();
                assert!(note.contains(&format!("{name} was attached")), "{note}");
                name
            })
            .collect();
        assert_eq!(attached.len(), count);
    }

    /// Returns its processes: the machine, the driver domain, the guest.
    fn processes(&self) -> Vec<u32> {
        let own = self.child.id();
        let is_child = |pid: &u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.lines().any(|line| line == format!("PPid:\t{own}"))
        };
        let all = fs::read_dir("/proc").unwrap().flatten();
        let all = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        all.filter(is_child).chain([own]).collect()
    }

    /// Returns the number of times that each thread of its processes went to sleep so far, by
    /// process, thread and name.
    fn sleeps(&self) -> BTreeMap<(u32, u32, String), u64> {
        let tasks = self.processes().into_iter().flat_map(|pid| {
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            tasks.map(move |task| (pid, task))
        });
        let count = |(pid, task): (u32, fs::DirEntry)| {
            let status = fs::read_to_string(task.path().join("status")).ok()?;
            let value = |key| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
            let sleeps = value("voluntary_ctxt_switches:")?.parse().ok()?;
            let name = value("Name:")?.to_owned();
            Some(((pid, task.file_name().to_str()?.parse().ok()?, name), sleeps))
        };
        tasks.filter_map(count).collect()
    }

    /// Returns the threads that went to sleep during this time, and how often.
    fn awake(&self, time: Duration) -> BTreeMap<(u32, u32, String), u64> {
        let before = self.sleeps();
        sleep(time);
        let mut after = self.sleeps();
        for (thread, sleeps) in &mut after {
            *sleeps -= before.get(thread).copied().unwrap_or_default();
        }
        after.retain(|_, sleeps| *sleeps > 0);
        after
    }

    /// Returns the driver domain's process.
    fn driver(&self) -> u32 {
        let driver = |pid: &u32| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&words).contains("domain\0driver")
        };
        self.processes().into_iter().find(driver).unwrap()
    }

    fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn image(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("disk.img");
    fs::write(&path, pvio_demo::image::image_bytes(8 << 20).unwrap()).unwrap();
    path
}

#[test]
fn machine_with_twenty_idle_disks_wakes_only_to_poll_sizes() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let image = image(dir.path());
    let mut machine = Machine::start(&state);
    machine.attach(&state, &image, 20);
    // Wait until work caused by attaching has ended: cached mappings are unmapped a minute after
    // the last request. From then on, only one thread wakes up, every three seconds, to poll the
    // sizes of all images.
    let (driver, begin, time) = (machine.driver(), Instant::now(), Duration::from_secs(15));
    let mut slept_well = false;
    while !slept_well {
        let awake = machine.awake(time);
        let sleeps: u64 = awake.values().sum();
        slept_well = awake.keys().all(|(pid, thread, _)| (*pid, *thread) == (driver, driver));
        slept_well &= sleeps <= 2 * (time.as_secs() / 3 + 1);
        assert!(slept_well || begin.elapsed() < PATIENCE, "within {time:?}: {awake:?}");
        println!("{sleeps} within {time:?}: {awake:?}");
    }
    assert_eq!(machine.processes().len(), 3);
    machine.stop();
}

#[test]
fn guest_with_forty_disks_stays_within_descriptor_reservation() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let image = image(dir.path());
    let mut machine = Machine::start(&state);
    machine.attach(&state, &image, 40);
    // The descriptors used per disk do not exceed the number reserved for it.
    let driver = machine.driver();
    let open = fs::read_dir(format!("/proc/{driver}/fd")).unwrap().count();
    assert!(open < 64 + 41 * (32 + 16), "{open}");
    machine.stop();
}
