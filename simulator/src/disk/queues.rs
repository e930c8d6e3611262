//! The queues of a session, which are served without threads.

use crate::disk::actions::Flaw;
use crate::disk::medium::{SharedMedium, SimEngine};
use pvio_blkback::{Buf, Progress, Queue, QueueFault, QueueParts, QueueServer};
use pvio_event_channel::{EventChannel, EventError, Port};
use pvio_ring::shm::{HeapMemory, Region};
use pvio_sim::kill::Mortal;
use pvio_sim::local::events::LocalChannel;
use pvio_sim::local::memory::LocalMapping;
use pvio_sim::{LocalDomain, Sim, WaitState};
use pvio_xenbus::driver::Fault;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

/// Event channel that can be made to fail.
pub struct Wire {
    channel: Mortal<LocalChannel>,
    cut: bool,
}

impl EventChannel for Wire {
    fn port(&self) -> Port {
        self.channel.port()
    }

    fn notify(&self) -> Result<(), EventError> {
        if self.cut { Ok(()) } else { self.channel.notify() }
    }

    fn take(&self) -> Result<bool, EventError> {
        self.channel.take()
    }
}

/// The process may be killed at each of its calls and stores.
pub type Platform = Mortal<LocalDomain>;
type Parts = QueueParts<Platform, Mortal<LocalChannel>, Mortal<HeapMemory>>;

thread_local! {
    /// Number of resumed sessions with several queues.
    static RESUMED: Cell<u32> = const { Cell::new(0) };
}

/// Returns the number of resumed sessions with several queues since the last call.
pub fn take_resumed() -> u32 {
    RESUMED.take()
}

/// State of a thread of the real daemon.
pub struct Served {
    pub queue: Queue<Platform, Wire, SimEngine<Buf<Mortal<LocalMapping>>>, Mortal<HeapMemory>>,
    wait: WaitState,
}

/// Slot of a queue, through which the scheduler polls it.
pub struct Seat {
    name: String,
    pub served: Option<Served>,
    pub fault: Option<QueueFault>,
}

pub type SharedSeat = Rc<RefCell<Seat>>;
/// Slots of a disk's queues.
pub type Seats = Rc<RefCell<Vec<SharedSeat>>>;

/// Serves the queues of a session: each has a slot.
pub struct Queues {
    pub medium: SharedMedium,
    pub seats: Seats,
    pub crashed: Rc<Cell<bool>>,
    pub flaw: Flaw,
    /// Whether the session was started by another process.
    pub resumed: bool,
    /// The first queue, if its record is to be exchanged with the second's.
    pub first: Option<(SharedSeat, Parts)>,
    /// Record of the session.
    pub record: Mortal<HeapMemory>,
}

/// Running queue.
pub struct Running {
    seat: SharedSeat,
    crashed: Rc<Cell<bool>>,
}

impl Queues {
    fn seat(&self, seat: &SharedSeat, parts: Parts) {
        let medium = Rc::clone(&self.medium);
        let parts = QueueParts {
            frontend: parts.frontend,
            disk: parts.disk,
            grants: parts.grants,
            data_path: parts.data_path,
            ring: parts.ring,
            channel: Wire { channel: parts.channel, cut: self.flaw == Flaw::NeverNotifies },
            abi: parts.abi,
            max_indirect_segments: parts.max_indirect_segments,
            record: parts.record,
            stats: parts.stats,
        };
        let queue = Queue::new(parts, SimEngine::new(medium, self.flaw));
        seat.borrow_mut().served = Some(Served { queue, wait: WaitState::Polling });
    }
}

impl QueueServer<Platform, Mortal<HeapMemory>> for Queues {
    type Running = Running;

    fn start(&mut self, name: &str, mut parts: Parts) -> Result<Running, Fault> {
        // The queue may take requests from here on.
        let valid = self.record.load_u64(0, Relaxed);
        assert_eq!(valid, Some(1), "the record of {name} is not valid");
        let seat = Seat { name: name.into(), served: None, fault: None };
        let seat = Rc::new(RefCell::new(seat));
        let number = {
            let mut seats = self.seats.borrow_mut();
            seats.retain(|seat| Rc::strong_count(seat) > 1);
            assert!(seats.iter().all(|seat| seat.borrow().name != name), "two sessions at once");
            seats.push(Rc::clone(&seat));
            seats.len() - 1
        };
        RESUMED.set(RESUMED.get() + u32::from(self.resumed && number == 1));
        match (self.flaw, number) {
            (Flaw::SwapsRecords, 0) if self.resumed => self.first = Some((Rc::clone(&seat), parts)),
            (Flaw::ResumesOneQueue, 1..) if self.resumed => {}
            _ => {
                if let Some((seat, mut first)) = self.first.take() {
                    std::mem::swap(&mut first.record, &mut parts.record);
                    self.seat(&seat, first);
                }
                self.seat(&seat, parts);
            }
        }
        Ok(Running { seat, crashed: Rc::clone(&self.crashed) })
    }

    fn fault(&mut self, running: &mut Running) -> Option<QueueFault> {
        running.seat.borrow_mut().fault.take()
    }
}

impl Drop for Running {
    /// Completes the operations in flight, as the end of the real worker does; unless the process
    /// is killed.
    fn drop(&mut self) {
        let mut seat = self.seat.borrow_mut();
        seat.fault = None;
        let Some(mut served) = seat.served.take() else { return };
        // A failed run ends without cleanup.
        if std::thread::panicking() {
            return;
        }
        if self.crashed.get() {
            return served.queue.engine_mut().crash();
        }
        served.finish();
    }
}

impl Served {
    fn finish(&mut self) {
        let queue = &mut self.queue;
        queue.drain();
        while queue.in_flight() > 0 {
            let engine = queue.engine_mut();
            assert!(
                engine.is_busy() || engine.is_done(),
                "operation was not submitted to the engine"
            );
            if engine.is_busy() {
                engine.complete_one();
            }
            if queue.poll(0).is_err() {
                return self.let_finish();
            }
        }
        let _ = queue.poll(0);
    }

    /// Completes the operations in flight although the frontend cannot be reached any more.
    pub fn let_finish(&mut self) {
        while self.queue.engine_mut().is_busy() {
            self.queue.engine_mut().complete_one();
        }
    }

    pub fn is_awake(&mut self) -> bool {
        self.wait != WaitState::Asleep
            || self.queue.channel().channel.0.is_pending()
            || self.queue.engine_mut().is_done()
    }

    /// Executes one step of a worker's loop.
    pub fn work(&mut self, flaw: Flaw, sim: &mut Sim) -> Result<(), QueueFault> {
        let queue = &mut self.queue;
        self.wait = match self.wait {
            WaitState::Asleep => {
                queue.poll(0)?;
                queue.channel().take()?;
                WaitState::Polling
            }
            WaitState::Polling => match queue.poll(1 + sim.below(32) as u32)? {
                Progress::Some => WaitState::Polling,
                Progress::None => WaitState::Checking,
            },
            WaitState::Checking if flaw == Flaw::NoFinalCheck => WaitState::Asleep,
            WaitState::Checking if queue.final_check()? => WaitState::Polling,
            WaitState::Checking => WaitState::Asleep,
        };
        Ok(())
    }
}
