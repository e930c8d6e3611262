//! Limits on operations and bytes per second, of one disk or of several together.
//!
//! Each limit is a token bucket. It fills at the rate up to the burst. An operation is released
//! when every bucket has a positive level, and takes its cost from each. If it costs more than is
//! available, it leaves a debt that delays the next operations, so that requests of any size pass
//! and the rate still holds. Flushes are free and never delayed. Reads do not wait for writes, nor
//! writes for reads.
//!
//! [`Throttles`] are the limits, a [`SharedLimit`] is a disk's membership in them, and [`Throttle`]
//! wraps the engine of each of its queues. Without limits the cost is one check of a flag.

mod limits;
mod share;

pub use limits::{Quota, ThrottleLimits};
pub use share::{SharedLimit, Throttles};

use crate::engine::clock::{Clock, sooner};
use crate::engine::lists::SpareLists;
use crate::engine::wait::WaitEngine;
use crate::engine::{BlockEngine, Done, Full, Geometry, Io, Pauses, Segments};
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use limits::Lane;
use pvio_ring::shm::PoolMemory;
use pvio_runtime::{EventFd, WaitPoint, Watch, Wrapper};
use std::io;
use std::time::Duration;

/// A rate-limited engine.
pub struct Throttle<B, E, C> {
    engine: E,
    share: Arc<SharedLimit>,
    clock: C,
    /// Delayed operations by lane, in the order of submission.
    held: [VecDeque<(u32, Io, Segments<B>)>; 2],
    /// Whether each lane is registered as waiting in the shared limit.
    waiting: [bool; 2],
    /// The time of the last computation, and the time that the first operation must wait from then.
    next: Option<(Duration, Duration)>,
    lists: SpareLists<B>,
    wake: Arc<EventFd>,
    woken: Watch,
}

impl<B, E: WaitEngine<B>, C: Clock> Throttle<B, E, C> {
    /// Wraps an engine. Uses one of the engine's watches. All engines that share limits must share
    /// the clock.
    ///
    /// # Errors
    /// The system's error if it has no free descriptor.
    pub fn new(mut engine: E, share: Arc<SharedLimit>, clock: C) -> io::Result<Self> {
        let wake = Arc::new(EventFd::new()?);
        let woken = engine.watch(wake.to_fd()?)?;
        share.add(&wake);
        Ok(Self {
            engine,
            share,
            clock,
            held: [VecDeque::new(), VecDeque::new()],
            waiting: [false; 2],
            next: None,
            lists: SpareLists::default(),
            wake,
            woken,
        })
    }

    fn is_empty(&self) -> bool {
        self.held.iter().all(VecDeque::is_empty)
    }

    /// Releases operations that are due. Returns whether there were any.
    fn release(&mut self) -> bool {
        self.next = None;
        if self.is_empty() {
            return false;
        }
        let now = self.clock.now();
        let mut any = false;
        for (n, lane) in Lane::ALL.into_iter().enumerate() {
            any |= self.release_lane(now, n, lane);
        }
        if any {
            self.engine.kick();
        }
        any
    }

    fn release_lane(&mut self, now: Duration, n: usize, lane: Lane) -> bool {
        let Self { engine, share, held, waiting, next, lists, .. } = self;
        let (Some(held), Some(waiting)) = (held.get_mut(n), waiting.get_mut(n)) else {
            return false;
        };
        let mut any = false;
        while let Some((tag, io, mut segments)) = held.pop_front() {
            let bytes = segments.iter().map(|s| s.len).sum();
            let wait = if share.is_limited() { share.pay(now, lane, bytes) } else { None };
            if let Some(wait) = wait {
                held.push_front((tag, io, segments));
                let wait = next.map_or(wait, |(_, other)| other.min(wait));
                *next = Some((now, wait));
                break;
            }
            if engine.submit(tag, io, &mut segments).is_err() {
                // The operation was already charged; it is charged again later, which is a small
                // error.
                held.push_front((tag, io, segments));
                break;
            }
            any = true;
            lists.keep(segments);
        }
        let has_some = !held.is_empty();
        if *waiting != has_some {
            *waiting = has_some;
            share.set_waiting(lane, has_some);
        }
        any
    }
}

impl<B, E, C> Drop for Throttle<B, E, C> {
    fn drop(&mut self) {
        for (lane, waiting) in Lane::ALL.into_iter().zip(self.waiting) {
            if waiting {
                self.share.set_waiting(lane, false);
            }
        }
    }
}

impl<B, E: WaitEngine<B>, C: Clock> BlockEngine<B> for Throttle<B, E, C> {
    fn geometry(&self) -> Geometry {
        self.engine.geometry()
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        let free = !self.share.is_limited() && self.is_empty();
        if free || io == Io::Flush {
            return self.engine.submit(tag, io, segments);
        }
        let [reads, writes] = &mut self.held;
        let list = self.lists.list(segments);
        let held = if io.changes() { writes } else { reads };
        held.push_back((tag, io, list));
        Ok(())
    }

    fn register(&mut self, memory: PoolMemory) -> usize {
        self.engine.register(memory)
    }

    fn kick(&mut self) {
        self.release();
        self.engine.kick();
    }

    fn deadline(&self) -> Option<Duration> {
        let own = self
            .next
            .map(|(then, wait)| wait.saturating_sub(self.clock.now().saturating_sub(then)));
        sooner(own, self.engine.deadline())
    }

    fn pauses(&self) -> Pauses {
        self.engine.pauses()
    }

    fn reap(&mut self, done: &mut Done<'_, B>) {
        loop {
            self.engine.reap(done);
            // After every reap: a watch that has fired is not armed again.
            if self.engine.fired(self.woken) {
                self.wake.clear();
            }
            // A synchronous engine does not notify of its completions.
            if self.is_empty() || !self.release() {
                break;
            }
        }
    }
}

impl<B, E: WaitPoint, C> Wrapper for Throttle<B, E, C> {
    type Inner = E;

    fn inner(&mut self) -> &mut E {
        &mut self.engine
    }
}
