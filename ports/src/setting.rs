//! Settings that can be changed while packets are processed.
//!
//! A queue's worker checks once per round whether a setting has changed, which is a load, and
//! caches the value. So there is no cost per packet.
#![forbid(unsafe_code)]

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Setting that any thread may replace.
#[derive(Debug, Default)]
pub(super) struct Setting<T> {
    version: AtomicU32,
    value: Mutex<Arc<T>>,
}

impl<T> Setting<T> {
    pub fn new(value: T) -> Arc<Self> {
        Arc::new(Self { version: AtomicU32::new(0), value: Mutex::new(Arc::new(value)) })
    }

    pub fn set(&self, value: T) {
        self.update(|_| value);
    }

    pub fn get(&self) -> Arc<T> {
        Arc::clone(&self.lock())
    }

    pub fn update(&self, change: impl FnOnce(&T) -> T) {
        let mut value = self.lock();
        *value = Arc::new(change(&value));
        // Incremented after the value is stored, so that a reader of the version finds that value
        // or a newer one.
        self.version.fetch_add(1, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Arc<T>> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One worker's cached value of a setting.
#[derive(Debug)]
pub(super) struct Seen<T> {
    live: Arc<Setting<T>>,
    version: u32,
    value: Arc<T>,
}

impl<T> Seen<T> {
    pub fn of(live: Arc<Setting<T>>) -> Self {
        let version = live.version.load(Ordering::Acquire);
        Self { value: live.get(), live, version }
    }

    /// Updates the cached value. Returns whether it has changed.
    pub fn look(&mut self) -> bool {
        let version = self.live.version.load(Ordering::Acquire);
        if version == self.version {
            return false;
        }
        (self.version, self.value) = (version, self.live.get());
        true
    }

    pub fn get(&self) -> &T {
        &self.value
    }
}
