//! Settings that change while packets pass.
//!
//! A queue's worker looks once a round whether anything changed (a load) and keeps what it saw: no
//! packet pays for settings that can change.
#![forbid(unsafe_code)]

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A setting that any thread may replace.
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
        // After the value: who sees the version finds it, or a later one.
        self.version.fetch_add(1, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Arc<T>> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one worker has seen of it.
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

    /// Takes over what changed; tells whether anything did.
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
