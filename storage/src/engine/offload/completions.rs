//! Finished jobs on their way back to their queue.

use super::Finished;
use alloc::vec::Vec;
use pvio_runtime::EventFd;
use pvio_runtime::sync::{Mutex, MutexGuard};
use std::sync::PoisonError;

/// Finished jobs to be returned to the queue.
#[derive(Debug)]
pub(super) struct Completions {
    over: Mutex<Vec<Finished>>,
    /// Readable while the list is not empty. Both are changed under the lock, so that neither a
    /// completion nor its notification can be lost.
    pub event: EventFd,
}

impl Completions {
    pub fn new(event: EventFd) -> Self {
        Self { over: Mutex::default(), event }
    }

    pub fn over(&self) -> MutexGuard<'_, Vec<Finished>> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn push(&self, finished: Finished) {
        let mut over = self.over();
        over.push(finished);
        if over.len() == 1 {
            self.event.notify();
        }
    }

    pub fn take(&self, into: &mut Vec<Finished>) {
        let mut over = self.over();
        if !over.is_empty() {
            self.event.clear();
            into.append(&mut over);
        }
    }
}

#[cfg(all(loom, test))]
mod model;
