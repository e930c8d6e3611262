//! Ports in memory, for tests, benchmarks and the simulator.
//!
//! ```
//! use pvio_netback::port::{NetPort, Offload, Packet, memory};
//!
//! let (mut a, mut b) = memory::pair(4);
//! let mut buf = a.reserve()?;
//! buf[..5].copy_from_slice(b"hello");
//! a.send(Packet { buf, start: 0, len: 5, offload: Offload::default() })?;
//! let got = b.receive().expect("a packet");
//! assert_eq!(got.frame(), b"hello");
//! b.recycle(got.buf);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

use super::{FRAME_MAX, NetPort, Packet, PortError, WouldBlock};
use alloc::boxed::Box;
use alloc::sync::Arc;
use crossbeam_queue::ArrayQueue;

/// One end of an in-memory link. The ends may be used by different threads.
#[derive(Debug)]
pub struct MemoryPort {
    out: Arc<Lane>,
    inward: Arc<Lane>,
}

/// One direction of a link: `depth` buffers, each in one of the two queues or owned by a user.
#[derive(Debug)]
struct Lane {
    filled: ArrayQueue<Packet<Box<[u8]>>>,
    free: ArrayQueue<Box<[u8]>>,
}

/// Returns two connected ports: each receives what the other sends. Each direction holds up to `depth`
/// packets.
///
/// # Panics
/// If `depth` is 0.
#[must_use]
pub fn pair(depth: usize) -> (MemoryPort, MemoryPort) {
    let (there, back) = (Lane::new(depth), Lane::new(depth));
    let a = MemoryPort { out: Arc::clone(&there), inward: Arc::clone(&back) };
    (a, MemoryPort { out: back, inward: there })
}

/// Returns a port that receives the packets that it sends, up to `depth` at a time.
///
/// # Panics
/// If `depth` is 0.
#[must_use]
pub fn loopback(depth: usize) -> MemoryPort {
    let lane = Lane::new(depth);
    MemoryPort { out: Arc::clone(&lane), inward: lane }
}

impl Lane {
    fn new(depth: usize) -> Arc<Self> {
        let free = ArrayQueue::new(depth);
        for _ in 0..depth {
            let buf = alloc::vec![0; FRAME_MAX].into_boxed_slice();
            // The queue was created with space for `depth` buffers.
            let _ = free.push(buf);
        }
        Arc::new(Self { filled: ArrayQueue::new(depth), free })
    }
}

impl NetPort for MemoryPort {
    type Buf = Box<[u8]>;
    const HEADROOM: usize = 0;

    fn reserve(&mut self) -> Result<Box<[u8]>, WouldBlock> {
        self.out.free.pop().ok_or(WouldBlock)
    }

    fn unreserve(&mut self, buf: Box<[u8]>) {
        let _ = self.out.free.push(buf);
    }

    fn send(&mut self, packet: Packet<Box<[u8]>>) -> Result<(), PortError> {
        if Arc::strong_count(&self.out) < 2 {
            self.unreserve(packet.buf);
            return Err(PortError::Gone);
        }
        self.out.filled.push(packet).map_err(|packet| {
            // The queue has space for every buffer of this port, so this one was not reserved here.
            drop(packet);
            PortError::Unsuited
        })
    }

    fn receive(&mut self) -> Option<Packet<Box<[u8]>>> {
        self.inward.filled.pop()
    }

    fn recycle(&mut self, buf: Box<[u8]>) {
        let _ = self.inward.free.push(buf);
    }

    fn flush(&mut self) {}
}
