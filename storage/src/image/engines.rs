//! The engines of an image: one for each queue, with the disk's wrappers.

use super::Image;
use super::storage::Storage;
use crate::engine::device::DeviceEngine;
use crate::engine::faults::Faults;
use crate::engine::flusher::Flushed;
use crate::engine::offload::{Executor, Offload};
use crate::engine::pause::Pausing;
use crate::engine::ram::RamEngine;
use crate::engine::record::Recorded;
use crate::engine::throttle::Throttle;
use crate::engine::trace::Traced;
use crate::engine::unflushed::Unflushed;
use crate::engine::uring::UringEngine;
use crate::engine::wait::{DiskEngine, WaitEngine, Waiting};
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::Ordering;
use pvio_ring::shm::SharedMemory;
use pvio_runtime::IoBuf;
use std::io;
use std::os::fd::AsFd;

impl Image {
    /// Creates an engine for one queue. Must be called on the thread that will use it.
    ///
    /// # Errors
    /// The system's error if it has no free descriptor or no io_uring.
    pub fn engine<B>(&self, depth: u32) -> io::Result<DiskEngine<B>>
    where
        B: IoBuf + SharedMemory,
    {
        let flushed = |others: Arc<dyn Executor>| -> Arc<dyn Executor> {
            match &self.flusher {
                Some(flusher) => Arc::new(Flushed::new(Arc::clone(flusher), others)),
                None => others,
            }
        };
        let executor = match &self.storage {
            Storage::File { file, discards, .. } => {
                let image = file.try_clone()?.into();
                let engine = UringEngine::with(
                    image,
                    self.geometry,
                    depth,
                    self.io,
                    self.fence.as_ref().map(AsFd::as_fd),
                )?;
                let engine = engine.polling_within(self.limits).logging(&self.unregistered);
                let executor: Arc<dyn Executor> = match (discards.clone(), self.flusher.clone()) {
                    (Some(discards), _) => flushed(discards),
                    (None, Some(flusher)) => flusher,
                    (None, None) => return self.wrap(engine, depth),
                };
                let discards = discards.is_some();
                let engine = DeviceEngine::new(engine, executor, discards, depth, &self.usage)?;
                return self.wrap(engine, depth);
            }
            Storage::Ram(disk) => {
                let engine = RamEngine::new(Arc::clone(disk), self.geometry);
                return self.wrap(Waiting::new(engine, None)?, depth);
            }
            Storage::Store(_) => return Err(io::ErrorKind::Unsupported.into()),
            Storage::Nbd(link) => flushed(link.clone()),
            Storage::ThreadPool(pool) => flushed(pool.clone()),
        };
        let engine = Offload::new(executor, self.geometry, depth, &self.usage)?;
        let completions = engine.completions()?;
        self.wrap(Waiting::new(engine, Some(completions))?, depth)
    }

    /// Wraps an engine with the disk's wrappers.
    fn wrap<B, E>(&self, engine: E, depth: u32) -> io::Result<DiskEngine<B>>
    where
        B: IoBuf + SharedMemory,
        E: WaitEngine<B> + 'static,
    {
        match &self.flusher {
            Some(flusher) => self.record(Unflushed::new(engine, Arc::clone(flusher), depth)),
            None => self.record(engine),
        }
    }

    fn record<B, E>(&self, engine: E) -> io::Result<DiskEngine<B>>
    where
        B: IoBuf + SharedMemory,
        E: WaitEngine<B> + 'static,
    {
        if let Some(record) = &self.record {
            let recorded: DiskEngine<B> = Box::new(Recorded::new(engine, Arc::clone(record)));
            return self.tune(recorded);
        }
        self.tune(engine)
    }

    /// Throttling, faults and pauses are generic over the engine's type, so that they cost almost
    /// nothing when idle.
    fn tune<B, E>(&self, engine: E) -> io::Result<DiskEngine<B>>
    where
        B: IoBuf + SharedMemory,
        E: WaitEngine<B> + 'static,
    {
        let Some((switch, seed)) = &self.faults else { return self.pause(engine) };
        let seed = seed.fetch_add(1, Ordering::Relaxed);
        self.pause(Faults::new(engine, switch, seed, self.clock))
    }

    fn pause<B, E>(&self, engine: E) -> io::Result<DiskEngine<B>>
    where
        B: IoBuf + SharedMemory,
        E: WaitEngine<B> + 'static,
    {
        if self.geometry.read_only {
            return self.limit(engine);
        }
        self.limit(Pausing::new(engine, Arc::clone(&self.pauses), self.clock))
    }

    fn limit<B, E>(&self, engine: E) -> io::Result<DiskEngine<B>>
    where
        B: IoBuf + SharedMemory,
        E: WaitEngine<B> + 'static,
    {
        let engine: DiskEngine<B> = match &self.share {
            Some(share) => Box::new(Throttle::new(engine, share.clone(), self.clock)?),
            None => Box::new(engine),
        };
        Ok(match &self.trace {
            Some(trace) => Box::new(Traced::new(engine, Arc::clone(trace), self.clock)),
            None => engine,
        })
    }
}
