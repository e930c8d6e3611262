//! The interface of a queue to storage: the [`BlockEngine`] trait.
//!
//! # Model
//! A queue submits operations with a tag, in batches, and polls for completions later. An engine
//! never blocks, completes operations in any order, completes every operation exactly once, and
//! owns an operation's buffers until it returns them with the completion. An engine is used by one
//! queue on one thread. Engines of the same image do not coordinate with each other.
//!
//! # Errors
//! The failure of an operation ([`EngineError`]) does not affect other operations. An engine
//! without capacity returns [`Full`], which is back-pressure, not an error. Sectors are in range:
//! the queue has checked them.
//!
//! `mem::MemEngine` (feature `test-utils`) holds data in private memory of one queue. Engines for files, devices and
//! servers, and wrappers that limit, delay or record operations, are in `pvio-storage`.

pub mod clock;
pub mod flush;
#[cfg(feature = "test-utils")]
pub mod mem;

pub use flush::FlushState;

use alloc::boxed::Box;
use core::time::Duration;
use pvio_ring::IoSeg;
use pvio_ring::shm::PoolMemory;

/// The geometry of a disk. Sectors are of 512 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Geometry {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Bytes of a logical sector, 512 or 4096. Requests cover whole logical sectors.
    pub sector_size: u32,
    /// Bytes of a physical sector: the unit that the storage writes atomically.
    pub physical_sector_size: u32,
    /// Whether writes are rejected.
    pub read_only: bool,
    /// Discard support, `None` if the disk has none.
    pub discard: Option<Discard>,
    /// Whether the storage cannot access guest pages directly. All data then passes through bounce
    /// buffers, whatever the [policy](crate::Policy).
    pub copied: bool,
}

impl Geometry {
    /// Returns the geometry of a writable disk with this number of sectors of 512 bytes, without discard.
    #[must_use]
    pub const fn new(sectors: u64) -> Self {
        Self {
            sectors,
            sector_size: 512,
            physical_sector_size: 512,
            read_only: false,
            discard: None,
            copied: false,
        }
    }
}

/// Discard parameters of a disk, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Discard {
    /// The smallest unit that is actually released.
    pub granularity: u32,
    /// The offset of the first such unit.
    pub alignment: u32,
    /// Whether discarded data can be made unrecoverable (secure discard).
    pub secure: bool,
}

/// An operation of an engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Io {
    /// Reads from the disk into the buffers.
    Read {
        /// First sector.
        sector: u64,
    },
    /// Writes the buffers to the disk.
    Write {
        /// First sector.
        sector: u64,
    },
    /// Makes all completed writes durable.
    Flush,
    /// Discards sectors that are no longer needed.
    Discard {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u64,
        /// Whether the old data must become unrecoverable. Valid only for a disk that advertises it
        /// ([`Discard::secure`]); other disks fail the operation.
        secure: bool,
    },
    /// Makes sectors read as zeroes. Their storage may be released, as by a discard.
    WriteZeroes {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u64,
    },
}

impl Io {
    /// Returns whether the operation modifies the disk.
    #[must_use]
    pub const fn changes(self) -> bool {
        matches!(self, Self::Write { .. } | Self::Discard { .. } | Self::WriteZeroes { .. })
    }
}

/// The engine accepts no further operation until one completes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the engine can take no more operations now")]
pub struct Full;

/// The reason why an operation failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EngineError {
    /// An error of the operating system.
    #[error("the operating system reports error {0}")]
    Os(i32),
    /// The image holds less data than the operation covers: it was truncated.
    #[error("the image has become shorter")]
    Short,
    /// The engine does not support the operation.
    #[error("the operation is not supported by this image")]
    Unsupported,
    /// The storage has no space for metadata that the operation has to write; with the error of the
    /// operating system. Nothing was lost, and the operation can be repeated.
    #[error("the storage is full: error {0} of the operating system")]
    StorageFull(i32),
    /// The thread that carries out operations has ended because of a bug. No operation can complete
    /// any more.
    #[error("the disk's I/O thread has ended")]
    Lost,
}

/// Block storage of a disk. `B` is the type of the memory that operations read from and write to.
pub trait BlockEngine<B> {
    /// Returns the geometry. It does not change while a queue runs.
    fn geometry(&self) -> Geometry;

    /// Queues an operation. Takes its segments out of `segments` even if the operation fails later.
    ///
    /// # Errors
    /// [`Full`]; `segments` is unchanged then.
    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full>;

    /// Submits the queued operations; called once for each batch.
    fn kick(&mut self);

    /// Registers memory that many operations will use; called once. An engine that benefits
    /// registers it with the kernel. Returns the number of bytes registered.
    fn register(&mut self, memory: PoolMemory) -> usize {
        drop(memory);
        0
    }

    /// Returns the time from now after which [`reap`](Self::reap) must be called again without an
    /// event, because an engine that delays operations may release some then. `None` if there is no
    /// deadline.
    fn deadline(&self) -> Option<Duration> {
        None
    }

    /// Returns how often and how long operations were held because the storage was full.
    fn pauses(&self) -> Pauses {
        Pauses::default()
    }

    /// Reports each completed operation once, by tag, and returns its segments as they were
    /// submitted. Segments that the callback leaves in the list are dropped.
    fn reap(&mut self, done: &mut Done<'_, B>);
}

/// How often and how long an engine held operations because the storage was full.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pauses {
    /// Whether operations are being held.
    pub is_paused: bool,
    /// Number of times that operations began to be held.
    pub count: u64,
    /// Total time during which operations were held.
    pub time: Duration,
}

/// A callback for completed operations: tag, outcome, segments.
pub type Done<'a, B> = dyn FnMut(u32, Result<(), EngineError>, &mut Segments<B>) + 'a;

/// The segments of an operation during submission. The list is reused to avoid allocations.
pub type Segments<B> = alloc::vec::Vec<IoSeg<B>>;

impl<B, E: BlockEngine<B> + ?Sized> BlockEngine<B> for Box<E> {
    fn geometry(&self) -> Geometry {
        (**self).geometry()
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        (**self).submit(tag, io, segments)
    }

    fn register(&mut self, memory: PoolMemory) -> usize {
        (**self).register(memory)
    }

    fn kick(&mut self) {
        (**self).kick();
    }

    fn deadline(&self) -> Option<Duration> {
        (**self).deadline()
    }

    fn pauses(&self) -> Pauses {
        (**self).pauses()
    }

    fn reap(&mut self, done: &mut Done<'_, B>) {
        (**self).reap(done);
    }
}
