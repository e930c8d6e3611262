//! Counters and levels of an open image.

use super::Image;
use super::storage::Storage;
use crate::engine::offload::BudgetUsage;
use crate::engine::offload::ThreadPool;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use pvio_runtime::LogLimit;

impl Image {
    /// Returns the counters of rate-limited log lines, by name.
    pub fn events(&self) -> Vec<(&'static str, Arc<LogLimit>)> {
        let mut events = Vec::from([("paused", Arc::clone(self.pauses.logged()))]);
        match &self.storage {
            Storage::File { discards, .. } => {
                events.push(("buffers-unregistered", Arc::clone(&self.unregistered)));
                let failed =
                    |pool: &Arc<ThreadPool>| ("operations-failed", Arc::clone(pool.failures()));
                events.extend(discards.as_ref().map(failed));
            }
            Storage::ThreadPool(pool) => {
                events.push(("operations-failed", Arc::clone(pool.failures())))
            }
            Storage::Nbd(link) => events.extend(link.events()),
            Storage::Ram(_) | Storage::Store(_) => {}
        }
        events
    }

    /// Returns the usage of the budgets of the open image.
    #[must_use]
    pub fn usage(&self) -> &Arc<BudgetUsage> {
        &self.usage
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").field("geometry", &self.geometry).finish_non_exhaustive()
    }
}
