//! A disk on a block device that can discard.
//!
//! What moves data and what flushes goes through io_uring ([`UringEngine`]). Discards are done by
//! threads: the calls for them block until the device is done, and io_uring has the plain one from
//! Linux 6.12 on, the secure one never.

use super::offload::{Executor, Offload};
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
    discards: Offload<B>,
}

impl<B: IoBuf + SharedMemory> DeviceEngine<B> {
    /// `data` does everything but discards, which `discards` does, `depth` at a time.
    ///
    /// # Errors
    /// What the system says when it has no descriptor to give.
    pub fn new(
        mut data: UringEngine<B>,
        discards: Arc<dyn Executor>,
        depth: u32,
    ) -> io::Result<Self> {
        let discards = Offload::new(discards, data.geometry(), depth)?;
        // Only so that a wait ends: what is over is taken whenever there is a reaping.
        data.watch(discards.completions()?);
        Ok(Self { data, discards })
    }
}

impl<B: IoBuf + SharedMemory> BlockEngine<B> for DeviceEngine<B> {
    fn geometry(&self) -> Geometry {
        self.data.geometry()
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        match io {
            Io::Discard { .. } => self.discards.submit(tag, io, segments),
            _ => self.data.submit(tag, io, segments),
        }
    }

    fn adopt(&mut self, memory: PoolMemory) -> usize {
        self.data.adopt(memory)
    }

    fn kick(&mut self) {
        self.discards.kick();
        self.data.kick();
    }

    fn look_again(&self) -> Option<Duration> {
        self.data.look_again()
    }

    fn reap(&mut self, done: &mut Done<'_, B>) {
        self.data.reap(done);
        self.discards.reap(done);
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
