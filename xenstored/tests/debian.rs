//! Debian's xenstore clients with this server.
#![cfg(feature = "std")]

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use common::{Running, debian};
use pvio_ring::DomId;
use pvio_xenbus::Xenstore;
use pvio_xenstored::Store;
use pvio_xenstored::server::{Server, ServerHandle};

fn serve() -> (ServerHandle, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let server =
        Server::new(Store::default()).listen(dir.path().join("s")).unwrap().spawn().unwrap();
    (server, dir)
}

/// Runs one of the `xenstore-*` tools; `None` if they are not installed.
fn tool(server: &ServerHandle, name: &str, args: &[&str]) -> Option<Output> {
    let program = debian(&format!("/usr/bin/xenstore-{name}"), "xenstore-utils")?;
    let mut command = Command::new(program);
    command.args(args).env("XENSTORED_PATH", server.path().unwrap());
    Some(command.output().unwrap())
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn xenstore_utils_write_read_list_and_remove_nodes() {
    let (server, _dir) = serve();
    let Some(wrote) = tool(&server, "write", &["/a/b", "hello", "/a/c", "world"]) else {
        return;
    };
    assert!(wrote.status.success(), "{wrote:?}");
    let run = |name: &str, args: &[&str]| tool(&server, name, args).unwrap();
    assert_eq!(stdout(&run("read", &["/a/b", "/a/c"])), "hello\nworld\n");
    assert_eq!(stdout(&run("list", &["/a"])), "b\nc\n");
    assert!(run("exists", &["/a/b"]).status.success());
    assert!(!run("exists", &["/a/none"]).status.success());
    assert!(run("rm", &["-t", "/a/b"]).status.success(), "xenstore-rm -t removes empty parents");
    assert!(run("exists", &["/a/c"]).status.success());
    assert!(run("rm", &["-t", "/a/c"]).status.success());
    assert!(!run("exists", &["/a"]).status.success());
    let missing = run("read", &["/a/b"]);
    assert!(!missing.status.success());
    assert!(String::from_utf8_lossy(&missing.stderr).contains("couldn't read path"));
    server.check().unwrap().unwrap();
}

#[test]
fn xenstore_ls_and_chmod_show_and_set_permissions() {
    let (server, _dir) = serve();
    let Some(wrote) = tool(&server, "write", &["/a/b", "hello"]) else {
        return;
    };
    assert!(wrote.status.success(), "{wrote:?}");
    let run = |name: &str, args: &[&str]| stdout(&tool(&server, name, args).unwrap());
    run("chmod", &["/a/b", "n3", "r4"]);
    let listing = run("ls", &["-p", "/"]);
    let lines: Vec<_> = listing.lines().map(|l| l.replace(" .", "")).collect();
    assert_eq!(lines[0], "a = \"\"  (n0)");
    assert_eq!(lines[1], " b = \"hello\"  (n3,r4)");
    assert_eq!(run("ls", &["-f", "/a"]), "/a/b = \"hello\"\n");
    run("chmod", &["-r", "/a", "b7"]);
    let perms = server.connect_local(DomId::DOM0).unwrap().get_perms("/a/b").unwrap();
    assert_eq!(perms.iter().map(ToString::to_string).collect::<Vec<_>>(), ["b7"]);
}

#[test]
fn xenstore_list_shows_directory_longer_than_message() {
    let (server, _dir) = serve();
    let mut xs = server.connect_local(DomId::DOM0).unwrap();
    for i in 0..900 {
        xs.write(&format!("/big/entry-{i:04}"), b"").unwrap();
    }
    let Some(listing) = tool(&server, "list", &["/big"]) else {
        return;
    };
    let expected: String = (0..900).map(|i| format!("entry-{i:04}\n")).collect();
    assert_eq!(stdout(&listing), expected);
}

#[test]
fn xenstore_watch_reports_writes_of_other_client() {
    let (server, _dir) = serve();
    let Some(program) = debian("/usr/bin/xenstore-watch", "xenstore-utils") else {
        return;
    };
    let mut watch = Running(
        Command::new(program)
            .args(["-n", "4", "/w"])
            .env("XENSTORED_PATH", server.path().unwrap())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut lines = BufReader::new(watch.0.stdout.take().unwrap()).lines();
    // The first event means that the watch is registered.
    assert_eq!(lines.next().unwrap().unwrap(), "/w");
    let mut xs = server.connect_local(DomId::DOM0).unwrap();
    xs.write("/w/x", b"1").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "/w/x");
    pvio_xenbus::transaction(&mut xs, |tx| tx.write("/w/y/z", b"2")).unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "/w/y/z");
    xs.rm("/w").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "/w");
    assert!(watch.0.wait().unwrap().success());
}

#[test]
fn xenstore_control_commands_get_response() {
    let (server, _dir) = serve();
    let Some(program) = debian("/usr/lib/xen-4.17/bin/xenstore-control", "xen-utils-4.17") else {
        return;
    };
    let control = |args: &[&str]| {
        let mut command = Command::new(&program);
        command.args(args).env("XENSTORED_PATH", server.path().unwrap()).output().unwrap()
    };
    assert_eq!(stdout(&control(&["check"])), "OK\n");
    assert!(stdout(&control(&["help"])).starts_with("check\n"));
    assert!(stdout(&control(&["quota"])).starts_with("nodes 1000\n"));
    // The tool sends a help command when another one is rejected as invalid.
    let refused = control(&["nonsense"]);
    let words = String::from_utf8_lossy(&refused.stderr);
    assert!(
        words.starts_with("Command not supported. Valid commands are:\ncheck\n"),
        "{refused:?}"
    );
}

#[test]
fn xen_test_xenstore_program_passes() {
    let (server, _dir) = serve();
    let Some(program) = debian("/usr/lib/xen-4.17/bin/test-xenstore", "xen-utils-4.17") else {
        return;
    };
    let run = |args: &[&str]| {
        let mut command = Command::new(&program);
        command.args(args).env("XENSTORED_PATH", server.path().unwrap());
        stdout(&command.output().unwrap())
    };
    let timed = run(&["-i", "50"]);
    assert_eq!(timed.lines().count(), 12, "{timed}");
    assert!(timed.lines().all(|l| l.contains(": avg: ")), "{timed}");
    assert_eq!(run(&["-r", "1"]), "", "random test for one second");
    // Two concurrent clients interfere only as far as transactions may.
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| assert!(!run(&["-i", "100"]).contains("failed")));
        }
    });
    let mut xs = server.connect_local(DomId::DOM0).unwrap();
    assert_eq!(xs.directory("/local/domain/0").unwrap(), [""; 0], "test program left no nodes");
    server.check().unwrap().unwrap();
}
