//! What a guest has set up over its rings, noted for whoever takes its session over.

use super::groups::Groups;
use super::hash::HashConfig;
use super::siblings::Waker;
use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use core::time::Duration;
use crossbeam_queue::ArrayQueue;
use pvio_xenbus::handshake::vif::KeptHash;

/// Who is told of changes is told this often at most: a guest can make as many as it likes.
pub const NOTED: Duration = Duration::from_millis(100);

/// The notes of a vif. Its queues write them, and go by one clock; who made them reads.
pub struct Notes {
    /// The latest alone counts.
    hash: ArrayQueue<Arc<HashConfig>>,
    /// Of the hash.
    changes: AtomicU32,
    /// All changes that were told of.
    told: AtomicU32,
    /// When the next may be, in milliseconds.
    next: AtomicU64,
    wake: Waker,
}

impl Notes {
    /// `wake` is called when something has changed.
    #[must_use]
    pub fn new(wake: Waker) -> Self {
        Self {
            hash: ArrayQueue::new(1),
            changes: AtomicU32::new(0),
            told: AtomicU32::new(0),
            next: AtomicU64::new(0),
            wake,
        }
    }

    /// What the guest has hashed and steered, if that has changed since last asked: `None` within for
    /// nothing.
    #[must_use]
    pub fn take_hash(&self) -> Option<Option<KeptHash>> {
        self.hash.pop().map(|config| config.to_keep())
    }

    pub(super) fn set_hash(&self, config: &HashConfig) {
        drop(self.hash.force_push(Arc::new(config.clone())));
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Tells of what has changed, unless that was done just now.
    pub(super) fn check(&self, groups: &Groups, now: Duration) {
        let now = millis(now);
        let changes = self.changes(groups);
        if changes != self.told.load(Ordering::Relaxed) && now >= self.next.load(Ordering::Relaxed)
        {
            self.next.store(now.saturating_add(millis(NOTED)), Ordering::Relaxed);
            self.told.store(changes, Ordering::Relaxed);
            (self.wake)();
        }
    }

    /// When [`check`](Self::check) is to be called at the latest.
    pub(super) fn deadline(&self, groups: &Groups) -> Option<Duration> {
        let news = self.changes(groups) != self.told.load(Ordering::Relaxed);
        news.then(|| Duration::from_millis(self.next.load(Ordering::Relaxed)))
    }

    fn changes(&self, groups: &Groups) -> u32 {
        self.changes.load(Ordering::Acquire).wrapping_add(groups.changes())
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl fmt::Debug for Notes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notes").field("changes", &self.changes).finish_non_exhaustive()
    }
}
