//! Budget of file descriptors, reserved for devices before they are served.
//!
//! A process has a limited number of descriptors. Without reservations, the device that uses the
//! last one fails later, and other devices fail with it when their guests reconnect.

use pvio_xenbus::driver::Fault;
use rustix::process::{Resource, getrlimit, setrlimit};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Descriptors reserved for the process itself: logs, xenstore, the control socket and its
/// connections, an image that is being opened.
const RESERVED_FOR_PROCESS: u64 = 64;

/// Raises the soft limit of this process and its children to the hard limit.
pub fn raise_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Not fatal: the current limit is sufficient for a few devices.
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!(%error, "the limit of file descriptors cannot be raised");
    }
}

/// The number of descriptors of the process and how many are reserved; clones share the count.
#[derive(Debug, Clone)]
pub struct Descriptors(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limit: u64,
    reserved: AtomicU64,
}

/// A reservation, released when dropped.
#[derive(Debug)]
pub struct Reservation {
    budget: Descriptors,
    count: u64,
}

impl Default for Descriptors {
    /// Returns a budget of this process's current limit.
    fn default() -> Self {
        Self::with_limit(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX))
    }
}

impl Descriptors {
    /// Returns a budget of `limit` descriptors, of which the process needs some itself.
    #[must_use]
    pub fn with_limit(limit: u64) -> Self {
        let limit = limit.saturating_sub(RESERVED_FOR_PROCESS);
        Self(Arc::new(Inner { limit, reserved: AtomicU64::new(0) }))
    }

    /// Returns the number of reserved descriptors, and the maximum.
    #[must_use]
    pub fn reserved(&self) -> (u64, u64) {
        (self.0.reserved.load(Ordering::Relaxed), self.0.limit)
    }

    /// Reserves descriptors.
    ///
    /// # Errors
    /// Too few are available: a [`Fault`] with their number.
    pub fn reserve(&self, count: u64) -> Result<Reservation, Fault> {
        let Inner { limit, reserved } = &*self.0;
        let fits = |taken: u64| taken.checked_add(count).filter(|sum| sum <= limit);
        match reserved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => Ok(Reservation { budget: self.clone(), count }),
            Err(taken) => {
                let text = format!(
                    "the device cannot be served: it needs up to {count} file descriptors, and \
                     {taken} of {limit} are reserved for other devices"
                );
                let remedy = "raise the limit (LimitNOFILE= of the service, ulimit -Hn), allow fewer \
                              queues (--queues), or detach another device, then attach it again";
                Err(Fault::new("file-descriptors", text).with_remedy(remedy))
            }
        }
    }
}

impl Reservation {
    /// Returns the number of reserved descriptors.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }
}

/// Returns the number of open descriptors of this process, and its limit.
#[must_use]
pub fn open_now() -> (u64, u64) {
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    // Reading the directory itself uses one.
    (open.saturating_sub(1) as u64, limit)
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.0.reserved.fetch_sub(self.count, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptor_reservation_beyond_limit_fails_until_one_is_dropped() {
        let all = Descriptors::with_limit(RESERVED_FOR_PROCESS + 100);
        let first = all.reserve(60).unwrap();
        let _second = all.reserve(40).unwrap();
        let refused = all.reserve(1).unwrap_err();
        assert!(refused.text.contains("100 of 100"), "{refused}");
        assert_eq!((first.count(), all.reserved()), (60, (100, 100)));
        drop(first);
        all.reserve(60).unwrap();
        assert!(all.reserve(u64::MAX).is_err());
        assert!(Descriptors::with_limit(1).reserve(1).is_err());
    }
}
