//! The driver of a disk's backend, with a hostile frontend and arbitrary keys of the toolstack: handshake,
//! sessions, reconnections, restarts of the process.
//!
//! A step makes a bounded number of transitions and never fails for what others write. At the end nothing
//! of the guest is mapped.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_blkback::engine::mem::MemEngine;
use pvio_blkback::session::{
    self, Begin, QueueServer, Session, SessionIdentity, SessionParts, SessionSpec,
};
use pvio_blkback::vbd::VbdServer;
use pvio_blkback::{
    BlockEngine, Buf, Config, Geometry, Policy, Queue, QueueFault, QueueParts, Vbd,
};
use pvio_event_channel::EventChannel;
use pvio_fuzz::disk::SECTORS;
use pvio_fuzz::world::{Rewrite, World};
use pvio_fuzz::{Scribble, Value};
use pvio_grant_table::policy::MappingBudget;
use pvio_ring::shm::{HeapMemory, PAGE_SIZE, Region};
use pvio_sim::LocalDomain;
use pvio_sim::local::events::LocalChannel;
use pvio_sim::local::memory::LocalMapping;
use pvio_xenbus::XenbusState;
use pvio_xenbus::driver::{BackendDriver, Fault, Life, MOST_TRANSITIONS};
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr, request_removal, switch_state};
use pvio_xenbus::handshake::vbd::{FrontRequest, Protocol, ToolstackBack};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

#[derive(Arbitrary, Debug)]
struct Input {
    policy: u8,
    max_queues: bool,
    actions: Vec<Action>,
}

#[derive(Arbitrary, Debug)]
enum Action {
    Rewrite(Rewrite),
    Toolstack(Rewrite),
    /// The frontend writes a correct request, and up to three states.
    Connect {
        pages: bool,
        queues: bool,
        protocol: u8,
        states: u8,
    },
    State(u8),
    Step,
    /// The backend's queues work.
    Serve,
    Request([u8; 24]),
    Scribble(Scribble),
    Remove,
    RequestRemoval,
    Create,
    Refresh,
    Changes(u8),
    /// The backend's process dies, and another one takes over.
    Restart(bool),
}

type Served = Queue<LocalDomain, LocalChannel, MemEngine<Buf<LocalMapping>>, HeapMemory>;
type Seat = Rc<RefCell<Option<Served>>>;
type Seats = Rc<RefCell<Vec<Seat>>>;

struct Queues(Seats);

impl QueueServer<LocalDomain, HeapMemory> for Queues {
    type Running = Seat;

    fn start(
        &mut self,
        _: &str,
        parts: QueueParts<LocalDomain, LocalChannel, HeapMemory>,
    ) -> Result<Seat, Fault> {
        let engine = MemEngine::zeroed(SECTORS as usize);
        let seat = Rc::new(RefCell::new(Some(Queue::new(parts, engine))));
        self.0.borrow_mut().push(Rc::clone(&seat));
        Ok(seat)
    }

    fn fault(&mut self, seat: &mut Seat) -> Option<QueueFault> {
        let mut served = seat.borrow_mut();
        let fault = served.as_mut()?.poll(0).err()?;
        *served = None;
        Some(fault)
    }

    fn stop(&mut self, seat: &mut Seat) -> Poll<()> {
        *seat.borrow_mut() = None;
        Poll::Ready(())
    }
}

struct Server {
    domain: LocalDomain,
    seats: Seats,
    /// The in-flight record, which outlives the process.
    record: Rc<RefCell<Option<HeapMemory>>>,
    sectors: Option<u64>,
}

impl Server {
    fn record(&self, identity: &SessionIdentity, begin: Begin) -> Result<HeapMemory, Fault> {
        let mut record = self.record.borrow_mut();
        if begin == Begin::New {
            let len = identity.record_len()?;
            *record = Some(HeapMemory::pages(len.div_ceil(PAGE_SIZE)));
        }
        record.clone().ok_or_else(|| Fault::new("record-missing", "there is none"))
    }
}

impl VbdServer for Server {
    type Session = Session<LocalDomain, HeapMemory, Queues>;

    fn open(&mut self, _: &ToolstackBack) -> Result<Geometry, Fault> {
        Ok(MemEngine::<Buf<LocalMapping>>::zeroed(SECTORS as usize).geometry())
    }

    fn sectors(&mut self) -> Option<u64> {
        self.sectors
    }

    fn resumable(&mut self, identity: &SessionIdentity) -> Result<(), Fault> {
        session::maps_requests(identity, self.record(identity, Begin::Resumed)?).map(drop)
    }

    fn start(&mut self, spec: &SessionSpec, begin: Begin) -> Result<Self::Session, Fault> {
        let parts = SessionParts {
            platform: self.domain.clone(),
            record: self.record(&spec.identity, begin)?,
            flush_state: Arc::default(),
            mapping_budget: MappingBudget::unlimited(),
            stats: Vec::new(),
            queues: Queues(Rc::clone(&self.seats)),
        };
        Session::start(spec, begin, parts)
    }

    fn ready(&mut self, session: &mut Self::Session) -> Result<Poll<()>, Fault> {
        session.ready()
    }

    fn fault(&mut self, session: &mut Self::Session) -> Option<Fault> {
        session.fault()
    }

    fn resize(&mut self, session: &mut Self::Session, sectors: u64) {
        session.resize(sectors);
    }

    fn stop(&mut self, session: &mut Self::Session) -> Poll<()> {
        session.stop()
    }

    fn end(&mut self, _: DeviceAddr) {
        *self.record.borrow_mut() = None;
    }
}

fuzz_target!(|input: Input| {
    let mut world = World::new(BackendKind::Vbd);
    let seats = Seats::default();
    let record = Rc::default();
    let config = Config {
        policy: Policy::ALL[usize::from(input.policy) % 4],
        max_queues: if input.max_queues { 2 } else { 1 },
        ..Config::default()
    };
    let server = |world: &World, sectors| Server {
        domain: world.domains.back.clone(),
        seats: Rc::clone(&seats),
        record: Rc::clone(&record),
        sectors,
    };
    let mut sectors = None;
    let first = BackendDriver::new(world.addr, Vbd::with(server(&world, None), config));
    let mut driver = Some(first);
    let front = world.addr.frontend_path();
    let mut produced = 0_u32;

    for action in input.actions.into_iter().take(100) {
        match action {
            Action::Rewrite(rewrite) => world.rewrite(&rewrite, false),
            Action::Toolstack(rewrite) => world.rewrite(&rewrite, true),
            Action::Connect { pages, queues, protocol, states } => {
                let queue = |first: usize| pvio_xenbus::handshake::vbd::Queue {
                    ring_refs: world.grefs[first..first + 1 + usize::from(pages)]
                        .iter()
                        .map(|g| g.0)
                        .collect(),
                    event_channel: world.channels[first / 2].port().0,
                };
                let list = if queues { vec![queue(0), queue(2)] } else { vec![queue(0)] };
                let protocol = [None, Some(Protocol::X86_64), Some(Protocol::X86_32)]
                    [usize::from(protocol % 3)];
                let request = FrontRequest { protocol, persistent: states & 8 != 0, queues: list };
                // The indices of new rings.
                for page in 0..4 {
                    for (at, value) in [(0, 0), (1, 1), (2, 0), (3, 1)] {
                        let scribble = Scribble::Word(page * 1024 + at, Value::Any(value));
                        scribble.write(&world.pages);
                    }
                }
                produced = 0;
                let _ = request.write(&mut world.front, &front);
                let list =
                    [XenbusState::Initialising, XenbusState::Initialised, XenbusState::Connected];
                for (at, state) in list.into_iter().enumerate() {
                    if states >> at & 1 == 1 {
                        let _ = switch_state(&mut world.front, &front, state);
                    }
                }
            }
            Action::State(state) => {
                if let Some(state) =
                    XenbusState::ALL.get(usize::from(state) % XenbusState::ALL.len())
                {
                    let _ = switch_state(&mut world.front, &front, *state);
                }
            }
            Action::Step => step(&mut driver, &mut world),
            Action::Serve => {
                for seat in &*seats.borrow() {
                    let mut served = seat.borrow_mut();
                    if let Some(queue) = &mut *served {
                        let _ = queue.poll(32).is_ok_and(|_| queue.final_check().is_ok());
                    }
                }
            }
            Action::Request(bytes) => {
                let at = 64 + produced as usize % 32 * 112;
                let _ = world.pages.write_bytes(at, &bytes);
                produced = produced.wrapping_add(1);
                Scribble::Index(0, Value::Any(produced)).write(&world.pages);
                world.channels.iter().for_each(|channel| channel.notify().expect("a live domain"));
            }
            Action::Scribble(scribble) => scribble.write(&world.pages),
            Action::Remove => world.remove(),
            Action::RequestRemoval => drop(request_removal(&mut world.dom0, world.addr)),
            Action::Create => {
                world.create();
                if driver.is_none() {
                    let vbd = Vbd::with(server(&world, sectors), config);
                    driver = Some(BackendDriver::new(world.addr, vbd));
                }
            }
            Action::Refresh => {
                if let Some(driver) = &mut driver {
                    let _ = driver.refresh(&mut world.back);
                }
            }
            Action::Changes(size) => {
                sectors = Some(u64::from(size));
                if let Some(driver) = &mut driver {
                    let _ = driver.check_for_changes(&mut world.back);
                }
            }
            Action::Restart(takes_over) => {
                if driver.take().is_some() {
                    let left = world.state(true).unwrap_or(XenbusState::Unknown);
                    let vbd = Vbd::with(server(&world, sectors), config);
                    driver = Some(if takes_over {
                        BackendDriver::taking_over(world.addr, vbd, left)
                    } else {
                        BackendDriver::restarted(world.addr, vbd)
                    });
                }
            }
        }
        // Stopped queues.
        seats.borrow_mut().retain(|seat| Rc::strong_count(seat) > 1);
        assert!(seats.borrow().len() <= 2, "more queues than are offered");
    }
    drop(driver);
    seats.borrow_mut().clear();
    world.assert_released();
});

/// Steps the driver until nothing is left to do.
fn step(driver: &mut Option<BackendDriver<Vbd<Server>>>, world: &mut World) {
    for round in 0.. {
        let Some(stepped) = driver else { return };
        let before = stepped.transitions();
        let life = stepped.step(&mut world.back).expect("xenstore works");
        let made = stepped.transitions() - before;
        assert!(made <= u64::from(MOST_TRANSITIONS), "{made} transitions in a step");
        match life {
            Life::Gone => {
                *driver = None;
                world.domains.assert_backend_is_empty();
                return;
            }
            Life::Alive => return,
            Life::More => assert!(round < 100, "a driver is never idle"),
        }
    }
}
