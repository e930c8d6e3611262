//! The end of a process at one of its steps, and what outlives it.

use pvio_netback::port::{FRAME_MAX, NetPort, Offload, Packet, PortError, WouldBlock};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::Arc;

thread_local! {
    static STEPS: Cell<usize> = const { Cell::new(0) };
    static END_AT: Cell<Option<usize>> = const { Cell::new(None) };
}

struct Killed;

/// A step of the backend: a store, or a call. It is the last if the process ends here.
pub fn step() {
    let step = STEPS.replace(STEPS.get() + 1);
    if END_AT.get() == Some(step) {
        END_AT.set(None);
        resume_unwind(Box::new(Killed));
    }
}

pub fn watch() -> Arc<dyn Fn() + Send + Sync> {
    Arc::new(step)
}

/// The process ends at its step number `at`, counted from here.
pub fn end_at(at: Option<usize>) {
    STEPS.set(0);
    END_AT.set(at);
}

/// Steps since then.
pub fn steps() -> usize {
    STEPS.get()
}

/// Does something as the backend; `None` if its process ended meanwhile.
pub fn run<T>(work: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => Some(done),
        Err(cause) if cause.is::<Killed>() => None,
        Err(cause) => resume_unwind(cause),
    }
}

/// What is at the other side of a queue's port.
#[derive(Default)]
pub struct Wire {
    /// Frames that left the machine.
    pub sent: Vec<Vec<u8>>,
    /// Frames for the guest.
    pub incoming: VecDeque<Vec<u8>>,
}

/// A port that lets frames go when it is flushed, as a tap's io_uring does. What was not flushed is
/// lost with the process.
pub struct Port {
    pub wire: Rc<RefCell<Wire>>,
    pending: Vec<Vec<u8>>,
}

impl Port {
    pub fn new(wire: &Rc<RefCell<Wire>>) -> Self {
        Self { wire: Rc::clone(wire), pending: Vec::new() }
    }
}

impl NetPort for Port {
    type Buf = Box<[u8]>;
    const HEADROOM: usize = 0;

    fn reserve(&mut self) -> Result<Box<[u8]>, WouldBlock> {
        step();
        Ok(vec![0; FRAME_MAX].into())
    }

    fn unreserve(&mut self, _: Box<[u8]>) {}

    fn send(&mut self, packet: Packet<Box<[u8]>>) -> Result<(), PortError> {
        step();
        self.pending.push(packet.frame().to_vec());
        Ok(())
    }

    fn receive(&mut self) -> Option<Packet<Box<[u8]>>> {
        step();
        let frame = self.wire.borrow_mut().incoming.pop_front()?;
        let len = frame.len();
        Some(Packet { buf: frame.into(), start: 0, len, offload: Offload::default() })
    }

    fn recycle(&mut self, _: Box<[u8]>) {}

    fn flush(&mut self) {
        step();
        // One frame may be out and the next not.
        for frame in self.pending.drain(..) {
            self.wire.borrow_mut().sent.push(frame);
            step();
        }
    }
}
