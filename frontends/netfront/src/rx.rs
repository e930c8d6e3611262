//! Received packets.

use crate::fault::{BackendFault, SetupError};
use crate::granted::Granted;
use crate::packet::{Checksum, Counters, Gso};
use crate::received::Incoming;
use crate::steering::Hash;
use alloc::boxed::Box;
use pvio_grant_table::{Access, DomId, GrantRef, Granter};
use pvio_ring::FrontRing;
use pvio_ring::proto::checksum::ETHERNET_HEADER;
use pvio_ring::proto::netif::{
    Extra, ExtraFault, ExtraKind, GsoKind, HASH_TOEPLITZ, HashKind, HashTypes, MAX_PACKET,
    RX_SLOT_SIZE, RxFlags, RxRequest, RxResponse,
};
use pvio_ring::shm::{PAGE_SIZE, Region};

/// Maximum headroom that can be requested before received data, in bytes: the maximum of pvio's
/// netback (Linux's frontend requests 256).
pub const HEADROOM_MAX: u16 = 2048;

/// Offset at which a packet is assembled: the maximum headroom.
const START: usize = HEADROOM_MAX as usize;
/// Size of the largest packet, in bytes: the largest IP packet in a frame with a VLAN tag.
const FRAME_MAX: usize = MAX_PACKET + ETHERNET_HEADER + 4;
/// Maximum number of extra segments of one packet.
const EXTRAS_MAX: usize = 4;
/// Number of posted buffers after which they are published.
const BATCH: u32 = 64;

/// The receive ring, and a page for each of its slots.
pub struct Rx<P: Granter> {
    ring: FrontRing<P::Pages>,
    ring_page: Granted<P>,
    data: Granted<P>,
    /// Buffer in which the packet is assembled.
    packet: Box<[u8]>,
    assembly: Assembly,
    unpublished: u32,
    takes: Takes,
}

/// Requested packet metadata and headroom.
#[derive(Clone, Copy, Default)]
struct Takes {
    /// Whether the backend may send GSO packets, over IPv4 and IPv6.
    gso: (bool, bool),
    /// Kinds of packets whose hash the backend reports.
    hashes: HashTypes,
    /// Headroom in each page, in bytes: the maximum requested so far.
    headroom: u16,
}

/// A packet that is assembled.
#[derive(Clone, Copy)]
pub struct Received {
    pub len: usize,
    pub checksum: Checksum,
    pub gso: Option<Gso>,
    /// Offset at which the frame starts.
    start: usize,
    hash: Option<Hash>,
    headroom: u16,
}

/// State of a partly received packet. The backend may publish its slots one at a time.
#[derive(Clone, Copy, Default)]
struct Assembly {
    next: Next,
    /// Bytes of data received so far.
    len: usize,
    /// Offset and length of the first slot's data in its page.
    first: (u16, u16),
    /// Headroom that each slot's length includes, in bytes: Linux's netback does so.
    room: u16,
    slots: usize,
    extras: usize,
    /// Data slots follow after the extra segments.
    more: bool,
    /// A slot was completed with an error: the packet is dropped.
    failed: bool,
    checksum: Checksum,
    gso: Option<Gso>,
    hash: Option<Hash>,
    headroom: u16,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Next {
    #[default]
    First,
    Extra,
    Data,
}

impl<P: Granter + Clone> Rx<P> {
    pub fn new(platform: &P, backend: DomId) -> Result<Self, SetupError> {
        let ring_page = Granted::new(platform.clone(), backend, 1, Access::ReadWrite)?;
        let ring = FrontRing::init(ring_page.pages().clone(), RX_SLOT_SIZE)?;
        let slots = ring.layout().slots();
        let count = slots as usize;
        let data = Granted::new(platform.clone(), backend, count, Access::ReadWrite)?;
        // If slot lengths include the headroom, the data start at up to twice the maximum headroom.
        let size = START.saturating_add(START).saturating_add(FRAME_MAX);
        let packet = alloc::vec![0; size].into_boxed_slice();
        let (assembly, takes) = (Assembly::default(), Takes::default());
        let mut rx = Self { ring, ring_page, data, packet, assembly, unpublished: 0, takes };
        (0..slots).for_each(|_| rx.post());
        let _ = rx.ring.publish();
        rx.unpublished = 0;
        Ok(rx)
    }
}

impl<P: Granter> Rx<P> {
    pub fn ring_page(&self) -> &Granted<P> {
        &self.ring_page
    }

    pub fn data_grefs(&self) -> &[GrantRef] {
        self.data.grefs()
    }

    /// Sets whether the backend may send GSO packets, over IPv4 and over IPv6.
    pub const fn take_gso(&mut self, v4: bool, v6: bool) {
        self.takes.gso = (v4, v6);
    }

    /// Sets the kinds of packets whose hash the backend reports.
    pub const fn take_hashes(&mut self, types: HashTypes) {
        self.takes.hashes = types;
    }

    /// Sets the requested headroom, in bytes. Packets with the earlier setting may still arrive.
    pub fn take_headroom(&mut self, bytes: u16) {
        self.takes.headroom = self.takes.headroom.max(bytes.min(HEADROOM_MAX));
    }

    /// Assembles the next packet in private memory.
    pub fn next(&mut self, counters: &mut Counters) -> Result<Option<Received>, BackendFault> {
        while self.ring.has_responses().map_err(BackendFault::RxRing)? {
            if !self.take_slot()? {
                continue;
            }
            let done = core::mem::take(&mut self.assembly);
            if done.failed {
                counters.rx_errors = counters.rx_errors.wrapping_add(1);
                continue;
            }
            counters.rx_packets = counters.rx_packets.wrapping_add(1);
            counters.rx_bytes = counters.rx_bytes.wrapping_add(done.len as u64);
            let Assembly { len, checksum, gso, hash, headroom, room, .. } = done;
            let start = START.saturating_add(room.into());
            return Ok(Some(Received { len, checksum, gso, start, hash, headroom }));
        }
        Ok(None)
    }

    /// Returns the packet that [`next`](Self::next) assembled; valid until the next call.
    #[cfg(feature = "smoltcp")]
    pub fn frame(&self, got: &Received) -> &[u8] {
        let end = got.start.saturating_add(got.len);
        self.packet.get(got.start..end).unwrap_or_default()
    }

    /// Returns the packet that [`next`](Self::next) assembled, with its metadata and headroom.
    pub fn incoming(&mut self, got: &Received) -> Incoming<'_> {
        let headroom = usize::from(got.headroom);
        let begin = got.start.saturating_sub(headroom);
        let end = got.start.saturating_add(got.len);
        let room = self.packet.get_mut(begin..end).unwrap_or_default();
        // The buffer holds data of an earlier packet.
        room.iter_mut().take(headroom).for_each(|byte| *byte = 0);
        Incoming::new(room, headroom, (got.checksum, got.gso, got.hash))
    }

    /// Returns whether enough buffers are unpublished for a batch.
    pub fn should_publish(&self) -> bool {
        self.unpublished >= BATCH
    }

    /// Publishes the posted buffers; returns whether the backend must be notified.
    pub fn publish(&mut self) -> bool {
        self.unpublished = 0;
        self.ring.publish()
    }

    /// Arms a notification and returns whether a response is available.
    pub fn final_check(&mut self) -> Result<bool, BackendFault> {
        self.ring.final_check().map_err(BackendFault::RxRing)
    }

    /// Returns whether a response is available, without arming a notification.
    pub fn has_work(&mut self) -> Result<bool, BackendFault> {
        self.ring.has_responses().map_err(BackendFault::RxRing)
    }

    pub fn revoke(&mut self) -> bool {
        let data = self.data.revoke();
        self.ring_page.revoke() && data
    }

    /// Takes one slot and posts its page again; returns whether the packet is complete.
    fn take_slot(&mut self) -> Result<bool, BackendFault> {
        // A page is posted again when its response is taken. So all pages are always posted, in
        // order, and the id of the oldest request is the number of its slot.
        let index = self.ring.next_index().wrapping_sub(self.ring.in_flight());
        let page = index & self.ring.layout().slots().wrapping_sub(1);
        let Some(mut slot) = self.ring.pop().map_err(BackendFault::RxRing)? else {
            return Ok(false);
        };
        // A slot of the ring is never shorter than a response.
        let complete = if self.assembly.next == Next::Extra {
            let extra = Extra::read(&mut slot).unwrap_or(Err(ExtraFault::Type(0)))?;
            self.assembly.extra(extra, self.takes)?
        } else {
            let response = RxResponse::read(&mut slot).unwrap_or_default();
            self.data(page, response)?
        };
        self.post();
        Ok(complete)
    }

    /// Appends a slot's data to the packet.
    fn data(&mut self, page: u32, response: RxResponse) -> Result<bool, BackendFault> {
        let RxResponse { id, offset, flags, status } = response;
        let expected = page as u16;
        if id != expected {
            return Err(BackendFault::RxId { expected, got: id });
        }
        let packet = &mut self.assembly;
        packet.slots = packet.slots.saturating_add(1);
        if packet.slots > slots_max(self.takes.headroom) {
            return Err(BackendFault::RxSlots);
        }
        let first = packet.next == Next::First;
        match u16::try_from(status) {
            Err(_) => packet.failed = true,
            Ok(size) => {
                if usize::from(offset).saturating_add(usize::from(size)) > PAGE_SIZE {
                    return Err(BackendFault::RxCrossesPage { offset, size });
                }
                if first && usize::from(size) < ETHERNET_HEADER {
                    return Err(BackendFault::RxShort(size));
                }
                // The headroom in the slot is not data. (For the first slot it is known only
                // later.)
                let room = if offset == 0 { packet.room.min(size) } else { 0 };
                let (offset, size) = (offset.saturating_add(room), size.saturating_sub(room));
                if first {
                    packet.first = (offset, size);
                }
                let end = packet.len.saturating_add(usize::from(size));
                if end > FRAME_MAX {
                    return Err(BackendFault::RxTooLong);
                }
                let start = START.saturating_add(packet.room.into());
                let place = start.saturating_add(packet.len)..start.saturating_add(end);
                let place = self.packet.get_mut(place).ok_or(BackendFault::RxTooLong)?;
                let from = (page as usize).saturating_mul(PAGE_SIZE);
                let from = from.saturating_add(usize::from(offset));
                let copied = self.data.pages().read_bytes(from, place);
                debug_assert!(copied.is_some(), "the page was checked");
                packet.len = end;
            }
        }
        if first {
            packet.checksum = match flags {
                f if f.contains(RxFlags::CSUM_BLANK) => Checksum::Blank,
                f if f.contains(RxFlags::DATA_VALIDATED) => Checksum::Validated,
                _ => Checksum::Unknown,
            };
        }
        packet.more = flags.contains(RxFlags::MORE_DATA);
        packet.next = match (first && flags.contains(RxFlags::EXTRA_INFO), packet.more) {
            (true, _) => Next::Extra,
            (false, true) => Next::Data,
            (false, false) => return Ok(true),
        };
        Ok(false)
    }

    /// Posts the page that belongs to the next slot.
    fn post(&mut self) {
        let page = self.ring.next_index() & self.ring.layout().slots().wrapping_sub(1);
        let request = RxRequest { id: page as u16, gref: self.data.gref(page as usize) };
        // There are as many pages as slots, so a slot is free.
        let pushed = self.ring.push(&request.to_bytes());
        debug_assert!(pushed.is_ok(), "more requests than slots");
        self.unpublished = self.unpublished.saturating_add(1);
    }
}

impl Assembly {
    /// Processes an extra segment; returns whether the packet is complete.
    fn extra(&mut self, extra: Extra, takes: Takes) -> Result<bool, BackendFault> {
        self.extras = self.extras.saturating_add(1);
        if self.extras > EXTRAS_MAX {
            return Err(BackendFault::RxSlots);
        }
        match extra.kind {
            ExtraKind::Gso { size, kind } => {
                let taken = match kind {
                    GsoKind::TcpV4 => takes.gso.0,
                    GsoKind::TcpV6 => takes.gso.1,
                };
                if !taken {
                    return Err(BackendFault::RxGso);
                }
                self.gso = Some(Gso { size, kind });
            }
            // A hash of a kind that is not, or no longer, requested is ignored.
            ExtraKind::Hash { kind, algorithm, value } if u32::from(algorithm) == HASH_TOEPLITZ => {
                let kind = hash_kind(kind).filter(|(_, kind)| takes.hashes.contains(*kind));
                self.hash = kind.map(|(kind, _)| Hash { kind, value });
            }
            ExtraKind::Xdp { headroom } if takes.headroom > 0 && !self.failed => {
                self.leave_room(headroom, takes.headroom)?;
            }
            _ => {}
        }
        if extra.more {
            return Ok(false);
        }
        self.next = Next::Data;
        Ok(!self.more)
    }

    /// Applies the headroom before the data. Either the first slot's offset points behind it, or
    /// (Linux's netback) every slot starts with the headroom and its length includes it.
    fn leave_room(&mut self, headroom: u16, most: u16) -> Result<(), BackendFault> {
        let (offset, size) = self.first;
        let lie = BackendFault::RxHeadroom { headroom, offset };
        if headroom > most || self.headroom != 0 {
            return Err(lie);
        }
        if offset < headroom {
            let left = size
                .checked_sub(headroom)
                .filter(|left| offset == 0 && usize::from(*left) >= ETHERNET_HEADER);
            self.len = left.ok_or(lie)?.into();
            self.room = headroom;
        }
        self.headroom = headroom;
        Ok(())
    }
}

/// Returns the maximum number of slots of one packet, without extra segments: more than the largest
/// packet needs with `headroom` bytes free in each page.
const fn slots_max(headroom: u16) -> usize {
    FRAME_MAX.div_ceil(PAGE_SIZE.saturating_sub(headroom as usize)).saturating_add(2)
}

/// Returns the kind of hash that a backend's number stands for.
fn hash_kind(number: u8) -> Option<(HashKind, HashTypes)> {
    Some(match number {
        0 => (HashKind::V4, HashTypes::IPV4),
        1 => (HashKind::V4Tcp, HashTypes::IPV4_TCP),
        2 => (HashKind::V6, HashTypes::IPV6),
        3 => (HashKind::V6Tcp, HashTypes::IPV6_TCP),
        _ => return None,
    })
}
