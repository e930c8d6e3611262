//! The environment of the command: ignored signals, and a system that forbids io_uring.
#![allow(missing_docs, reason = "tests")]

use seccompiler::{SeccompAction, SeccompFilter};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

const PVIO: &str = env!("CARGO_BIN_EXE_pvio");

/// Returns the mask of the signals that a process ignores or catches.
fn mask(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    u64::from_str_radix(mask.trim_start_matches(':').trim(), 16).unwrap()
}

#[test]
fn signals_ignored_at_start_stay_ignored_and_others_stop_machine() {
    const HUP: u64 = 1;
    const INT: u64 = 1 << 1;
    const TERM: u64 = 1 << 14;
    for (trap, ignored) in [("", 0), ("trap '' HUP;", HUP), ("trap '' HUP INT;", HUP | INT)] {
        let dir = tempfile::tempdir().unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{trap} exec \"$0\" run --state-dir \"$1\""), PVIO]);
        let mut child = shell.arg(dir.path()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let ready = lines.any(|line| line.starts_with("ready"));
        let all = HUP | INT | TERM;
        let seen = [mask(child.id(), "SigIgn") & all, mask(child.id(), "SigCgt") & all];
        let pid = rustix::process::Pid::from_child(&child);
        // An ignored signal has no effect; SIGTERM stops it in order.
        rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
        if ignored != 0 {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        }
        let status = child.wait().unwrap();
        assert!(ready, "{trap}");
        assert_eq!(seen, [ignored, all & !ignored], "{trap}");
        assert!(status.success(), "{trap} {status}");
    }
}

/// Runs the command with a filter that makes `io_uring_setup` fail with that error, as in a
/// container.
fn without_io_uring(errno: u32, args: &[&str]) -> Option<Output> {
    const IO_URING_SETUP: i64 = 425;
    let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
    // A seccomp filter applies to its thread and to threads and processes created from it.
    let thread = std::thread::spawn(move || {
        let (pass, fail) = (SeccompAction::Allow, SeccompAction::Errno(errno));
        let arch = std::env::consts::ARCH.try_into().ok()?;
        let rules = BTreeMap::from([(IO_URING_SETUP, Vec::new())]);
        let filter = SeccompFilter::new(rules, pass, fail, arch).unwrap();
        let program: seccompiler::BpfProgram = filter.try_into().unwrap();
        seccompiler::apply_filter(&program).ok()?;
        Some(Command::new("timeout").arg("60").arg(PVIO).args(args).output().unwrap())
    });
    thread.join().unwrap()
}

#[test]
fn forbidden_io_uring_is_reported_before_anything_starts() {
    let dir = tempfile::tempdir().unwrap();
    let (image, state) = (dir.path().join("scratch.img"), dir.path().join("state"));
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let (image, state) = (image.to_str().unwrap(), state.to_str().unwrap());
    for (errno, args) in [
        (1, &["run", "--state-dir", state][..]),
        (38, &["run", "--nic", "--state-dir", state]),
        (1, &["check", "--disk", image, "--state-dir", state]),
        (38, &["serve"]),
    ] {
        let Some(out) = without_io_uring(errno, args) else {
            return eprintln!("SKIPPED: seccomp filters cannot be set here");
        };
        let why = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{args:?}: {why}");
        assert!(why.starts_with("pvio: io_uring cannot be used: "), "{args:?}: {why}");
        assert!(why.contains("seccomp"), "{args:?}: {why}");
        assert_eq!(why.lines().count(), 2, "{args:?}: {why}");
        assert!(!std::path::Path::new(state).exists(), "{args:?}");
    }
}
