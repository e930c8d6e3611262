//! Limits on how many operations and bytes a disk may have done in a second.
//!
//! A token bucket for each limit, shared by the disk's queues: it fills at the rate, holds at most
//! the burst, and an operation goes when there is anything in every bucket, taking out what it
//! costs. One that costs more than there is leaves a debt that the next wait for, so that requests
//! of any size pass and the rate holds all the same. Flushes cost nothing and are never held up.

use super::clock::Clock;
use super::uring::Watch;
use super::wait::{WaitEngine, sooner};
use super::{BlockEngine, Done, Full, Geometry, Io, Segments};
use alloc::collections::VecDeque;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Billionths of a token, so that any span of time fills in whole numbers.
const WHOLE: i128 = 1_000_000_000;

/// How much a second, and how much at once after a time of rest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rate {
    /// A second; at least 1.
    pub per_second: u64,
    /// At once; at least 1.
    pub burst: u64,
}

/// What a disk may have done. What is `None` has no limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Limits {
    /// Reads, writes and discards.
    pub operations: Option<Rate>,
    /// Bytes read and written.
    pub bytes: Option<Rate>,
}

#[derive(Debug, Default)]
struct Bucket {
    rate: Option<Rate>,
    level: i128,
    filled: Duration,
}

impl Bucket {
    fn full(rate: Option<Rate>, now: Duration) -> Self {
        Self { rate, level: rate.map_or(0, |r| i128::from(r.burst) * WHOLE), filled: now }
    }

    /// Fills it; how long it must still fill before anything is in it.
    fn fill(&mut self, now: Duration) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        let nanos = now.saturating_sub(self.filled).as_nanos();
        self.filled = self.filled.max(now);
        let more =
            i128::try_from(nanos).unwrap_or(i128::MAX).saturating_mul(rate.per_second.into());
        let most = i128::from(rate.burst.max(1)) * WHOLE;
        self.level = self.level.saturating_add(more).min(most);
        if self.level > 0 {
            return Duration::ZERO;
        }
        let nanos =
            (1 - self.level + i128::from(rate.per_second) - 1) / i128::from(rate.per_second.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn take(&mut self, tokens: u64) {
        self.level -= i128::from(tokens) * WHOLE;
    }
}

#[derive(Debug, Default)]
struct State {
    limits: Limits,
    operations: Bucket,
    bytes: Bucket,
    /// What ends the waits of engines that hold operations back.
    wake: Vec<Weak<OwnedFd>>,
}

/// The limits of a disk, for all its queues. They can be changed at any time.
#[derive(Debug, Default)]
pub struct Throttles {
    state: Mutex<State>,
}

impl Throttles {
    /// Limits, with full buckets.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        let this = Self::default();
        this.set(limits);
        this
    }

    /// Other limits, from now on, for what is held back too. Full buckets and no debts.
    pub fn set(&self, limits: Limits) {
        let mut state = self.state();
        state.limits = limits;
        // The engines have a clock, which is not asked here; a full bucket needs no filling.
        state.operations = Bucket::full(limits.operations, Duration::ZERO);
        state.bytes = Bucket::full(limits.bytes, Duration::ZERO);
        state.wake.retain(|wake| match wake.upgrade() {
            Some(wake) => {
                let _ = rustix::io::write(&wake, &1u64.to_ne_bytes());
                true
            }
            None => false,
        });
    }

    /// The limits now.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.state().limits
    }

    /// How long an operation must wait; if not at all, it is paid for.
    fn pay(&self, now: Duration, io: Io, bytes: usize) -> Option<Duration> {
        let mut state = self.state();
        let wait = state.operations.fill(now).max(state.bytes.fill(now));
        if !wait.is_zero() {
            return Some(wait);
        }
        debug_assert!(io != Io::Flush, "flushes cost nothing");
        state.operations.take(1);
        state.bytes.take(bytes as u64);
        None
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An engine whose operations keep to limits.
pub struct Throttle<B, E, C> {
    engine: E,
    throttles: Arc<Throttles>,
    clock: C,
    /// In the order they came.
    held: VecDeque<(u32, Io, Segments<B>)>,
    /// How long the first of them must wait, as of when this was asked.
    next: Option<(Duration, Duration)>,
    lists: Vec<Segments<B>>,
    wake: Arc<OwnedFd>,
    woken: Watch,
}

impl<B, E: WaitEngine<B>, C: Clock> Throttle<B, E, C> {
    /// Holds an engine to limits. It takes one of the engine's watches. All engines that share limits
    /// must share the clock.
    ///
    /// # Errors
    /// What the system says when it has no descriptor to give.
    pub fn new(mut engine: E, throttles: Arc<Throttles>, clock: C) -> io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let woken = engine.watch(wake.try_clone()?);
        throttles.state().wake.push(Arc::downgrade(&wake));
        Ok(Self {
            engine,
            throttles,
            clock,
            held: VecDeque::new(),
            next: None,
            lists: Vec::new(),
            wake,
            woken,
        })
    }

    /// Lets go what may go now; whether there was anything.
    fn release(&mut self) -> bool {
        self.next = None;
        let now = self.clock.now();
        let mut any = false;
        while let Some((tag, io, mut segments)) = self.held.pop_front() {
            let bytes = segments.iter().map(|s| s.len).sum();
            if let Some(wait) = self.throttles.pay(now, io, bytes) {
                self.held.push_front((tag, io, segments));
                self.next = Some((now, wait));
                break;
            }
            if self.engine.submit(tag, io, &mut segments).is_err() {
                // It is paid for already; once more is little.
                self.held.push_front((tag, io, segments));
                break;
            }
            any = true;
            self.lists.push(segments);
        }
        if any {
            self.engine.kick();
        }
        any
    }
}

impl<B, E: WaitEngine<B>, C: Clock> BlockEngine<B> for Throttle<B, E, C> {
    fn geometry(&self) -> Geometry {
        self.engine.geometry()
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        if io == Io::Flush {
            return self.engine.submit(tag, io, segments);
        }
        let mut list = self.lists.pop().unwrap_or_default();
        list.append(segments);
        self.held.push_back((tag, io, list));
        Ok(())
    }

    fn kick(&mut self) {
        self.release();
        self.engine.kick();
    }

    fn look_again(&self) -> Option<Duration> {
        let own = self
            .next
            .map(|(then, wait)| wait.saturating_sub(self.clock.now().saturating_sub(then)));
        sooner(own, self.engine.look_again())
    }

    fn reap(&mut self, done: &mut Done<'_, B>) {
        self.engine.reap(done);
        if self.engine.fired(self.woken) {
            let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
        }
        // An engine that does all at once tells nobody that it has.
        while !self.held.is_empty() && self.release() {
            self.engine.reap(done);
        }
    }
}

impl<B, E: WaitEngine<B>, C: Clock> WaitEngine<B> for Throttle<B, E, C> {
    fn watch(&mut self, file: OwnedFd) -> Watch {
        self.engine.watch(file)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let own = self.look_again();
        self.engine.wait(sooner(timeout, own))
    }

    fn fired(&mut self, watch: Watch) -> bool {
        self.engine.fired(watch)
    }
}
