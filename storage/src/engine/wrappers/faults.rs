//! Fault injection: delays operations and makes some fail, reproducibly by a seed. The plan can be
//! changed at runtime. Without a plan the cost is one load.

use crate::engine::clock::{Clock, sooner};
use crate::engine::lists::SpareLists;
use crate::engine::{BlockEngine, Done, EngineError, Full, Geometry, Io, Segments};
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_ring::shm::PoolMemory;
use pvio_runtime::{Setting, SettingReader, WaitPoint, Wrapper};
use std::time::Duration;

/// Delays and failure rates.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FaultPlan {
    /// Minimum duration of every operation.
    pub latency: Duration,
    /// Maximum additional duration, uniformly distributed.
    pub jitter: Duration,
    /// Failing reads, per million.
    pub reads: u32,
    /// Failing writes, discards and zeroing operations, per million.
    pub writes: u32,
    /// Failing flushes, per million.
    pub flushes: u32,
    /// Error number of the operating system with which operations fail.
    pub errno: i32,
}

impl FaultPlan {
    /// Returns whether the plan has any effect.
    #[must_use]
    pub fn is_any(&self) -> bool {
        *self != Self { errno: self.errno, ..Self::default() }
    }
}

/// The fault plan of a disk, shared by its queues. It can be changed at any time.
#[derive(Debug, Default)]
pub struct FaultSwitch(Arc<Setting<FaultPlan>>);

impl FaultSwitch {
    /// Creates a switch with an initial plan.
    #[must_use]
    pub fn new(plan: FaultPlan) -> Self {
        Self(Setting::new(plan))
    }

    /// Sets the plan for operations submitted from now on. A plan without effect also releases
    /// delayed completions. The caller must wake the threads that wait for engines of this disk.
    pub fn set(&self, plan: FaultPlan) {
        self.0.set(plan);
    }

    /// Returns the current plan, if it has any effect.
    #[must_use]
    pub fn plan(&self) -> Option<FaultPlan> {
        Some(*self.0.get()).filter(FaultPlan::is_any)
    }
}

/// An engine with delays and failures. An operation that fails was not executed.
pub struct Faults<B, E, C> {
    engine: E,
    plan: SettingReader<FaultPlan>,
    clock: C,
    random: u64,
    /// By tag: the earliest time of completion.
    due: Vec<Duration>,
    /// Completed operations that are not due.
    over: Vec<(u32, Result<(), EngineError>, Segments<B>)>,
    lists: SpareLists<B>,
}

impl<B, E, C: Clock> Faults<B, E, C> {
    /// Wraps an engine. Queues of the same disk should have different seeds.
    pub fn new(engine: E, switch: &FaultSwitch, seed: u64, clock: C) -> Self {
        let (due, over, lists) = (Vec::new(), Vec::new(), SpareLists::default());
        let plan = SettingReader::new(&switch.0);
        Self { engine, plan, clock, random: seed, due, over, lists }
    }

    /// Returns the current plan, if it has any effect.
    fn plan(&mut self) -> Option<FaultPlan> {
        self.plan.refresh();
        Some(*self.plan.get()).filter(FaultPlan::is_any)
    }

    /// Returns the next pseudorandom number (splitmix64).
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
        let Some(plan) = self.plan() else {
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
        if self.plan().is_none() {
            // Delays of an earlier plan must not apply to a later operation with the same tag.
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

impl<B, E: WaitPoint, C> Wrapper for Faults<B, E, C> {
    type Inner = E;

    fn inner(&mut self) -> &mut E {
        &mut self.engine
    }
}
