//! Port to guest.

use super::{BATCH, Features, recycle_ops};
use crate::fault::{DropReason, Fault};
use crate::port::{Checksum, NetPort, Packet, PacketBuf};
use crate::stats::Stats;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
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

/// The receive ring and what waits for it.
pub(super) struct Rx<M, B> {
    ring: BackRing<M>,
    backlog: VecDeque<Packet<B>>,
    backlog_bytes: usize,
    /// Packets being copied, and the requests they use, in order; empty between polls.
    batch: Vec<Packet<B>>,
    slots: Vec<RxSlot>,
    ops: Vec<CopyOp<'static>>,
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
            batch: Vec::with_capacity(BATCH),
            slots: Vec::with_capacity(slots),
            ops: Vec::with_capacity(slots),
        })
    }

    /// Takes up to `most` packets from the port and puts as many as there are buffers for into
    /// them. Returns how many were taken or delivered.
    pub fn step<N: NetPort<Buf = B>>(
        &mut self,
        copier: &impl GrantCopier,
        peer: DomId,
        features: &Features,
        port: &mut N,
        most: usize,
        stats: &Stats,
    ) -> Result<usize, Fault> {
        let taken = self.take(features, port, most.min(BATCH), stats);
        self.assign()?;
        let delivered = self.batch.len();
        if delivered > 0 {
            self.copy(copier, peer);
            self.deliver(port, stats);
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
        let Some(packet) = self.backlog.front() else { return Ok(true) };
        let needed = slots_of(packet);
        Ok(!self.ring.final_check_for(needed).map_err(Fault::RxRing)?)
    }

    /// Whether there is something to do, from what shared memory says now.
    pub fn has_work(&mut self) -> Result<bool, Fault> {
        let Some(packet) = self.backlog.front() else { return Ok(false) };
        let needed = slots_of(packet);
        Ok(self.ring.waiting() >= needed || self.ring.look().map_err(Fault::RxRing)? >= needed)
    }

    /// Packets waiting for the guest to post buffers.
    pub fn backlog(&self) -> usize {
        self.backlog.len()
    }

    /// Drops what waits, giving the buffers back.
    pub fn drop_backlog<N: NetPort<Buf = B>>(&mut self, port: &mut N, stats: &Stats) {
        for packet in self.backlog.drain(..) {
            stats.drop_one(DropReason::RxNoBuffers);
            port.recycle(packet.buf);
        }
        self.backlog_bytes = 0;
    }

    /// Takes packets from the port into the backlog; what does not fit is dropped here, so that
    /// a guest without buffers holds nothing but its own share.
    fn take<N: NetPort<Buf = B>>(
        &mut self,
        features: &Features,
        port: &mut N,
        most: usize,
        stats: &Stats,
    ) -> usize {
        let mut count = 0_usize;
        while count < most
            && let Some(mut packet) = port.receive()
        {
            count = count.saturating_add(1);
            match self.admit(features, &mut packet) {
                Ok(()) => {
                    self.backlog_bytes = self.backlog_bytes.saturating_add(packet.len);
                    self.backlog.push_back(packet);
                }
                Err(reason) => {
                    stats.drop_one(reason);
                    port.recycle(packet.buf);
                }
            }
        }
        count
    }

    /// Whether a packet can go to this guest at all; a checksum it cannot complete is completed.
    fn admit(&self, features: &Features, packet: &mut Packet<B>) -> Result<(), DropReason> {
        let len = packet.frame().len();
        if len < ETHERNET_HEADER {
            return Err(DropReason::RxShort);
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
        if len > PAGE_SIZE && !features.sg {
            return Err(DropReason::RxTooBig);
        }
        let full = self.backlog.len() >= BACKLOG_PACKETS;
        if full || self.backlog_bytes.saturating_add(len) > BACKLOG_BYTES {
            return Err(DropReason::RxNoBuffers);
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

    /// Moves packets for which there are buffers to the batch, and takes the buffers.
    fn assign(&mut self) -> Result<(), Fault> {
        while self.batch.len() < BATCH
            && let Some(packet) = self.backlog.front()
        {
            let needed = slots_of(packet);
            let enough =
                self.ring.waiting() >= needed || self.ring.look().map_err(Fault::RxRing)? >= needed;
            if !enough {
                break;
            }
            for _ in 0..needed {
                if let Some(mut slot) = self.ring.pop().map_err(Fault::RxRing)?
                    && let Ok(request) = RxRequest::read(&mut slot)
                {
                    self.slots.push(RxSlot { request, failed: false });
                }
            }
            if let Some(packet) = self.backlog.pop_front() {
                self.backlog_bytes = self.backlog_bytes.saturating_sub(packet.len);
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
                stats.count_rx(packet.len);
            }
            port.recycle(packet.buf);
        }
        self.slots.clear();
    }
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
