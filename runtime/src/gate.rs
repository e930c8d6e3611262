//! A gate that holds workers back until their process is ready to serve.
#![forbid(unsafe_code)]

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Holds [workers](crate::Worker) back after their start: they have their threads and io_urings, and
/// serve when the gate is opened. A process that confines itself opens it last. Clones are the same
/// gate.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    open: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    /// Creates a gate that is closed.
    #[must_use]
    pub fn closed() -> Self {
        Self(Arc::default())
    }

    /// Creates a gate that holds nothing back.
    #[must_use]
    pub fn opened() -> Self {
        let gate = Self::closed();
        gate.open();
        gate
    }

    /// Opens the gate. It is never closed again.
    pub fn open(&self) {
        *self.lock() = true;
        self.0.changed.notify_all();
    }

    /// Waits until the gate is open or `stopped` holds. Returns whether it is open.
    pub(crate) fn wait(&self, stopped: impl Fn() -> bool) -> bool {
        let mut open = self.lock();
        while !*open && !stopped() {
            open = self.0.changed.wait(open).unwrap_or_else(PoisonError::into_inner);
        }
        *open
    }

    /// Wakes the waiting threads, whose `stopped` may have changed.
    pub(crate) fn wake(&self) {
        // A thread between its check and its wait holds the lock.
        drop(self.lock());
        self.0.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
