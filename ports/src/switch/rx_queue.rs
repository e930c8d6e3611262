//! Packets that wait for one queue of a member.
#![forbid(unsafe_code)]

use crate::buffers::{LARGE, SMALL, buffers, is_large};
use crate::{Gso, Packet};
use alloc::sync::Arc;
#[cfg(not(loom))]
use crossbeam_queue::ArrayQueue;
use pvio_netback::stats::Stats;
use pvio_ring::proto::netif::GsoKind;
#[cfg(loom)]
use pvio_runtime::sync::ArrayQueue;
use pvio_runtime::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use pvio_runtime::{EventFd, PrivateBuf};
use std::io;
use std::sync::OnceLock;

/// Limit of waiting bytes, without packets that the receiving queue has taken.
pub(super) const BYTES: usize = 256 * 1024;
const LARGES: usize = if cfg!(loom) { 1 } else { 24 };
const SMALLS: usize = if cfg!(loom) { 2 } else { 256 };

/// Packets from other members, in the receiver's buffers. A sender exchanges a full buffer for an
/// empty one of the same size, so nothing is copied and a slow receiver does not hold the senders'
/// memory.
#[derive(Debug)]
pub(super) struct RxQueue {
    full: ArrayQueue<Packet<PrivateBuf>>,
    large: ArrayQueue<PrivateBuf>,
    small: ArrayQueue<PrivateBuf>,
    bytes: AtomicUsize,
    /// Counters of the receiver, for lost packets; set once there is a receiver.
    stats: OnceLock<Arc<Stats>>,
    /// Whether the receiver sleeps or is about to.
    asleep: AtomicBool,
    /// Wakes the receiver.
    event: EventFd,
    takes: (bool, bool),
}

impl RxQueue {
    /// Creates the receive queue. `takes` holds whether it accepts unsegmented TCP over IPv4 and
    /// over IPv6.
    pub fn new(takes: (bool, bool)) -> io::Result<Self> {
        let (large, small) = (ArrayQueue::new(LARGES), ArrayQueue::new(SMALLS));
        let filled = |queue: &ArrayQueue<PrivateBuf>, len| {
            buffers(len, queue.capacity()).into_iter().for_each(|buf| drop(queue.push(buf)));
        };
        filled(&large, LARGE);
        filled(&small, SMALL);
        Ok(Self {
            full: ArrayQueue::new(LARGES + SMALLS),
            large,
            small,
            bytes: AtomicUsize::new(0),
            stats: OnceLock::new(),
            asleep: AtomicBool::new(false),
            event: EventFd::new()?,
            takes,
        })
    }

    pub fn takes(&self, gso: Gso) -> bool {
        match gso.kind {
            GsoKind::TcpV4 => self.takes.0,
            GsoKind::TcpV6 => self.takes.1,
        }
    }

    /// Returns an empty buffer for a frame of `len` bytes. Without a free buffer, the packet is
    /// lost and counted.
    pub fn reserve(&self, len: usize) -> Option<PrivateBuf> {
        let room = self.has_room(len);
        let small = if len <= SMALL { self.small.pop() } else { None };
        let buf = if room { small.or_else(|| self.large.pop()) } else { None };
        if buf.is_none() {
            self.lose();
        }
        buf
    }

    /// Adds a packet in a buffer of [`reserve`](Self::reserve).
    pub fn push(&self, packet: Packet<PrivateBuf>) {
        self.bytes.fetch_add(packet.len, Ordering::Relaxed);
        // The queue has space for every buffer.
        let _ = self.full.push(packet);
        // The receiver sets `asleep` and then checks the queue; this thread adds the packet and
        // then checks `asleep`. With the fences, at least one of them sees the other's store.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed) {
            self.event.notify();
        }
    }

    /// Adds a packet in a sender's buffer and returns an empty buffer in exchange. Without a free
    /// buffer, the packet is lost and counted, and its buffer is returned.
    pub fn exchange(&self, packet: Packet<PrivateBuf>) -> PrivateBuf {
        let empty = if !self.has_room(packet.len) {
            None
        } else if is_large(&packet.buf) {
            self.large.pop()
        } else {
            self.small.pop()
        };
        let Some(empty) = empty else {
            self.lose();
            return packet.buf;
        };
        self.push(packet);
        empty
    }

    fn lose(&self) {
        self.stats.get().into_iter().for_each(|stats| stats.drop_at_a_switch());
    }

    fn has_room(&self, len: usize) -> bool {
        self.bytes.load(Ordering::Relaxed).saturating_add(len) <= BYTES
    }

    // Methods for the receiver.

    pub fn count_in(&self, stats: &Arc<Stats>) {
        let _ = self.stats.set(Arc::clone(stats));
    }

    pub fn pop(&self) -> Option<Packet<PrivateBuf>> {
        let packet = self.full.pop()?;
        self.bytes.fetch_sub(packet.len, Ordering::Relaxed);
        Some(packet)
    }

    pub fn recycle(&self, buf: PrivateBuf) {
        let _ = if is_large(&buf) { self.large.push(buf) } else { self.small.push(buf) };
    }

    pub fn is_empty(&self) -> bool {
        self.full.is_empty()
    }

    /// Returns the eventfd that is notified while the receiver sleeps.
    pub const fn event(&self) -> &EventFd {
        &self.event
    }

    /// Called before the receiver sleeps. Returns whether it may.
    pub fn may_sleep(&self) -> bool {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.full.is_empty()
    }

    /// Called after the receiver has woken up.
    pub fn awake(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }
}

/// Model of the receive queue, in every interleaving (`cargo xtask test loom`). The receiver sleeps
/// whenever it may: a lost wake-up is a deadlock.
#[cfg(all(loom, test))]
mod model {
    use super::*;
    use crate::{Checksum, Offload};
    use loom::sync::atomic::AtomicU32;
    use loom::thread;

    const NOTHING: Offload = Offload { checksum: Checksum::Validated, gso: None };

    fn check(model: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(2);
        builder.check(model);
    }

    fn queue() -> Arc<RxQueue> {
        Arc::new(RxQueue::new((true, true)).unwrap())
    }

    /// Receives one packet as [`QueuePort`](crate::queue_port::QueuePort) does.
    fn receive(rx: &RxQueue) -> Packet<PrivateBuf> {
        loop {
            if let Some(packet) = rx.pop() {
                return packet;
            }
            if rx.may_sleep() {
                rx.event().wait();
                rx.event().clear();
            }
            rx.awake();
        }
    }

    fn buffers_left(rx: &RxQueue) -> usize {
        let small = core::iter::from_fn(|| rx.small.pop()).count();
        small + core::iter::from_fn(|| rx.large.pop()).count()
    }

    #[test]
    fn packets_of_two_senders_wake_the_receiver_and_are_not_counted_after() {
        check(|| {
            let (rx, written) = (queue(), Arc::new([AtomicU32::new(0), AtomicU32::new(0)]));
            let senders: [_; 2] = core::array::from_fn(|n| {
                let (rx, written) = (Arc::clone(&rx), Arc::clone(&written));
                thread::spawn(move || {
                    let buf = rx.reserve(100 + n).unwrap();
                    written[n].store(1, Ordering::Relaxed);
                    rx.push(Packet { buf, start: 0, len: 100 + n, offload: NOTHING });
                })
            });
            for _ in 0..2 {
                let packet = receive(&rx);
                let seen = written[packet.len - 100].load(Ordering::Relaxed);
                assert_eq!(seen, 1, "a packet before its contents");
                rx.recycle(packet.buf);
            }
            for sender in senders {
                sender.join().unwrap();
            }
            assert_eq!(rx.bytes.load(Ordering::Relaxed), 0);
            assert_eq!(buffers_left(&rx), LARGES + SMALLS, "a buffer was lost");
        });
    }

    #[test]
    fn sender_that_exchanges_buffers_loses_packets_and_no_buffer() {
        check(|| {
            let rx = queue();
            let sender = {
                let rx = Arc::clone(&rx);
                thread::spawn(move || {
                    for _ in 0..3 {
                        let buf = PrivateBuf::page_aligned(SMALL);
                        drop(rx.exchange(Packet { buf, start: 0, len: 60, offload: NOTHING }));
                    }
                })
            };
            rx.recycle(receive(&rx).buf);
            sender.join().unwrap();
            while let Some(packet) = rx.pop() {
                rx.recycle(packet.buf);
            }
            assert_eq!(rx.bytes.load(Ordering::Relaxed), 0);
            assert_eq!(buffers_left(&rx), LARGES + SMALLS, "a buffer was lost");
        });
    }
}
