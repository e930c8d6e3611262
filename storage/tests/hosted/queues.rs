//! Several queues of one disk, with a frontend that is part of the test.

use crate::machine::{Machine, PATIENCE, image, on_every_path};
use pvio_blkback::{Config, Policy};
use pvio_blkfront::{Op, Queue, Shape};
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{Access, Granter};
use pvio_hosted::Domain;
use pvio_ring::FrontRing;
use pvio_ring::proto::blkif::{Abi, Status};
use pvio_ring::shm::Region;
use pvio_xenbus::XenbusState;
use pvio_xenbus::client::Client;
use pvio_xenbus::handshake::common::{DeviceAddr, read_error, read_state, switch_state};
use pvio_xenbus::handshake::vbd::{BackOffer, FrontRequest, Mode, Protocol, Queue as QueueKeys};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const SHAPE: Shape = Shape { ring_pages: 2, pages_per_slot: 11 };

/// Waits until the backend is in this state.
fn backend_is(xs: &mut Client, addr: DeviceAddr, state: XenbusState) {
    let begin = Instant::now();
    loop {
        let now = read_state(xs, &addr.backend_path()).unwrap();
        if now == state {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "backend state is {now}, expected {state}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for the backend to close the disk, and returns the reason. The backend writes the reason
/// first, and is Closed when nothing is mapped any more.
fn backend_gives_up(machine: &Machine) -> String {
    let (mut xs, begin) = (machine.xenstore(), Instant::now());
    loop {
        if let Some(why) = read_error(&mut xs, &machine.addr().backend_path()).unwrap() {
            backend_is(&mut xs, machine.addr(), XenbusState::Closed);
            return why;
        }
        assert!(begin.elapsed() < PATIENCE, "backend was not closed");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Creates queues for a disk whose backend has advertised its features, and writes the request for
/// them.
fn queues(guest: &Domain, xs: &mut Client, machine: &Machine, n: usize) -> Vec<Queue<Domain>> {
    let addr = machine.addr();
    backend_is(xs, addr, XenbusState::InitWait);
    let offer = BackOffer::read(xs, &addr.backend_path()).unwrap();
    assert_eq!((offer.max_queues, offer.max_ring_page_order), (Some(4), Some(4)));
    (0..n)
        .map(|_| Queue::with_shape(guest.clone(), machine.driver, 51712, SHAPE).unwrap())
        .collect()
}

fn ask(xs: &mut Client, addr: DeviceAddr, queues: Vec<QueueKeys>) {
    let (protocol, persistent) = (Some(Protocol::X86_64), true);
    let base = addr.frontend_path();
    FrontRequest { protocol, persistent, queues }.write(xs, &base).unwrap();
    switch_state(xs, &base, XenbusState::Initialised).unwrap();
}

fn keys(queue: &Queue<Domain>) -> QueueKeys {
    QueueKeys {
        ring_refs: queue.ring_grefs().iter().map(|gref| gref.0).collect(),
        event_channel: queue.channel().port().0,
    }
}

fn four_queues(policy: Config) -> Machine {
    Machine::new(Config { max_queues: 4, ..policy })
}

/// Writes blocks and reads them back. Returns the number of requests.
fn work(queue: &mut Queue<Domain>, number: u64) -> u64 {
    let mut requests = 0;
    for round in 0..50_u64 {
        for write in [true, false] {
            let slot = queue.reserve().unwrap();
            let (sector, bytes) = ((number * 50 + round) * 16, 8192);
            let content = [(number * 50 + round) as u8; 8192];
            let op = if write { Op::Write { sector, bytes } } else { Op::Read { sector, bytes } };
            queue.fill(slot, 0, if write { &content } else { &[0; 8192] }).unwrap();
            queue.start(slot, op).unwrap();
            queue.publish().unwrap();
            while queue.poll(|_, _, status| assert_eq!(status, Status::Okay)).unwrap() == 0 {
                if !queue.final_check().unwrap() {
                    queue.channel().wait(Some(PATIENCE)).unwrap();
                    queue.channel().take().unwrap();
                }
            }
            let mut seen = [0; 8192];
            queue.fetch(slot, 0, &mut seen).unwrap();
            assert_eq!(seen, content, "queue {number}, round {round}");
            queue.release(slot);
            requests += 1;
        }
    }
    requests
}

#[test]
fn queues_of_disk_are_served_concurrently() {
    on_every_path(side_by_side);
}

fn side_by_side(config: Config) {
    let machine = four_queues(config);
    let file = image(16 << 20);
    machine.add_disk(file.path(), Mode::ReadWrite);
    let driver = machine.serve();
    let guest = machine.join(machine.guest);
    let mut xs = guest.xenstore().unwrap();
    let mut queues = queues(&guest, &mut xs, &machine, 3);
    ask(&mut xs, machine.addr(), queues.iter().map(keys).collect());
    backend_is(&mut xs, machine.addr(), XenbusState::Connected);
    std::thread::scope(|scope| {
        for (n, queue) in queues.iter_mut().enumerate() {
            scope.spawn(move || assert_eq!(work(queue, n as u64), 100));
        }
    });
    assert_eq!((driver.stats.reads.get(), driver.stats.writes.get()), (50, 50), "of the first");
    let base = machine.addr().frontend_path();
    switch_state(&mut xs, &base, XenbusState::Closing).unwrap();
    switch_state(&mut xs, &base, XenbusState::Closed).unwrap();
    backend_is(&mut xs, machine.addr(), XenbusState::Closed);
    for queue in queues {
        assert!(queue.dismantle().is_ok(), "all pages are returned to the guest");
    }
    driver.end();
}

#[test]
fn failed_connection_of_one_queue_releases_all_queues() {
    for what in ["event channel", "ring"] {
        let machine = four_queues(Config { policy: Policy::PersistentOrCopy, ..Config::default() });
        let file = image(1 << 20);
        machine.add_disk(file.path(), Mode::ReadWrite);
        let driver = machine.serve();
        let guest = machine.join(machine.guest);
        let mut xs = guest.xenstore().unwrap();
        let queues = queues(&guest, &mut xs, &machine, 4);
        let mut all: Vec<_> = queues.iter().map(keys).collect();
        match what {
            "ring" => all[3].ring_refs[1] = 30_000,
            _ => all[3].event_channel = 900,
        }
        ask(&mut xs, machine.addr(), all);
        let why = backend_gives_up(&machine);
        assert!(why.contains(what), "{why}");
        for queue in queues {
            assert!(queue.dismantle().is_ok(), "page is still mapped");
        }
        driver.end();
    }
}

#[test]
fn fault_in_one_queue_closes_disk_with_reason() {
    let machine = four_queues(Config::default());
    let file = image(1 << 20);
    machine.add_disk(file.path(), Mode::ReadWrite);
    let driver = machine.serve();
    let guest = machine.join(machine.guest);
    let mut xs = guest.xenstore().unwrap();
    let mut queues = queues(&guest, &mut xs, &machine, 1);
    // The second queue has a ring, but a frontend that violates the protocol.
    let (back, slot_size) = (machine.driver, Abi::X86_64.slot_size());
    let pages = guest.alloc_pages(2).unwrap();
    let grant = |page| guest.grant(back, &pages, page, Access::ReadWrite).unwrap();
    let ring_refs: Vec<_> = (0..2).map(grant).collect();
    FrontRing::init(pages.clone(), slot_size).unwrap();
    let channel = guest.alloc_unbound(back).unwrap();
    let bad = QueueKeys {
        ring_refs: ring_refs.iter().map(|gref| gref.0).collect(),
        event_channel: channel.port().0,
    };
    ask(&mut xs, machine.addr(), vec![keys(&queues[0]), bad]);
    backend_is(&mut xs, machine.addr(), XenbusState::Connected);
    work(&mut queues[0], 0);
    assert!(pages.store_u32(0, 1000, Ordering::SeqCst));
    channel.notify().unwrap();
    let why = backend_gives_up(&machine);
    assert!(why.contains("ring-producer-overflow"), "{why}");
    assert!(queues.remove(0).dismantle().is_ok(), "page is still mapped");
    for gref in ring_refs {
        assert!(guest.end_access(gref).is_ok(), "page is still mapped");
    }
    driver.end();
}
