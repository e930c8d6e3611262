//! Settings that can be changed while requests and packets are processed.
//!
//! A worker checks once per round whether a setting has changed, which is one load, and caches the
//! value. So there is no lock per request or packet.
#![forbid(unsafe_code)]

use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{Mutex, MutexGuard};
use std::sync::{Arc, PoisonError};

/// Setting that any thread may replace.
///
/// ```
/// use pvio_runtime::{Setting, SettingReader};
///
/// let limit = Setting::new(10);
/// let mut reader = SettingReader::new(&limit);
/// limit.set(20);
/// assert_eq!(*reader.get(), 10);
/// assert!(reader.refresh() && !reader.refresh());
/// assert_eq!(*reader.get(), 20);
/// ```
#[derive(Debug, Default)]
pub struct Setting<T> {
    version: AtomicU32,
    value: Mutex<Arc<T>>,
}

impl<T> Setting<T> {
    /// Creates a setting with its first value.
    pub fn new(value: T) -> Arc<Self> {
        Arc::new(Self { version: AtomicU32::new(0), value: Mutex::new(Arc::new(value)) })
    }

    /// Replaces the value.
    pub fn set(&self, value: T) {
        self.update(|_| value);
    }

    /// Returns the current value.
    pub fn get(&self) -> Arc<T> {
        Arc::clone(&self.lock())
    }

    /// Replaces the value by one that is computed from it. Updates are serialized.
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
pub struct SettingReader<T> {
    setting: Arc<Setting<T>>,
    version: u32,
    value: Arc<T>,
}

impl<T> SettingReader<T> {
    /// Creates a reader with the current value.
    pub fn new(setting: &Arc<Setting<T>>) -> Self {
        let version = setting.version.load(Ordering::Acquire);
        Self { value: setting.get(), setting: Arc::clone(setting), version }
    }

    /// Updates the cached value. Returns whether it has changed.
    #[inline]
    pub fn refresh(&mut self) -> bool {
        let version = self.setting.version.load(Ordering::Acquire);
        if version == self.version {
            return false;
        }
        (self.version, self.value) = (version, self.setting.get());
        true
    }

    /// Returns the cached value.
    #[must_use]
    pub fn get(&self) -> &T {
        &self.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reader_sees_the_last_of_concurrent_updates() {
        let count = Setting::new(0_u32);
        let mut reader = SettingReader::new(&count);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..100).for_each(|_| count.update(|count| count + 1)));
            }
        });
        assert!(reader.refresh());
        assert_eq!((*reader.get(), *count.get()), (400, 400));
        assert!(!reader.refresh());
    }
}
