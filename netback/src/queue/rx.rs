//! Port to guest.

use super::{BATCH, Context, Features, Groups, Reception, recycle_ops};
use crate::Platform;
use crate::fault::{DropReason, Fault};
use crate::port::{Checksum, FRAME_MAX, NetPort, Packet, PacketBuf};
use crate::stats::Stats;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_grant_table::{CopyBuf, CopyOp, DomId, GrantCopier, GrantStatus};
use pvio_ring::proto::checksum::{self, ETHERNET_HEADER, IpVersion, Transport};
use pvio_ring::proto::netif::{
    Extra, ExtraKind, GsoKind, RX_SLOT_SIZE, RxFlags, RxRequest, RxResponse, rsp,
};
use pvio_ring::shm::{PAGE_SIZE, SharedMemory};
use pvio_ring::{BackRing, RingFault};

/// Bytes of packets that may wait for a guest to post buffers (Linux: 128 pages a queue).
pub const BACKLOG_BYTES: usize = 512 * 1024;
/// Packets that may wait, however small.
pub const BACKLOG_PACKETS: usize = 256;
/// How long a packet waits for the guest to post buffers (Linux: `rx_drain_timeout_msecs`).
pub const DRAIN: Duration = Duration::from_secs(10);
/// The same for a guest that does not say when it posts some, without `feature-rx-notify`.
pub const DRAIN_UNSEEN: Duration = Duration::from_millis(30);
/// How long a guest with [`rx_notify`](Features::rx_notify) may post no buffers while packets wait
/// until it counts as [stalled](Reception::Stalled) (Linux: `rx_stall_timeout_msecs`).
pub const STALL: Duration = Duration::from_secs(60);

/// The receive ring and what waits for it.
pub(super) struct Rx<M, B> {
    ring: BackRing<M>,
    backlog: VecDeque<Waiting<B>>,
    backlog_bytes: usize,
    /// Since when packets have waited and none was delivered.
    starved: Option<Duration>,
    /// The guest has stalled; it is ready again with so many buffers.
    stalled: Option<u32>,
    /// Packets being copied, and the requests they use, in order; empty between polls.
    batch: Vec<Packet<B>>,
    slots: Vec<RxSlot>,
    ops: Vec<CopyOp<'static>>,
}

struct Waiting<B> {
    packet: Packet<B>,
    since: Duration,
}

struct RxSlot {
    request: RxRequest,
    failed: bool,
}

impl<M: SharedMemory, B: PacketBuf> Rx<M, B> {
    pub fn attach(mem: M) -> Result<Self, RingFault> {
        let ring = BackRing::attach(mem, RX_SLOT_SIZE)?;
        let slots = ring.layout().slots() as usize;
        Ok(Self {
            ring,
            backlog: VecDeque::with_capacity(BACKLOG_PACKETS),
            backlog_bytes: 0,
            starved: None,
            stalled: None,
            batch: Vec::with_capacity(BATCH),
            slots: Vec::with_capacity(slots),
            ops: Vec::with_capacity(slots),
        })
    }

    /// Takes up to `most` packets from the port and puts as many as there are buffers for into
    /// them. Returns how many were taken or delivered.
    pub fn step<N: NetPort<Buf = B>>(
        &mut self,
        context: &Context<'_, impl Platform>,
        port: &mut N,
        most: usize,
    ) -> Result<usize, Fault> {
        let taken = self.take(context, port, most.min(BATCH));
        self.assign()?;
        let delivered = self.batch.len();
        if delivered > 0 {
            self.copy(&context.pages, context.peer);
            self.deliver(port, context.stats);
            self.starved = None;
        }
        if !self.backlog.is_empty() {
            self.starved.get_or_insert(context.now);
        }
        Ok(taken.max(delivered))
    }

    /// Shows the guest what was delivered; tells whether it must be notified.
    pub fn publish(&mut self) -> bool {
        self.ring.publish()
    }

    /// Whether the worker may sleep as far as this ring is concerned. The guest is asked for a
    /// wake-up only if a packet waits for buffers: posting them is no reason to wake anybody else.
    pub fn may_sleep(&mut self) -> Result<bool, Fault> {
        let Some(needed) = self.needed() else { return Ok(true) };
        Ok(!self.ring.final_check_for(needed).map_err(Fault::RxRing)?)
    }

    /// Whether there is something to do, from what shared memory says now.
    pub fn has_work(&mut self) -> Result<bool, Fault> {
        let Some(needed) = self.needed() else { return Ok(false) };
        self.has_buffers(needed)
    }

    /// Packets waiting for the guest to post buffers.
    pub fn backlog(&self) -> usize {
        self.backlog.len()
    }

    /// Drops what waits, giving the buffers back.
    pub fn drop_backlog<N: NetPort<Buf = B>>(&mut self, port: &mut N, stats: &Stats) {
        while let Some(packet) = self.pop_waiting() {
            stats.drop_one(DropReason::RxNoBuffers);
            port.recycle(packet.buf);
        }
        self.starved = None;
    }

    /// When something is to be looked at though nothing happens.
    pub fn deadline(&self, features: &Features) -> Option<Duration> {
        let oldest = self.backlog.front()?.since;
        let drained = oldest.saturating_add(drain_after(features));
        let stalls = self.starved.filter(|_| features.rx_notify && self.stalled.is_none());
        let stalls = stalls.map_or(Duration::MAX, |since| since.saturating_add(STALL));
        Some(drained.min(stalls))
    }

    /// Drops what has waited for too long.
    pub fn expire<N: NetPort<Buf = B>>(
        &mut self,
        features: &Features,
        now: Duration,
        port: &mut N,
        stats: &Stats,
    ) {
        while let Some(oldest) = self.backlog.front()
            && oldest.since.saturating_add(drain_after(features)) <= now
            && let Some(packet) = self.pop_waiting()
        {
            stats.drop_one(DropReason::RxNoBuffers);
            port.recycle(packet.buf);
        }
    }

    /// Whether the guest has stalled, or is ready again, since last asked. What waited may have
    /// been dropped meanwhile: it stays starved until something is delivered.
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

    /// Receive requests without which nothing can be done; `None` if there is nothing to do.
    fn needed(&self) -> Option<u32> {
        self.backlog.front().map(|waiting| slots_of(&waiting.packet)).or(self.stalled)
    }

    fn has_buffers(&mut self, needed: u32) -> Result<bool, Fault> {
        Ok(self.ring.waiting() >= needed || self.ring.look().map_err(Fault::RxRing)? >= needed)
    }

    fn pop_waiting(&mut self) -> Option<Packet<B>> {
        let packet = self.backlog.pop_front()?.packet;
        self.backlog_bytes = self.backlog_bytes.saturating_sub(packet.len);
        Some(packet)
    }

    /// Takes packets from the port into the backlog, as long as there is space: the rest stay with
    /// the port, so that a guest without buffers holds nothing but its own share.
    fn take<N: NetPort<Buf = B>>(
        &mut self,
        context: &Context<'_, impl Platform>,
        port: &mut N,
        most: usize,
    ) -> usize {
        let mut count = 0_usize;
        while count < most
            && self.backlog.len() < BACKLOG_PACKETS
            && self.backlog_bytes <= BACKLOG_BYTES.saturating_sub(FRAME_MAX)
            && let Some(mut packet) = port.receive()
        {
            count = count.saturating_add(1);
            match admit(context.features, context.groups, &mut packet) {
                Ok(()) => {
                    self.backlog_bytes = self.backlog_bytes.saturating_add(packet.len);
                    self.backlog.push_back(Waiting { packet, since: context.now });
                }
                Err(reason) => {
                    context.stats.drop_one(reason);
                    port.recycle(packet.buf);
                }
            }
        }
        count
    }

    /// Moves packets for which there are buffers to the batch, and takes the buffers.
    fn assign(&mut self) -> Result<(), Fault> {
        while self.batch.len() < BATCH
            && let Some(waiting) = self.backlog.front()
        {
            let needed = slots_of(&waiting.packet);
            if !self.has_buffers(needed)? {
                break;
            }
            for _ in 0..needed {
                if let Some(mut slot) = self.ring.pop().map_err(Fault::RxRing)?
                    && let Ok(request) = RxRequest::read(&mut slot)
                {
                    self.slots.push(RxSlot { request, failed: false });
                }
            }
            if let Some(packet) = self.pop_waiting() {
                self.batch.push(packet);
            }
        }
        Ok(())
    }

    /// Copies the data of the whole batch in one go.
    fn copy(&mut self, copier: &impl GrantCopier, peer: DomId) {
        let mut ops = recycle_ops(core::mem::take(&mut self.ops));
        let mut slots = self.slots.iter();
        for packet in &self.batch {
            for (i, part) in packet.frame().chunks(PAGE_SIZE).enumerate() {
                let slot = slots.next();
                if i == 0 && packet.offload.gso.is_some() {
                    // The extra segment stands in the second slot; that buffer stays unused.
                    slots.next();
                }
                let Some(slot) = slot else { break };
                ops.push(CopyOp {
                    domain: peer,
                    gref: slot.request.gref,
                    offset: 0,
                    with: CopyBuf::ToGrant(part),
                    status: GrantStatus::GeneralError,
                });
            }
        }
        copier.copy(&mut ops);

        let mut done = ops.iter();
        let mut slots = self.slots.iter_mut();
        for packet in &self.batch {
            for i in 0..packet.len.div_ceil(PAGE_SIZE) {
                let failed = done.next().is_none_or(|op| op.status != GrantStatus::Okay);
                slots.next().into_iter().for_each(|slot| slot.failed = failed);
                if i == 0 && packet.offload.gso.is_some() {
                    slots.next();
                }
            }
        }
        self.ops = recycle_ops(ops);
    }

    /// Answers every slot, each in its own place, and gives the buffers back.
    fn deliver<N: NetPort<Buf = B>>(&mut self, port: &mut N, stats: &Stats) {
        let mut slots = self.slots.iter();
        for packet in self.batch.drain(..) {
            let mut failed = false;
            let mut left = packet.len;
            let mut flags = flags_of(&packet);
            while left > 0 {
                let size = left.min(PAGE_SIZE);
                left = left.saturating_sub(size);
                flags.set(RxFlags::MORE_DATA, left > 0);
                let Some(slot) = slots.next() else { break };
                failed |= slot.failed;
                // At most 4096, so it fits; an error is negative.
                let status = if slot.failed { rsp::ERROR } else { size as i16 };
                let response = RxResponse { id: slot.request.id, offset: 0, flags, status };
                push(&mut self.ring, &response.to_bytes());
                if flags.contains(RxFlags::EXTRA_INFO)
                    && let Some(gso) = packet.offload.gso
                {
                    slots.next();
                    let kind = ExtraKind::Gso { size: gso.size, kind: gso.kind };
                    push(&mut self.ring, &Extra { kind, more: false }.to_bytes());
                }
                flags = RxFlags::empty();
            }
            if failed {
                stats.drop_one(DropReason::RxCopy);
            } else {
                stats.count_rx(packet.len, packet.offload.gso.is_some());
            }
            port.recycle(packet.buf);
        }
        self.slots.clear();
    }
}

/// Whether a packet can go to this guest at all; a checksum it cannot complete is completed.
fn admit<B: PacketBuf>(
    features: &Features,
    groups: &Groups,
    packet: &mut Packet<B>,
) -> Result<(), DropReason> {
    let len = packet.frame().len();
    if len < ETHERNET_HEADER {
        return Err(DropReason::RxShort);
    }
    if !groups.wants(packet.frame()) {
        return Err(DropReason::RxGroup);
    }
    if let Some(gso) = packet.offload.gso {
        let allowed = match gso.kind {
            GsoKind::TcpV4 => features.gso_v4,
            GsoKind::TcpV6 => features.gso_v6,
        };
        if !allowed || gso.size == 0 {
            return Err(DropReason::RxGso);
        }
    }
    if len > FRAME_MAX || (len > PAGE_SIZE && !features.sg) {
        return Err(DropReason::RxTooBig);
    }
    if let Checksum::Partial { start, offset } = packet.offload.checksum {
        let (start, offset) = (usize::from(start), usize::from(offset));
        // The guest is told only that a checksum is blank, so it must be where the guest
        // will look, and of an IP version it does this for.
        let found = Transport::of(packet.frame()).ok();
        let found = found.filter(|t| t.start == start && t.offset == offset);
        let accepted = found.is_some_and(|t| match t.version {
            IpVersion::V4 => features.checksum_v4,
            IpVersion::V6 => features.checksum_v6,
        });
        if !accepted {
            if packet.offload.gso.is_some() {
                return Err(DropReason::RxGso);
            }
            if !checksum::complete(packet.frame_mut(), start, offset) {
                return Err(DropReason::RxChecksum);
            }
            packet.offload.checksum = Checksum::Validated;
        }
    }
    Ok(())
}

/// How long a packet may wait.
const fn drain_after(features: &Features) -> Duration {
    if features.rx_notify { DRAIN } else { DRAIN_UNSEEN }
}

/// Receive requests a packet uses: one a page, and one for an extra segment. At most 18.
fn slots_of<B>(packet: &Packet<B>) -> u32 {
    let pages = packet.len.div_ceil(PAGE_SIZE) as u32;
    pages.saturating_add(u32::from(packet.offload.gso.is_some()))
}

/// The flags of a packet's first slot.
fn flags_of<B>(packet: &Packet<B>) -> RxFlags {
    let checksum = match packet.offload.checksum {
        Checksum::Unknown => RxFlags::empty(),
        Checksum::Validated => RxFlags::DATA_VALIDATED,
        Checksum::Partial { .. } => RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED,
    };
    let extra = if packet.offload.gso.is_some() { RxFlags::EXTRA_INFO } else { RxFlags::empty() };
    checksum | extra
}

fn push<M: SharedMemory>(ring: &mut BackRing<M>, response: &[u8]) {
    // One response for each request that was taken, so there is room.
    let pushed = ring.push(response);
    debug_assert!(pushed.is_ok(), "more answers than requests");
}
