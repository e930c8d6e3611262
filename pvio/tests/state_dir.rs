//! Directories in which `pvio run` stores its sockets, logs and demo image, and those that it must
//! reject.
#![allow(missing_docs, reason = "tests")]

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// A user id that no account has.
const STRANGER: u32 = 54_321;

/// Runs `pvio run` with that directory for temporary files, expects it to fail, and returns its
/// message.
fn refused(tmp: &Path, more: &[&str]) -> String {
    // A command that does start would not end.
    let mut pvio = Command::new("timeout");
    pvio.args(["60", env!("CARGO_BIN_EXE_pvio"), "run"]).args(more);
    let out = pvio.env("TMPDIR", tmp).env_remove("XDG_RUNTIME_DIR").output().unwrap();
    let why = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(2), "{why}");
    let lines: Vec<&str> = why.lines().collect();
    assert!(lines.len() == 2 && lines[1].starts_with("help: "), "{why}");
    why
}

#[test]
fn state_dir_prepared_by_other_user_is_rejected_and_links_not_followed() {
    let user = rustix::process::geteuid().as_raw();
    let dir = tempfile::tempdir().unwrap();
    let victim = dir.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    let prepare = |machine: &Path| {
        fs::create_dir_all(machine).unwrap();
        fs::set_permissions(machine, Permissions::from_mode(0o755)).unwrap();
        for name in ["demo.img", "driver.log", "guest.log"] {
            symlink(&victim, machine.join(name)).unwrap();
        }
    };
    let root = dir.path().join(format!("pvio-{user}"));

    // The directory of all machines is a symlink.
    let elsewhere = dir.path().join("elsewhere");
    prepare(&elsewhere.join("guest"));
    symlink(&elsewhere, &root).unwrap();
    let why = refused(dir.path(), &[]);
    assert!(why.contains("symbolic link") && why.contains("--state-dir"), "{why}");
    fs::remove_file(&root).unwrap();

    // The directory of this machine is a symlink.
    fs::create_dir(&root).unwrap();
    fs::set_permissions(&root, Permissions::from_mode(0o700)).unwrap();
    symlink(elsewhere.join("guest"), root.join("guest")).unwrap();
    assert!(refused(dir.path(), &[]).contains("symbolic link"));
    let named = root.join("guest");
    assert!(
        refused(dir.path(), &["--state-dir", named.to_str().unwrap()]).contains("symbolic link")
    );
    fs::remove_file(&named).unwrap();

    // Other users can write to it.
    prepare(&named);
    fs::set_permissions(&named, Permissions::from_mode(0o777)).unwrap();
    assert!(refused(dir.path(), &[]).contains("others may write"));

    // Another user owns it, or the directory above it.
    if chown(&named, Some(STRANGER), None).is_ok() {
        fs::set_permissions(&named, Permissions::from_mode(0o755)).unwrap();
        assert!(refused(dir.path(), &[]).contains("belongs to user 54321"));
        fs::remove_dir_all(&named).unwrap();
        chown(&root, Some(STRANGER), None).unwrap();
        assert!(refused(dir.path(), &[]).contains("belongs to user 54321"));
    } else {
        eprintln!("SKIPPED: directories of other users; run it as root");
    }
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
}

#[test]
fn state_dir_in_user_namespace_belongs_to_outer_user() {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o1777)).unwrap();
    let user = rustix::process::geteuid();
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", env!("CARGO_BIN_EXE_pvio")]);
    let user = if user.is_root() {
        command.uid(STRANGER);
        STRANGER
    } else {
        user.as_raw()
    };
    command.env("TMPDIR", dir.path()).env_remove("XDG_RUNTIME_DIR").stdin(Stdio::null());
    let mut can = Command::new("unshare");
    can.args(["--user", "--map-root-user", env!("CARGO_BIN_EXE_pvio"), "--version"]);
    if rustix::process::geteuid().is_root() {
        can.uid(STRANGER);
    }
    if !can.output().is_ok_and(|out| out.status.success()) {
        return eprintln!(
            "SKIPPED: no user namespaces for this user, or the program is not theirs to run"
        );
    }
    let mut child = command.arg("run").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let state = lines.find(|line| line.starts_with("state "));
    let pid = rustix::process::Pid::from_child(&child);
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
    child.wait().unwrap();
    let folder = dir.path().join(format!("pvio-{user}/guest"));
    let state = state.expect("state directory is printed");
    assert!(state.contains(folder.to_str().unwrap()), "{state}");
    assert!(!dir.path().join("pvio-0").exists());
}
