//! What the queues of a vif have to tell each other. Each is served by a thread of its own, so all of it
//! goes through mailboxes: nobody waits, and nobody locks.

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

/// Packets that wait to be taken by the queue that they were steered to.
const INBOX: usize = 64;
/// Packets that a queue has handed to others and whose buffers have not come back: fewer than a port
/// has, so that it can go on receiving whatever the others' guest does.
pub const AWAY_MAX: usize = 32;
/// All queues of a vif. The first is the one with the control ring.
pub struct Siblings<B> {
    all: Vec<Sibling<B>>,
}

/// What others leave for a queue.
struct Sibling<B> {
    wake: Waker,
    /// Whoever leaves something has to wake it.
    asleep: AtomicBool,
    /// Its guest has no buffers for what waits.
    starved: AtomicBool,
    /// The latest alone counts.
    hash: ArrayQueue<Arc<HashConfig>>,
    orders: ArrayQueue<Order>,
    /// Of orders; only the first queue's is used.
    outcomes: ArrayQueue<Outcome>,
    inbox: ArrayQueue<Arrival<B>>,
    /// Its buffers, come back.
    home: ArrayQueue<B>,
}

/// A packet for the guest, and the queue whose port its buffer belongs to.
pub(super) struct Arrival<B> {
    pub packet: Packet<B>,
    pub hash: Option<Hash>,
    pub home: usize,
}

/// Something that the control ring asks of one queue.
pub(super) struct Order {
    pub request: CtrlRequest,
    /// The queue.
    pub queue: usize,
    /// Where the list stands.
    pub page: GrantRef,
    pub list: Vec<GrefEntry>,
    pub adds: bool,
}

/// An order that was carried out.
pub(super) struct Outcome {
    pub order: Order,
    pub status: CtrlStatus,
    pub data: u32,
}

impl<B: PacketBuf> Siblings<B> {
    /// As many queues as there are wakers. A queue that is polled all the time needs none: give one
    /// that does nothing.
    #[must_use]
    pub fn new(wakers: impl IntoIterator<Item = Waker>) -> Arc<Self> {
        let all = wakers.into_iter().map(Sibling::new).collect();
        Arc::new(Self { all })
    }

    /// How many queues there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there is no queue at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Every queue goes by this from now on, each before it takes its next packet.
    pub(super) fn set_hash(&self, config: &HashConfig) {
        let config = Arc::new(config.clone());
        for sibling in &self.all {
            drop(sibling.hash.force_push(Arc::clone(&config)));
        }
    }

    /// Leaves an order; `false` without such a queue. One is left at a time, for all queues.
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

    /// To be called when something was left.
    fn wake(&self) {
        // Pairs with the fence of `may_sleep`: either it sees what was left, or this its sleep.
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

/// A queue's place among its siblings.
pub(super) struct Link<B> {
    siblings: Arc<Siblings<B>>,
    index: usize,
    /// `None` while nothing is hashed.
    hash: Option<Arc<HashConfig>>,
    /// Buffers of this queue's port that others have.
    away: usize,
    /// A packet for a queue that has not yet taken what it has.
    held: Option<(usize, Arrival<B>)>,
}

/// Where a packet goes.
pub(super) enum Steered<B> {
    /// To this queue.
    Here(Arrival<B>),
    /// It was handed on.
    Away,
    /// It is held until there is place for it; nothing is to be taken from the port meanwhile.
    Held,
    /// To a queue whose guest takes nothing.
    Lost(Packet<B>),
}

impl<B: PacketBuf> Link<B> {
    /// `None` without such a queue.
    pub fn new(siblings: &Arc<Siblings<B>>, index: usize) -> Option<Self> {
        let siblings = Arc::clone(siblings);
        siblings.all.get(index)?;
        Some(Self { siblings, index, hash: None, away: 0, held: None })
    }

    pub fn siblings(&self) -> &Siblings<B> {
        &self.siblings
    }

    /// Takes over what the guest has set up since last asked.
    pub fn update(&mut self) {
        if let Some(config) = self.mine().and_then(|mine| mine.hash.pop()) {
            self.hash = Some(config).filter(|config| config.is_active());
        }
    }

    pub fn next_order(&self) -> Option<Order> {
        self.mine()?.orders.pop()
    }

    /// Tells the first queue what became of an order. There is place: it has left no more.
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

    /// The next packet that another queue has handed over.
    pub fn next_arrival(&self) -> Option<Arrival<B>> {
        self.mine()?.inbox.pop()
    }

    /// A buffer of this queue's port that another queue has no more use for.
    pub fn next_home(&mut self) -> Option<B> {
        if self.away == 0 {
            return None;
        }
        let buf = self.mine()?.home.pop()?;
        self.away = self.away.saturating_sub(1);
        Some(buf)
    }

    /// Gives a buffer of another queue's port back.
    pub fn send_home(&self, home: usize, buf: B) {
        if let Some(sibling) = self.siblings.all.get(home) {
            // There is place for all that may be away.
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

    /// Decides on a packet that the port has received.
    pub fn steer(&mut self, packet: Packet<B>) -> Steered<B> {
        let Some(config) = &self.hash else {
            return Steered::Here(Arrival { packet, hash: None, home: self.index });
        };
        let (hash, to) = config.steer(packet.frame());
        self.hand(to, Arrival { packet, hash, home: self.index })
    }

    /// Tries again with a packet that is held, if there is one.
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

    /// Says whether packets wait for this queue's guest to post buffers.
    pub fn set_starved(&self, starved: bool) {
        if let Some(mine) = self.mine() {
            mine.starved.store(starved, Ordering::Relaxed);
        }
    }

    /// Whether the queue may sleep as far as its siblings are concerned: they wake it from now on.
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

    /// Whether there is something to do.
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
