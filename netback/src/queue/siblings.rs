//! Messages between the queues of a vif. Each queue has its own thread, so all messages go through
//! bounded lock-free queues, and no thread waits for another.

use super::hash::{Hash, HashConfig};
use crate::port::{Packet, PacketBuf};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering, fence};
use crossbeam_queue::ArrayQueue;
use pvio_grant_table::GrantRef;
use pvio_ring::proto::netif::{CtrlRequest, CtrlStatus, GrefEntry};

/// Wakes the thread that serves a queue.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// Capacity of a queue's inbox: packets steered to it that it has not taken yet.
const INBOX: usize = 64;
/// Limit of the buffers of a queue's port that other queues hold. It is less than the number of a
/// port's buffers, so that the queue can go on receiving even if the other queues' buffers are
/// never posted.
pub const AWAY_MAX: usize = 32;
/// All queues of a vif. The first is the one that serves the control ring.
pub struct Siblings<B> {
    all: Vec<Sibling<B>>,
}

/// Messages to one queue, and its state.
struct Sibling<B> {
    wake: Waker,
    /// Whether the queue has to be woken for a new message.
    asleep: AtomicBool,
    /// Whether packets wait and the guest posts no buffers in this queue.
    starved: AtomicBool,
    /// Newest hash configuration; a newer one replaces it.
    hash: ArrayQueue<Arc<HashConfig>>,
    orders: ArrayQueue<Order>,
    /// Outcomes of orders; used by the first queue only.
    outcomes: ArrayQueue<Outcome>,
    inbox: ArrayQueue<Arrival<B>>,
    /// Buffers of this queue's port that other queues return.
    home: ArrayQueue<B>,
}

/// Packet for the guest, and the queue whose port owns its buffer.
pub(super) struct Arrival<B> {
    pub packet: Packet<B>,
    pub hash: Option<Hash>,
    pub home: usize,
}

/// Request of the control ring that one queue has to execute.
pub(super) struct Order {
    pub request: CtrlRequest,
    /// Number of the queue that executes it.
    pub queue: usize,
    /// Guest page that holds the list.
    pub page: GrantRef,
    pub list: Vec<GrefEntry>,
    pub adds: bool,
}

/// Outcome of an executed order.
pub(super) struct Outcome {
    pub order: Order,
    pub status: CtrlStatus,
    pub data: u32,
}

impl<B: PacketBuf> Siblings<B> {
    /// Creates one queue for each waker. A queue that polls continuously needs none: pass a
    /// function that does nothing.
    #[must_use]
    pub fn new(wakers: impl IntoIterator<Item = Waker>) -> Arc<Self> {
        let all = wakers.into_iter().map(Sibling::new).collect();
        Arc::new(Self { all })
    }

    /// Returns the number of queues.
    #[must_use]
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there are no queues.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Sends a hash configuration to every queue. Each applies it before its next packet.
    pub(super) fn set_hash(&self, config: &HashConfig) {
        let config = Arc::new(config.clone());
        for sibling in &self.all {
            drop(sibling.hash.force_push(Arc::clone(&config)));
        }
    }

    /// Sends an order. Returns `false` if there is no such queue. Only one order is outstanding at
    /// a time, over all queues.
    pub(super) fn order(&self, order: Order) -> bool {
        let Some(sibling) = self.all.get(order.queue) else { return false };
        let left = sibling.orders.push(order).is_ok();
        sibling.wake();
        left
    }
}

impl<B> Sibling<B> {
    fn new(wake: Waker) -> Self {
        Self {
            wake,
            asleep: AtomicBool::new(false),
            starved: AtomicBool::new(false),
            hash: ArrayQueue::new(1),
            orders: ArrayQueue::new(1),
            outcomes: ArrayQueue::new(1),
            inbox: ArrayQueue::new(INBOX),
            home: ArrayQueue::new(AWAY_MAX),
        }
    }

    /// Wakes the queue if it sleeps. Called after each message to it.
    fn wake(&self) {
        // Pairs with the fence of `may_sleep`: either that function sees the message, or this one
        // sees `asleep`.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed) {
            (self.wake)();
        }
    }

    fn has_mail(&self) -> bool {
        !(self.orders.is_empty()
            && self.outcomes.is_empty()
            && self.inbox.is_empty()
            && self.hash.is_empty())
    }
}

/// Connection of a queue to the other queues of its vif.
pub(super) struct Link<B> {
    siblings: Arc<Siblings<B>>,
    index: usize,
    /// `None` while no packet is hashed.
    hash: Option<Arc<HashConfig>>,
    /// Number of buffers of this queue's port that other queues hold.
    away: usize,
    /// Packet for a queue whose inbox is full.
    held: Option<(usize, Arrival<B>)>,
}

/// Destination of a packet.
pub(super) enum Steered<B> {
    /// This queue.
    Here(Arrival<B>),
    /// Another queue; the packet was passed on.
    Away,
    /// Another queue that has no space. The packet is held until there is space; no packet may be
    /// taken from the port until then.
    Held,
    /// A queue whose guest posts no buffers; the packet is dropped.
    Lost(Packet<B>),
}

impl<B: PacketBuf> Link<B> {
    /// Returns `None` if `index` is out of range.
    pub fn new(siblings: &Arc<Siblings<B>>, index: usize) -> Option<Self> {
        let siblings = Arc::clone(siblings);
        siblings.all.get(index)?;
        Some(Self { siblings, index, hash: None, away: 0, held: None })
    }

    pub fn siblings(&self) -> &Siblings<B> {
        &self.siblings
    }

    /// Applies the newest hash configuration, if there is one.
    pub fn update(&mut self) {
        if let Some(config) = self.mine().and_then(|mine| mine.hash.pop()) {
            self.hash = Some(config).filter(|config| config.is_active());
        }
    }

    pub fn next_order(&self) -> Option<Order> {
        self.mine()?.orders.pop()
    }

    /// Sends the outcome of an order to the first queue. There is space, since only one order is
    /// outstanding.
    pub fn tell(&self, outcome: Outcome) {
        if let Some(first) = self.siblings.all.first() {
            let told = first.outcomes.push(outcome).is_ok();
            debug_assert!(told, "more outcomes than orders");
            if self.index != 0 {
                first.wake();
            }
        }
    }

    pub fn next_outcome(&self) -> Option<Outcome> {
        self.mine()?.outcomes.pop()
    }

    /// Returns the next packet that another queue has passed on.
    pub fn next_arrival(&self) -> Option<Arrival<B>> {
        self.mine()?.inbox.pop()
    }

    /// Returns a buffer of this queue's port that another queue has returned.
    pub fn next_home(&mut self) -> Option<B> {
        if self.away == 0 {
            return None;
        }
        let buf = self.mine()?.home.pop()?;
        self.away = self.away.saturating_sub(1);
        Some(buf)
    }

    /// Returns a buffer to the queue whose port owns it.
    pub fn send_home(&self, home: usize, buf: B) {
        if let Some(sibling) = self.siblings.all.get(home) {
            // The capacity is the limit of buffers that other queues hold.
            let came = sibling.home.push(buf).is_ok();
            debug_assert!(came, "more buffers came home than went");
            if sibling.home.len() >= AWAY_MAX / 2 {
                sibling.wake();
            }
        }
    }

    pub const fn index(&self) -> usize {
        self.index
    }

    /// Steers a packet that the port has received.
    pub fn steer(&mut self, packet: Packet<B>) -> Steered<B> {
        let Some(config) = &self.hash else {
            return Steered::Here(Arrival { packet, hash: None, home: self.index });
        };
        let (hash, to) = config.steer(packet.frame());
        self.hand(to, Arrival { packet, hash, home: self.index })
    }

    /// Retries to pass on a held packet, if there is one.
    pub fn retry(&mut self) -> Option<Steered<B>> {
        let (to, arrival) = self.held.take()?;
        Some(self.hand(to, arrival))
    }

    fn hand(&mut self, to: usize, arrival: Arrival<B>) -> Steered<B> {
        let siblings = Arc::clone(&self.siblings);
        let Some(sibling) = siblings.all.get(to).filter(|_| to != self.index) else {
            return Steered::Here(arrival);
        };
        let refused =
            if self.away < AWAY_MAX { sibling.inbox.push(arrival).err() } else { Some(arrival) };
        let Some(arrival) = refused else {
            self.away = self.away.saturating_add(1);
            sibling.wake();
            return Steered::Away;
        };
        if sibling.starved.load(Ordering::Relaxed) {
            return Steered::Lost(arrival.packet);
        }
        sibling.wake();
        self.held = Some((to, arrival));
        Steered::Held
    }

    /// Sets whether packets wait for this queue's guest to post buffers.
    pub fn set_starved(&self, starved: bool) {
        if let Some(mine) = self.mine() {
            mine.starved.store(starved, Ordering::Relaxed);
        }
    }

    /// Whether the queue may sleep. If so, new messages wake it from then on.
    pub fn may_sleep(&self) -> bool {
        let Some(mine) = self.mine() else { return true };
        mine.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !self.has_work() {
            return true;
        }
        mine.asleep.store(false, Ordering::Relaxed);
        false
    }

    /// Whether there are messages or a held packet.
    pub fn has_work(&self) -> bool {
        self.held.is_some() || self.mine().is_some_and(Sibling::has_mail)
    }

    fn mine(&self) -> Option<&Sibling<B>> {
        self.siblings.all.get(self.index)
    }
}

impl<B> fmt::Debug for Siblings<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Siblings").field("queues", &self.all.len()).finish_non_exhaustive()
    }
}
