//! A disk that is slow, and fails now and then: the same way for the same seed. How slow and how
//! often can be changed while it runs; where nothing is planned, that costs one look at a flag.

use super::clock::{Clock, sooner};
use super::lists::SpareLists;
use super::uring::Watch;
use super::wait::WaitEngine;
use super::{BlockEngine, Done, EngineError, Full, Geometry, Io, Segments};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};
use pvio_ring::shm::PoolMemory;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// How slow, and how often an operation fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FaultPlan {
    /// What every operation takes at least.
    pub latency: Duration,
    /// What it takes more at most; evenly distributed.
    pub jitter: Duration,
    /// Of a million reads, how many fail.
    pub reads: u32,
    /// Of a million writes, discards and zeroings.
    pub writes: u32,
    /// Of a million flushes.
    pub flushes: u32,
    /// What an operation that fails does so with: an error number of the operating system.
    pub errno: i32,
}

impl FaultPlan {
    /// Whether it has any effect.
    #[must_use]
    pub fn is_any(&self) -> bool {
        *self != Self { errno: self.errno, ..Self::default() }
    }
}

/// The plan of a disk, for all its queues; it can be changed at any time.
#[derive(Debug, Default)]
pub struct FaultSwitch {
    on: AtomicBool,
    plan: Mutex<FaultPlan>,
}

impl FaultSwitch {
    /// A plan that is in force from the beginning.
    #[must_use]
    pub fn new(plan: FaultPlan) -> Self {
        let this = Self::default();
        this.set(plan);
        this
    }

    /// Another plan, for what is begun from now on; under one without effect nothing that is over
    /// is held back any longer. Whoever waits for an engine of this disk must be woken.
    pub fn set(&self, plan: FaultPlan) {
        *self.plan.lock().unwrap_or_else(PoisonError::into_inner) = plan;
        self.on.store(plan.is_any(), Ordering::Release);
    }

    /// The plan now, if it has any effect.
    #[must_use]
    pub fn plan(&self) -> Option<FaultPlan> {
        let is_on = self.on.load(Ordering::Acquire);
        is_on.then(|| *self.plan.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }
}

/// An engine that is slowed down and made to fail. An operation that fails was not done.
pub struct Faults<B, E, C> {
    engine: E,
    switch: Arc<FaultSwitch>,
    clock: C,
    random: u64,
    /// By tag: when it may be over at the earliest.
    due: Vec<Duration>,
    /// What is over and not yet due.
    over: Vec<(u32, Result<(), EngineError>, Segments<B>)>,
    lists: SpareLists<B>,
}

impl<B, E, C: Clock> Faults<B, E, C> {
    /// The engine, with a plan. Two queues of a disk want two seeds.
    pub fn new(engine: E, switch: Arc<FaultSwitch>, seed: u64, clock: C) -> Self {
        let (due, over, lists) = (Vec::new(), Vec::new(), SpareLists::default());
        Self { engine, switch, clock, random: seed, due, over, lists }
    }

    /// The next number (splitmix64).
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn fails(&mut self, plan: &FaultPlan, io: Io) -> bool {
        let of_a_million = match io {
            Io::Read { .. } => plan.reads,
            Io::Write { .. } | Io::Discard { .. } | Io::WriteZeroes { .. } => plan.writes,
            Io::Flush => plan.flushes,
        };
        self.random() % 1_000_000 < u64::from(of_a_million)
    }

    fn set_due(&mut self, plan: &FaultPlan, tag: u32) {
        let jitter = u64::try_from(plan.jitter.as_nanos()).unwrap_or(u64::MAX);
        let jitter = Duration::from_nanos(self.random() % jitter.saturating_add(1).max(1));
        let tag = tag as usize;
        if self.due.len() <= tag {
            self.due.resize(tag + 1, Duration::ZERO);
        }
        if let Some(due) = self.due.get_mut(tag) {
            *due = self.clock.now() + plan.latency + jitter;
        }
    }
}

impl<B, E: BlockEngine<B>, C: Clock> BlockEngine<B> for Faults<B, E, C> {
    fn geometry(&self) -> Geometry {
        self.engine.geometry()
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        let Some(plan) = self.switch.plan() else {
            return self.engine.submit(tag, io, segments);
        };
        self.set_due(&plan, tag);
        if !self.fails(&plan, io) {
            return self.engine.submit(tag, io, segments);
        }
        let list = self.lists.list(segments);
        self.over.push((tag, Err(EngineError::Os(plan.errno)), list));
        Ok(())
    }

    fn register(&mut self, memory: PoolMemory) -> usize {
        self.engine.register(memory)
    }

    fn kick(&mut self) {
        self.engine.kick();
    }

    fn deadline(&self) -> Option<Duration> {
        if self.over.is_empty() {
            return self.engine.deadline();
        }
        let now = self.clock.now();
        let due = |tag: u32| self.due.get(tag as usize).copied().unwrap_or_default();
        let own = self.over.iter().map(|(tag, ..)| due(*tag).saturating_sub(now)).min();
        sooner(own, self.engine.deadline())
    }

    fn reap(&mut self, done: &mut Done<'_, B>) {
        if !self.switch.is_on() {
            // What was planned once is of no meaning to the next operation of that tag.
            self.due.clear();
            for (tag, result, mut segments) in self.over.drain(..) {
                done(tag, result, &mut segments);
                self.lists.keep(segments);
            }
            return self.engine.reap(done);
        }
        let Self { engine, over, lists, .. } = self;
        engine.reap(&mut |tag, result, segments| {
            let list = lists.list(segments);
            over.push((tag, result, list));
        });
        let now = self.clock.now();
        let mut i = 0;
        while let Some((tag, ..)) = self.over.get(i) {
            if self.due.get(*tag as usize).is_some_and(|due| *due > now) {
                i += 1;
                continue;
            }
            let (tag, result, mut segments) = self.over.swap_remove(i);
            done(tag, result, &mut segments);
            self.lists.keep(segments);
        }
    }
}

impl<B, E: WaitEngine<B>, C: Clock> WaitEngine<B> for Faults<B, E, C> {
    fn watch(&mut self, file: OwnedFd) -> Watch {
        self.engine.watch(file)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let own = self.deadline();
        self.engine.wait(sooner(timeout, own))
    }

    fn fired(&mut self, watch: Watch) -> bool {
        self.engine.fired(watch)
    }
}
