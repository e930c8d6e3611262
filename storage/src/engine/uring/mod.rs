//! An engine for a file or block device, through io_uring.
//!
//! The engine is also the worker's **only wait point**: event channels and the stop signal are
//! polled through the same io_uring ([`WaitPoint`]), so that one system call submits a
//! batch and waits for the first event.
//!
//! A disk that is [polled](IoMode::IoPoll) has a second io_uring, for reads and writes within its
//! device's [transfer limits](TransferLimits). While any are in flight, a wait polls both io_urings
//! and does not sleep.

mod io_mode;
mod limits;

pub use io_mode::IoMode;
pub use limits::TransferLimits;

use super::{BlockEngine, Done, EngineError, Full, Geometry, Io, Segments};
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_ring::shm::PoolMemory;
use pvio_runtime::{Backoff, Done as Over, FileId, IoBuf, LogLimit, PrivateBuf, whole};
use pvio_runtime::{DisabledUring, MAX_WATCHES, Operations, Uring, WaitPoint, Watch, Watches};
use rustix::fs::{OFlags, fcntl_getfl};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Operations of the io_uring of polled reads and writes.
const TRANSFERS: Operations = Operations::READ.and(Operations::WRITE).and(Operations::REGISTER);
/// Operations of the other io_uring, which also has the transfers that are not polled.
const OPERATIONS: Operations =
    TRANSFERS.and(Operations::SYNC).and(Operations::ALLOCATE).and(Operations::POLL);
/// Tokens from this value on are watches; smaller tokens are tags.
const WATCH: u64 = 1 << 32;
/// An engine for a file or block device through io_uring. Must be used on the thread that created
/// it.
pub struct UringEngine<B: IoBuf> {
    uring: Uring<B>,
    image: FileId,
    /// The io_uring of polled reads and writes, if there are any.
    polled: Option<Polled<B>>,
    geometry: Geometry,
    /// Whether the image bypasses the page cache (`O_DIRECT`).
    direct: bool,
    /// The operation of each tag and its progress.
    operations: Vec<Operation>,
    watches: Watches,
    /// Operations to continue: short transfers and interrupted operations.
    rest: Vec<(u32, Segments<B>)>,
    /// Interrupted operations to continue at a later time.
    paused: Vec<(Instant, u32, Segments<B>)>,
    /// Counts pages that could not be registered. Rate-limited, because a guest can start any
    /// number of sessions.
    unregistered: Arc<LogLimit>,
}

struct Polled<B: IoBuf> {
    uring: Uring<B>,
    image: FileId,
    limits: TransferLimits,
}

#[derive(Clone, Copy)]
struct Operation {
    io: Io,
    /// Bytes transferred so far.
    moved: u32,
    /// Bytes still to transfer; 0 for operations without data.
    left: u32,
    /// Backoff after consecutive interruptions without progress.
    backoff: Backoff,
}

impl Operation {
    fn new(io: Io, left: u32) -> Self {
        Self { io, moved: 0, left, backoff: Backoff::default() }
    }
}

impl<B: IoBuf> UringEngine<B> {
    /// Creates an engine for `depth` operations at a time over an open image.
    ///
    /// # Errors
    /// The error of `io_uring_setup`.
    pub fn new(image: OwnedFd, geometry: Geometry, depth: u32) -> io::Result<Self> {
        Self::with(image, geometry, depth, IoMode::Normal, None)
    }

    /// Creates an engine with another I/O mode. Its io_urings hold `fence` until the kernel has
    /// finished their last operation.
    ///
    /// # Errors
    /// The error of `io_uring_setup`, or the system's error if it has no free descriptor.
    pub fn with(
        image: OwnedFd,
        geometry: Geometry,
        depth: u32,
        mode: IoMode,
        fence: Option<BorrowedFd<'_>>,
    ) -> io::Result<Self> {
        let polled = match mode {
            IoMode::IoPoll => Some((DisabledUring::polled(depth)?, image.try_clone()?)),
            IoMode::Normal | IoMode::SqPoll => None,
        };
        let polled = polled.map(|(uring, image)| Polled::over(uring, image, fence)).transpose()?;
        let direct = fcntl_getfl(&image).is_ok_and(|flags| flags.contains(OFlags::DIRECT));
        let mut uring = ring(depth.saturating_add(MAX_WATCHES as u32), mode)?;
        let image = add_image(&mut uring, image, fence)?;
        Ok(Self {
            uring: uring.enable(OPERATIONS)?,
            image,
            polled,
            geometry,
            direct,
            operations: (0..depth).map(|_| Operation::new(Io::Flush, 0)).collect(),
            watches: Watches::new(WATCH),
            rest: Vec::new(),
            paused: Vec::new(),
            unregistered: Arc::default(),
        })
    }

    /// Counts pages that cannot be registered in `unregistered`, which also limits the log lines.
    #[must_use]
    pub fn logging(mut self, unregistered: &Arc<LogLimit>) -> Self {
        self.unregistered = Arc::clone(unregistered);
        self
    }

    /// Polls for all transfers within these limits of the device.
    #[must_use]
    pub fn polling_within(mut self, limits: TransferLimits) -> Self {
        if let Some(polled) = &mut self.polled {
            polled.limits = limits;
        }
        self
    }

    /// Returns an error unless this kernel supports the mode.
    ///
    /// # Errors
    /// The error of `io_uring_setup`.
    pub fn probe(mode: IoMode) -> io::Result<()> {
        match mode {
            IoMode::IoPoll => DisabledUring::<B>::polled(1)?.enable(TRANSFERS).map(drop),
            IoMode::Normal | IoMode::SqPoll => ring::<B>(1, mode)?.enable(OPERATIONS).map(drop),
        }
    }

    /// Submits an operation or its remainder.
    fn go(&mut self, tag: u32, segments: &mut Segments<B>) -> Result<(), Full> {
        let Some(&operation) = self.operations.get(tag as usize) else { return Err(Full) };
        let Operation { io, moved, left, .. } = operation;
        let (skip, token) = (moved as usize, u64::from(tag));
        let bytes = |sectors: u64| sectors.wrapping_mul(512);
        let at = |sector| bytes(sector).wrapping_add(u64::from(moved));
        let (at, write) = match io {
            Io::Read { sector } => (at(sector), false),
            Io::Write { sector } => (at(sector), true),
            other => {
                let (mode, sector, sectors) = match other {
                    Io::Discard { sector, sectors, secure: true } => (UNKNOWN, sector, sectors),
                    Io::Discard { sector, sectors, .. } => (PUNCH_HOLE, sector, sectors),
                    Io::WriteZeroes { sector, sectors } => (ZERO_RANGE, sector, sectors),
                    _ => return self.uring.sync_data(self.image, token).map_err(|_| Full),
                };
                let (at, len) = (bytes(sector), bytes(sectors));
                return self.uring.allocate(self.image, mode, at, len, token).map_err(|_| Full);
            }
        };
        let (uring, image) = match &mut self.polled {
            Some(polled) if polled.limits.take(at, left.into(), segments) => {
                (&mut polled.uring, polled.image)
            }
            _ => (&mut self.uring, self.image),
        };
        let begun = if write {
            uring.write_rest(image, at, skip, segments.drain(..), token)
        } else {
            uring.read_rest(image, at, skip, segments.drain(..), token)
        };
        begun.map_err(|_| Full)
    }

    /// Returns the time from now until the next paused operation continues.
    fn next_attempt(&self) -> Option<Duration> {
        let due = self.paused.iter().map(|(due, ..)| *due).min()?;
        Some(due.saturating_duration_since(Instant::now()))
    }
}

impl<B: IoBuf> WaitPoint for UringEngine<B> {
    fn watch(&mut self, file: OwnedFd) -> io::Result<Watch> {
        self.watches.add(&mut self.uring, file)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.watches.arm(&mut self.uring);
        if let Some(polled) = self.polled.as_mut().filter(|polled| polled.uring.busy() > 0) {
            return polled.wait_with(&mut self.uring, timeout);
        }
        if !self.uring.has_done() {
            self.uring.wait(timeout)?;
        }
        Ok(())
    }

    fn fired(&mut self, watch: Watch) -> bool {
        self.watches.fired(watch)
    }
}

impl<B: IoBuf> Polled<B> {
    fn over(
        mut uring: DisabledUring<B>,
        image: OwnedFd,
        fence: Option<BorrowedFd<'_>>,
    ) -> io::Result<Self> {
        let image = add_image(&mut uring, image, fence)?;
        let uring = uring.with_registered_files_only().enable(TRANSFERS)?;
        Ok(Self { uring, image, limits: TransferLimits::default() })
    }

    /// Polls both io_urings until one has a completion or the timeout expires.
    fn wait_with(&mut self, other: &mut Uring<B>, timeout: Option<Duration>) -> io::Result<()> {
        other.flush()?;
        self.uring.flush()?;
        let begin = Instant::now();
        while !other.poll()? && !self.uring.poll()? {
            if timeout.is_some_and(|time| begin.elapsed() >= time) {
                break;
            }
            core::hint::spin_loop();
        }
        Ok(())
    }
}

impl UringEngine<PrivateBuf> {
    /// Reads once from a byte offset in the way of a polled disk.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if polling is not supported; otherwise the error of `io_uring_setup` or of the
    /// read.
    pub fn try_polled(image: OwnedFd, at: u64, len: usize) -> io::Result<()> {
        let Polled { mut uring, image, .. } = Polled::over(DisabledUring::polled(1)?, image, None)?;
        let begun = uring.read(image, at, [whole(PrivateBuf::page_aligned(len))], 0);
        let mut result = begun.map(|()| 0).map_err(|_| EAGAIN);
        while uring.busy() > 0 {
            uring.wait(None)?;
            uring.reap(|done| result = done.result);
        }
        result.map(drop).map_err(io::Error::from_raw_os_error)
    }
}

fn add_image<B: IoBuf>(
    uring: &mut DisabledUring<B>,
    image: OwnedFd,
    fence: Option<BorrowedFd<'_>>,
) -> io::Result<FileId> {
    match fence {
        None => Ok(uring.add_main_file(image)),
        Some(fence) => uring.add_fenced_file(image, fence),
    }
}

/// Time without operations after which the kernel's submission thread sleeps.
const IDLE: Duration = Duration::from_millis(50);

fn ring<B: IoBuf>(slots: u32, mode: IoMode) -> io::Result<DisabledUring<B>> {
    match mode {
        IoMode::Normal | IoMode::IoPoll => DisabledUring::new(slots),
        IoMode::SqPoll => DisabledUring::with_kernel_thread(slots, IDLE),
    }
}

impl<B: IoBuf> BlockEngine<B> for UringEngine<B> {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        let Some(operation) = self.operations.get_mut(tag as usize) else { return Err(Full) };
        if self.uring.free_slots() == 0 {
            return Err(Full);
        }
        let left = match io {
            Io::Read { .. } | Io::Write { .. } => segments.iter().map(|s| s.len).sum::<usize>(),
            _ => 0,
        };
        *operation = Operation::new(io, left as u32);
        self.go(tag, segments)
    }

    /// With the page cache the kernel does not pin the buffers, so registration has no benefit.
    fn register(&mut self, memory: PoolMemory) -> usize {
        if !self.direct {
            return 0;
        }
        let uring = self.polled.as_mut().map_or(&mut self.uring, |polled| &mut polled.uring);
        let len = memory.len();
        match uring.register(memory) {
            Ok(()) => len,
            Err(error) => {
                if let Some(unlogged) = self.unregistered.admit() {
                    let remedy = "raise RLIMIT_MEMLOCK";
                    tracing::warn!(%error, bytes = len, remedy, unlogged, "buffers cannot be registered: the disk is served without");
                }
                0
            }
        }
    }

    fn kick(&mut self) {
        // A failed submission leaves the entries in the ring; `wait` retries and reports the error.
        let _ = self.uring.flush();
        if let Some(polled) = &mut self.polled {
            let _ = polled.uring.flush();
        }
    }

    fn deadline(&self) -> Option<Duration> {
        self.next_attempt()
    }

    fn reap(&mut self, done: &mut Done<'_, B>) {
        let Self { uring, polled, operations, watches, rest, paused, .. } = self;
        let mut settle = |d: Over<'_, B>| {
            let Ok(tag) = u32::try_from(d.token) else {
                watches.complete(d.token);
                return;
            };
            let Some(operation) = operations.get_mut(tag as usize) else { return };
            match d.result {
                Err(e) if is_transient(e) => match operation.backoff.pause() {
                    None => done(tag, Err(EngineError::Os(e)), d.segments),
                    Some(Duration::ZERO) => rest.push((tag, d.segments.drain(..).collect())),
                    Some(pause) => {
                        let due = Instant::now() + pause;
                        paused.push((due, tag, d.segments.drain(..).collect()));
                    }
                },
                Err(e) if e == EOPNOTSUPP => done(tag, Err(EngineError::Unsupported), d.segments),
                Err(e) => done(tag, Err(EngineError::Os(e)), d.segments),
                Ok(n) if n >= operation.left => done(tag, Ok(()), d.segments),
                Ok(0) => done(tag, Err(EngineError::Short), d.segments),
                Ok(n) => {
                    operation.moved += n;
                    operation.left -= n;
                    operation.backoff.reset();
                    rest.push((tag, d.segments.drain(..).collect()));
                }
            }
        };
        uring.reap(&mut settle);
        if let Some(polled) = polled {
            // The kernel completes polled operations only when it is called; `wait` reports errors.
            let _ = polled.uring.poll();
            polled.uring.reap(&mut settle);
        }
        if !self.paused.is_empty() {
            let now = Instant::now();
            let due = self.paused.extract_if(.., |(due, ..)| *due <= now);
            self.rest.extend(due.map(|(_, tag, segments)| (tag, segments)));
        }
        for (tag, mut segments) in core::mem::take(&mut self.rest) {
            if self.go(tag, &mut segments).is_err() {
                done(tag, Err(EngineError::Os(EAGAIN)), &mut segments);
            }
        }
    }
}

/// `FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE`.
const PUNCH_HOLE: i32 = 2 | 1;
/// `FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE`: unlike with a hole, the range stays allocated.
const ZERO_RANGE: i32 = 16 | 1;
/// An invalid mode for secure discard of a file: the kernel returns `EOPNOTSUPP` and does nothing,
/// which is right because copies of the data may exist elsewhere on the device.
const UNKNOWN: i32 = 1 << 30;
const EAGAIN: i32 = 11;
const EOPNOTSUPP: i32 = 95;

/// Returns whether an operation must be retried: it was interrupted (`EINTR`, or the codes with
/// which file systems request a restart of the system call, `ERESTARTSYS` to
/// `ERESTART_RESTARTBLOCK`), or was temporarily impossible.
const fn is_transient(error: i32) -> bool {
    matches!(error, 4 | EAGAIN | 512..=514 | 516)
}

#[cfg(test)]
mod tests;
