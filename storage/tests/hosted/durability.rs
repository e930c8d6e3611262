//! A disk with a failed flush, as its guest sees it in this and the next session, and its operator.

use crate::machine::{Machine, PATIENCE, image};
use pvio_blkback::Config;
use pvio_blkfront::Op;
use pvio_blkfront::blocking::BlockingDisk;
use pvio_hosted::Domain;
use pvio_ring::proto::blkif::Status;
use pvio_xenbus::Xenstore;
use pvio_xenbus::client::Client;
use pvio_xenbus::handshake::common::{read_error, request_removal};
use pvio_xenbus::handshake::vbd::{Mode, ToolstackBack};
use std::time::{Duration, Instant};

fn one(session: &mut BlockingDisk<Domain, Client>, op: Op) -> Status {
    let queue = session.queue().unwrap();
    let slot = queue.reserve().unwrap();
    queue.start(slot, op).unwrap();
    queue.publish().unwrap();
    let mut found = None;
    while found.is_none() {
        session.answers(|_, _, status| found = Some(status)).unwrap();
    }
    session.queue().unwrap().release(slot);
    found.unwrap()
}

#[test]
fn failed_flush_is_reported_and_persists_until_disk_is_recreated() {
    let machine = Machine::new(Config::default());
    let file = image(1 << 20);
    let mut back = ToolstackBack::new(machine.addr(), file.path().to_str().unwrap());
    (back.mode, back.options) = (Mode::ReadWrite, Some("fail-flushes=1000000".into()));
    let addr = machine.add(&back);
    let driver = machine.serve();
    let mut xs = machine.xenstore();
    let guest = machine.join(machine.guest);
    let attach = || {
        let own = guest.xenstore().unwrap();
        BlockingDisk::attach(guest.clone(), own, addr, PATIENCE).unwrap()
    };
    let mut session = attach();
    assert_eq!(read_error(&mut xs, &addr.backend_path()).unwrap(), None);
    assert_eq!(one(&mut session, Op::Flush), Status::Error);
    let begin = Instant::now();
    let told = loop {
        if let Some(told) = read_error(&mut xs, &addr.backend_path()).unwrap() {
            break told;
        }
        assert!(begin.elapsed() < PATIENCE, "error node was not written");
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(told.contains("flush-failed"), "{told}");
    // Flushes of the storage succeed again, and reads fail, to detect when the options take effect.
    let options = format!("{}/pvio-options", addr.backend_path());
    xs.write(&options, b"fail-flushes=0,fail-reads=1000000").unwrap();
    while one(&mut session, Op::Read { sector: 0, bytes: 4096 }) == Status::Okay {
        assert!(begin.elapsed() < PATIENCE, "options did not take effect");
    }
    assert_eq!(one(&mut session, Op::Flush), Status::Error);
    assert_eq!(one(&mut session, Op::Write { sector: 0, bytes: 4096 }), Status::Okay);
    assert_eq!(driver.stats.failed_flushes.get(), 2);
    session.close().unwrap();
    let mut session = attach();
    assert_eq!(
        one(&mut session, Op::Flush),
        Status::Error,
        "flush fails after reattaching to the same image"
    );
    session.close().unwrap();
    request_removal(&mut xs, addr).unwrap();
    assert!(driver.thread.join().unwrap());
    // The disk is attached again.
    back.options = None;
    xs.rm(&addr.backend_path()).unwrap();
    machine.rebuild_driver(&back);
    let driver = machine.serve();
    let mut session = attach();
    assert_eq!(one(&mut session, Op::Flush), Status::Okay);
    assert_eq!(read_error(&mut xs, &addr.backend_path()).unwrap(), None);
    session.close().unwrap();
    driver.end();
}
