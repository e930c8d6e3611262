//! The receive path: port to guest.

mod accept;
mod shape;

use super::queue_set::{Arrival, Link, Steered};
use super::ring::Ring;
use super::{BATCH, Context, Features, Reception, recycle_ops};
use crate::fault::{DropReason, Fault};
use crate::port::{FRAME_MAX, NetPort, PacketBuf};
use crate::stats::Stats;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_event_channel::BackendPlatform;
use pvio_grant_table::{CopyBuf, CopyOp, DomId, GrantCopier, GrantStatus};
use pvio_ring::proto::netif::{Extra, RxFlags, RxRequest, RxResponse, rsp};
use pvio_ring::shm::SharedMemory;
use shape::Shape;

/// Limit of bytes of packets that wait for a guest to post buffers (Linux: 128 pages per queue).
pub const BACKLOG_BYTES: usize = 512 * 1024;
/// Limit of packets that wait for a guest to post buffers.
pub const BACKLOG_PACKETS: usize = 256;
/// Longest time that a packet waits for the guest to post buffers (Linux:
/// `rx_drain_timeout_msecs`).
pub const DRAIN: Duration = Duration::from_secs(10);
/// The same for a guest without `feature-rx-notify`, which sends no event when it posts buffers.
pub const DRAIN_UNSEEN: Duration = Duration::from_millis(30);
/// Time after which a guest with [`rx_notify`](Features::rx_notify) counts as
/// [stalled](Reception::Stalled) if it posts no buffers while packets wait (Linux:
/// `rx_stall_timeout_msecs`).
pub const STALL: Duration = Duration::from_secs(60);

/// Receive ring and the packets that wait for buffers.
pub(super) struct Rx<M, B, R> {
    ring: Ring<M, R>,
    backlog: VecDeque<Waiting<B>>,
    backlog_bytes: usize,
    /// Time since which packets have waited without a delivery.
    starved: Option<Duration>,
    /// Set while the guest is stalled: the number of posted buffers that ends the stall.
    stalled: Option<u32>,
    /// Bytes left free before the data of each slot.
    headroom: u16,
    /// Packets being copied, and the requests that they use, in order; empty between polls.
    batch: Vec<Waiting<B>>,
    slots: Vec<RxSlot>,
    ops: Vec<CopyOp<'static>>,
}

struct Waiting<B> {
    arrival: Arrival<B>,
    shape: Shape,
    since: Duration,
}

impl<B> Waiting<B> {
    /// Returns the number of receive requests that the packet needs.
    fn slots(&self) -> u32 {
        self.shape.slots(self.arrival.packet.len)
    }
}

struct RxSlot {
    request: RxRequest,
    failed: bool,
}

impl<M: SharedMemory, B: PacketBuf, R: SharedMemory> Rx<M, B, R> {
    pub fn new(ring: Ring<M, R>) -> Self {
        let slots = ring.slots();
        Self {
            ring,
            backlog: VecDeque::with_capacity(BACKLOG_PACKETS),
            backlog_bytes: 0,
            starved: None,
            stalled: None,
            headroom: 0,
            batch: Vec::with_capacity(BATCH),
            slots: Vec::with_capacity(slots),
            ops: Vec::with_capacity(slots),
        }
    }

    /// Takes up to `most` packets from the port and copies as many packets into the guest's buffers
    /// as fit. Returns the number of packets taken or delivered, whichever is larger.
    pub fn step<N: NetPort<Buf = B>>(
        &mut self,
        context: &Context<'_, impl BackendPlatform, impl SharedMemory>,
        port: &mut N,
        mut link: Option<&mut Link<B>>,
        most: usize,
    ) -> Result<usize, Fault> {
        if core::mem::replace(&mut self.headroom, context.headroom) != context.headroom {
            for Waiting { arrival, shape, .. } in &mut self.backlog {
                *shape = Shape::of(arrival, context.features, context.headroom);
            }
        }
        self.give_up(context.stats)?;
        let taken = self.take(context, port, link.as_deref_mut(), most.min(BATCH));
        self.assign()?;
        let delivered = self.batch.len();
        if delivered > 0 {
            self.copy(&context.pages, context.peer);
            self.deliver(port, link.as_deref(), context.stats);
            self.starved = None;
        }
        if let Some(link) = link {
            link.set_starved(!self.backlog.is_empty());
        }
        if !self.backlog.is_empty() {
            self.starved.get_or_insert(context.now);
        }
        Ok(taken.max(delivered))
    }

    /// Sends an error response for buffers that were in use when too many processes ended.
    fn give_up(&mut self, stats: &Stats) -> Result<(), Fault> {
        while self.ring.gives_up()
            && let Some(mut slot) = self.ring.take().map_err(Fault::RxRing)?
        {
            let id = RxRequest::read(&mut slot).map_or(0, |request| request.id);
            let (flags, status) = (RxFlags::empty(), rsp::ERROR);
            self.ring.respond(&RxResponse { id, offset: 0, flags, status }.to_bytes());
            stats.drop_one(DropReason::RxDeaths);
        }
        Ok(())
    }

    /// Publishes responses. Returns whether the guest has to be notified.
    pub fn publish(&mut self) -> bool {
        self.ring.publish()
    }

    /// Requests a notification and returns whether there is work, if a packet waits for buffers.
    /// Otherwise posted buffers need not wake the worker.
    pub fn final_check(&mut self) -> Result<bool, Fault> {
        let Some(needed) = self.needed() else { return Ok(false) };
        self.ring.final_check_for(needed).map_err(Fault::RxRing)
    }

    /// Whether there is work, by the current producer index.
    pub fn has_work(&mut self) -> Result<bool, Fault> {
        let Some(needed) = self.needed() else { return Ok(false) };
        self.has_buffers(needed)
    }

    /// As [`Tx::given_up`](super::tx::Tx::given_up).
    pub fn given_up(&self) -> u64 {
        self.ring.given_up()
    }

    /// Returns the number of packets that wait for the guest to post buffers.
    pub fn backlog(&self) -> usize {
        self.backlog.len()
    }

    /// Returns the number of waiting packets, and their size in bytes.
    pub fn waiting(&self) -> (usize, usize) {
        (self.backlog.len(), self.backlog_bytes)
    }

    /// Drops all waiting packets and returns their buffers, also of those that a fault left in the
    /// batch.
    pub fn drop_backlog<N: NetPort<Buf = B>>(
        &mut self,
        port: &mut N,
        link: Option<&Link<B>>,
        stats: &Stats,
    ) {
        let mut drop_one = |Waiting { arrival, .. }: Waiting<B>| {
            stats.drop_one(DropReason::RxNoBuffers);
            return_buffer(port, link, arrival.owner, arrival.packet.buf);
        };
        self.batch.drain(..).for_each(&mut drop_one);
        while let Some(waiting) = self.pop_waiting() {
            drop_one(waiting);
        }
        self.starved = None;
    }

    /// Returns the earliest time at which a waiting packet expires or the guest counts as stalled.
    pub fn deadline(&self, features: &Features) -> Option<Duration> {
        let oldest = self.backlog.front()?.since;
        let drained = oldest.saturating_add(drain_after(features));
        let stalls = self.starved.filter(|_| features.rx_notify && self.stalled.is_none());
        let stalls = stalls.map_or(Duration::MAX, |since| since.saturating_add(STALL));
        Some(drained.min(stalls))
    }

    /// Drops packets that have waited too long.
    pub fn expire<N: NetPort<Buf = B>>(
        &mut self,
        features: &Features,
        now: Duration,
        port: &mut N,
        link: Option<&Link<B>>,
        stats: &Stats,
    ) {
        while let Some(oldest) = self.backlog.front()
            && oldest.since.saturating_add(drain_after(features)) <= now
            && let Some(Waiting { arrival, .. }) = self.pop_waiting()
        {
            stats.drop_one(DropReason::RxNoBuffers);
            return_buffer(port, link, arrival.owner, arrival.packet.buf);
        }
    }

    /// Returns whether the guest has stalled, or is ready again, since the last call. Waiting
    /// packets may have expired in between; the wait counts until a packet is delivered.
    pub fn reception(
        &mut self,
        features: &Features,
        now: Duration,
    ) -> Result<Option<Reception>, Fault> {
        if let Some(needed) = self.stalled {
            if !self.has_buffers(needed)? {
                return Ok(None);
            }
            (self.stalled, self.starved) = (None, None);
            return Ok(Some(Reception::Ready));
        }
        let starved = self.starved.is_some_and(|since| since.saturating_add(STALL) <= now);
        let Some(needed) = self.needed().filter(|_| starved && features.rx_notify) else {
            return Ok(None);
        };
        if self.has_buffers(needed)? {
            return Ok(None);
        }
        self.stalled = Some(needed);
        Ok(Some(Reception::Stalled))
    }

    /// Returns the number of receive requests needed to make progress; `None` if there is no work.
    fn needed(&self) -> Option<u32> {
        self.backlog.front().map(Waiting::slots).or(self.stalled)
    }

    fn has_buffers(&mut self, needed: u32) -> Result<bool, Fault> {
        Ok(self.ring.waiting() >= needed || self.ring.look().map_err(Fault::RxRing)? >= needed)
    }

    fn pop_waiting(&mut self) -> Option<Waiting<B>> {
        let waiting = self.backlog.pop_front()?;
        if !pvio_ring::planted!(BacklogLeaked) {
            self.backlog_bytes = self.backlog_bytes.saturating_sub(waiting.arrival.packet.len);
        }
        Some(waiting)
    }

    fn has_place(&self) -> bool {
        self.backlog.len() < BACKLOG_PACKETS
            && self.backlog_bytes <= BACKLOG_BYTES.saturating_sub(FRAME_MAX)
    }

    /// Takes packets from the port into the backlog while it has space. Further packets stay in the
    /// port, so that a guest without buffers occupies only its own backlog.
    fn take<N: NetPort<Buf = B>>(
        &mut self,
        context: &Context<'_, impl BackendPlatform, impl SharedMemory>,
        port: &mut N,
        link: Option<&mut Link<B>>,
        most: usize,
    ) -> usize {
        let mut count = 0_usize;
        let Some(link) = link else {
            while count < most
                && self.has_place()
                && let Some(packet) = port.receive()
            {
                count = count.saturating_add(1);
                self.accept(context, port, None, Arrival { packet, hash: None, owner: 0 });
            }
            return count;
        };
        while let Some(buf) = link.next_returned() {
            port.recycle(buf);
        }
        while count < most
            && self.has_place()
            && let Some(arrival) = link.next_arrival()
        {
            count = count.saturating_add(1);
            self.accept(context, port, Some(link), arrival);
        }
        while count < most
            && self.has_place()
            && let Some(steered) =
                link.retry().or_else(|| port.receive().map(|packet| link.steer(packet)))
        {
            match steered {
                Steered::Local(arrival) => self.accept(context, port, Some(link), arrival),
                Steered::Passed => context.stats.count_steered(),
                Steered::Deferred => break,
                Steered::Dropped(packet) => {
                    context.stats.drop_one(DropReason::RxSteered);
                    port.recycle(packet.buf);
                }
            }
            count = count.saturating_add(1);
        }
        count
    }

    fn accept<N: NetPort<Buf = B>>(
        &mut self,
        context: &Context<'_, impl BackendPlatform, impl SharedMemory>,
        port: &mut N,
        link: Option<&Link<B>>,
        mut arrival: Arrival<B>,
    ) {
        let page = Shape::page(self.headroom);
        match accept::accept(context.features, context.groups, page, &mut arrival.packet) {
            Ok(()) => {
                self.backlog_bytes = self.backlog_bytes.saturating_add(arrival.packet.len);
                let shape = Shape::of(&arrival, context.features, self.headroom);
                self.backlog.push_back(Waiting { arrival, shape, since: context.now });
            }
            Err(reason) => {
                context.stats.drop_one(reason);
                return_buffer(port, link, arrival.owner, arrival.packet.buf);
            }
        }
    }

    /// Moves packets for which there are buffers to the batch, and takes the buffers.
    fn assign(&mut self) -> Result<(), Fault> {
        while self.batch.len() < BATCH
            && let Some(waiting) = self.backlog.front()
        {
            let needed = waiting.slots();
            if !self.has_buffers(needed)? {
                break;
            }
            for _ in 0..needed {
                if let Some(mut slot) = self.ring.take().map_err(Fault::RxRing)?
                    && let Ok(request) = RxRequest::read(&mut slot)
                {
                    self.slots.push(RxSlot { request, failed: false });
                }
            }
            self.ring.record_taken();
            let waiting = self.pop_waiting();
            self.batch.extend(waiting);
        }
        Ok(())
    }

    /// Copies the data of the whole batch with one call.
    fn copy(&mut self, copier: &impl GrantCopier, peer: DomId) {
        let mut ops = recycle_ops(core::mem::take(&mut self.ops));
        let mut slots = self.slots.iter();
        for Waiting { arrival, shape, .. } in &self.batch {
            pass_over(&mut slots, shape.before());
            for (i, part) in arrival.packet.frame().chunks(shape.room()).enumerate() {
                let slot = slots.next();
                if i == 0 {
                    // Extra segments use the next slots, whose buffers are not written.
                    pass_over(&mut slots, shape.extras().count());
                }
                let Some(slot) = slot else { break };
                ops.push(CopyOp {
                    domain: peer,
                    gref: slot.request.gref,
                    offset: shape.headroom().into(),
                    with: CopyBuf::ToGrant(part),
                    status: GrantStatus::GeneralError,
                });
            }
        }
        copier.copy(&mut ops);

        let mut done = ops.iter();
        let mut slots = self.slots.iter_mut();
        for Waiting { arrival, shape, .. } in &self.batch {
            pass_over(&mut slots, shape.before());
            for i in 0..arrival.packet.len.div_ceil(shape.room()) {
                let failed = done.next().is_none_or(|op| op.status != GrantStatus::Okay);
                slots.next().into_iter().for_each(|slot| slot.failed = failed);
                if i == 0 {
                    pass_over(&mut slots, shape.extras().count());
                }
            }
        }
        self.ops = recycle_ops(ops);
    }

    /// Writes the response of every slot, in order, and returns the packet buffers.
    fn deliver<N: NetPort<Buf = B>>(
        &mut self,
        port: &mut N,
        link: Option<&Link<B>>,
        stats: &Stats,
    ) {
        let mut slots = self.slots.iter();
        for Waiting { arrival, shape, .. } in self.batch.drain(..) {
            let packet = arrival.packet;
            let mut failed = false;
            let mut left = packet.len;
            if let Some((size, slots_used)) = shape.prefix(left)
                && let Some(slot) = slots.next()
            {
                let (id, flags) = (slot.request.id, RxFlags::GSO_PREFIX | RxFlags::MORE_DATA);
                let response = RxResponse { id, offset: size, flags, status: slots_used };
                self.ring.respond(&response.to_bytes());
            }
            let mut flags = shape.flags(&packet);
            while left > 0 {
                let size = left.min(shape.room());
                left = left.saturating_sub(size);
                flags.set(RxFlags::MORE_DATA, left > 0);
                let Some(slot) = slots.next() else { break };
                failed |= slot.failed;
                // At most 4096, so it fits an `i16`; errors are negative.
                let status = if slot.failed { rsp::ERROR } else { size as i16 };
                let (id, offset) = (slot.request.id, shape.headroom());
                let response = RxResponse { id, offset, flags, status };
                self.ring.respond(&response.to_bytes());
                if flags.contains(RxFlags::EXTRA_INFO) {
                    let mut extras = shape.extras().peekable();
                    while let Some(kind) = extras.next() {
                        slots.next();
                        let more = extras.peek().is_some();
                        self.ring.respond(&Extra { kind, more }.to_bytes());
                    }
                }
                flags = RxFlags::empty();
            }
            if failed {
                stats.drop_one(DropReason::RxCopy);
            } else {
                stats.count_rx(packet.len, packet.offload.gso.is_some());
            }
            return_buffer(port, link, arrival.owner, packet.buf);
        }
        self.slots.clear();
    }
}

fn pass_over(slots: &mut impl Iterator, count: usize) {
    for _ in 0..count {
        slots.next();
    }
}

/// Returns a packet's buffer to the port that owns it.
fn return_buffer<N: NetPort>(port: &mut N, link: Option<&Link<N::Buf>>, owner: usize, buf: N::Buf) {
    match link {
        Some(link) if link.index() != owner => link.return_buffer(owner, buf),
        _ => port.recycle(buf),
    }
}

/// Returns the longest time that a packet may wait.
const fn drain_after(features: &Features) -> Duration {
    if features.rx_notify { DRAIN } else { DRAIN_UNSEEN }
}
