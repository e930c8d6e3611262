//! A server without work sleeps. This test has its own program, so that no other server's thread is
//! measured.
#![cfg(feature = "std")]

mod common;

use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::drain;
use pvio_ring::DomId;
use pvio_xenbus::Xenstore;
use pvio_xenbus::client::Client;
use pvio_xenstored::Store;
use pvio_xenstored::server::Server;

#[test]
fn idle_server_thread_never_wakes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let server = Server::new(Store::default()).listen(&path).unwrap().spawn().unwrap();
    let mut xs = Client::connect(&path).unwrap();
    xs.watch("/", "t").unwrap();
    let _silent = UnixStream::connect(&path).unwrap();
    let mut guest = server.connect_local(DomId(3)).unwrap();
    guest.watch("@releaseDomain", "t").unwrap();
    drain(&mut xs, Duration::from_millis(100));

    let thread = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|task| task.unwrap().path())
        .find(|task| std::fs::read_to_string(task.join("comm")).unwrap().trim() == "xenstore")
        .expect("the server has a thread of this name");
    let switches = || {
        let status = std::fs::read_to_string(thread.join("status")).unwrap();
        let lines: Vec<_> =
            status.lines().filter(|l| l.contains("ctxt_switches")).map(String::from).collect();
        assert_eq!(lines.len(), 2);
        lines
    };
    let before = switches();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(switches(), before, "server thread woke up without a request");
    // It can still be woken.
    xs.read("/").unwrap();
    assert_ne!(switches(), before);
}
