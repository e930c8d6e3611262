//! State beyond a backend's port, which survives the process.

use pvio_netback::port::{FRAME_MAX, NetPort, Offload, Packet, PortError, WouldBlock};
use pvio_sim::kill::{end, moment};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

/// State behind a queue's port.
#[derive(Default)]
pub struct Wire {
    /// Frames that were sent.
    pub sent: Vec<Vec<u8>>,
    /// Frames for the guest.
    pub incoming: VecDeque<Vec<u8>>,
    /// Packet that ends every process that sends it.
    pub deadly: Option<Vec<u8>>,
}

/// Port that sends frames when it is flushed, as a tap's io_uring does. Frames that were not
/// flushed are lost with the process.
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
        moment();
        Ok(vec![0; FRAME_MAX].into())
    }

    fn unreserve(&mut self, _: Box<[u8]>) {}

    fn send(&mut self, packet: Packet<Box<[u8]>>) -> Result<(), PortError> {
        moment();
        if self.wire.borrow().deadly.as_deref() == Some(packet.frame()) {
            end();
        }
        self.pending.push(packet.frame().to_vec());
        Ok(())
    }

    fn receive(&mut self) -> Option<Packet<Box<[u8]>>> {
        moment();
        let frame = self.wire.borrow_mut().incoming.pop_front()?;
        let len = frame.len();
        Some(Packet { buf: frame.into(), start: 0, len, offload: Offload::default() })
    }

    fn recycle(&mut self, _: Box<[u8]>) {}

    fn flush(&mut self) {
        moment();
        // The process may end between two frames.
        for frame in self.pending.drain(..) {
            self.wire.borrow_mut().sent.push(frame);
            moment();
        }
    }
}
