//! Ports that move packets in memory of this process, without system calls.
#![forbid(unsafe_code)]

use crate::wait::WaitPort;
use crate::{NetPort, Packet, PortError, WouldBlock};
use core::fmt;
use core::time::Duration;
use pvio_runtime::{EventFd, WaitPoint, Watch, WatchRing};
use std::io;
use std::os::fd::OwnedFd;

/// Source and destination of packets in memory, without a wait point.
pub trait PacketQueue: NetPort {
    /// Returns the eventfd that is notified when packets arrive while the worker sleeps, if other
    /// threads add packets.
    fn event(&self) -> Option<&EventFd> {
        None
    }

    /// Checks whether the queue can continue.
    ///
    /// # Errors
    /// It cannot.
    fn check(&self) -> io::Result<()> {
        Ok(())
    }

    /// Whether packets have arrived since the last attempt to receive.
    fn has_arrived(&self) -> bool {
        false
    }

    /// Called before the worker sleeps. Returns whether it may.
    fn may_sleep(&self) -> bool {
        true
    }

    /// Called after the worker has woken up.
    fn awake(&self) {}
}

/// Port on a queue of packets in memory, with the worker's wait point.
pub struct QueuePort<Q> {
    queue: Q,
    ring: WatchRing,
    arrived: Option<Watch>,
}

impl<Q: PacketQueue> QueuePort<Q> {
    /// Creates the port. It must be used by the thread that creates it.
    pub(crate) fn on(queue: Q) -> io::Result<Self> {
        let mut ring = WatchRing::new()?;
        let event = queue.event().map(EventFd::to_fd).transpose()?;
        let arrived = event.map(|event| ring.watch(event)).transpose()?;
        Ok(Self { queue, ring, arrived })
    }
}

impl<Q: PacketQueue> WaitPoint for QueuePort<Q> {
    fn watch(&mut self, file: OwnedFd) -> io::Result<Watch> {
        self.ring.watch(file)
    }

    fn fired(&mut self, watch: Watch) -> bool {
        self.ring.fired(watch)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let waited = if self.queue.may_sleep() { self.ring.wait(timeout) } else { Ok(()) };
        self.queue.awake();
        waited
    }
}

impl<Q: PacketQueue> WaitPort for QueuePort<Q> {
    fn poll(&mut self) -> io::Result<()> {
        self.ring.reap();
        if self.arrived.is_some_and(|arrived| self.ring.fired(arrived)) {
            self.queue.event().into_iter().for_each(EventFd::clear);
        }
        self.queue.check()?;
        self.ring.arm()
    }

    fn has_work(&mut self) -> io::Result<bool> {
        Ok(self.queue.has_arrived() || self.ring.has_work()?)
    }
}

impl<Q: PacketQueue> NetPort for QueuePort<Q> {
    type Buf = Q::Buf;
    const HEADROOM: usize = Q::HEADROOM;

    fn reserve(&mut self) -> Result<Q::Buf, WouldBlock> {
        self.queue.reserve()
    }

    fn fit(&mut self, buf: Q::Buf, len: usize) -> Q::Buf {
        self.queue.fit(buf, len)
    }

    fn unreserve(&mut self, buf: Q::Buf) {
        self.queue.unreserve(buf);
    }

    fn send(&mut self, packet: Packet<Q::Buf>) -> Result<(), PortError> {
        self.queue.send(packet)
    }

    fn receive(&mut self) -> Option<Packet<Q::Buf>> {
        self.queue.receive()
    }

    fn recycle(&mut self, buf: Q::Buf) {
        self.queue.recycle(buf);
    }

    fn flush(&mut self) {
        self.queue.flush();
    }

    fn set_clock(&mut self, now: Duration) {
        self.queue.set_clock(now);
    }

    fn deadline(&self) -> Option<Duration> {
        self.queue.deadline()
    }
}

impl<Q: fmt::Debug> fmt::Debug for QueuePort<Q> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueuePort").field("queue", &self.queue).finish_non_exhaustive()
    }
}
