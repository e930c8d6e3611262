//! One queue of a vif: a transmit ring, a receive ring, and the state machine between them and a
//! port.
//!
//! [`Queue::poll`] does the outstanding work, up to a budget, and never blocks. When nothing is
//! left, [`Queue::final_check`] requests notifications from the guest and checks once more. Only if
//! it returns `false` may the caller wait, for the queue's [channels](Queue::channels) and the port.
//!
//! A queue that has failed stays failed: its rings are not read again.
#![forbid(unsafe_code)]

mod access;
mod attach;
mod control;
mod features;
mod groups;
mod hash;
mod limit;
mod messages;
mod packet;
mod queue_set;
mod record;
mod refs;
mod ring;
mod rx;
mod setup;
mod staged;
mod tx;

pub use crate::wire::SEGMENT_MIN;
pub use access::{Policy, UnknownPolicy};
pub use features::Features;
pub use groups::{GROUPS_MAX, Groups};
pub use hash::HASH_MAPPING_MAX;
pub use limit::RateLimit;
pub use messages::Headroom;
pub use queue_set::{LENT_MAX, QueueSet, Waker};
pub use record::{SessionRefs, VifRecord};
pub use refs::{ControlRefs, EventPorts, QueueRefs};
pub use rx::{BACKLOG_BYTES, BACKLOG_PACKETS, DRAIN, DRAIN_UNSEEN, STALL};
pub use staged::STAGED_MAX;

use crate::fault::QueueError;
use crate::port::{NetPort, PacketBuf};
use crate::stats::{Held, Stats};
use access::{PageAccess, Pages};
use alloc::sync::Arc;
use alloc::vec::Vec;
use control::Control;
use core::time::Duration;
use pvio_event_channel::{BackendPlatform, EventChannel};
use pvio_grant_table::policy::CachedMappings;
use pvio_grant_table::{CopyOp, DomId};
use pvio_ring::shm::{HeapMemory, Part, SharedMemory};
use queue_set::Link;

/// Largest number of packets that one copy call and one publication cover.
const BATCH: usize = 64;

/// Work done by one [`Queue::poll`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Packets taken from the guest, including dropped ones.
    pub tx: usize,
    /// Packets taken from the port or delivered to the guest, including dropped ones.
    pub rx: usize,
}

impl Progress {
    /// Whether any work was done.
    #[must_use]
    pub const fn any(self) -> bool {
        self.tx != 0 || self.rx != 0
    }
}

/// Change of whether the guest posts receive buffers, as [`Queue::tick`] reports it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reception {
    /// The guest has posted no buffers for [`STALL`] although packets waited. Packets should no
    /// longer be sent to it.
    Stalled,
    /// The guest posts buffers again.
    Ready,
}

/// One queue of a vif. `B` is the port's packet buffer, `R` the memory of the in-flight record.
pub struct Queue<P: BackendPlatform, B, R = HeapMemory> {
    platform: P,
    peer: DomId,
    features: Features,
    access: PageAccess<P>,
    tx: tx::Tx<P::Mapping, B, Part<R>>,
    rx: rx::Rx<P::Mapping, B, Part<R>>,
    tx_channel: P::Channel,
    /// `None` if the rings share a channel.
    rx_channel: Option<P::Channel>,
    stats: Arc<Stats>,
    _counted: Counted,
    limit: Arc<RateLimit>,
    groups: Arc<Groups<Part<R>>>,
    headroom: Arc<Headroom>,
    /// `None` if the queue is standalone.
    link: Option<queue_set::Link<B>>,
    /// `Some` only for the first queue.
    control: Option<control::Control<P::Mapping, P::Channel, Part<R>>>,
    staged: Option<staged::Staged<P::Mapping>>,
    now: Duration,
    failed: Option<QueueError>,
}

/// Current usage of a queue, in its counters. Dropping it sets the usage to 0.
struct Counted(Arc<Stats>);

impl Counted {
    fn new(stats: &Arc<Stats>) -> Self {
        stats.limit(Held { packets: BACKLOG_PACKETS, bytes: BACKLOG_BYTES, staged: STAGED_MAX });
        Self(Arc::clone(stats))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.hold(Held::default());
        self.0.limit(Held::default());
    }
}

impl<P: BackendPlatform, B: PacketBuf, R: SharedMemory + Clone> Queue<P, B, R> {
    /// Sets how the guest's pages are accessed; the default is [`Policy::Copy`].
    pub fn set_policy(&mut self, policy: Policy) {
        self.access = policy.into();
    }

    /// Accesses the guest's pages through cached mappings. That requires the guest's promise, as
    /// described at [`GrantsStay`](pvio_grant_table::policy::GrantsStay), for every page: a vif's
    /// negotiation gives it for staged pages only. It is meant for frontends that are known to
    /// grant the same pages for the whole session.
    pub fn use_cached_mappings(&mut self, mappings: CachedMappings<P>) {
        self.access = PageAccess::Cached(mappings);
    }

    /// Returns the limit of the guest's transmit rate, which may be changed at any time. A packet
    /// counts with its size on the wire: all frames after segmentation, with headers.
    #[must_use]
    pub const fn limit(&self) -> &Arc<RateLimit> {
        &self.limit
    }

    /// Makes this queue use a limit that it shares with other queues of the vif.
    pub fn share_limit(&mut self, limit: &Arc<RateLimit>) {
        self.limit = Arc::clone(limit);
    }

    /// Returns the multicast groups whose packets the guest receives.
    #[must_use]
    pub const fn groups(&self) -> &Arc<Groups<Part<R>>> {
        &self.groups
    }

    /// Moves up to `budget` packets in each direction, in batches, and notifies the guest at most
    /// once for each channel. Never blocks. If nothing was done, there was no work.
    ///
    /// # Errors
    /// A [`QueueError`], which is permanent.
    pub fn poll<N: NetPort<Buf = B>>(
        &mut self,
        port: &mut N,
        budget: usize,
    ) -> Result<Progress, QueueError> {
        self.guarded(|queue| queue.run(port, budget))
    }

    /// Requests notifications from the guest and checks once more for work. Called before waiting;
    /// the caller waits only if it returns `false`.
    ///
    /// # Errors
    /// A [`QueueError`], which is permanent.
    pub fn final_check(&mut self) -> Result<bool, QueueError> {
        self.guarded(|queue| {
            let rings = queue.tx.final_check()? || queue.rx.final_check()?;
            let control = queue.control.as_mut().map_or(Ok(false), Control::final_check)?;
            Ok(rings || control || queue.link.as_ref().is_some_and(Link::final_check))
        })
    }

    /// Whether there is work in the rings, without a request for notifications: for busy polling.
    ///
    /// # Errors
    /// A [`QueueError`], which is permanent.
    pub fn has_work(&mut self) -> Result<bool, QueueError> {
        self.guarded(|queue| {
            let control = queue.control.as_mut().map_or(Ok(false), Control::has_work)?;
            let messages = control || queue.link.as_ref().is_some_and(Link::has_work);
            Ok(messages || queue.tx.has_work()? || queue.rx.has_work()?)
        })
    }

    /// Takes the pending events of every channel. Called after one of them woke the caller and
    /// before [`poll`](Self::poll).
    ///
    /// # Errors
    /// A [`QueueError`], which is permanent.
    pub fn take_events(&mut self) -> Result<(), QueueError> {
        self.guarded(|queue| {
            for channel in queue.channels() {
                channel.take()?;
            }
            Ok(())
        })
    }

    /// Signals that the port may have free buffers again.
    pub fn unblock(&mut self) {
        self.tx.unblock();
    }

    /// Sets the time (monotonic, with any origin), at which packets start to wait from now on.
    pub fn set_clock(&mut self, now: Duration) {
        self.now = now;
    }

    /// Returns the time at which [`tick`](Self::tick) has to be called, by the queue's clock, or
    /// `None` if no timer is armed.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        let (tx, rx) = (self.tx.deadline(), self.rx.deadline(&self.features));
        tx.into_iter().chain(rx).min()
    }

    /// Drops packets that have waited for [`DRAIN`], and reports whether the guest receives
    /// ([`STALL`]).
    ///
    /// # Errors
    /// A [`QueueError`], which is permanent.
    pub fn tick<N: NetPort<Buf = B>>(
        &mut self,
        port: &mut N,
    ) -> Result<Option<Reception>, QueueError> {
        self.guarded(|queue| {
            let Self { rx, features, now, stats, link, .. } = queue;
            rx.expire(features, *now, port, link.as_ref(), stats);
            let reception = rx.reception(features, *now)?;
            queue.count_held();
            Ok(reception)
        })
    }

    /// Returns the event channels that wake this queue.
    pub fn channels(&self) -> impl Iterator<Item = &P::Channel> {
        let control = self.control.as_ref().map(Control::channel);
        core::iter::once(&self.tx_channel).chain(&self.rx_channel).chain(control)
    }

    /// Returns the negotiated features.
    #[must_use]
    pub const fn features(&self) -> &Features {
        &self.features
    }

    /// Returns the queue's counters.
    #[must_use]
    pub const fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// Returns the number of requests of both rings that will get an error response, because too
    /// many processes ended while they were in flight.
    #[must_use]
    pub fn given_up(&self) -> u64 {
        self.tx.given_up().saturating_add(self.rx.given_up())
    }

    /// Returns the number of packets that wait for the guest to post buffers.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.rx.backlog()
    }

    /// Drops the packets that wait for the guest to post buffers. Called when the session ends.
    pub fn drop_backlog<N: NetPort<Buf = B>>(&mut self, port: &mut N) {
        self.rx.drop_backlog(port, self.link.as_ref(), &self.stats);
        self.count_held();
    }

    fn run<N: NetPort<Buf = B>>(
        &mut self,
        port: &mut N,
        budget: usize,
    ) -> Result<Progress, QueueError> {
        let mut progress = Progress::default();
        if self.link.is_some() {
            self.handle_messages()?;
        }
        let Self { platform, access, staged, peer, features, tx, rx, stats, link, .. } = self;
        let (limit, groups, now) = (&*self.limit, &*self.groups, self.now);
        let (staged, headroom) = (staged.as_ref(), self.headroom.get());
        let pages = Pages { platform: &*platform, access: &*access, staged, stats };
        let context = Context { pages, peer: *peer, features, stats, limit, groups, headroom, now };
        loop {
            let left = budget.saturating_sub(progress.tx);
            let sent = tx.step(&context, port, left)?;
            let left = budget.saturating_sub(progress.rx);
            let received = rx.step(&context, port, link.as_mut(), left)?;
            progress.tx = progress.tx.saturating_add(sent);
            progress.rx = progress.rx.saturating_add(received);
            if sent < BATCH && received < BATCH {
                break;
            }
        }
        if progress.tx > 0 {
            // Before the responses: a packet that is recorded as complete is never sent again.
            port.flush();
        }
        self.count_held();
        self.notify()?;
        Ok(progress)
    }

    fn count_held(&self) {
        let (packets, bytes) = self.rx.waiting();
        self.stats.hold(Held { packets, bytes, staged: self.staged() });
    }

    /// Publishes the responses of both rings and notifies the guest if it requested that.
    fn notify(&mut self) -> Result<(), QueueError> {
        let (tx, rx) = (self.tx.publish(), self.rx.publish());
        let on_rx = if rx { self.rx_channel.as_ref() } else { None };
        let on_tx = tx || (rx && self.rx_channel.is_none());
        for channel in on_tx.then_some(&self.tx_channel).into_iter().chain(on_rx) {
            channel.notify()?;
            self.stats.count_notification();
        }
        Ok(())
    }

    /// Runs `work` unless the queue has failed, and stores its error.
    fn guarded<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, QueueError>,
    ) -> Result<T, QueueError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        work(self).inspect_err(|error| {
            self.failed = Some(*error);
            if let QueueError::Fault(fault) = error {
                self.stats.count_end(*fault);
            }
        })
    }
}

impl<P: BackendPlatform, B, R> core::fmt::Debug for Queue<P, B, R> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Queue").field("peer", &self.peer).field("failed", &self.failed).finish()
    }
}

/// Context of one round that both directions need.
struct Context<'a, P: BackendPlatform, R> {
    pages: Pages<'a, P>,
    peer: DomId,
    features: &'a Features,
    stats: &'a Stats,
    limit: &'a RateLimit,
    groups: &'a Groups<R>,
    headroom: u16,
    now: Duration,
}

/// Empties a list of copies and reuses its allocation for buffers of another lifetime. (Collecting
/// from a `Vec`'s own iterator reuses the memory.)
fn recycle_ops<'a>(mut ops: Vec<CopyOp<'_>>) -> Vec<CopyOp<'a>> {
    ops.clear();
    ops.into_iter().map_while(|_| None).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recycled_copy_list_keeps_capacity() {
        let ops: Vec<CopyOp<'_>> = Vec::with_capacity(256);
        let (at, capacity) = (ops.as_ptr().addr(), ops.capacity());
        let ops = recycle_ops(ops);
        assert_eq!((ops.as_ptr().addr(), ops.capacity()), (at, capacity));
    }
}
