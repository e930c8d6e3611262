//! Shared memory that reports every store.

use super::SharedMemory;
use alloc::sync::Arc;
use core::fmt;
use core::ptr::NonNull;

/// Shared memory that calls a function before each store that this crate makes to it: for tests
/// that take a snapshot, or stop a backend, at every store.
#[derive(Clone)]
pub struct Watched<M> {
    memory: M,
    watch: Arc<dyn Fn() + Send + Sync>,
}

impl<M: SharedMemory> Watched<M> {
    /// Returns `memory`, with `watch` called before each store to it.
    #[must_use]
    pub fn new(memory: M, watch: Arc<dyn Fn() + Send + Sync>) -> Self {
        Self { memory, watch }
    }

    /// Returns the memory itself, whose stores are not reported.
    #[must_use]
    pub fn inner(&self) -> &M {
        &self.memory
    }
}

// SAFETY: the memory keeps the promise and lives as long as this value; the function gets no access
// to it.
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

    fn before_load(&self) {
        self.memory.before_load();
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
