//! Scheduling of disks that share limits.
//!
//! Each disk has a virtual clock that advances by the cost of its operations. The disk with the
//! lowest clock goes first. A disk that was idle starts at the current position of the others: it
//! neither accumulates credit nor has to catch up.

use super::limits::{Buckets, Lane, ThrottleLimits};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use pvio_runtime::EventFd;
use pvio_runtime::sync::atomic::{AtomicBool, Ordering};
use pvio_runtime::sync::{Mutex, MutexGuard};
use std::sync::PoisonError;
use std::time::Duration;

/// Polling interval of a disk that waits for its turn, in case no notification arrives.
const TURN_CHECK_INTERVAL: Duration = Duration::from_millis(1);
/// Time for which the others wait for a disk to take its turn: its worker may be busy or gone.
const TURN_TIMEOUT: Duration = Duration::from_millis(5);

#[derive(Debug, Default)]
struct Member {
    /// Its virtual clock, as a time at the limits' rates.
    used: Duration,
    /// Number of its queues with waiting operations, by lane.
    waiting: [usize; 2],
    /// When the others began to wait for it to take its turn.
    awaited: Option<Duration>,
    /// Eventfds that wake its queues.
    wake: Vec<Weak<EventFd>>,
}

impl Member {
    fn is_waiting(&self) -> bool {
        self.waiting.iter().any(|queues| *queues > 0)
    }

    fn wake(&mut self) {
        self.wake.retain(|wake| match wake.upgrade() {
            Some(wake) => {
                wake.notify();
                true
            }
            None => false,
        });
    }
}

#[derive(Debug, Default)]
struct State {
    limits: ThrottleLimits,
    buckets: Buckets,
    members: Vec<Option<Member>>,
    /// Virtual clock of the disk that went last.
    at: Duration,
}

/// Limits of one disk, or of several that share them. They can be changed at any time.
#[derive(Debug, Default)]
pub struct Throttles {
    limited: AtomicBool,
    state: Mutex<State>,
}

impl Throttles {
    /// Creates limits with full buckets.
    #[must_use]
    pub fn new(limits: ThrottleLimits) -> Self {
        let this = Self::default();
        this.set(limits);
        this
    }

    /// Replaces the limits, also for delayed operations. Buckets are full, and debts are dropped.
    pub fn set(&self, limits: ThrottleLimits) {
        let mut state = self.state();
        state.limits = limits;
        state.buckets = Buckets::full(&limits);
        self.limited.store(limits.any(), Ordering::Release);
        state.members.iter_mut().flatten().for_each(Member::wake);
    }

    /// Returns the current limits.
    #[must_use]
    pub fn limits(&self) -> ThrottleLimits {
        self.state().limits
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A disk's membership in shared limits, for all its queues.
#[derive(Debug)]
pub struct SharedLimit {
    throttles: Arc<Throttles>,
    index: usize,
    /// Whether nothing is delayed, because the disk's queues are stopping.
    lifted: AtomicBool,
}

impl SharedLimit {
    /// Adds a disk to the limits. All members have equal shares.
    #[must_use]
    pub fn new(throttles: Arc<Throttles>) -> Self {
        let mut state = throttles.state();
        let member = Some(Member { used: state.at, ..Member::default() });
        let index = match state.members.iter().position(Option::is_none) {
            Some(free) => {
                if let Some(place) = state.members.get_mut(free) {
                    *place = member;
                }
                free
            }
            None => {
                state.members.push(member);
                state.members.len() - 1
            }
        };
        drop(state);
        Self { throttles, index, lifted: AtomicBool::new(false) }
    }

    /// Sets whether delayed operations are released immediately, because the disk's queues are
    /// stopping and must not wait as long as the limits require. Released operations are charged: a
    /// disk that is attached again finds its buckets empty. Other disks that share the limits are
    /// not delayed by that; this disk comes after them in the order.
    pub fn lift(&self, whether: bool) {
        if self.lifted.swap(whether, Ordering::Relaxed) != whether && whether {
            self.wake();
        }
    }

    /// Returns the shared limits.
    #[must_use]
    pub fn throttles(&self) -> &Arc<Throttles> {
        &self.throttles
    }

    /// Wakes its queues, because a condition that they wait for has changed.
    pub fn wake(&self) {
        self.with(|_, member| member.wake());
    }

    /// Returns whether there are any limits.
    pub(super) fn is_limited(&self) -> bool {
        self.throttles.limited.load(Ordering::Relaxed)
    }

    pub(super) fn add(&self, wake: &Arc<EventFd>) {
        self.with(|_, member| member.wake.push(Arc::downgrade(wake)));
    }

    /// Sets whether a queue has waiting operations in this lane.
    pub(super) fn set_waiting(&self, lane: Lane, whether: bool) {
        let mut state = self.throttles.state();
        let (at, several) = (state.at, state.members.len() > 1);
        if let Some(member) = state.members.get_mut(self.index).and_then(Option::as_mut) {
            if whether && !member.is_waiting() {
                member.used = member.used.max(at);
            }
            if let Some(queues) = member.waiting.get_mut(lane as usize) {
                *queues = if whether { *queues + 1 } else { queues.saturating_sub(1) };
            }
            member.awaited = None;
        }
        if several && !whether {
            // Another disk may have let this one go first.
            let others = state.members.iter_mut().enumerate().filter(|(i, _)| *i != self.index);
            others
                .filter_map(|(_, m)| m.as_mut())
                .filter(|m| m.is_waiting())
                .for_each(Member::wake);
        }
    }

    /// Returns the time that an operation must wait; `None` if it may proceed, and is then charged.
    pub(super) fn pay(&self, now: Duration, lane: Lane, bytes: usize) -> Option<Duration> {
        let mut state = self.throttles.state();
        let State { buckets, members, at, .. } = &mut *state;
        if self.lifted.load(Ordering::Relaxed) {
            let is_alone = members.iter().flatten().nth(1).is_none();
            let cost = if is_alone {
                buckets.take_without_wait(now, lane, bytes)
            } else {
                buckets.cost(lane, bytes)
            };
            if let Some(member) = members.get_mut(self.index).and_then(Option::as_mut) {
                member.used = member.used.saturating_add(cost);
            }
            return None;
        }
        let wait = buckets.wait(now, lane);
        if !wait.is_zero() {
            return Some(wait);
        }
        let used = members.get(self.index).and_then(Option::as_ref).map(|m| m.used)?;
        if members.len() > 1 {
            let ready = Lane::ALL.map(|lane| buckets.wait(now, lane).is_zero());
            let others = members.iter_mut().enumerate().filter(|(i, _)| *i != self.index);
            let ahead = others.filter_map(|(_, member)| member.as_mut()).find(|member| {
                let could = ready.iter().zip(member.waiting).any(|(ready, n)| *ready && n > 0);
                let patient = member.awaited.is_none_or(|since| now <= since + TURN_TIMEOUT);
                could && patient && member.used < used
            });
            if let Some(ahead) = ahead {
                if ahead.awaited.is_none() {
                    ahead.awaited = Some(now);
                    ahead.wake();
                }
                return Some(TURN_CHECK_INTERVAL);
            }
        }
        let cost = buckets.take(now, lane, bytes);
        if let Some(member) = members.get_mut(self.index).and_then(Option::as_mut) {
            member.used = member.used.max(if member.is_waiting() { Duration::ZERO } else { *at });
            *at = (*at).max(member.used);
            member.used = member.used.saturating_add(cost);
            member.awaited = None;
        }
        None
    }

    fn with(&self, work: impl FnOnce(&Buckets, &mut Member)) {
        let mut state = self.throttles.state();
        let State { buckets, members, .. } = &mut *state;
        if let Some(member) = members.get_mut(self.index).and_then(Option::as_mut) {
            work(buckets, member);
        }
    }
}

impl Drop for SharedLimit {
    fn drop(&mut self) {
        if let Some(place) = self.throttles.state().members.get_mut(self.index) {
            *place = None;
        }
    }
}

/// Model of queues that wait for their limits, in every interleaving (`cargo xtask test loom`). A
/// queue sleeps until it is woken; no time passes.
#[cfg(all(loom, test))]
mod model {
    use super::super::limits::Quota;
    use super::*;
    use loom::thread;
    use pvio_runtime::BucketRate;

    const NOW: Duration = Duration::from_secs(1);

    fn check(model: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(4);
        builder.check(model);
    }

    fn limits() -> ThrottleLimits {
        ThrottleLimits::of_all(Some(BucketRate::per_second(1, 1)), None)
    }

    /// Releases an operation as a [`Throttle`](super::super::Throttle) does, without its deadline.
    fn release(share: &SharedLimit, wake: &EventFd) {
        let mut is_waiting = false;
        while share.is_limited() && share.pay(NOW, Lane::Reads, 512).is_some() {
            if !is_waiting {
                share.set_waiting(Lane::Reads, true);
                is_waiting = true;
            }
            wake.wait();
            wake.clear();
        }
        if is_waiting {
            share.set_waiting(Lane::Reads, false);
        }
    }

    fn queue(share: &Arc<SharedLimit>) -> thread::JoinHandle<()> {
        let (share, wake) = (Arc::clone(share), Arc::new(EventFd::new().unwrap()));
        share.add(&wake);
        thread::spawn(move || release(&share, &wake))
    }

    #[test]
    fn changed_limits_reach_queues_that_wait() {
        for new in [ThrottleLimits::default(), limits()] {
            check(move || {
                let throttles = Arc::new(Throttles::new(limits()));
                let share = Arc::new(SharedLimit::new(Arc::clone(&throttles)));
                // The bucket is empty from now on.
                assert_eq!(share.pay(NOW, Lane::Reads, 512), None);
                let queue = queue(&share);
                throttles.set(new);
                queue.join().unwrap();
            });
        }
    }

    #[test]
    fn lifted_limits_release_all_queues_of_a_disk() {
        check(|| {
            let throttles = Arc::new(Throttles::new(limits()));
            let share = Arc::new(SharedLimit::new(throttles));
            assert_eq!(share.pay(NOW, Lane::Reads, 512), None);
            let queues = [queue(&share), queue(&share)];
            share.lift(true);
            for queue in queues {
                queue.join().unwrap();
            }
        });
    }

    #[test]
    fn disks_that_share_limits_pay_once_for_each_operation() {
        let all = Quota { operations: Some(BucketRate::per_second(1, 3)), bytes: None };
        check(move || {
            let throttles = Arc::new(Throttles::new(ThrottleLimits { all, ..limits() }));
            let disks = [(); 2].map(|()| Arc::new(SharedLimit::new(Arc::clone(&throttles))));
            let queues = disks.map(|share| {
                thread::spawn(move || {
                    (0..2).filter(|_| share.pay(NOW, Lane::Reads, 1).is_none()).count()
                })
            });
            let paid: usize = queues.map(|queue| queue.join().unwrap()).iter().sum();
            assert!((2..=3).contains(&paid), "{paid}");
        });
    }
}
