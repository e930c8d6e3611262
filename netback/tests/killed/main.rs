//! A backend is killed at any of its steps (each store to a ring or to the in-flight record, each
//! call of its port, of grants and of event channels) and replaced by another. Only packets that
//! the guest made and that have no visible response are sent. Every request gets one response,
//! every buffer is used once, and the guest's configuration stays in force.

#[path = "../common/mod.rs"]
mod common;
mod control;
mod guest;
mod wire;

use common::{ALL, BACK, FRONT};
use control::Control;
use guest::Guest;
use pvio_event_channel::EventChannel;
use pvio_netback::fault::DropReason;
use pvio_netback::queue::{QueueSet, SessionRefs, VifRecord, Waker};
use pvio_netback::{Features, Queue, Stats};
use pvio_ring::shm::HeapMemory;
use pvio_sim::kill::{Mortal, run};
use pvio_sim::{LocalDomain, LocalMachine};
use std::sync::Arc;
use wire::Port;

type Memory = Mortal<HeapMemory>;
type Platform = Mortal<LocalDomain>;
type Back = Queue<Platform, Box<[u8]>, Memory>;

const GROUPS: [[u8; 6]; 3] = [[1, 0, 0x5e, 0, 0, 1], [1, 0, 0x5e, 0, 0, 2], [1, 0, 0x5e, 0, 0, 3]];
const STATION: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// Parameters of a run.
#[derive(Clone, Copy)]
struct Kind {
    queues: usize,
    split: bool,
    control: bool,
    /// Initial value of the rings' indices.
    start: u32,
}

/// Everything that survives the backend's process, and the process.
struct World {
    back: Platform,
    guests: Vec<Guest>,
    control: Option<Control>,
    record: Option<Memory>,
    served: Vec<(Back, Port)>,
}

impl World {
    fn new(kind: Kind) -> Self {
        let machine = LocalMachine::new();
        let front = machine.domain(FRONT);
        let back = Mortal(machine.domain(BACK));
        let guests = (0..kind.queues)
            .map(|number| Guest::new(front.clone(), number as u8, kind.start, kind.split));
        let guests: Vec<_> = guests.collect();
        let control = kind.control.then(|| Control::new(&front, &guests[kind.queues - 1]));
        let mut world = Self { back, guests, control, record: None, served: Vec::new() };
        world.connect();
        world
    }

    /// Connects like a vif: to a new session, or to one that another process left.
    fn connect(&mut self) {
        let refs: Vec<_> = self.guests.iter().map(Guest::refs).collect();
        let control = self.control.as_ref().map(Control::refs);
        let session = SessionRefs { peer: FRONT, device: 0, queues: &refs, control };
        let record = match &self.record {
            Some(memory) => VifRecord::open(memory.clone(), &session).unwrap(),
            None => {
                let pages = HeapMemory::pages(session.record_len().div_ceil(4096));
                let memory = Mortal(pages);
                self.record = Some(memory.clone());
                VifRecord::create(memory, &session).unwrap()
            }
        };
        let groups = Arc::new(record.groups().unwrap());
        groups.set_filter(true);
        let features = Features { names_groups: true, ..ALL };
        let mut queues: Vec<Back> = Vec::new();
        for (index, refs) in refs.iter().enumerate() {
            let parts = (&record, index, &groups);
            let stats = Arc::new(Stats::default());
            let back = self.back.clone();
            let queue = Queue::attach_recorded(back, FRONT, refs, features, stats, parts);
            queues.push(queue.unwrap());
        }
        if let Some(control) = &control {
            let nothing: Waker = Arc::new(|| ());
            let set = QueueSet::new(vec![nothing; queues.len()]);
            for (index, queue) in queues.iter_mut().enumerate() {
                queue.join(&set, index);
            }
            queues[0].serve_control_recorded(control, true, &record).unwrap();
            for index in 0..queues.len() {
                let list = queues[0].staged_before(index);
                queues[index].restage(&list).unwrap();
            }
        }
        if record.is_resumed() {
            queues.iter().flat_map(Back::channels).for_each(|channel| channel.notify().unwrap());
        } else {
            record.commit();
        }
        let ports = self.guests.iter().map(|guest| Port::new(&guest.wire));
        self.served = queues.into_iter().zip(ports).collect();
    }

    /// Actions of the guest in one round.
    fn guest(&mut self, round: usize) {
        self.take();
        for (n, guest) in self.guests.iter_mut().enumerate() {
            match (round + n) % 6 {
                0 => {
                    guest.send(&[60]);
                    guest.send(&[100, 700, 30]);
                    guest.inject(STATION, 100);
                }
                1 => {
                    guest.name(GROUPS[n]);
                    guest.send(&[61, 61]);
                    guest.inject(STATION, 9000);
                }
                2 => {
                    guest.send(&[80]);
                    guest.send_short();
                    guest.send(&[90; 5]);
                    guest.inject(STATION, 60);
                    guest.inject(STATION, 5000);
                }
                3 => guest.inject(STATION, 70),
                _ => guest.send(&[64]),
            }
        }
        if let Some(control) = &mut self.control {
            control.ask();
        }
    }

    /// Takes all visible responses.
    fn take(&mut self) {
        let frames: Vec<_> = self.guests.iter_mut().flat_map(Guest::take).collect();
        for frame in frames {
            self.guests[usize::from(frame[14])].came(&frame);
        }
        if let Some(control) = &mut self.control {
            control.take();
        }
    }

    fn poll(&mut self) {
        for (queue, port) in &mut self.served {
            queue.take_events().unwrap();
            queue.poll(port, 64).unwrap();
            queue.final_check().unwrap();
        }
    }

    /// Discards the state of the process, with all frames in flight to the guest in it.
    fn bury(&mut self) {
        self.served.clear();
        self.take();
        self.guests.iter_mut().for_each(Guest::forgive);
    }

    fn is_done(&self) -> bool {
        self.guests.iter().all(Guest::is_done) && self.control.as_ref().is_none_or(Control::is_done)
    }
}

/// Number of rounds in which the guest starts new work.
const ROUNDS: usize = 8;

/// Runs one guest, whose backends end at the given steps. Returns the number of steps.
fn live(kind: Kind, ends: &[usize]) -> usize {
    let mut world = World::new(kind);
    let mut ends = ends.iter().copied();
    let mut left = ends.next().unwrap_or(usize::MAX);
    let mut total = 0;
    for round in 0.. {
        assert!(round < 60, "the guest does not finish");
        if round < ROUNDS {
            world.guest(round);
        } else if world.is_done() {
            break;
        } else if let Some(control) = &mut world.control {
            control.ask();
        }
        let (mut alive, mut steps) = run(left, || world.poll());
        total += steps;
        while alive.is_none() {
            world.bury();
            left = ends.next().unwrap_or(usize::MAX);
            (alive, steps) = run(left, || world.connect());
            total += steps;
        }
        if left != usize::MAX {
            left -= steps;
        }
        world.take();
    }
    // A process that was started last may have responses to publish.
    world.poll();
    world.take();
    // Completed requests stay in force: groups are received, and all frames are steered to the last
    // queue.
    let to = world.control.as_ref().map_or(0, |_| world.guests.len() - 1);
    for group in &GROUPS[..world.guests.len()] {
        let before = world.guests[to].received;
        world.guests[0].inject(*group, 80);
        world.guests[0].inject([1, 0, 0x5e, 9, 9, 9], 80);
        (0..3).for_each(|_| world.poll());
        world.take();
        assert_eq!(world.guests[to].received, before + 1, "only the joined group is received");
        world.guests[0].drop_unheard();
    }
    if let Some(control) = &world.control {
        let staged: Vec<_> = world.served.iter().map(|(queue, _)| queue.staged()).collect();
        assert_eq!(staged.iter().sum::<usize>(), control.staged(), "{staged:?}");
    }
    total
}

/// Ends the backend at every one of its steps, and its successor a few steps later.
fn every_step(kind: Kind) {
    let steps = live(kind, &[]);
    println!("{steps} steps");
    assert!(steps > 200);
    for at in 0..steps {
        live(kind, &[at]);
        if at % 3 == 0 {
            live(kind, &[at, at * 7 % 61]);
        }
    }
}

#[test]
fn queue_killed_at_every_step_loses_no_packet_and_adds_none() {
    every_step(Kind { queues: 1, split: false, control: false, start: 0 });
}

#[test]
fn split_channels_and_index_wrap_killed_at_every_step_lose_no_packet() {
    every_step(Kind { queues: 1, split: true, control: false, start: u32::MAX - 6 });
}

#[test]
fn queues_killed_at_every_step_keep_control_ring_settings() {
    every_step(Kind { queues: 2, split: false, control: true, start: u32::MAX - 6 });
}

#[test]
fn packet_that_crashes_two_processes_gets_error_response() {
    let kind = Kind { queues: 1, split: false, control: false, start: 0 };
    let mut world = World::new(kind);
    let poll = |world: &mut World| run(usize::MAX, || world.poll()).0.is_some();
    let guest = &mut world.guests[0];
    guest.send(&[60]);
    guest.send(&[100, 700, 30]);
    guest.make_deadly();
    guest.name(GROUPS[0]);
    guest.send(&[61]);
    for deaths in 0..2 {
        assert!(!poll(&mut world), "after {deaths}");
        world.bury();
        world.connect();
    }
    assert!(poll(&mut world), "the process continues without the packets");
    world.take();
    let guest = &mut world.guests[0];
    assert_eq!(guest.given_up, [3, 0], "all packets in flight fail with an error");
    assert_eq!(world.served[0].0.stats().dropped(DropReason::TxDeaths), 3);
    assert!(guest.is_done() && guest.wire.borrow().sent.is_empty());
    // Later packets are sent, and the group is selected.
    guest.send(&[62]);
    guest.inject(GROUPS[0], 80);
    (0..3).for_each(|_| world.poll());
    world.take();
    assert!(world.guests[0].is_done() && world.guests[0].received == 1);
    // Processes that end while nothing is in flight have no effect.
    for _ in 0..3 {
        world.bury();
        world.connect();
    }
    world.guests[0].send(&[63]);
    world.poll();
    world.take();
    assert!(world.guests[0].is_done() && world.guests[0].given_up == [3, 0]);
}
