//! One queue of a vif: a transmit ring, a receive ring, and the state machine between them and a
//! port.
//!
//! [`Queue::poll`] does what there is to do, up to a budget, and never waits. When it has nothing
//! more to do, ask [`Queue::may_sleep`]: it asks the guest for a wake-up and looks once more. Only
//! if it says yes may the caller wait, for the queue's [channels](Queue::channels) and the port.
//!
//! A queue that has failed stays failed: nothing more is read from its rings.
#![forbid(unsafe_code)]

mod control;
mod features;
mod groups;
mod hash;
mod limit;
mod mail;
mod packet;
mod reach;
mod record;
mod ring;
mod rx;
mod setup;
mod siblings;
mod staged;
mod tx;

pub use crate::wire::SEGMENT_MIN;
pub use features::Features;
pub use groups::{GROUPS_MAX, Groups};
pub use hash::HASH_MAPPING_MAX;
pub use limit::RateLimit;
pub use mail::Headroom;
pub use reach::{Policy, UnknownPolicy};
pub use record::{SessionRefs, VifRecord};
pub use rx::{BACKLOG_BYTES, BACKLOG_PACKETS, DRAIN, DRAIN_UNSEEN, STALL};
pub use siblings::{AWAY_MAX, Siblings, Waker};
pub use staged::STAGED_MAX;

use crate::Platform;
use crate::fault::{AttachError, QueueError};
use crate::port::{NetPort, PacketBuf};
use crate::stats::{Held, Stats};
use alloc::sync::Arc;
use alloc::vec::Vec;
use control::Control;
use core::time::Duration;
use pvio_event_channel::{EventChannel, Port};
use pvio_grant_table::policy::CachedMappings;
use pvio_grant_table::{Access, CopyOp, DomId, GrantRef};
use pvio_ring::shm::{HeapMemory, Part, SharedMemory};
use reach::{Pages, Reach};
use ring::{Direction, Ring};
use siblings::Link;

/// Packets moved with one copy call and one publication.
const BATCH: usize = 64;

/// What a frontend publishes of one queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueRefs {
    /// `tx-ring-ref`.
    pub tx_ring: GrantRef,
    /// `rx-ring-ref`.
    pub rx_ring: GrantRef,
    /// `event-channel`, or the pair.
    pub events: EventPorts,
}

/// What a frontend publishes of its control ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ControlRefs {
    /// `ctrl-ring-ref`.
    pub ring: GrantRef,
    /// `event-channel-ctrl`.
    pub event: Port,
}

/// How the guest wants to be woken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EventPorts {
    /// One channel for both rings (`event-channel`).
    Shared(Port),
    /// One each (`event-channel-tx`, `event-channel-rx`).
    Split {
        /// For the transmit ring.
        tx: Port,
        /// For the receive ring.
        rx: Port,
    },
}

/// What one [`Queue::poll`] did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Packets taken from the guest, dropped ones included.
    pub tx: usize,
    /// Packets taken from the port or delivered to the guest, dropped ones included.
    pub rx: usize,
}

impl Progress {
    /// Whether anything was done.
    #[must_use]
    pub const fn any(self) -> bool {
        self.tx != 0 || self.rx != 0
    }
}

/// What became of a guest's willingness to receive, as [`Queue::tick`] tells it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reception {
    /// It has posted no buffers for [`STALL`] though packets waited: nothing more should be sent
    /// to it.
    Stalled,
    /// It has posted buffers again.
    Ready,
}

/// One queue of a vif. `B` is the memory of the port it is used with, `R` that of its in-flight record.
pub struct Queue<P: Platform, B, R = HeapMemory> {
    platform: P,
    peer: DomId,
    features: Features,
    reach: Reach<P>,
    tx: tx::Tx<P::Mapping, B, Part<R>>,
    rx: rx::Rx<P::Mapping, B, Part<R>>,
    tx_channel: P::Channel,
    /// `None` when the rings share a channel.
    rx_channel: Option<P::Channel>,
    stats: Arc<Stats>,
    _counted: Counted,
    limit: Arc<RateLimit>,
    groups: Arc<Groups<Part<R>>>,
    headroom: Arc<Headroom>,
    /// `None` while it is by itself.
    link: Option<siblings::Link<B>>,
    /// Only the first queue may have it.
    control: Option<control::Control<P::Mapping, P::Channel, Part<R>>>,
    staged: Option<staged::Staged<P::Mapping>>,
    now: Duration,
    failed: Option<QueueError>,
}

/// Levels of a queue in its counters. Dropping it sets them to 0.
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

impl<P: Platform, B: PacketBuf> Queue<P, B> {
    /// Maps the rings of a frontend in domain `peer` and binds its event channels. Requests in the rings
    /// that have no response are served. The in-flight record does not outlive the process.
    ///
    /// # Errors
    /// An [`AttachError`]; nothing stays mapped or bound.
    pub fn attach(
        platform: P,
        peer: DomId,
        refs: &QueueRefs,
        features: Features,
        stats: Arc<Stats>,
    ) -> Result<Self, AttachError> {
        let queues = core::slice::from_ref(refs);
        let record = VifRecord::private(&SessionRefs { peer, device: 0, queues, control: None });
        let record = record.map_err(|error| AttachError::Record { ring: "transmit", error })?;
        let groups = record.groups().ok_or(AttachError::no_section("transmit"))?;
        let parts = (&record, 0, &Arc::new(groups));
        Self::attach_recorded(platform, peer, refs, features, stats, parts)
    }
}

impl<P: Platform, B: PacketBuf, R: SharedMemory + Clone> Queue<P, B, R> {
    /// Maps the rings of a frontend in domain `peer` and binds its event channels, as queue number
    /// `index` of a vif with this record and these groups. A session that is resumed goes on where the
    /// record says that its last backend was.
    ///
    /// # Errors
    /// An [`AttachError`]; nothing stays mapped or bound.
    pub fn attach_recorded(
        platform: P,
        peer: DomId,
        refs: &QueueRefs,
        features: Features,
        stats: Arc<Stats>,
        (record, index, groups): (&VifRecord<R>, usize, &Arc<Groups<Part<R>>>),
    ) -> Result<Self, AttachError> {
        let groups = Arc::clone(groups);
        let sections = record.queue(index).ok_or(AttachError::no_section("transmit"))?;
        let map = |ring, gref| {
            let mapped = platform.map(peer, core::slice::from_ref(&gref), Access::ReadWrite);
            mapped.map_err(|status| AttachError::Map { ring, status })
        };
        let [tx_section, rx_section] = sections;
        let resumed = record.is_resumed();
        let tx = map("transmit", refs.tx_ring)?;
        let tx = tx::Tx::new(Ring::attach(tx, Direction::Transmit, tx_section, resumed)?);
        let rx = map("receive", refs.rx_ring)?;
        let rx = rx::Rx::new(Ring::attach(rx, Direction::Receive, rx_section, resumed)?);
        let (tx_channel, rx_channel) = match refs.events {
            EventPorts::Shared(port) => (platform.bind_interdomain(peer, port)?, None),
            EventPorts::Split { tx, rx } => {
                let tx = platform.bind_interdomain(peer, tx)?;
                (tx, Some(platform.bind_interdomain(peer, rx)?))
            }
        };
        Ok(Self {
            platform,
            peer,
            features,
            reach: Reach::Copy,
            tx,
            rx,
            tx_channel,
            rx_channel,
            _counted: Counted::new(&stats),
            stats,
            limit: Arc::default(),
            groups,
            headroom: Arc::default(),
            link: None,
            control: None,
            staged: None,
            now: Duration::ZERO,
            failed: None,
        })
    }

    /// Reaches the guest's pages so from now on; at first, by [`Policy::Copy`].
    pub fn set_policy(&mut self, policy: Policy) {
        self.reach = policy.into();
    }

    /// Reaches the guest's pages by mappings that stay, which takes the guest's promise, as
    /// [`GrantsStay`](pvio_grant_table::policy::GrantsStay) says, for every page it names: a vif's
    /// negotiation gives it for staged pages only. For frontends that are known to grant their pages
    /// once and for all.
    pub fn keep_mapped(&mut self, kept: CachedMappings<P>) {
        self.reach = Reach::Keep(kept);
    }

    /// How fast the guest may send, to be changed at any time; at first, as fast as it can. What a
    /// packet takes is what it is on the wire: every frame it is segmented into, with its headers.
    #[must_use]
    pub const fn limit(&self) -> &Arc<RateLimit> {
        &self.limit
    }

    /// Has this limit in common with other queues of the vif from now on.
    pub fn share_limit(&mut self, limit: &Arc<RateLimit>) {
        self.limit = Arc::clone(limit);
    }

    /// The multicast groups that the guest wants to hear.
    #[must_use]
    pub const fn groups(&self) -> &Arc<Groups<Part<R>>> {
        &self.groups
    }

    /// Moves up to `budget` packets each way, in batches, and notifies the guest at most once a
    /// channel. Never waits. Nothing done means that there was nothing to do.
    ///
    /// # Errors
    /// A [`QueueError`], now and for ever.
    pub fn poll<N: NetPort<Buf = B>>(
        &mut self,
        port: &mut N,
        budget: usize,
    ) -> Result<Progress, QueueError> {
        self.guarded(|queue| queue.run(port, budget))
    }

    /// Whether the caller may wait. Asks the guest for a wake-up first, then looks once more.
    ///
    /// # Errors
    /// A [`QueueError`], now and for ever.
    pub fn may_sleep(&mut self) -> Result<bool, QueueError> {
        self.guarded(|queue| {
            let rings = queue.tx.may_sleep()? && queue.rx.may_sleep()?;
            let control = queue.control.as_mut().map_or(Ok(true), Control::may_sleep)?;
            Ok(rings && control && queue.link.as_ref().is_none_or(Link::may_sleep))
        })
    }

    /// Whether there is work in the rings, without asking for a wake-up: for spinning.
    ///
    /// # Errors
    /// A [`QueueError`], now and for ever.
    pub fn has_work(&mut self) -> Result<bool, QueueError> {
        self.guarded(|queue| {
            let control = queue.control.as_mut().map_or(Ok(false), Control::has_work)?;
            let mail = control || queue.link.as_ref().is_some_and(Link::has_work);
            Ok(mail || queue.tx.has_work()? || queue.rx.has_work()?)
        })
    }

    /// Takes the pending events of every channel. To be called when one of them woke the caller,
    /// before [`poll`](Self::poll).
    ///
    /// # Errors
    /// A [`QueueError`], now and for ever.
    pub fn take_events(&mut self) -> Result<(), QueueError> {
        self.guarded(|queue| {
            for channel in queue.channels() {
                channel.take()?;
            }
            Ok(())
        })
    }

    /// Tells the queue that the port may have space for packets again.
    pub fn unblock(&mut self) {
        self.tx.unblock();
    }

    /// Tells the queue the time, counted from any moment, and never backwards. What waits from now
    /// on waits since then.
    pub fn set_clock(&mut self, now: Duration) {
        self.now = now;
    }

    /// When [`tick`](Self::tick) is to be called, by the queue's clock; `None` while nothing waits.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        let (tx, rx) = (self.tx.deadline(), self.rx.deadline(&self.features));
        tx.into_iter().chain(rx).min()
    }

    /// Drops what has waited for too long ([`DRAIN`]), and looks after a guest that does not
    /// receive ([`STALL`]).
    ///
    /// # Errors
    /// A [`QueueError`], now and for ever.
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

    /// The event channels that wake this queue.
    pub fn channels(&self) -> impl Iterator<Item = &P::Channel> {
        let control = self.control.as_ref().map(Control::channel);
        core::iter::once(&self.tx_channel).chain(&self.rx_channel).chain(control)
    }

    /// What was negotiated.
    #[must_use]
    pub const fn features(&self) -> &Features {
        &self.features
    }

    /// The queue's counters.
    #[must_use]
    pub const fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// Requests of both rings that are to be answered with an error, since too many processes ended with them
    /// in flight.
    #[must_use]
    pub fn given_up(&self) -> u64 {
        self.tx.given_up().saturating_add(self.rx.given_up())
    }

    /// Packets waiting for the guest to post buffers.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.rx.backlog()
    }

    /// Drops what waits for the guest to post buffers: at the end.
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
            self.read_mail()?;
        }
        let Self { platform, reach, staged, peer, features, tx, rx, stats, link, .. } = self;
        let (limit, groups, now) = (&*self.limit, &*self.groups, self.now);
        let (staged, headroom) = (staged.as_ref(), self.headroom.get());
        let pages = Pages { platform: &*platform, reach: &*reach, staged, stats };
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
            // Before the responses: what is recorded as complete is never sent again.
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

    /// Publishes both rings' responses and wakes the guest as it asked to be.
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

    /// Runs `work` unless the queue has failed, and remembers if it fails.
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

impl<P: Platform, B, R> core::fmt::Debug for Queue<P, B, R> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Queue").field("peer", &self.peer).field("failed", &self.failed).finish()
    }
}

/// What both directions need of the queue in one round.
struct Context<'a, P: Platform, R> {
    pages: Pages<'a, P>,
    peer: DomId,
    features: &'a Features,
    stats: &'a Stats,
    limit: &'a RateLimit,
    groups: &'a Groups<R>,
    headroom: u16,
    now: Duration,
}

/// Empties a list of copies and keeps its allocation for buffers of another lifetime. (Collecting
/// from a `Vec`'s own iterator reuses the memory.)
fn recycle_ops<'a>(mut ops: Vec<CopyOp<'_>>) -> Vec<CopyOp<'a>> {
    ops.clear();
    ops.into_iter().map_while(|_| None).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recycled_list_keeps_its_memory() {
        let ops: Vec<CopyOp<'_>> = Vec::with_capacity(256);
        let (at, capacity) = (ops.as_ptr().addr(), ops.capacity());
        let ops = recycle_ops(ops);
        assert_eq!((ops.as_ptr().addr(), ops.capacity()), (at, capacity));
    }
}
