//! Shared memory that tells of every store.

use super::SharedMemory;
use alloc::sync::Arc;
use core::fmt;
use core::ptr::NonNull;

/// Shared memory that calls a function before each store that this crate makes to it: for tests that
/// take a snapshot, or end a backend, at every store.
#[derive(Clone)]
pub struct Watched<M> {
    memory: M,
    watch: Arc<dyn Fn() + Send + Sync>,
}

impl<M: SharedMemory> Watched<M> {
    /// `memory`, with `watch` called before each store to it.
    #[must_use]
    pub fn new(memory: M, watch: Arc<dyn Fn() + Send + Sync>) -> Self {
        Self { memory, watch }
    }

    /// The memory itself, whose stores nobody watches.
    #[must_use]
    pub fn inner(&self) -> &M {
        &self.memory
    }
}

// SAFETY: the memory keeps the promise and lives as long as this does; the function gets nothing of it.
unsafe impl<M: SharedMemory> SharedMemory for Watched<M> {
    fn base(&self) -> NonNull<u8> {
        self.memory.base()
    }

    fn len(&self) -> usize {
        self.memory.len()
    }

    fn writable(&self) -> bool {
        self.memory.writable()
    }

    fn before_store(&self) {
        (self.watch)();
        self.memory.before_store();
    }
}

impl<M> fmt::Debug for Watched<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watched")
    }
}
