//! Pauses a disk whose storage is full, instead of reporting an I/O error to the guest.
//!
//! A write, discard or zeroing that fails with `ENOSPC` or `EDQUOT` is held and repeated, at first
//! after [`FIRST_PAUSE`], then after twice the time, up to [`LAST_PAUSE`]. So is a flush that could not
//! write metadata ([`EngineError::StorageFull`]). A flush whose data was lost is never repeated: it
//! would succeed.
//!
//! # Order
//! Reads continue. Changes and flushes that are submitted during a pause wait until all failed
//! operations have completed, and are submitted in order then. Of the failed operations, one is
//! repeated to find out whether there is space again, then all, flushes after the others.

use crate::engine::clock::{Clock, sooner};
use crate::engine::lists::SpareLists;
use crate::engine::{BlockEngine, Done, EngineError, Full, Geometry, Io, Pauses, Segments};
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_ring::shm::PoolMemory;
use pvio_runtime::{LogLimit, WaitPoint, Wrapper};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// Time until a failed operation is repeated for the first time.
pub const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Maximum time between two repetitions.
pub const LAST_PAUSE: Duration = Duration::from_secs(1);

const ENOSPC: i32 = 28;
const EDQUOT: i32 = 122;

/// The pauses of a disk, shared by its queues.
#[derive(Default)]
pub struct PauseState {
    /// Whether failed operations are reported instead of being held.
    reports: AtomicBool,
    /// Whether the session is about to end.
    abandoned: AtomicBool,
    /// Number of queues that hold operations.
    paused: AtomicUsize,
    listener: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// The image in log lines.
    image: String,
    logged: Arc<LogLimit>,
}

impl PauseState {
    /// Creates the state of a disk that holds failed operations. `image` is its name in log lines.
    #[must_use]
    pub fn new(image: impl Into<String>) -> Self {
        Self { image: image.into(), ..Self::default() }
    }

    /// Returns the rate limit of the log lines.
    #[must_use]
    pub const fn logged(&self) -> &Arc<LogLimit> {
        &self.logged
    }

    /// Sets whether failed operations are held. Those that are held otherwise complete with an error
    /// when their engine is next reaped; the caller wakes the threads that wait for engines.
    pub fn set_holds(&self, holds: bool) {
        self.reports.store(!holds, Ordering::Release);
    }

    /// Returns whether failed operations are held.
    #[must_use]
    pub fn holds(&self) -> bool {
        !self.reports.load(Ordering::Acquire)
    }

    /// Notes whether the session is about to end, so that no later process completes its operations.
    pub fn set_abandoned(&self, abandoned: bool) {
        self.abandoned.store(abandoned, Ordering::Release);
    }

    /// Returns whether the session is about to end.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// Returns whether any queue holds operations.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire) > 0
    }

    /// Calls `listener` whenever a pause begins or ends, on the thread of a queue. Only the first
    /// listener is used.
    pub fn on_change(&self, listener: impl Fn() + Send + Sync + 'static) {
        let _ = self.listener.set(Box::new(listener));
    }

    fn begin(&self, error: EngineError) {
        if self.paused.fetch_add(1, Ordering::AcqRel) == 0 {
            if let Some(unlogged) = self.logged.admit() {
                let (image, remedy) = (&self.image, "free space, or enlarge the storage");
                tracing::warn!(image, %error, remedy, unlogged, "the storage is full: the disk is paused");
            }
            self.notify();
        }
    }

    fn end(&self, time: Duration) {
        if self.paused.fetch_sub(1, Ordering::AcqRel) == 1 {
            let image = &self.image;
            tracing::info!(image, ?time, "the disk is not paused any more");
            self.notify();
        }
    }

    fn notify(&self) {
        if let Some(listener) = self.listener.get() {
            listener();
        }
    }
}

/// An operation that is held.
struct Held<B> {
    tag: u32,
    io: Io,
    segments: Segments<B>,
}

/// The operation of a tag in flight.
#[derive(Clone, Copy)]
struct InFlight {
    io: Io,
    /// Whether it has failed before.
    repeated: bool,
}

/// A pause in progress.
#[derive(Clone, Copy)]
struct Pause {
    begin: Duration,
    /// The time of the next attempt, and the time that was waited for it.
    due: Duration,
    wait: Duration,
    /// Whether an attempt was made and its result was not considered so far.
    attempted: bool,
    /// Whether an operation of the attempt has not failed again.
    progress: bool,
}

/// An engine that holds operations while the storage is full.
pub struct Pausing<B, E, C> {
    engine: E,
    state: Arc<PauseState>,
    clock: C,
    /// By tag.
    operations: Vec<InFlight>,
    /// Operations that failed, with their errors; flushes last.
    failed: VecDeque<(Held<B>, EngineError)>,
    /// Operations that were submitted during the pause.
    later: VecDeque<Held<B>>,
    /// Number of failed operations that are in flight again.
    repeated: usize,
    pause: Option<Pause>,
    /// The pauses that have ended.
    ended: Pauses,
    lists: SpareLists<B>,
}

impl<B, E: BlockEngine<B>, C: Clock> Pausing<B, E, C> {
    /// Wraps an engine.
    pub fn new(engine: E, state: Arc<PauseState>, clock: C) -> Self {
        Self {
            engine,
            state,
            clock,
            operations: Vec::new(),
            failed: VecDeque::new(),
            later: VecDeque::new(),
            repeated: 0,
            pause: None,
            ended: Pauses::default(),
            lists: SpareLists::default(),
        }
    }

    fn begin(
        &mut self,
        tag: u32,
        operation: InFlight,
        segments: &mut Segments<B>,
    ) -> Result<(), Full> {
        let index = tag as usize;
        if self.operations.len() <= index {
            self.operations.resize(index + 1, operation);
        }
        if let Some(place) = self.operations.get_mut(index) {
            *place = operation;
        }
        self.engine.submit(tag, operation.io, segments)
    }

    /// Collects completions, and holds operations that failed because the storage is full.
    fn collect(&mut self, done: &mut Done<'_, B>) {
        let Self { engine, state, operations, failed, repeated, lists, pause, .. } = self;
        engine.reap(&mut |tag, result, segments| {
            let Some(&operation) = operations.get(tag as usize) else {
                return done(tag, result, segments);
            };
            let InFlight { io, repeated: again } = operation;
            *repeated = repeated.saturating_sub(again.into());
            let full = result.err().filter(|error| is_full(io, *error) && state.holds());
            let Some(error) = full else {
                if let Some(pause) = pause.as_mut().filter(|_| again) {
                    pause.progress = true;
                }
                return done(tag, result, segments);
            };
            let held = Held { tag, io, segments: lists.list(segments) };
            let is_flush = |(held, _): &(Held<B>, _)| held.io == Io::Flush;
            let place = failed.iter().position(is_flush).filter(|_| io != Io::Flush);
            failed.insert(place.unwrap_or(failed.len()), (held, error));
        });
    }

    /// Submits what can be submitted now. Returns whether there was any.
    fn advance(&mut self) -> bool {
        let now = self.clock.now();
        let Some((_, error)) = self.failed.front() else {
            return self.repeated == 0 && self.pause.is_some() && self.resume(now);
        };
        let Some(pause) = &mut self.pause else {
            self.state.begin(*error);
            let (due, wait) = (now + FIRST_PAUSE, FIRST_PAUSE);
            let (attempted, progress) = (false, false);
            self.pause = Some(Pause { begin: now, due, wait, attempted, progress });
            return false;
        };
        if self.repeated > 0 {
            return false;
        }
        if core::mem::take(&mut pause.attempted) {
            pause.wait = match pause.progress {
                true => FIRST_PAUSE,
                false => (pause.wait * 2).min(LAST_PAUSE),
            };
            pause.due = now + pause.wait;
        }
        // One is enough to find out whether there is space.
        let most = match core::mem::take(&mut pause.progress) {
            true => usize::MAX,
            false if now >= pause.due => 1,
            false => return false,
        };
        pause.attempted = true;
        self.repeat(most)
    }

    /// Submits failed operations again.
    fn repeat(&mut self, most: usize) -> bool {
        while self.repeated < most
            && let Some((mut held, error)) = self.failed.pop_front()
        {
            let operation = InFlight { io: held.io, repeated: true };
            let waits = held.io == Io::Flush && self.repeated > 0;
            if waits || self.begin(held.tag, operation, &mut held.segments).is_err() {
                self.failed.push_front((held, error));
                break;
            }
            self.repeated += 1;
            self.lists.keep(held.segments);
        }
        self.repeated > 0
    }

    /// Ends the pause, and submits the operations that waited for its end.
    fn resume(&mut self, now: Duration) -> bool {
        let mut any = false;
        while let Some(mut held) = self.later.pop_front() {
            let operation = InFlight { io: held.io, repeated: false };
            if self.begin(held.tag, operation, &mut held.segments).is_err() {
                self.later.push_front(held);
                return any;
            }
            any = true;
            self.lists.keep(held.segments);
        }
        if let Some(pause) = self.pause.take() {
            let time = now.saturating_sub(pause.begin);
            self.ended.count += 1;
            self.ended.time += time;
            self.state.end(time);
        }
        any
    }

    /// Completes failed operations with their errors.
    fn report(&mut self, done: &mut Done<'_, B>) {
        for (mut held, error) in self.failed.drain(..) {
            done(held.tag, Err(error), &mut held.segments);
            self.lists.keep(held.segments);
        }
    }
}

/// Returns whether an operation that failed with this error can be repeated when there is space.
const fn is_full(io: Io, error: EngineError) -> bool {
    match error {
        EngineError::StorageFull(_) => true,
        // A flush with this error has lost data.
        EngineError::Os(ENOSPC | EDQUOT) => io.changes(),
        _ => false,
    }
}

impl<B, E, C> Drop for Pausing<B, E, C> {
    fn drop(&mut self) {
        if self.pause.is_some() {
            self.state.end(Duration::ZERO);
        }
    }
}

impl<B, E: BlockEngine<B>, C: Clock> BlockEngine<B> for Pausing<B, E, C> {
    fn geometry(&self) -> Geometry {
        self.engine.geometry()
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        if self.pause.is_some() && !matches!(io, Io::Read { .. }) {
            let segments = self.lists.list(segments);
            self.later.push_back(Held { tag, io, segments });
            return Ok(());
        }
        self.begin(tag, InFlight { io, repeated: false }, segments)
    }

    fn register(&mut self, memory: PoolMemory) -> usize {
        self.engine.register(memory)
    }

    fn kick(&mut self) {
        self.engine.kick();
    }

    fn deadline(&self) -> Option<Duration> {
        let waits = self.pause.filter(|_| self.repeated == 0);
        let own = waits.map(|pause| pause.due.saturating_sub(self.clock.now()));
        sooner(own, self.engine.deadline())
    }

    fn pauses(&self) -> Pauses {
        let Pauses { count, time, .. } = self.ended;
        match &self.pause {
            None => self.ended,
            Some(pause) => Pauses {
                is_paused: true,
                count: count + 1,
                time: time + self.clock.now().saturating_sub(pause.begin),
            },
        }
    }

    fn reap(&mut self, done: &mut Done<'_, B>) {
        self.collect(done);
        while !self.failed.is_empty() || self.pause.is_some() {
            if !self.state.holds() {
                self.report(done);
            }
            if !self.advance() {
                break;
            }
            self.engine.kick();
            // A synchronous engine does not notify of its completions.
            self.collect(done);
        }
    }
}

impl<B, E: WaitPoint, C> Wrapper for Pausing<B, E, C> {
    type Inner = E;

    fn inner(&mut self) -> &mut E {
        &mut self.engine
    }
}
