//! Crash tests: a backend process is killed at any store and any call, and successors take over.
//!
//! A run is repeated for each point at which the process can end: each store to a ring, to the
//! record or to a mapped page, and each call to engine, grants and event channel. A successor then
//! resumes from ring and record in their current state. It must execute all requests without a
//! response, and every request must be completed exactly once.

mod storage;

use crate::rig::{BACK, FRONT, Pages};
use pvio_blkback::{BlockEngine, DataPath, DiskState, Queue, QueueParts, QueueRecord, Stats};
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{Access, GrantMapper, GrantRef, Granter};
use pvio_ring::inflight::{Record, RequestLog, SessionKey};
use pvio_ring::proto::blkif::{Abi, Response, Segment, Status};
use pvio_ring::shm::{HeapMemory, PAGE_SIZE, Region};
use pvio_ring::{BackRing, FrontRing, RingLayout};
use pvio_sim::kill::{Mortal, run};
use pvio_sim::local::events::LocalChannel;
use pvio_sim::{LocalDomain, LocalMachine};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::Arc;
use storage::{AREA, AREAS, Disk, Engine, Waiting};

type Driver = Mortal<LocalDomain>;
type Backend = Queue<Driver, Mortal<LocalChannel>, Engine, Mortal<HeapMemory>>;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Write,
    Read,
    Flush,
    Discard,
    Barrier,
    IndirectWrite,
    IndirectRead,
    UnknownOperation,
    NoSegments,
    OutOfRange,
}

const KINDS: [Kind; 12] = {
    use Kind::*;
    [
        Write,
        Read,
        Flush,
        Write,
        Barrier,
        IndirectRead,
        UnknownOperation,
        IndirectWrite,
        Discard,
        NoSegments,
        Read,
        OutOfRange,
    ]
};

/// Returns the data that a read returns, or a write writes.
fn content(area: u64, written: bool) -> Vec<u8> {
    let bytes =
        (0..PAGE_SIZE as u64).map(|i| (i / 512 + area * 5 + u64::from(written) * 128) as u8);
    bytes.collect()
}

struct Request {
    kind: Kind,
    area: u64,
    page: Pages,
    gref: GrantRef,
    /// The page of its segments, if it is indirect.
    table: Option<(Pages, GrantRef)>,
}

struct Guest {
    ring: FrontRing<Pages>,
    ring_grefs: Vec<GrantRef>,
    requests: Vec<Request>,
    made: usize,
    /// By id.
    open: HashMap<u64, usize>,
    failed: Vec<usize>,
    abi: Abi,
}

/// Returns ids as guests use them: some have the bytes of operation codes.
fn id(number: usize) -> u64 {
    [1, 3, 5, 6, 7, 0x100, 0x101][number % 7] + 0x1000 * number as u64
}

impl Guest {
    fn new(domain: &LocalDomain, abi: Abi, pages: usize, areas: std::ops::Range<u64>) -> Self {
        let granted = |count| {
            let memory = domain.alloc_pages(count).unwrap();
            let grant = |page| domain.grant(BACK, &memory, page, Access::ReadWrite).unwrap();
            let grefs: Vec<_> = (0..count).map(grant).collect();
            (memory, grefs)
        };
        let (memory, ring_grefs) = granted(pages);
        let ring = FrontRing::init(memory, abi.slot_size()).unwrap();
        let requests = areas.map(|area| {
            let kind = KINDS[area as usize % KINDS.len()];
            let (page, grefs) = granted(1);
            let written = matches!(kind, Kind::Write | Kind::Barrier | Kind::IndirectWrite);
            let bytes = if written { content(area, true) } else { vec![0; PAGE_SIZE] };
            page.write_bytes(0, &bytes).unwrap();
            let indirect = matches!(kind, Kind::IndirectWrite | Kind::IndirectRead);
            let table = indirect.then(|| {
                let (table, table_grefs) = granted(1);
                let segment = Segment { gref: grefs[0], first: 0, last: 7 };
                table.write_bytes(0, &segment.write()).unwrap();
                (table, table_grefs[0])
            });
            Request { kind, area, page, gref: grefs[0], table }
        });
        let requests = requests.collect();
        Self { ring, ring_grefs, requests, made: 0, open: HashMap::new(), failed: vec![], abi }
    }

    /// Submits some requests.
    fn ask(&mut self, disk: &mut Disk) {
        for _ in 0..5 {
            let Some(request) = self.requests.get(self.made) else { return };
            let mut bytes = request.encoded(id(self.made));
            if self.abi == Abi::X86_32 {
                bytes.drain(4..8);
            }
            bytes.resize(self.abi.slot_size(), 0xee);
            if self.ring.push(&bytes).is_err() {
                return;
            }
            self.open.insert(id(self.made), self.made);
            disk.open.insert(request.area);
            disk.flushes += usize::from(matches!(request.kind, Kind::Flush | Kind::Barrier));
            self.made += 1;
            let _ = self.ring.publish();
        }
    }

    /// Takes the visible responses.
    fn take(&mut self, disk: &mut Disk, may_fail: bool) {
        while let Some(mut slot) = self.ring.pop().unwrap() {
            let response = Response::read(&mut slot).unwrap();
            let number = self.open.remove(&response.id);
            let number = number.unwrap_or_else(|| panic!("{response:?} without a request"));
            let request = &self.requests[number];
            disk.open.remove(&request.area);
            disk.flushes -= usize::from(matches!(request.kind, Kind::Flush | Kind::Barrier));
            let expected = match request.kind {
                Kind::UnknownOperation => Status::NotSupported,
                Kind::NoSegments | Kind::OutOfRange => Status::Error,
                _ => Status::Okay,
            };
            if may_fail && response.status == Status::Error {
                self.failed.push(number);
                continue;
            }
            assert_eq!(response.status, expected, "{:?}", request.kind);
            request.check(disk);
        }
    }
}

impl Request {
    fn encoded(&self, id: u64) -> Vec<u8> {
        let (op, count) = match self.kind {
            Kind::Read | Kind::OutOfRange => (0, 1),
            Kind::Write => (1, 1),
            Kind::NoSegments => (1, 0),
            Kind::Barrier => (2, 1),
            Kind::Flush => (3, 0),
            Kind::Discard => (5, 0),
            Kind::IndirectRead => (6, 0),
            Kind::IndirectWrite => (6, 1),
            Kind::UnknownOperation => (0x77, 1),
        };
        let mut bytes = vec![op, count, 0, 0, 0, 0, 0, 0];
        let sector = match self.kind {
            Kind::OutOfRange => AREAS * AREA,
            _ => self.area * AREA,
        };
        bytes.extend(id.to_le_bytes());
        bytes.extend(sector.to_le_bytes());
        match &self.table {
            Some((_, gref)) => {
                bytes[2] = 1;
                bytes.extend([0; 4]);
                bytes.extend(gref.0.to_le_bytes());
            }
            None if self.kind == Kind::Discard => bytes.extend(8_u64.to_le_bytes()),
            None => {
                bytes.extend(self.gref.0.to_le_bytes());
                bytes.extend([0, 7, 0, 0]);
            }
        }
        bytes
    }

    /// Checks the effect of a completed request.
    fn check(&self, disk: &Disk) {
        let (area, mut page) = (disk.area(self.area), vec![0; PAGE_SIZE]);
        self.page.read_bytes(0, &mut page).unwrap();
        match self.kind {
            Kind::Read | Kind::IndirectRead => assert!(page == content(self.area, false), "read"),
            Kind::Write | Kind::Barrier | Kind::IndirectWrite => {
                assert!(area[..PAGE_SIZE] == content(self.area, true), "{:?}", self.kind);
            }
            Kind::Discard => assert!(area[..PAGE_SIZE].iter().all(|b| *b == 0)),
            _ => assert!(area[..PAGE_SIZE] == content(self.area, false), "{:?}", self.kind),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Setup {
    path: DataPath,
    abi: Abi,
    pages: usize,
    queues: usize,
    requests: u64,
}

struct World {
    setup: Setup,
    guest: LocalDomain,
    driver: Driver,
    guests: Vec<Guest>,
    disk: Rc<RefCell<Disk>>,
    waiting: Vec<Waiting>,
    record: Mortal<HeapMemory>,
    key: SessionKey,
    stats: Arc<Stats>,
}

impl World {
    fn new(setup: Setup) -> Self {
        let machine = LocalMachine::new();
        let (guest, driver) = (machine.domain(FRONT), Mortal(machine.domain(BACK)));
        let per_queue = |q: u64| q * setup.requests..(q + 1) * setup.requests;
        let areas = (0..setup.queues as u64).map(per_queue);
        let guests = areas.map(|areas| Guest::new(&guest, setup.abi, setup.pages, areas)).collect();
        let mut key = SessionKey::new();
        let layout = RingLayout::new(setup.pages * PAGE_SIZE, setup.abi.slot_size()).unwrap();
        for _ in 0..setup.queues {
            key.section(RequestLog::<HeapMemory>::section_len(layout));
        }
        let mut bytes = Vec::new();
        for area in 0..AREAS {
            bytes.extend(content(area, false));
            bytes.resize((area + 1) as usize * AREA as usize * 512, 0xcc);
        }
        let (open, executed) = (HashSet::new(), HashSet::new());
        let disk = Rc::new(RefCell::new(Disk { bytes, open, flushes: 0, executed, stuck: false }));
        let record = Mortal(HeapMemory::pages(key.record_len().div_ceil(PAGE_SIZE)));
        let (waiting, stats) = (vec![], Arc::default());
        Self { setup, guest, driver, guests, disk, waiting, record, key, stats }
    }

    /// Starts a server process, the first one or a successor.
    fn server(&mut self, resumed: bool) -> Vec<Backend> {
        let Setup { abi, path, .. } = self.setup;
        let open = if resumed { Record::open } else { Record::create };
        let record = open(self.record.clone(), self.key.clone()).unwrap();
        let mut queues = Vec::new();
        self.waiting.clear();
        for (index, guest) in self.guests.iter().enumerate() {
            let end = self.guest.alloc_unbound(BACK).unwrap();
            let channel = self.driver.bind_interdomain(FRONT, end.port()).unwrap();
            std::mem::forget(end);
            let ring = self.driver.map(FRONT, &guest.ring_grefs, Access::ReadWrite).unwrap();
            let mut ring = BackRing::attach(ring, abi.slot_size()).unwrap();
            let record = match resumed {
                true => QueueRecord::resume(&record, index, &mut ring, abi, true).unwrap(),
                false => QueueRecord::new(&record, index, &ring, abi).unwrap(),
            };
            let waiting = Waiting::default();
            self.waiting.push(waiting.clone());
            let engine = Engine { disk: self.disk.clone(), waiting, turn: 0 };
            let parts = QueueParts {
                frontend: FRONT,
                disk: Arc::new(DiskState::new(engine.geometry())),
                grants: self.driver.clone(),
                data_path: path,
                ring,
                channel,
                abi,
                max_indirect_segments: 16,
                record,
                stats: self.stats.clone(),
            };
            queues.push(Queue::new(parts, engine));
        }
        if !resumed {
            record.commit();
        }
        queues
    }

    /// Runs guest and server until all requests are completed, or the process ends.
    fn run(&mut self, server: &mut [Backend], deaths: usize) {
        for turn in 0.. {
            assert!(turn < 10_000, "requests without a response: {:?}", self.guests[0].open);
            for guest in &mut self.guests {
                let disk = &mut self.disk.borrow_mut();
                // A guest that sleeps sees several batches of responses together.
                if turn % 3 != 1 {
                    guest.take(disk, deaths > 1);
                }
                guest.ask(disk);
            }
            let is_over =
                |guest: &Guest| guest.made == guest.requests.len() && guest.open.is_empty();
            if self.guests.iter().all(is_over) {
                return;
            }
            for queue in &mut *server {
                queue.poll(4).unwrap();
            }
        }
    }

    /// Kills one process at each of these points; the last process ends regularly. Returns the
    /// number of points in its run.
    fn live(&mut self, kills: &[usize]) -> usize {
        for (deaths, kill_at) in kills.iter().chain([&usize::MAX]).enumerate() {
            // A session whose record was never completed was never served.
            let mut server = (deaths == 0).then(|| self.server(false));
            let (outcome, moments) = run(*kill_at, || {
                let server = server.get_or_insert_with(|| self.server(true));
                self.run(server, deaths);
            });
            if outcome.is_some() {
                for guest in &self.guests {
                    let done = guest.requests.iter().enumerate();
                    let done = done.filter(|(n, _)| !guest.failed.contains(n));
                    done.for_each(|(_, request)| request.check(&self.disk.borrow()));
                }
                drop(server);
                return moments;
            }
            // The kernel may or may not complete the operations that it received.
            std::mem::forget(server);
            for (_, io, segments) in self.waiting.iter().flat_map(|w| w.take()) {
                if (kill_at + deaths) % 2 == 0 {
                    self.disk.borrow_mut().execute(io, &segments);
                }
                std::mem::forget(segments);
            }
            let mut disk = self.disk.borrow_mut();
            disk.executed.clear();
            self.guests.iter_mut().for_each(|guest| guest.take(&mut disk, deaths > 0));
        }
        unreachable!("the last process is not killed");
    }
}

/// Kills a process at every point of a run.
fn at_every_moment(setup: Setup) {
    let moments = World::new(setup).live(&[]);
    assert!(moments > 200, "{setup:?}: {moments}");
    for kill_at in 0..moments {
        let first = catch_unwind(AssertUnwindSafe(|| World::new(setup).live(&[kill_at])));
        first.unwrap_or_else(|cause| {
            println!("{setup:?}, killed at {kill_at} of {moments}");
            resume_unwind(cause)
        });
    }
}

const PLAIN: Setup =
    Setup { path: DataPath::Copy, abi: Abi::X86_64, pages: 1, queues: 1, requests: 34 };

#[test]
fn server_killed_at_any_step_is_resumed_on_every_data_path() {
    for path in DataPath::ALL {
        at_every_moment(Setup { path, ..PLAIN });
    }
}

#[test]
fn server_killed_at_any_step_is_resumed_with_32_bit_layout_and_large_ring() {
    at_every_moment(Setup { abi: Abi::X86_32, ..PLAIN });
    at_every_moment(Setup { pages: 2, requests: 72, ..PLAIN });
}

#[test]
fn multi_queue_server_killed_at_any_step_is_resumed() {
    at_every_moment(Setup { queues: 3, requests: 14, path: DataPath::Map, ..PLAIN });
}

#[test]
fn successor_killed_at_any_step_is_resumed() {
    let setup = Setup { requests: 13, ..PLAIN };
    let moments = World::new(setup).live(&[]);
    for first in (0..moments).step_by(9) {
        // The second process is killed while it takes over, or later.
        for second in (0..30).chain((30..moments).step_by(23)) {
            let twice = catch_unwind(AssertUnwindSafe(|| World::new(setup).live(&[first, second])));
            if let Err(cause) = twice {
                println!("killed at {first}, then at {second}, of {moments}");
                resume_unwind(cause);
            }
        }
    }
}

#[test]
fn request_that_crashes_two_processes_gets_error_response() {
    let mut world = World::new(Setup { requests: 1, ..PLAIN });
    world.disk.borrow_mut().stuck = true;
    world.guests[0].ask(&mut world.disk.borrow_mut());
    for deaths in 0..3 {
        let mut server = world.server(deaths > 0);
        server[0].poll(32).unwrap();
        let waiting = world.waiting[0].borrow().len();
        assert_eq!(waiting, usize::from(deaths < 2), "after {deaths}");
        world.disk.borrow_mut().executed.clear();
        std::mem::forget(server);
    }
    let guest = &mut world.guests[0];
    let mut response = guest.ring.pop().unwrap().map(|mut slot| Response::read(&mut slot).unwrap());
    let response = response.take().expect("an answer");
    assert_eq!((response.id, response.op, response.status), (id(0), 1, Status::Error));
}

#[test]
fn full_ring_in_flight_is_resubmitted_on_resume() {
    let mut world = World::new(Setup { requests: 96, ..PLAIN });
    let waits = |r: &Request| matches!(r.kind, Kind::Read | Kind::Write | Kind::Flush);
    world.guests[0].requests.retain(waits);
    world.disk.borrow_mut().stuck = true;
    (0..7).for_each(|_| world.guests[0].ask(&mut world.disk.borrow_mut()));
    for resumed in [false, true] {
        world.disk.borrow_mut().executed.clear();
        let mut server = world.server(resumed);
        server[0].poll(32).unwrap();
        assert_eq!(world.waiting[0].borrow().len(), 32, "every slot of the ring");
        if resumed {
            world.disk.borrow_mut().stuck = false;
            world.run(&mut server, 1);
        } else {
            std::mem::forget(server);
        }
    }
}
