//! A disk in a file or on a block device that is written.
//!
//! What moves data goes through io_uring ([`UringEngine`]). Flushes are done by a thread for all queues
//! ([`flusher`](super::flusher)). Discards of a block device are done by threads too: the calls for them
//! block until the device is done, and io_uring has the plain one from Linux 6.12 on, the secure one never.

use super::clock::sooner;
use super::offload::{Executor, Load, Offload};
use super::uring::{UringEngine, Watch};
use super::wait::WaitEngine;
use super::{BlockEngine, Done, Full, Geometry, Io, Segments};
use alloc::sync::Arc;
use core::time::Duration;
use pvio_ring::shm::{PoolMemory, SharedMemory};
use pvio_uring::IoBuf;
use std::io;
use std::os::fd::OwnedFd;

/// Such a disk, for one queue. To be used by the thread that made it.
pub struct DeviceEngine<B: IoBuf> {
    data: UringEngine<B>,
    blocking: Offload<B>,
    /// Whether discards are done there too.
    discards: bool,
}

impl<B: IoBuf + SharedMemory> DeviceEngine<B> {
    /// `data` does everything but flushes, and discards if they are `blocking` too: those `executor` does,
    /// `depth` at a time.
    ///
    /// # Errors
    /// What the system says when it has no descriptor to give.
    pub fn new(
        mut data: UringEngine<B>,
        executor: Arc<dyn Executor>,
        discards: bool,
        depth: u32,
        load: &Arc<Load>,
    ) -> io::Result<Self> {
        let blocking = Offload::new(executor, data.geometry(), depth, load)?;
        // Only so that a wait ends: what is over is taken whenever there is a reaping.
        data.watch(blocking.completions()?);
        Ok(Self { data, blocking, discards })
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
        self.blocking.reap(done);
    }
}

impl<B: IoBuf + SharedMemory> WaitEngine<B> for DeviceEngine<B> {
    fn watch(&mut self, file: OwnedFd) -> Watch {
        self.data.watch(file)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.data.wait(timeout)
    }

    fn fired(&mut self, watch: Watch) -> bool {
        self.data.fired(watch)
    }
}
