//! An engine for a writable file or block device.
//!
//! Reads, writes and zeroing use io_uring ([`UringEngine`]). One thread flushes for all queues
//! ([`flusher`](super::flusher)). Discards of a block device are done by threads as well, because
//! the system calls block until the device has finished. io_uring has plain discard since Linux
//! 6.12, and has no secure discard.

use super::clock::sooner;
use super::offload::{BudgetUsage, Executor, Offload};
use super::uring::UringEngine;
use super::{BlockEngine, Done, Full, Geometry, Io, Segments};
use alloc::sync::Arc;
use core::time::Duration;
use pvio_ring::shm::{PoolMemory, SharedMemory};
use pvio_runtime::{IoBuf, WaitPoint, Watch};
use std::io;
use std::os::fd::OwnedFd;

/// The engine of one queue. Must be used on the thread that created it.
pub struct DeviceEngine<B: IoBuf> {
    data: UringEngine<B>,
    blocking: Offload<B>,
    /// Watch of the descriptor that is readable while `blocking` has completions.
    completions: Watch,
    /// Whether discards are done by the threads as well.
    discards: bool,
}

impl<B: IoBuf + SharedMemory> DeviceEngine<B> {
    /// Creates an engine in which `executor` carries out flushes, and discards if `discards` is
    /// set, with up to `depth` operations at a time. `data` does everything else.
    ///
    /// # Errors
    /// The system's error if it has no free descriptor.
    pub fn new(
        mut data: UringEngine<B>,
        executor: Arc<dyn Executor>,
        discards: bool,
        depth: u32,
        usage: &Arc<BudgetUsage>,
    ) -> io::Result<Self> {
        let blocking = Offload::new(executor, data.geometry(), depth, usage)?;
        let completions = data.watch(blocking.completions()?)?;
        Ok(Self { data, blocking, completions, discards })
    }
}

impl<B: IoBuf + SharedMemory> BlockEngine<B> for DeviceEngine<B> {
    fn geometry(&self) -> Geometry {
        self.data.geometry()
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        match io {
            Io::Flush => self.blocking.submit(tag, io, segments),
            Io::Discard { .. } if self.discards => self.blocking.submit(tag, io, segments),
            _ => self.data.submit(tag, io, segments),
        }
    }

    fn register(&mut self, memory: PoolMemory) -> usize {
        self.data.register(memory)
    }

    fn kick(&mut self) {
        self.blocking.kick();
        self.data.kick();
    }

    fn deadline(&self) -> Option<Duration> {
        sooner(self.data.deadline(), self.blocking.deadline())
    }

    fn reap(&mut self, done: &mut Done<'_, B>) {
        self.data.reap(done);
        // Collected by every `reap`, which clears the descriptor.
        self.data.fired(self.completions);
        self.blocking.reap(done);
    }
}

impl<B: IoBuf> WaitPoint for DeviceEngine<B> {
    fn watch(&mut self, file: OwnedFd) -> io::Result<Watch> {
        self.data.watch(file)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.data.wait(timeout)
    }

    fn fired(&mut self, watch: Watch) -> bool {
        self.data.fired(watch)
    }
}
