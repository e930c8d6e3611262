//! Levels and limits of the jobs of a disk, readable by other threads.

use super::DATA_MOST;
use super::buffers::DATA_LEAST;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicUsize, Ordering};

/// Usage of the budgets of an open disk: tables in memory, and the jobs that its queues have
/// submitted to threads or to a server. Values that are read together may stem from different
/// points in time.
#[derive(Debug, Default)]
pub struct BudgetUsage {
    /// Bytes of tables, and their limit.
    tables: (u64, u64),
    jobs: AtomicUsize,
    bytes: AtomicUsize,
    jobs_limit: AtomicUsize,
    bytes_limit: AtomicUsize,
}

impl BudgetUsage {
    /// Returns the usage of a disk without queues. `tables`: bytes of tables in memory, and their limit.
    #[must_use]
    pub fn new(tables: (u64, u64)) -> Self {
        Self { tables, ..Self::default() }
    }

    /// Returns usage and limit of each budget, by name.
    #[must_use]
    pub fn budgets(&self) -> [(&'static str, u64, u64); 3] {
        let get = |n: &AtomicUsize| n.load(Ordering::Relaxed) as u64;
        [
            ("table-bytes", self.tables.0, self.tables.1),
            ("jobs", get(&self.jobs), get(&self.jobs_limit)),
            ("job-bytes", get(&self.bytes), get(&self.bytes_limit)),
        ]
    }
}

/// Share of one queue in a [`BudgetUsage`]. Dropping it subtracts the share.
#[derive(Debug)]
pub(super) struct QueueUsage {
    of: Arc<BudgetUsage>,
    jobs: usize,
    bytes: usize,
    jobs_limit: usize,
}

impl QueueUsage {
    /// Adds the limits of a queue with at most `depth` operations.
    pub fn new(of: Arc<BudgetUsage>, depth: u32) -> Self {
        // Each job either has a buffer or is the only job of its operation.
        let jobs_limit = (DATA_MOST / DATA_LEAST).saturating_add(depth as usize);
        of.jobs_limit.fetch_add(jobs_limit, Ordering::Relaxed);
        of.bytes_limit.fetch_add(DATA_MOST, Ordering::Relaxed);
        Self { of, jobs: 0, bytes: 0, jobs_limit }
    }

    /// Updates the jobs in flight and the bytes of buffers of the queue.
    pub fn set(&mut self, jobs: usize, bytes: usize) {
        let change = |total: &AtomicUsize, before: &mut usize, now: usize| {
            if *before != now {
                // Wraps like the atomic addition, so that a decrease subtracts.
                total.fetch_add(now.wrapping_sub(*before), Ordering::Relaxed);
                *before = now;
            }
        };
        change(&self.of.jobs, &mut self.jobs, jobs);
        change(&self.of.bytes, &mut self.bytes, bytes);
    }
}

impl Drop for QueueUsage {
    fn drop(&mut self) {
        self.set(0, 0);
        self.of.jobs_limit.fetch_sub(self.jobs_limit, Ordering::Relaxed);
        self.of.bytes_limit.fetch_sub(DATA_MOST, Ordering::Relaxed);
    }
}
