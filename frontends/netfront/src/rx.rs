//! Packets in.

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

/// Bytes that a backend can be asked to leave free before received data, at most: what our netback leaves
/// (Linux's frontend asks for 256).
pub const HEADROOM_MAX: u16 = 2048;

/// Where a packet is put together: behind as much room as there may be.
const START: usize = HEADROOM_MAX as usize;
/// Bytes of the largest packet: the largest IP packet in a frame with a VLAN tag.
const FRAME_MAX: usize = MAX_PACKET + ETHERNET_HEADER + 4;
/// Extra segments of one packet.
const EXTRAS_MAX: usize = 4;
/// Pages given back before the backend is shown them.
const BATCH: u32 = 64;

/// The receive ring, and a page for each of its slots.
pub struct Rx<P: Granter> {
    ring: FrontRing<P::Pages>,
    ring_page: Granted<P>,
    data: Granted<P>,
    /// The packet that is being put together.
    packet: Box<[u8]>,
    assembly: Assembly,
    unpublished: u32,
    takes: Takes,
}

/// What the backend was asked to say of packets, or to do about them.
#[derive(Clone, Copy, Default)]
struct Takes {
    /// Whether TCP over IPv4 and IPv6 may come unsegmented.
    gso: (bool, bool),
    /// Of which packets it tells the hash.
    hashes: HashTypes,
    /// Room in each page, the most that was asked for at any time.
    headroom: u16,
}

/// A packet that was put together.
#[derive(Clone, Copy)]
pub struct Received {
    pub len: usize,
    pub checksum: Checksum,
    pub gso: Option<Gso>,
    /// Where it begins.
    start: usize,
    hash: Option<Hash>,
    headroom: u16,
}

/// How far a packet has come. The backend may publish its slots one by one.
#[derive(Clone, Copy, Default)]
struct Assembly {
    next: Next,
    /// Bytes of data so far.
    len: usize,
    /// Where the data of the first slot lay in its page, and how much it was.
    first: (u16, u16),
    /// Bytes of each slot that are no data but room: Linux's netback counts it in.
    room: u16,
    slots: usize,
    extras: usize,
    /// Data follows once the extra segments are over.
    more: bool,
    /// A slot was answered with an error: the packet is to be dropped.
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
        // Where room is counted in, the data begin behind it.
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

    /// Whether TCP may come unsegmented, over IPv4 and over IPv6.
    pub const fn take_gso(&mut self, v4: bool, v6: bool) {
        self.takes.gso = (v4, v6);
    }

    /// Of which packets the backend tells the hash.
    pub const fn take_hashes(&mut self, types: HashTypes) {
        self.takes.hashes = types;
    }

    /// Room may be left before the data. What was asked for earlier may come still.
    pub fn take_headroom(&mut self, bytes: u16) {
        self.takes.headroom = self.takes.headroom.max(bytes.min(HEADROOM_MAX));
    }

    /// Puts the next packet together, in private memory.
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

    /// The packet that [`next`](Self::next) put together, until it is called again.
    #[cfg(feature = "smoltcp")]
    pub fn frame(&self, got: &Received) -> &[u8] {
        let end = got.start.saturating_add(got.len);
        self.packet.get(got.start..end).unwrap_or_default()
    }

    /// The packet that [`next`](Self::next) put together, with all that is known of it, and with the room
    /// before it.
    pub fn incoming(&mut self, got: &Received) -> Incoming<'_> {
        let headroom = usize::from(got.headroom);
        let begin = got.start.saturating_sub(headroom);
        let end = got.start.saturating_add(got.len);
        let room = self.packet.get_mut(begin..end).unwrap_or_default();
        // What stood there was another packet's.
        room.iter_mut().take(headroom).for_each(|byte| *byte = 0);
        Incoming::new(room, headroom, (got.checksum, got.gso, got.hash))
    }

    /// Whether so many pages wait to be shown to the backend that it should be now.
    pub fn should_publish(&self) -> bool {
        self.unpublished >= BATCH
    }

    /// Shows the backend the pages given back; tells whether it must be notified.
    pub fn publish(&mut self) -> bool {
        self.unpublished = 0;
        self.ring.publish()
    }

    /// Whether a packet waits here, after asking to be woken for one.
    pub fn final_check(&mut self) -> Result<bool, BackendFault> {
        self.ring.final_check().map_err(BackendFault::RxRing)
    }

    /// Whether a packet waits here, without asking for a wake-up.
    pub fn has_work(&mut self) -> Result<bool, BackendFault> {
        self.ring.has_responses().map_err(BackendFault::RxRing)
    }

    pub fn revoke(&mut self) -> bool {
        let data = self.data.revoke();
        self.ring_page.revoke() && data
    }

    /// Takes one slot and gives its page back; tells whether the packet is complete.
    fn take_slot(&mut self) -> Result<bool, BackendFault> {
        // A page is given back when its answer is taken, so all are always out, in order: the
        // oldest request's number is that of the slot.
        let index = self.ring.next_index().wrapping_sub(self.ring.in_flight());
        let page = index & self.ring.layout().slots().wrapping_sub(1);
        let Some(mut slot) = self.ring.pop().map_err(BackendFault::RxRing)? else {
            return Ok(false);
        };
        // A slot of the ring's size is never short.
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

    /// Adds a slot's data to the packet.
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
                // Room that is counted in is no data. (In the first slot it is known of only afterwards.)
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

    /// Gives the backend the page that belongs to the next slot.
    fn post(&mut self) {
        let page = self.ring.next_index() & self.ring.layout().slots().wrapping_sub(1);
        let request = RxRequest { id: page as u16, gref: self.data.gref(page as usize) };
        // As many pages as slots, so there is a slot.
        let pushed = self.ring.push(&request.to_bytes());
        debug_assert!(pushed.is_ok(), "more requests than slots");
        self.unpublished = self.unpublished.saturating_add(1);
    }
}

impl Assembly {
    /// Takes an extra segment; tells whether the packet is complete.
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
            // Of a kind that was not asked for, or is no more, it says nothing.
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

    /// Room was left before the data: either they begin behind it, by the first slot's word, or (Linux's
    /// netback) the slot begins with the room, and counts it in; so does every other then.
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

/// Slots of one packet, extra segments not counted: more than the largest needs that lies behind so much
/// room in each.
const fn slots_max(headroom: u16) -> usize {
    FRAME_MAX.div_ceil(PAGE_SIZE.saturating_sub(headroom as usize)).saturating_add(2)
}

/// What a backend's number for a kind of hash means.
fn hash_kind(number: u8) -> Option<(HashKind, HashTypes)> {
    Some(match number {
        0 => (HashKind::V4, HashTypes::IPV4),
        1 => (HashKind::V4Tcp, HashTypes::IPV4_TCP),
        2 => (HashKind::V6, HashTypes::IPV6),
        3 => (HashKind::V6Tcp, HashTypes::IPV6_TCP),
        _ => return None,
    })
}
