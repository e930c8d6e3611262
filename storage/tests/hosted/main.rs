//! The whole stack with real threads, files and xenstore: handshake, data, close, re-attach, and a
//! driver domain that dies.

mod changes;
mod durability;
mod frontends;
#[path = "../support/fuse.rs"]
mod fuse;
mod machine;
mod queues;
mod resumed;
#[path = "../support/storage.rs"]
mod storage;
mod storms;
mod successors;
#[path = "../support/mod.rs"]
mod support;
mod waiting;

use machine::{Machine, PATIENCE, image, on_every_path};
use pvio_blkback::{Config, DataPath};
use pvio_blkfront::blocking::{BlockingDisk, DiskError};
use pvio_blkfront::{Op, SLOT_BYTES, Shape};
use pvio_hosted::Domain;
use pvio_ring::proto::blkif::Status;
use pvio_xenbus::client::Client;
use pvio_xenbus::handshake::common::{read_error, request_removal};
use pvio_xenbus::handshake::vbd::{Mode, ToolstackBack};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

fn write(session: &mut BlockingDisk<Domain, Client>, sector: u64, data: &[u8]) {
    for (op, fill) in [(Op::Write { sector, bytes: data.len() }, true), (Op::Flush, false)] {
        let queue = session.queue().unwrap();
        let slot = queue.reserve().unwrap();
        if fill {
            queue.fill(slot, 0, data).unwrap();
        }
        queue.start(slot, op).unwrap();
        queue.publish().unwrap();
        let mut answers = 0;
        while answers == 0 {
            answers += session.answers(|_, _, status| assert_eq!(status, Status::Okay)).unwrap();
        }
        session.queue().unwrap().release(slot);
    }
}

#[test]
fn disk_data_is_written_and_read_and_device_closes_on_every_path() {
    on_every_path(whole_path);
}

fn whole_path(config: Config) {
    let machine = Machine::new(config);
    let file = image(4 << 20);
    let addr = machine.add_disk(file.path(), Mode::ReadWrite);
    let driver = machine.serve();
    let mut session = machine.attach().unwrap();
    assert_eq!(session.size(), 4 << 20);

    let mut got = vec![0; 3 << 20];
    session.read_at(512, &mut got).unwrap();
    assert!(got == std::fs::read(file.path()).unwrap()[512..512 + (3 << 20)]);

    write(&mut session, 100, &[0x5a; SLOT_BYTES]);
    let mut there = vec![0; SLOT_BYTES];
    file.as_file().read_exact_at(&mut there, 100 * 512).unwrap();
    assert!(there.iter().all(|b| *b == 0x5a), "a flushed write is in the file");

    assert!(matches!(session.read_at(4 << 20, &mut [0; 512]), Err(DiskError::OutOfRange(..))));
    session.close().unwrap();
    let stats = &driver.stats;
    let counts =
        [&stats.mapped_pages, &stats.reused_pages, &stats.copied_pages].map(|c| c.get() > 0);
    let expected = match config.policy.path(true) {
        DataPath::Map => [true, false, false],
        DataPath::Copy => [false, false, true],
        DataPath::PersistentOrMap | DataPath::PersistentOrCopy => [true, true, false],
    };
    assert_eq!(counts, expected, "mapped, reused, copied");
    request_removal(&mut machine.xenstore(), addr).unwrap();
    assert!(driver.thread.join().unwrap(), "backend is removed after both sides closed");
}

#[test]
fn advertised_multi_page_ring_and_indirect_requests_are_used() {
    on_every_path(large);
}

fn large(config: Config) {
    let machine = Machine::new(config);
    let file = image(16 << 20);
    machine.add_disk(file.path(), Mode::ReadWrite);
    let driver = machine.serve();
    let guest = machine.join(machine.guest);
    let xs = guest.xenstore().unwrap();
    let requested = Shape { ring_pages: 32, pages_per_slot: 20 };
    let mut session =
        BlockingDisk::attach_with(guest, xs, machine.addr(), requested, PATIENCE).unwrap();
    let queue = session.queue().unwrap();
    // 16 pages are advertised, and more segments than requested.
    assert_eq!(queue.shape(), Shape { ring_pages: 16, pages_per_slot: 20 });
    assert_eq!((queue.depth(), queue.slot_bytes()), (512, 80 << 10));
    let data: Vec<u8> = (0..80 << 10).map(|i| (i / 4096 + i) as u8).collect();
    write(&mut session, 80, &data);
    let mut there = vec![0; data.len()];
    file.as_file().read_exact_at(&mut there, 80 * 512).unwrap();
    assert!(there == data, "a flushed write is in the file");
    let mut got = vec![0; 16 << 20];
    session.read_at(0, &mut got).unwrap();
    assert!(got == std::fs::read(file.path()).unwrap());
    session.close().unwrap();
    driver.end();
}

#[test]
fn blocking_read_waits_for_abandoned_requests() {
    on_every_path(given_up);
}

fn given_up(config: Config) {
    let machine = Machine::new(config);
    let file = image(4 << 20);
    machine.add_disk(file.path(), Mode::ReadOnly);
    let driver = machine.serve();
    let mut session = machine.attach().unwrap();
    // Every slot is in flight, and no thread polls for the responses.
    let queue = session.queue().unwrap();
    while let Some(slot) = queue.reserve() {
        queue.start(slot, Op::Read { sector: 0, bytes: 4096 }).unwrap();
    }
    queue.publish().unwrap();
    let mut got = vec![0; 2 << 20];
    session.read_at(0, &mut got).unwrap();
    assert!(got == std::fs::read(file.path()).unwrap()[..2 << 20]);
    session.close().unwrap();
    driver.end();
}

#[test]
fn frontend_reattaches_after_close() {
    on_every_path(attach_again);
}

fn attach_again(config: Config) {
    let machine = Machine::new(config);
    let file = image(1 << 20);
    machine.add_disk(file.path(), Mode::ReadOnly);
    let driver = machine.serve();
    let guest = machine.join(machine.guest);
    for _ in 0..3 {
        let xs = guest.xenstore().unwrap();
        let mut session =
            BlockingDisk::attach(guest.clone(), xs, machine.addr(), PATIENCE).unwrap();
        session.read_at(0, &mut [0; 4096]).unwrap();
        assert!(session.device().served().unwrap().info.read_only);
        session.close().unwrap();
    }
    driver.end();
}

#[test]
fn requests_outstanding_at_driver_domain_death_are_completed_by_next() {
    on_every_path(next_driver);
}

fn next_driver(config: Config) {
    let machine = Machine::new(config);
    let file = image(1 << 20);
    let addr = machine.add_disk(file.path(), Mode::ReadWrite);
    let driver = machine.serve();
    let mut session = machine.attach().unwrap();
    write(&mut session, 0, &[1; 512]);

    // Its process has ended, and its home directory in xenstore is removed; a new domain has the
    // same id.
    driver.end();
    let queue = session.queue().unwrap();
    let slot = queue.reserve().unwrap();
    queue.fill(slot, 0, &[2; 512]).unwrap();
    queue.start(slot, Op::Write { sector: 8, bytes: 512 }).unwrap();
    queue.publish().unwrap();
    machine.rebuild_driver(&ToolstackBack::new(addr, file.path().to_str().unwrap()));
    let driver = machine.serve();

    let mut answers = 0;
    while answers == 0 {
        let answered = session.answers(|_, _, status| assert_eq!(status, Status::Okay));
        answers += answered.unwrap_or_else(|error| {
            let why = read_error(&mut machine.xenstore(), &addr.backend_path());
            panic!("{error}; error node of the backend: {why:?}")
        });
    }
    let mut there = [0; 512];
    file.as_file().read_exact_at(&mut there, 4096).unwrap();
    assert_eq!(there, [2; 512]);
    assert_eq!(session.device().sessions(), 2);
    session.close().unwrap();
    driver.end();
}

#[test]
fn missing_image_closes_device_with_path_in_error_node() {
    let machine = Machine::new(Config::default());
    let addr = machine.add_disk(Path::new("/nowhere/disk.img"), Mode::ReadWrite);
    let driver = machine.serve();
    let error =
        machine.attach_within(Duration::from_millis(500)).err().expect("attach without a disk");
    assert!(error.to_string().contains("its state is Closed"), "{error}");
    let mut xs = machine.xenstore();
    let why = read_error(&mut xs, &addr.backend_path()).unwrap().expect("a reason");
    assert!(why.contains("/nowhere/disk.img does not exist"), "{why}");
    driver.end();
}
