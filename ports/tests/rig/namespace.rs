//! Running a test in a separate network namespace, by running this test program again.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::io::Write;
use std::process::{Command, Stdio};

const INSIDE: &str = "PVIO_TEST_IN_NAMESPACE";

/// Runs `test`, the calling test with its module, in a new namespace. Returns `true` inside the
/// namespace, where the test continues. Returns `false` outside: the test has passed inside, or
/// could not run, which was printed.
///
/// # Panics
/// If the test failed inside.
pub fn entered(test: &str, before: &[&str]) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    // A user other than root can be root in a user namespace.
    let how = if rustix::process::geteuid().is_root() { "-n" } else { "-rn" };
    let probe = Command::new("unshare").args([how]).args(before).arg("true").output();
    let works = probe.as_ref().is_ok_and(|out| out.status.success());
    if !works || !std::path::Path::new("/dev/net/tun").exists() {
        skipped(test, "no network namespace or no /dev/net/tun; run as root, with util-linux");
        return false;
    }
    if !Command::new("ip").arg("-V").output().is_ok_and(|out| out.status.success()) {
        skipped(test, "no `ip`; install iproute2");
        return false;
    }
    let program = std::env::current_exe().unwrap();
    // An unknown name would run no test, which would count as passed.
    let named = Command::new(&program).args(["--exact", test, "--list"]).output().unwrap();
    let named = std::string::String::from_utf8_lossy(&named.stdout)
        .starts_with(&std::format!("{test}: test"));
    assert!(named, "no test of this program is called {test}");
    let status = Command::new("unshare")
        .args([how])
        .args(before)
        .arg(program)
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{test} failed in its namespace");
    false
}

/// Bypasses the test harness, which hides the output of passing tests.
pub fn skipped(test: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {why}");
}

/// Runs `ip` and returns what it prints, or `None` if it fails.
pub fn ip(args: &str) -> Option<std::string::String> {
    let out = Command::new("ip").args(args.split(' ')).output().unwrap();
    out.status.success().then(|| std::string::String::from_utf8(out.stdout).unwrap())
}

/// As [`entered`], for a test that also runs these programs, each from the Debian package of that
/// name.
pub fn entered_with(test: &str, programs: &[(&str, &str)]) -> bool {
    entered_with_before(test, programs, &[])
}

/// As `entered_with`, through a command.
pub fn entered_with_before(test: &str, programs: &[(&str, &str)], before: &[&str]) -> bool {
    for (program, package) in programs {
        let found = Command::new("sh").args(["-c", &std::format!("command -v {program}")]).output();
        if !found.is_ok_and(|out| out.status.success()) {
            skipped(test, &std::format!("no `{program}`; apt install {package}"));
            return false;
        }
    }
    if std::env::var_os(INSIDE).is_none() && !rustix::process::geteuid().is_root() {
        skipped(test, "named network namespaces; run as root");
        return false;
    }
    entered(test, before)
}
