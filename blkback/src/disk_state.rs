//! State of a disk that its queues share: geometry, failed flushes, the budget of cached mappings.

use crate::engine::{FlushState, Geometry};
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};
use pvio_grant_table::policy::MappingBudget;

/// A disk's [`Geometry`] as all its queues see it: all but the size stays as it is for as long as
/// they run. The size is looked at once for each batch of requests.
#[derive(Debug)]
pub struct DiskState {
    /// But for the size.
    geometry: Geometry,
    sectors: AtomicU64,
    flushes: Arc<FlushState>,
    mappings: Arc<MappingBudget>,
}

impl DiskState {
    /// A disk that looks so.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        Self::with(geometry, Arc::default(), MappingBudget::unlimited())
    }

    /// A disk that looks so, whose image knows whether a flush has failed, and whose guest may have so many
    /// pages kept mapped.
    #[must_use]
    pub fn with(
        geometry: Geometry,
        flushes: Arc<FlushState>,
        mappings: Arc<MappingBudget>,
    ) -> Self {
        Self { geometry, sectors: AtomicU64::new(geometry.sectors), flushes, mappings }
    }

    /// How many pages of the guest may be kept mapped.
    #[must_use]
    pub fn mapping_budget(&self) -> &Arc<MappingBudget> {
        &self.mappings
    }

    /// Whether a flush of the disk has failed: no further one succeeds then.
    #[must_use]
    pub fn flush_state(&self) -> &Arc<FlushState> {
        &self.flushes
    }

    /// What it looks like now.
    #[must_use]
    #[inline]
    pub fn geometry(&self) -> Geometry {
        Geometry { sectors: self.sectors(), ..self.geometry }
    }

    /// Its size now, in sectors of 512 bytes.
    #[must_use]
    #[inline]
    pub fn sectors(&self) -> u64 {
        // Nothing else goes with it: an engine that has grown has done so before it is told here,
        // and one that has shrunk refuses by itself what is past its end.
        self.sectors.load(Ordering::Relaxed)
    }

    /// Changes its size; whether it was another before.
    pub fn resize(&self, sectors: u64) -> bool {
        self.sectors.swap(sectors, Ordering::Relaxed) != sectors
    }
}
