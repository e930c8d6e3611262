//! Storage, as a queue uses it: the [`BlockEngine`] trait.
//!
//! # Model
//! A queue hands an engine operations with a tag, in batches, and asks later which are done. An
//! engine never blocks, completes in any order, completes every operation exactly once, and owns
//! an operation's buffers until then; all of them come back with the completion. It is used by one
//! queue of one thread; engines over the same image know nothing of each other.
//!
//! # Errors
//! An operation fails by itself ([`EngineError`]) and says nothing about others. An engine that can
//! take no more says [`Full`], which is back-pressure, not an error. Sectors are in range: the
//! queue has checked that.
//!
//! [`mem::MemEngine`] keeps data in private memory of one queue. Engines over files, devices and servers,
//! and what limits, delays or records their operations, are in `pvio-storage`.

pub mod clock;
pub mod flush;
pub mod mem;

pub use flush::FlushState;

use alloc::boxed::Box;
use core::time::Duration;
use pvio_ring::IoSeg;
use pvio_ring::shm::PoolMemory;

/// What a disk looks like. Sectors are of 512 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Bytes of a logical sector, 512 or 4096: requests are whole ones.
    pub sector_size: u32,
    /// Bytes of a physical sector: what the medium writes at once.
    pub physical_sector_size: u32,
    /// Whether writing is refused.
    pub read_only: bool,
    /// What can be discarded, if anything.
    pub discard: Option<Discard>,
    /// Whether a guest's pages are nothing for the medium: all data is copied into memory of our own
    /// and out of it, whatever the [policy](crate::Policy).
    pub copied: bool,
}

/// How a disk discards, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Discard {
    /// The smallest unit that is really given back.
    pub granularity: u32,
    /// Where the first such unit begins.
    pub alignment: u32,
    /// Whether what was there can be made unrecoverable.
    pub secure: bool,
}

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Io {
    /// Fill the buffers from the disk.
    Read {
        /// First sector.
        sector: u64,
    },
    /// Write the buffers to the disk.
    Write {
        /// First sector.
        sector: u64,
    },
    /// Bring every write completed before now to the medium.
    Flush,
    /// These sectors are not needed any more.
    Discard {
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u64,
        /// What was there must not be found by anybody any more. Only for a disk that offers it
        /// ([`Discard::secure`]); others fail by it.
        secure: bool,
    },
    /// These sectors read as zeroes from now on. They may be given back like discarded ones.
    WriteZeroes {
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u64,
    },
}

impl Io {
    /// Whether the disk is changed by it.
    #[must_use]
    pub const fn changes(self) -> bool {
        matches!(self, Self::Write { .. } | Self::Discard { .. } | Self::WriteZeroes { .. })
    }
}

/// The engine can take nothing more before something is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the engine can take no more operations now")]
pub struct Full;

/// Why an operation failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EngineError {
    /// An error of the operating system.
    #[error("the operating system reports error {0}")]
    Os(i32),
    /// Less than was asked for, and no more to be had: the image was truncated.
    #[error("the image is shorter than it was")]
    Short,
    /// This engine cannot do that.
    #[error("not supported by this image")]
    Unsupported,
    /// Who does the operations has ended, by a mistake in it: none will be done any more.
    #[error("the thread that does the disk's operations has ended")]
    Lost,
}

/// Keeps the data of a disk. `B` is the memory operations move data to and from.
pub trait BlockEngine<B> {
    /// What the disk looks like; never changes while a queue runs.
    fn geometry(&self) -> Geometry;

    /// Queues an operation. Its segments are taken out of `segments` even when it fails later.
    ///
    /// # Errors
    /// [`Full`]; nothing was taken then.
    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full>;

    /// Submits what was queued: once a batch.
    fn kick(&mut self);

    /// Registers memory that many operations will use, once. An engine that gains by it registers the memory
    /// with the kernel. Returns how many bytes it registered.
    fn register(&mut self, memory: PoolMemory) -> usize {
        drop(memory);
        0
    }

    /// Returns when to [`reap`](Self::reap) again without an event, as a time from now: an engine that delays
    /// operations may release some then. `None` if it has no deadline.
    fn deadline(&self) -> Option<Duration> {
        None
    }

    /// Reports every operation that is done, each once, by tag, and gives its segments back, as
    /// they were submitted. What is left in the list is dropped afterwards.
    fn reap(&mut self, done: &mut Done<'_, B>);
}

/// Who is told of operations that are done: tag, outcome, segments.
pub type Done<'a, B> = dyn FnMut(u32, Result<(), EngineError>, &mut Segments<B>) + 'a;

/// The segments of an operation on their way into an engine; reused, so that none is allocated.
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

    fn reap(&mut self, done: &mut Done<'_, B>) {
        (**self).reap(done);
    }
}
