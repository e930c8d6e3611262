//! Records completed writes, so that a flush of a disk without any has nothing to do.

use crate::engine::flusher::Flusher;
use crate::engine::{BlockEngine, Done, Full, Geometry, Io, Segments};
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_ring::shm::PoolMemory;
use pvio_runtime::{WaitPoint, Wrapper};
use std::time::Duration;

/// An engine that reports completed writes to the [`Flusher`] of its disk.
pub struct Unflushed<E> {
    engine: E,
    flusher: Arc<Flusher>,
    /// Whether the operation with each tag changes the disk.
    changes: Vec<bool>,
}

impl<E> Unflushed<E> {
    /// Wraps an engine with up to `depth` operations in flight.
    pub fn new(engine: E, flusher: Arc<Flusher>, depth: u32) -> Self {
        Self { engine, flusher, changes: alloc::vec![false; depth as usize] }
    }
}

impl<B, E: BlockEngine<B>> BlockEngine<B> for Unflushed<E> {
    fn geometry(&self) -> Geometry {
        self.engine.geometry()
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        if let Some(changes) = self.changes.get_mut(tag as usize) {
            *changes = !matches!(io, Io::Read { .. } | Io::Flush);
        }
        self.engine.submit(tag, io, segments)
    }

    fn register(&mut self, memory: PoolMemory) -> usize {
        self.engine.register(memory)
    }

    fn kick(&mut self) {
        self.engine.kick();
    }

    fn deadline(&self) -> Option<Duration> {
        self.engine.deadline()
    }

    fn reap(&mut self, done: &mut Done<'_, B>) {
        let Self { engine, flusher, changes } = self;
        engine.reap(&mut |tag, result, segments| {
            // Before the response: the guest's next flush may come through another queue. A write
            // that failed may have changed a part.
            if changes.get(tag as usize).is_none_or(|changes| *changes) {
                flusher.mark_written();
            }
            done(tag, result, segments);
        });
    }
}

impl<E: WaitPoint> Wrapper for Unflushed<E> {
    type Inner = E;

    fn inner(&mut self) -> &mut E {
        &mut self.engine
    }
}
