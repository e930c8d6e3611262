//! The driver of a NIC's backend, with a hostile frontend and arbitrary keys of the toolstack: handshake,
//! sessions, reconnections, restarts of the process.
//!
//! A step makes a bounded number of transitions and never fails for what others write. At the end nothing
//! of the guest is mapped.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_event_channel::EventChannel;
use pvio_fuzz::world::{Rewrite, World};
use pvio_fuzz::{Scribble, Value};
use pvio_netback::port::memory::{MemoryPort, loopback};
use pvio_netback::queue::Policy;
use pvio_netback::session::{
    Begin, QueueServer, SessionConfig, SessionParts, check_record, invalidate_record,
};
use pvio_netback::vif::{Attach, VifServer};
use pvio_netback::{Queue, Session, SessionSpec, Stats, Vif};
use pvio_ring::shm::{HeapMemory, PAGE_SIZE, Region};
use pvio_sim::LocalDomain;
use pvio_xenbus::XenbusState;
use pvio_xenbus::driver::{BackendDriver, Fault, Life, MOST_TRANSITIONS};
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr, request_removal, switch_state};
use pvio_xenbus::handshake::vif::{
    ControlRing, EventChannels, FrontRequest, ToolstackBack, VifRate,
};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

#[derive(Arbitrary, Debug)]
struct Input {
    map: bool,
    max_queues: bool,
    actions: Vec<Action>,
}

#[derive(Arbitrary, Debug)]
enum Action {
    Rewrite(Rewrite),
    Toolstack(Rewrite),
    /// The frontend writes a correct request, and up to three states.
    Connect {
        features: u8,
        control: bool,
        split: bool,
        states: u8,
    },
    State(u8),
    Step,
    /// The backend's queues work.
    Serve,
    /// A slot of one of the rings.
    Request(bool, [u8; 12]),
    Scribble(Scribble),
    Remove,
    RequestRemoval,
    Create,
    Refresh,
    Changes,
    /// The backend's process dies, and another one takes over.
    Restart(bool),
}

struct Served {
    queue: Queue<LocalDomain, Box<[u8]>, HeapMemory>,
    port: MemoryPort,
}

type Seat = Rc<RefCell<Option<Served>>>;
type Seats = Rc<RefCell<Vec<Seat>>>;

struct Queues(Seats);

/// A queue, which ends when this is dropped.
struct Running(Seat);

impl Drop for Running {
    fn drop(&mut self) {
        *self.0.borrow_mut() = None;
    }
}

impl QueueServer<LocalDomain, HeapMemory> for Queues {
    type Buf = Box<[u8]>;
    type Running = Running;

    fn begin(&mut self, _: &SessionConfig) -> Result<(), Fault> {
        Ok(())
    }

    fn start(
        &mut self,
        _: usize,
        _: &str,
        queue: Queue<LocalDomain, Box<[u8]>, HeapMemory>,
    ) -> Result<Running, Fault> {
        let seat = Rc::new(RefCell::new(Some(Served { queue, port: loopback(4) })));
        self.0.borrow_mut().push(Rc::clone(&seat));
        Ok(Running(seat))
    }

    fn fault(&mut self, running: &mut Running) -> Option<Fault> {
        let mut served = running.0.borrow_mut();
        let Served { queue, port } = served.as_mut()?;
        queue.poll(port, 0).err()?;
        *served = None;
        Some(Fault::new("queue", "the queue has ended"))
    }
}

struct Server {
    domain: LocalDomain,
    seats: Seats,
    /// The in-flight record, which outlives the process.
    record: Rc<RefCell<Option<HeapMemory>>>,
    /// The session that was started last.
    session: Option<SessionSpec>,
    policy: Policy,
    stats: Vec<Arc<Stats>>,
}

impl Server {
    fn record(&self, spec: &SessionSpec, begin: Begin) -> Result<HeapMemory, Fault> {
        let mut record = self.record.borrow_mut();
        if begin == Begin::New {
            *record = Some(HeapMemory::pages(spec.record_len().div_ceil(PAGE_SIZE)));
        }
        record.clone().ok_or_else(|| Fault::new("record-missing", "there is none"))
    }
}

impl VifServer for Server {
    type Session = Session<LocalDomain, HeapMemory, Queues>;

    fn stats(&self) -> &[Arc<Stats>] {
        &self.stats
    }

    fn max_queues(&self) -> u32 {
        self.stats.len() as u32
    }

    fn policy(&self) -> Policy {
        self.policy
    }

    fn open(&mut self, _: &ToolstackBack, _: Attach) -> Result<(), Fault> {
        Ok(())
    }

    fn resumable(&mut self, spec: &SessionSpec) -> Result<(), Fault> {
        check_record(self.record(spec, Begin::Resumed)?, spec)
    }

    fn start(&mut self, spec: &SessionSpec, begin: Begin) -> Result<Self::Session, Fault> {
        self.session = Some(spec.clone());
        let mut stats = self.stats.clone();
        stats.resize_with(spec.queues.len().max(stats.len()), Arc::default);
        let parts = SessionParts {
            platform: self.domain.clone(),
            record: self.record(spec, begin)?,
            limit: Arc::default(),
            stats,
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

    fn stop(&mut self, session: &mut Self::Session) -> Poll<()> {
        session.stop()
    }

    fn end(&mut self, _: DeviceAddr) {
        if let (Some(spec), Some(record)) = (self.session.take(), self.record.take()) {
            invalidate_record(record, &spec);
        }
    }

    fn set_rate(&mut self, session: &mut Self::Session, rate: Option<VifRate>) {
        session.set_rate(rate);
    }

    fn filter_groups(&mut self, session: &mut Self::Session, chosen: bool) {
        session.filter_groups(chosen);
    }

    fn set_headroom(&mut self, session: &mut Self::Session, bytes: u16) {
        session.set_headroom(bytes);
    }
}

fuzz_target!(|input: Input| {
    let mut world = World::new(BackendKind::Vif);
    let seats = Seats::default();
    let record = Rc::default();
    let vif = |world: &World| {
        Vif::new(Server {
            domain: world.domains.back.clone(),
            seats: Rc::clone(&seats),
            record: Rc::clone(&record),
            session: None,
            policy: if input.map { Policy::Map } else { Policy::Copy },
            stats: (0..if input.max_queues { 2 } else { 1 }).map(|_| Arc::default()).collect(),
        })
    };
    let mut driver = Some(BackendDriver::new(world.addr, vif(&world)));
    let front = world.addr.frontend_path();
    let mut produced = [0_u32; 2];

    for action in input.actions.into_iter().take(100) {
        match action {
            Action::Rewrite(rewrite) => world.rewrite(&rewrite, false),
            Action::Toolstack(rewrite) => world.rewrite(&rewrite, true),
            Action::Connect { features, control, split, states } => {
                let port = |at: usize| world.channels[at].port().0;
                let events = if split {
                    EventChannels::Split { tx: port(0), rx: port(1) }
                } else {
                    EventChannels::Shared(port(0))
                };
                let (tx_ring_ref, rx_ring_ref) = (world.grefs[0].0, world.grefs[1].0);
                let queue = pvio_xenbus::handshake::vif::Queue { tx_ring_ref, rx_ring_ref, events };
                let bit = |at: u8| features >> at & 1 == 1;
                let request = FrontRequest {
                    rx_notify: bit(0),
                    sg: bit(1),
                    gso_tcpv4: bit(2),
                    gso_tcpv6: bit(3),
                    queues: vec![queue],
                    ctrl: control.then(|| ControlRing {
                        ring_ref: world.grefs[2].0,
                        event_channel: port(2),
                    }),
                    ..FrontRequest::default()
                };
                // The indices of new rings.
                for page in 0..3 {
                    for (at, value) in [(0, 0), (1, 1), (2, 0), (3, 1)] {
                        Scribble::Word(page * 1024 + at, Value::Any(value)).write(&world.pages);
                    }
                }
                produced = [0; 2];
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
                let state = XenbusState::ALL[usize::from(state) % XenbusState::ALL.len()];
                let _ = switch_state(&mut world.front, &front, state);
            }
            Action::Step => step(&mut driver, &mut world),
            Action::Serve => {
                for seat in &*seats.borrow() {
                    if let Some(Served { queue, port }) = &mut *seat.borrow_mut() {
                        let _ = queue.take_events().is_ok() && queue.poll(port, 32).is_ok();
                        let _ = queue.final_check();
                    }
                }
            }
            Action::Request(rx, bytes) => {
                let (page, size) = if rx { (1, 8) } else { (0, 12) };
                let at = page * PAGE_SIZE + 64 + produced[page] as usize % 256 * size;
                world.pages.write_bytes(at, &bytes[..size]).expect("inside the page");
                produced[page] = produced[page].wrapping_add(1);
                Scribble::Word(page as u16 * 1024, Value::Any(produced[page])).write(&world.pages);
                world.channels.iter().for_each(|channel| channel.notify().expect("a live domain"));
            }
            Action::Scribble(scribble) => scribble.write(&world.pages),
            Action::Remove => world.remove(),
            Action::RequestRemoval => drop(request_removal(&mut world.dom0, world.addr)),
            Action::Create => {
                world.create();
                if driver.is_none() {
                    driver = Some(BackendDriver::new(world.addr, vif(&world)));
                }
            }
            Action::Refresh => {
                if let Some(driver) = &mut driver {
                    let _ = driver.refresh(&mut world.back);
                }
            }
            Action::Changes => {
                if let Some(driver) = &mut driver {
                    let _ = driver.check_for_changes(&mut world.back);
                }
            }
            Action::Restart(takes_over) => {
                if driver.take().is_some() {
                    let left = world.state(true).unwrap_or(XenbusState::Unknown);
                    driver = Some(if takes_over {
                        BackendDriver::taking_over(world.addr, vif(&world), left)
                    } else {
                        BackendDriver::restarted(world.addr, vif(&world))
                    });
                }
            }
        }
        // Stopped queues.
        seats.borrow_mut().retain(|seat| Rc::strong_count(seat) > 1);
    }
    drop(driver);
    seats.borrow_mut().clear();
    world.assert_released();
});

/// Steps the driver until nothing is left to do.
fn step(driver: &mut Option<BackendDriver<Vif<Server>>>, world: &mut World) {
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
