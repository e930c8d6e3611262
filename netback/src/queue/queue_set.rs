//! Messages between the queues of a vif. Each queue has its own thread, so all messages go through
//! bounded lock-free queues, and no thread waits for another.

use super::hash::{Hash, HashConfig};
use crate::port::{Packet, PacketBuf};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
#[cfg(not(loom))]
use crossbeam_queue::ArrayQueue;
use pvio_grant_table::GrantRef;
use pvio_ring::proto::netif::{CtrlRequest, CtrlStatus, GrefEntry};
#[cfg(loom)]
use pvio_runtime::sync::ArrayQueue;
use pvio_runtime::sync::atomic::{AtomicBool, Ordering, fence};

#[cfg(all(loom, test))]
mod model;

/// Wakes the thread that serves a queue.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// Capacity of a queue's inbox: packets steered to it that it has not taken yet.
const INBOX: usize = if cfg!(loom) { 1 } else { 64 };
/// Limit of the buffers of a queue's port that other queues hold. It is less than the number of a
/// port's buffers, so that the queue can go on receiving even if the other queues' buffers are
/// never posted.
pub const LENT_MAX: usize = if cfg!(loom) { 2 } else { 32 };
/// All queues of a vif. The first is the one that serves the control ring.
pub struct QueueSet<B> {
    members: Vec<Member<B>>,
}

/// Messages to one queue, and its state.
struct Member<B> {
    wake: Waker,
    /// Whether the queue has to be woken for a new message.
    asleep: AtomicBool,
    /// Whether packets wait and the guest posts no buffers in this queue.
    starved: AtomicBool,
    /// Newest hash configuration; a newer one replaces it.
    hash: ArrayQueue<Arc<HashConfig>>,
    commands: ArrayQueue<StagingCommand>,
    /// Results of commands; used by the first queue only.
    results: ArrayQueue<StagingResult>,
    inbox: ArrayQueue<Arrival<B>>,
    /// Buffers of this queue's port that other queues return.
    returned: ArrayQueue<B>,
}

/// Packet for the guest, and the queue whose port owns its buffer.
pub(super) struct Arrival<B> {
    pub packet: Packet<B>,
    pub hash: Option<Hash>,
    pub owner: usize,
}

/// Request of the control ring that one queue has to execute.
pub(super) struct StagingCommand {
    pub request: CtrlRequest,
    /// Number of the queue that executes it.
    pub queue: usize,
    /// Guest page that holds the list.
    pub page: GrantRef,
    pub list: Vec<GrefEntry>,
    pub adds: bool,
}

/// Result of an executed command.
pub(super) struct StagingResult {
    pub command: StagingCommand,
    pub status: CtrlStatus,
    pub data: u32,
}

impl<B: PacketBuf> QueueSet<B> {
    /// Creates one queue for each waker. A queue that polls continuously needs none: pass a
    /// function that does nothing.
    #[must_use]
    pub fn new(wakers: impl IntoIterator<Item = Waker>) -> Arc<Self> {
        let members = wakers.into_iter().map(Member::new).collect();
        Arc::new(Self { members })
    }

    /// Returns the number of queues.
    #[must_use]
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there are no queues.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Sends a hash configuration to every queue. Each applies it before its next packet.
    pub(super) fn set_hash(&self, config: &HashConfig) {
        let config = Arc::new(config.clone());
        for member in &self.members {
            drop(member.hash.force_push(Arc::clone(&config)));
        }
    }

    /// Sends a command. Returns `false` if there is no such queue. Only one command is outstanding at
    /// a time, over all queues.
    pub(super) fn send(&self, command: StagingCommand) -> bool {
        let Some(member) = self.members.get(command.queue) else { return false };
        let left = member.commands.push(command).is_ok();
        member.wake();
        left
    }
}

impl<B> Member<B> {
    fn new(wake: Waker) -> Self {
        Self {
            wake,
            asleep: AtomicBool::new(false),
            starved: AtomicBool::new(false),
            hash: ArrayQueue::new(1),
            commands: ArrayQueue::new(1),
            results: ArrayQueue::new(1),
            inbox: ArrayQueue::new(INBOX),
            returned: ArrayQueue::new(LENT_MAX),
        }
    }

    /// Wakes the queue if it sleeps. Called after each message to it.
    fn wake(&self) {
        // Pairs with the fence of `final_check`: either that function sees the message, or this one
        // sees `asleep`.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed) {
            (self.wake)();
        }
    }

    fn has_messages(&self) -> bool {
        !(self.commands.is_empty()
            && self.results.is_empty()
            && self.inbox.is_empty()
            && self.hash.is_empty())
    }
}

/// Connection of a queue to the other queues of its vif.
pub(super) struct Link<B> {
    set: Arc<QueueSet<B>>,
    index: usize,
    /// `None` while no packet is hashed.
    hash: Option<Arc<HashConfig>>,
    /// Number of buffers of this queue's port that other queues hold.
    lent: usize,
    /// Packet for a queue whose inbox is full.
    deferred: Option<(usize, Arrival<B>)>,
}

/// Destination of a packet.
pub(super) enum Steered<B> {
    /// This queue.
    Local(Arrival<B>),
    /// Another queue; the packet was passed on.
    Passed,
    /// Another queue that has no space. The packet is deferred until there is space; no packet may be
    /// taken from the port until then.
    Deferred,
    /// A queue whose guest posts no buffers; the packet is dropped.
    Dropped(Packet<B>),
}

impl<B: PacketBuf> Link<B> {
    /// Returns `None` if `index` is out of range.
    pub fn new(set: &Arc<QueueSet<B>>, index: usize) -> Option<Self> {
        let set = Arc::clone(set);
        set.members.get(index)?;
        Some(Self { set, index, hash: None, lent: 0, deferred: None })
    }

    pub fn set(&self) -> &QueueSet<B> {
        &self.set
    }

    /// Applies the newest hash configuration, if there is one.
    pub fn update(&mut self) {
        if let Some(config) = self.own().and_then(|own| own.hash.pop()) {
            self.hash = Some(config).filter(|config| config.is_active());
        }
    }

    pub fn next_command(&self) -> Option<StagingCommand> {
        self.own()?.commands.pop()
    }

    /// Sends the result of a command to the first queue. There is space, since only one command is
    /// outstanding.
    pub fn report(&self, result: StagingResult) {
        if let Some(first) = self.set.members.first() {
            let reported = first.results.push(result).is_ok();
            debug_assert!(reported, "more results than commands");
            if self.index != 0 {
                first.wake();
            }
        }
    }

    pub fn next_result(&self) -> Option<StagingResult> {
        self.own()?.results.pop()
    }

    /// Returns the next packet that another queue has passed on.
    pub fn next_arrival(&self) -> Option<Arrival<B>> {
        self.own()?.inbox.pop()
    }

    /// Returns a buffer of this queue's port that another queue has returned.
    pub fn next_returned(&mut self) -> Option<B> {
        if self.lent == 0 {
            return None;
        }
        let buf = self.own()?.returned.pop()?;
        self.lent = self.lent.saturating_sub(1);
        Some(buf)
    }

    /// Returns a buffer to the queue whose port owns it.
    pub fn return_buffer(&self, owner: usize, buf: B) {
        if let Some(member) = self.set.members.get(owner) {
            // The capacity is the limit of buffers that other queues hold.
            let pushed = member.returned.push(buf).is_ok();
            debug_assert!(pushed, "more buffers returned than lent");
            if member.returned.len() >= LENT_MAX / 2 {
                member.wake();
            }
        }
    }

    pub const fn index(&self) -> usize {
        self.index
    }

    /// Steers a packet that the port has received.
    pub fn steer(&mut self, packet: Packet<B>) -> Steered<B> {
        let Some(config) = &self.hash else {
            return Steered::Local(Arrival { packet, hash: None, owner: self.index });
        };
        let (hash, to) = config.steer(packet.frame());
        self.pass(to, Arrival { packet, hash, owner: self.index })
    }

    /// Retries to pass on a deferred packet, if there is one.
    pub fn retry(&mut self) -> Option<Steered<B>> {
        let (to, arrival) = self.deferred.take()?;
        Some(self.pass(to, arrival))
    }

    fn pass(&mut self, to: usize, arrival: Arrival<B>) -> Steered<B> {
        let set = Arc::clone(&self.set);
        let Some(member) = set.members.get(to).filter(|_| to != self.index) else {
            return Steered::Local(arrival);
        };
        let refused =
            if self.lent < LENT_MAX { member.inbox.push(arrival).err() } else { Some(arrival) };
        let Some(arrival) = refused else {
            self.lent = self.lent.saturating_add(1);
            member.wake();
            return Steered::Passed;
        };
        if member.starved.load(Ordering::Relaxed) {
            return Steered::Dropped(arrival.packet);
        }
        member.wake();
        self.deferred = Some((to, arrival));
        Steered::Deferred
    }

    /// Sets whether packets wait for this queue's guest to post buffers.
    pub fn set_starved(&self, starved: bool) {
        if let Some(own) = self.own() {
            own.starved.store(starved, Ordering::Relaxed);
        }
    }

    /// Returns whether there is work. If not, new messages wake the queue from then on.
    pub fn final_check(&self) -> bool {
        let Some(own) = self.own() else { return false };
        own.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !self.has_work() {
            return false;
        }
        own.asleep.store(false, Ordering::Relaxed);
        true
    }

    /// Whether there are messages or a deferred packet.
    pub fn has_work(&self) -> bool {
        self.deferred.is_some() || self.own().is_some_and(Member::has_messages)
    }

    fn own(&self) -> Option<&Member<B>> {
        self.set.members.get(self.index)
    }
}

impl<B> fmt::Debug for QueueSet<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueSet").field("queues", &self.members.len()).finish_non_exhaustive()
    }
}
