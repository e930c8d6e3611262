//! A fence is passed when the last write end is closed, including those that the kernel holds.

use pvio_recordfile::RecordDir;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);

#[test]
fn fence_is_passed_when_every_write_end_is_closed() {
    let parent = tempfile::tempdir().unwrap();
    let dir = RecordDir::open(&parent.path().join("records")).unwrap();
    let first = dir.fence("disk.fence").unwrap();
    assert!(first.wait(Duration::ZERO).unwrap(), "new fence is passed");
    let held = first.hold().unwrap();
    let copy = held.try_clone().unwrap();
    let next = dir.fence("disk.fence").unwrap();
    assert!(!next.is_passed().unwrap());
    assert!(!next.wait(Duration::from_millis(1)).unwrap());
    drop(held);
    assert!(!next.is_passed().unwrap(), "copy of the write end holds the fence");
    let waiting = thread::spawn(move || next.wait(LONG).unwrap());
    drop(copy);
    assert!(waiting.join().unwrap());
    // It can be held repeatedly, and is removed when all write ends are closed.
    let again = dir.fence("disk.fence").unwrap();
    assert!(again.is_passed().unwrap());
    let held = again.hold().unwrap();
    dir.fence("disk.fence").unwrap().remove().unwrap();
    let path = parent.path().join("records/disk.fence");
    assert!(fs::metadata(&path).unwrap().file_type().is_fifo(), "fence in use is not removed");
    dir.sweep().unwrap();
    assert!(path.exists());
    drop(held);
    dir.sweep().unwrap();
    assert!(!path.exists());
}

#[test]
fn fence_is_not_inherited_by_spawned_program() {
    let parent = tempfile::tempdir().unwrap();
    let dir = RecordDir::open(&parent.path().join("records")).unwrap();
    let held = dir.fence("disk.fence").unwrap().hold().unwrap();
    let mut other =
        Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // The child has started, and with it the inherited descriptors are in use.
    std::io::Write::write_all(other.stdin.as_mut().unwrap(), b"x").unwrap();
    std::io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut [0]).unwrap();
    drop(held);
    assert!(dir.fence("disk.fence").unwrap().wait(LONG).unwrap());
    drop(other.stdin.take());
    other.wait().unwrap();
}

#[test]
fn fence_file_that_is_no_fifo_is_an_error() {
    let parent = tempfile::tempdir().unwrap();
    let dir = RecordDir::open(&parent.path().join("records")).unwrap();
    fs::write(parent.path().join("records/disk.fence"), b"").unwrap();
    dir.fence("disk.fence").unwrap_err();
}

#[test]
fn fence_swept_by_other_daemon_before_hold_still_holds() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("records");
    let dir = RecordDir::open(&path).unwrap();
    let fence = dir.fence("disk.fence").unwrap();
    assert!(fence.is_passed().unwrap());
    dir.sweep().unwrap();
    assert!(!path.join("disk.fence").exists());
    let held = fence.hold().unwrap();
    assert!(!dir.fence("disk.fence").unwrap().is_passed().unwrap(), "next fence is not passed");
    drop(held);
    // The sweep may run at any moment of `hold`.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        scope.spawn(|| {
            let other = RecordDir::open(&path).unwrap();
            while !stop.load(Ordering::Relaxed) {
                other.sweep().unwrap();
            }
        });
        for _ in 0..3000 {
            let held = dir.fence("disk.fence").unwrap().hold().unwrap();
            let next = dir.fence("disk.fence").unwrap();
            assert!(!next.is_passed().unwrap(), "next fence is passed although one is held");
            drop(held);
        }
    });
}
