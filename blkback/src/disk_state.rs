//! State of a disk that its queues share: geometry, failed flushes, the budget of cached mappings.

use crate::engine::{FlushState, Geometry};
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};
use pvio_grant_table::policy::MappingBudget;

/// A disk's [`Geometry`] as all its queues see it. Everything except the size is constant while the
/// queues run. A queue reads the size once for each batch of requests.
#[derive(Debug)]
pub struct DiskState {
    /// The geometry; its size is superseded by `sectors`.
    geometry: Geometry,
    sectors: AtomicU64,
    flushes: Arc<FlushState>,
    mappings: Arc<MappingBudget>,
}

impl DiskState {
    /// Creates the state of a disk with this geometry.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        Self::with(geometry, Arc::default(), MappingBudget::unlimited())
    }

    /// Creates the state of a disk with this geometry, the flush state of its image, and the budget
    /// of cached mappings of its guest.
    #[must_use]
    pub fn with(
        geometry: Geometry,
        flushes: Arc<FlushState>,
        mappings: Arc<MappingBudget>,
    ) -> Self {
        Self { geometry, sectors: AtomicU64::new(geometry.sectors), flushes, mappings }
    }

    /// Returns the budget of cached mappings of the guest's pages.
    #[must_use]
    pub fn mapping_budget(&self) -> &Arc<MappingBudget> {
        &self.mappings
    }

    /// Returns whether a flush of the disk has failed. No further flush succeeds then.
    #[must_use]
    pub fn flush_state(&self) -> &Arc<FlushState> {
        &self.flushes
    }

    /// Returns the current geometry.
    #[must_use]
    #[inline]
    pub fn geometry(&self) -> Geometry {
        Geometry { sectors: self.sectors(), ..self.geometry }
    }

    /// Returns the current size in sectors of 512 bytes.
    #[must_use]
    #[inline]
    pub fn sectors(&self) -> u64 {
        // Relaxed is enough, because no other data depends on it: an engine that has grown did so
        // before the new size was stored here, and one that has shrunk rejects operations beyond
        // its end.
        self.sectors.load(Ordering::Relaxed)
    }

    /// Sets the size in sectors of 512 bytes. Returns whether it changed.
    pub fn resize(&self, sectors: u64) -> bool {
        self.sectors.swap(sectors, Ordering::Relaxed) != sectors
    }
}
