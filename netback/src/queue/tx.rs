//! The transmit path: guest to port.

use super::packet::{self, GroupChange, Piece, Taken};
use super::ring::Ring;
use super::{BATCH, Context, Features, recycle_ops};
use crate::fault::{DropReason, Fault};
use crate::port::{Checksum, NetPort, Offload, Packet, PacketBuf};
use crate::stats::Stats;
use crate::wire::WireCost;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_event_channel::BackendPlatform;
use pvio_grant_table::{CopyBuf, CopyOp, DomId, GrantCopier, GrantStatus};
use pvio_ring::proto::checksum::{IpVersion, Transport};
use pvio_ring::proto::netif::{GsoKind, TxFlags, TxResponse, rsp};
use pvio_ring::shm::{PAGE_SIZE, SharedMemory};

/// Limit of frames of one batch after segmentation, which bounds how far a batch can exceed a rate
/// limit.
const FRAMES: u64 = 4096;

/// Transmit ring and the packets between it and the port.
pub(super) struct Tx<M, B, R> {
    ring: Ring<M, R>,
    /// Packets whose data is being copied; empty between polls, as are the next two fields.
    batch: Vec<Gathering<B>>,
    pieces: Vec<Piece>,
    ops: Vec<CopyOp<'static>>,
    /// The port had no free buffer at the last attempt, so requests wait for the port.
    blocked: bool,
    /// Time until which requests wait because the guest has reached its rate limit.
    limited: Option<Duration>,
}

/// Packet whose slots were taken.
struct Gathering<B> {
    taken: Taken,
    pieces: core::ops::Range<usize>,
    fate: Fate<B>,
}

enum Fate<B> {
    /// Forwarded: its buffer, and the offset of the frame in it.
    Sent(B, usize),
    /// Not forwarded: no packet, or a rejected one. The response has this status.
    Answered(i16),
}

impl<M: SharedMemory, B: PacketBuf, R: SharedMemory> Tx<M, B, R> {
    pub fn new(ring: Ring<M, R>) -> Self {
        let slots = ring.slots();
        Self {
            ring,
            batch: Vec::with_capacity(BATCH),
            pieces: Vec::with_capacity(slots),
            ops: Vec::with_capacity(slots),
            blocked: false,
            limited: None,
        }
    }

    /// Forwards up to one batch of packets and writes their responses. Returns the number of
    /// packets taken, including dropped ones.
    pub fn step<N: NetPort<Buf = B>>(
        &mut self,
        context: &Context<'_, impl BackendPlatform, impl SharedMemory>,
        port: &mut N,
        most: usize,
    ) -> Result<usize, Fault> {
        // Buffers of packets that were gathered before a fault go back to the port.
        let gathered = self.gather(context, port, most.min(BATCH));
        let taken = gathered.inspect_err(|_| self.abandon(port))?;
        if !self.batch.is_empty() {
            self.copy(&context.pages, context.peer);
            self.deliver(context, port);
        }
        self.pieces.clear();
        Ok(taken)
    }

    /// Publishes responses. Returns whether the guest has to be notified.
    pub fn publish(&mut self) -> bool {
        self.ring.publish()
    }

    /// Requests a notification and returns whether there is work.
    pub fn final_check(&mut self) -> Result<bool, Fault> {
        Ok(!self.blocked
            && self.limited.is_none()
            && self.ring.final_check_for(1).map_err(Fault::TxRing)?)
    }

    /// Whether there is work, by the current producer index.
    pub fn has_work(&mut self) -> Result<bool, Fault> {
        Ok(!self.blocked
            && self.limited.is_none()
            && self.ring.has_requests().map_err(Fault::TxRing)?)
    }

    /// Returns the time at which the guest may send again, if it has reached its rate limit.
    pub fn deadline(&self) -> Option<Duration> {
        self.limited
    }

    /// Returns the number of requests that will get an error response, because too many processes
    /// ended while they were in flight.
    pub fn given_up(&self) -> u64 {
        self.ring.given_up()
    }

    /// Signals that the port may have free buffers again.
    pub fn unblock(&mut self) {
        self.blocked = false;
    }

    /// Takes packets from the ring while the port has buffers.
    fn gather<N: NetPort<Buf = B>>(
        &mut self,
        context: &Context<'_, impl BackendPlatform, impl SharedMemory>,
        port: &mut N,
        most: usize,
    ) -> Result<usize, Fault> {
        let (mut count, mut frames) = (0_usize, 0_u64);
        (self.blocked, self.limited) = (false, None);
        while count < most && frames < FRAMES && self.ring.has_requests().map_err(Fault::TxRing)? {
            if let Err(until) = context.limit.check(context.now) {
                self.limited = Some(until);
                context.stats.count_limited();
                break;
            }
            // The buffer first: a request that was taken from the ring cannot be returned to it.
            let Ok(buf) = port.reserve() else {
                self.blocked = true;
                break;
            };
            let start = self.pieces.len();
            let gives_up = self.ring.gives_up();
            let taken = match packet::take(&mut self.ring, &mut self.pieces) {
                Ok(taken) => taken,
                Err(fault) => {
                    port.unreserve(buf);
                    return Err(fault);
                }
            };
            count = count.saturating_add(1);
            let cost = WireCost::least(taken.len, taken.gso);
            frames = frames.saturating_add(cost.frames);
            context.limit.take(cost.bytes, context.now);
            let pieces = start..self.pieces.len();
            let refused = if gives_up { Some(DropReason::TxDeaths) } else { taken.refused };
            let fate = if let Some(change) = taken.group {
                port.unreserve(buf);
                Fate::Answered(self.change(change, context))
            } else if let Some(reason) = refused {
                port.unreserve(buf);
                context.stats.drop_one(reason);
                Fate::Answered(rsp::ERROR)
            } else {
                let buf = port.fit(buf, taken.len);
                let parts = self.pieces.get(start..).unwrap_or_default();
                let start = place(parts, N::HEADROOM, buf.bytes().len());
                Fate::Sent(buf, start)
            };
            self.batch.push(Gathering { taken, pieces, fate });
        }
        Ok(count)
    }

    /// Executes a request that carries no packet, but adds or removes a multicast group.
    fn change(
        &self,
        change: GroupChange,
        context: &Context<'_, impl BackendPlatform, impl SharedMemory>,
    ) -> i16 {
        let refused = match change {
            _ if !context.features.names_groups => Some(DropReason::TxMulticast),
            GroupChange::Add(group) if !context.groups.add(group) => Some(DropReason::TxGroups),
            GroupChange::Add(_) => None,
            GroupChange::Remove(group) => {
                context.groups.remove(group);
                None
            }
        };
        refused.into_iter().for_each(|reason| context.stats.drop_one(reason));
        if refused.is_none() { rsp::OKAY } else { rsp::ERROR }
    }

    /// Copies the data of the whole batch with one call.
    fn copy(&mut self, copier: &impl GrantCopier, peer: DomId) {
        let mut ops = recycle_ops(core::mem::take(&mut self.ops));
        for Gathering { pieces, fate, .. } in &mut self.batch {
            let Fate::Sent(buf, start) = fate else { continue };
            let mut rest = buf.bytes_mut().get_mut(*start..).unwrap_or_default();
            let pieces = self.pieces.get_mut(pieces.clone()).unwrap_or_default();
            // A slot without data gets a response, but its page is not accessed: its grant may be
            // anything (XSA-448).
            for piece in pieces.iter_mut().filter(|p| p.size > 0) {
                let Some((part, tail)) = rest.split_at_mut_checked(usize::from(piece.size)) else {
                    // The sizes add up to `len`, a u16, and buffers are at least that large.
                    debug_assert!(false, "a packet larger than its buffer");
                    break;
                };
                rest = tail;
                // Cleared when it is copied.
                piece.failed = true;
                ops.push(CopyOp {
                    domain: peer,
                    gref: piece.gref,
                    offset: usize::from(piece.offset),
                    with: CopyBuf::FromGrant(part),
                    status: GrantStatus::GeneralError,
                });
            }
        }
        copier.copy(&mut ops);
        let copied = self.pieces.iter_mut().filter(|piece| piece.failed);
        for (piece, op) in copied.zip(&ops) {
            piece.failed = op.status != GrantStatus::Okay;
        }
        self.ops = recycle_ops(ops);
    }

    /// Sends the batch to the port and writes the response of every slot.
    fn deliver<N: NetPort<Buf = B>>(
        &mut self,
        context: &Context<'_, impl BackendPlatform, impl SharedMemory>,
        port: &mut N,
    ) {
        let Context { features, stats, .. } = context;
        for Gathering { taken, pieces, fate } in self.batch.drain(..) {
            let pieces = self.pieces.get(pieces).unwrap_or_default();
            let (buf, start) = match fate {
                Fate::Sent(buf, start) => (buf, start),
                Fate::Answered(status) => {
                    answer(&mut self.ring, pieces, taken.extras, status);
                    continue;
                }
            };
            let mut packet = Packet { buf, start, len: taken.len, offload: Offload::default() };
            let sent = if pieces.iter().any(|piece| piece.failed) {
                Err((DropReason::TxCopy, Some(packet.buf)))
            } else {
                match offload(&taken, features, packet.frame_mut(), stats) {
                    Ok(offload) => {
                        packet.offload = offload;
                        if taken.gso.is_some() {
                            // The headers are known only after the copy.
                            let cost = WireCost::of(packet.frame(), taken.gso);
                            let more = cost.beyond(WireCost::least(taken.len, taken.gso));
                            context.limit.take(more.bytes, context.now);
                        }
                        port.send(packet).map_err(|error| (error.reason(), None))
                    }
                    Err(reason) => Err((reason, Some(packet.buf))),
                }
            };
            let status = match sent {
                Ok(()) => {
                    stats.count_tx(taken.len, taken.gso.is_some());
                    rsp::OKAY
                }
                Err((reason, buf)) => {
                    stats.drop_one(reason);
                    buf.into_iter().for_each(|buf| port.unreserve(buf));
                    rsp::ERROR
                }
            };
            answer(&mut self.ring, pieces, taken.extras, status);
        }
    }

    /// Returns the buffers of packets that will not be sent, since the vif ends.
    fn abandon<N: NetPort<Buf = B>>(&mut self, port: &mut N) {
        for packet in self.batch.drain(..) {
            if let Fate::Sent(buf, _) = packet.fate {
                port.unreserve(buf);
            }
        }
        self.pieces.clear();
    }
}

/// Returns the offset of a frame in a buffer of `buffer` bytes, after the headroom. If the packet
/// has a full page, the offset aligns it with a page of the buffer, since a copy that crosses a
/// page counts as two. Otherwise it aligns the frame with a cache line. Pages are mostly filled
/// from their start, and on some processors copies are 16 times slower if the destination is a few
/// bytes further into its page than the source (Zen 4's `rep movsb`).
fn place(pieces: &[Piece], headroom: usize, buffer: usize) -> usize {
    const CACHE_LINE: usize = 64;
    let size = |pieces: &[Piece]| pieces.iter().map(|p| usize::from(p.size)).sum::<usize>();
    let first = pieces.iter().position(|piece| usize::from(piece.size) == PAGE_SIZE);
    let (before, unit) = match first {
        Some(first) => (size(pieces.get(..first).unwrap_or_default()), PAGE_SIZE),
        None => (0, CACHE_LINE),
    };
    let before = headroom.saturating_add(before);
    let gap = before.checked_next_multiple_of(unit).unwrap_or(before).saturating_sub(before);
    let start = headroom.saturating_add(gap);
    if start.saturating_add(size(pieces)) <= buffer { start } else { headroom }
}

/// Writes the responses of a packet: `status` for its data slots, `NULL` for its extra segments.
fn answer<M: SharedMemory, R: SharedMemory>(
    ring: &mut Ring<M, R>,
    pieces: &[Piece],
    extras: u32,
    status: i16,
) {
    let data = pieces.iter().map(|p| TxResponse { id: p.id, status });
    let null = (0..extras).map(|_| TxResponse { id: 0, status: rsp::NULL });
    for response in data.chain(null) {
        ring.respond(&response.to_bytes());
    }
}

/// Returns the offloads that the port has to do, from the guest's flags and the packet itself.
fn offload(
    taken: &Taken,
    features: &Features,
    frame: &mut [u8],
    stats: &Stats,
) -> Result<Offload, DropReason> {
    let blank = taken.flags.contains(TxFlags::CSUM_BLANK);
    if !blank && taken.gso.is_none() {
        let validated = taken.flags.contains(TxFlags::DATA_VALIDATED);
        let checksum = if validated { Checksum::Validated } else { Checksum::Unknown };
        return Ok(Offload { checksum, gso: None });
    }
    let transport = Transport::of(frame).map_err(|_| DropReason::TxChecksum)?;
    if let Some(gso) = taken.gso {
        let (allowed, version) = match gso.kind {
            GsoKind::TcpV4 => (features.sends_gso_v4, IpVersion::V4),
            GsoKind::TcpV6 => (features.sends_gso_v6, IpVersion::V6),
        };
        if !allowed || transport.udp || transport.version != version {
            return Err(DropReason::TxGso);
        }
        if !blank {
            // Each segment gets its own checksum, computed from the pseudo-header sum that must be
            // in this field. Some guests leave a complete checksum there (Linux:
            // `rx_gso_checksum_fixup`).
            transport.blank(frame);
            stats.count_gso_fixup();
        }
    }
    let place = |n: usize| u16::try_from(n).map_err(|_| DropReason::TxChecksum);
    let checksum =
        Checksum::Partial { start: place(transport.start)?, offset: place(transport.offset)? };
    Ok(Offload { checksum, gso: taken.gso })
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvio_grant_table::GrantRef;

    #[test]
    fn placement_aligns_full_pages_if_buffer_has_space() {
        let pieces = |sizes: &[u16]| {
            let piece =
                |&size: &u16| Piece { gref: GrantRef(8), id: 0, offset: 0, size, failed: false };
            sizes.iter().map(piece).collect::<Vec<_>>()
        };
        let at = |sizes: &[u16], buffer| place(&pieces(sizes), 10, buffer);
        assert_eq!(at(&[66, 1448], 2048), 64);
        assert_eq!(at(&[1984], 2048), 64);
        assert_eq!(at(&[1985], 2048), 10, "no space for alignment");
        assert_eq!(at(&[4096], 70_000), 4096);
        assert_eq!(at(&[66, 4096, 4096, 5], 70_000), 4096 - 66);
        // Headers, then the rest of a page, before the first full one.
        assert_eq!(at(&[66, 3000, 4096], 70_000), 4096 - 3066);
        assert_eq!(at(&[4095, 10, 4096], 70_000), 8192 - 4105);
        assert_eq!(at(&[66, 4096], 66 + 4096 + 10), 10, "no space for alignment");
        for policy in super::super::Policy::ALL {
            assert_eq!(policy.as_str().parse(), Ok(policy));
        }
    }
}
