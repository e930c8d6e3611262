//! A backend that resumes the session of its predecessor, within one domain.

use crate::machine::{Machine, PATIENCE, image};
use pvio_blkback::vbd::VbdServer;
use pvio_blkback::{Config, Policy, Vbd};
use pvio_blkfront::Op;
use pvio_grant_table::DomId;
use pvio_hosted::Domain;
use pvio_recordfile::RecordDir;
use pvio_ring::proto::blkif::Status;
use pvio_ring::shm::Region;
use pvio_storage::host::{ImageServer, UNMAPPING};
use pvio_xenbus::driver::BackendDriver;
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr};
use pvio_xenbus::handshake::vbd::Mode;
use pvio_xenbus::{XenbusState, Xenstore};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Offset of word 4 of a record's header: whether pages are mapped for single requests.
const MAPS_REQUESTS: usize = 32;

type Device = BackendDriver<Vbd<ImageServer<Domain>>>;

/// Steps a device until told to stop, and then leaves its session to a successor.
fn serve(mut device: Device, domain: Domain, stop: &Arc<AtomicBool>) -> JoinHandle<()> {
    let stop = Arc::clone(stop);
    std::thread::spawn(move || {
        let mut xs = domain.xenstore().unwrap();
        while !stop.load(Ordering::SeqCst) {
            device.step(&mut xs).unwrap();
            xs.wait_event(Some(Duration::from_millis(5))).unwrap();
        }
        while device.leave().is_pending() {
            std::thread::sleep(Duration::from_millis(1));
        }
    })
}

/// Returns the time from the end of the first backend to a response of the second, and the mark in
/// the record.
fn resumed(policy: Policy) -> (Duration, u64) {
    let machine = Machine::new(Config { policy, ..Config::default() });
    let (file, parent) = (image(1 << 20), tempfile::tempdir().unwrap());
    let records = RecordDir::open(&parent.path().join("records")).unwrap();
    let addr = machine.add_disk(file.path(), Mode::ReadWrite);
    let domain = machine.join(machine.driver);
    let vbd = || {
        let server = ImageServer::new(domain.clone(), Arc::new(|| ()));
        let server = server.recorded_in(records.clone());
        Vbd::with(server, machine.config)
    };
    let stop = Arc::new(AtomicBool::new(false));
    let first = serve(BackendDriver::restarted(addr, vbd()), domain.clone(), &stop);
    let mut session = machine.attach().unwrap();
    let read = Op::Read { sector: 0, bytes: 4096 };
    session.read_at(0, &mut [0; 4096]).unwrap();
    stop.store(true, Ordering::SeqCst);
    first.join().unwrap();
    let begin = Instant::now();
    let device = format!("vbd-{}-{}", addr.front, addr.index);
    let mark = records.existing(&device, 4096).unwrap().load_u64(MAPS_REQUESTS, Ordering::Acquire);

    let queue = session.queue().unwrap();
    let slot = queue.reserve().unwrap();
    queue.start(slot, read).unwrap();
    queue.publish().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let second = serve(BackendDriver::resuming(addr, vbd()), domain.clone(), &stop);
    let mut answers = 0;
    while answers == 0 {
        assert!(begin.elapsed() < PATIENCE, "{policy}: no response");
        answers += session.answers(|_, _, status| assert_eq!(status, Status::Okay)).unwrap();
    }
    let time = begin.elapsed();
    assert_eq!(session.state(), XenbusState::Connected, "{policy}: it is the same session");
    session.queue().unwrap().release(slot);
    session.close().unwrap();
    stop.store(true, Ordering::SeqCst);
    second.join().unwrap();
    (time, mark.unwrap())
}

#[test]
fn resume_delays_first_response_until_old_mappings_are_unmapped() {
    let (time, mark) = resumed(Policy::Map);
    assert_eq!(mark, 1);
    assert!(time >= UNMAPPING, "first response after {time:?}");
    for policy in [Policy::Copy, Policy::PersistentOrMap, Policy::PersistentOrCopy] {
        assert_eq!(resumed(policy).1, 0, "{policy}: no unmap delay with persistent grants");
    }
}

#[test]
fn record_that_cannot_be_removed_is_counted() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("records");
    let records = RecordDir::open(&path).unwrap();
    std::fs::create_dir(path.join("vbd-1-51712")).unwrap();
    let machine = Machine::new(Config::default());
    let domain = machine.join(machine.driver);
    let mut server = ImageServer::new(domain, Arc::new(|| ())).recorded_in(records);
    for _ in 0..12 {
        server.end(DeviceAddr::new(BackendKind::Vbd, DomId(0), DomId(1), 51712));
    }
    let counted: Vec<_> = server.events().iter().map(|(name, log)| (*name, log.seen())).collect();
    assert_eq!(counted, [("size-unknown", 0), ("records-left", 12)]);
}
