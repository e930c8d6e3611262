//! Packets in.

use crate::fault::{BackendFault, SetupError};
use crate::granted::Granted;
use crate::queue::{Checksum, Counters, Gso};
use alloc::boxed::Box;
use pvio_grant_table::{Access, DomId, GrantRef, Granter};
use pvio_ring::FrontRing;
use pvio_ring::proto::checksum::ETHERNET_HEADER;
use pvio_ring::proto::netif::{
    Extra, ExtraFault, ExtraKind, GsoKind, MAX_PACKET, RX_SLOT_SIZE, RxFlags, RxRequest, RxResponse,
};
use pvio_ring::shm::{PAGE_SIZE, Region};

/// Slots of one packet, extra segments not counted: more than the largest needs.
const SLOTS_MAX: usize = 19;
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
    /// Whether TCP over IPv4 and IPv6 may come unsegmented.
    takes_gso: (bool, bool),
}

/// A packet that was put together.
pub struct Received {
    pub len: usize,
    pub checksum: Checksum,
    pub gso: Option<Gso>,
}

/// How far a packet has come. The backend may publish its slots one by one.
#[derive(Clone, Copy, Default)]
struct Assembly {
    next: Next,
    len: usize,
    slots: usize,
    extras: usize,
    /// Data follows once the extra segments are over.
    more: bool,
    /// A slot was answered with an error: the packet is to be dropped.
    failed: bool,
    checksum: Checksum,
    gso: Option<Gso>,
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
        let packet = alloc::vec![0; FRAME_MAX].into_boxed_slice();
        let assembly = Assembly::default();
        let takes_gso = (false, false);
        let mut rx = Self { ring, ring_page, data, packet, assembly, unpublished: 0, takes_gso };
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
        self.takes_gso = (v4, v6);
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
            let Assembly { len, checksum, gso, .. } = done;
            return Ok(Some(Received { len, checksum, gso }));
        }
        Ok(None)
    }

    /// The packet that [`next`](Self::next) put together, until it is called again.
    pub fn frame(&self, len: usize) -> &[u8] {
        self.packet.get(..len).unwrap_or_default()
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
            self.assembly.extra(extra, self.takes_gso)?
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
        if packet.slots > SLOTS_MAX {
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
                let end = packet.len.saturating_add(usize::from(size));
                let place = self.packet.get_mut(packet.len..end);
                let place = place.ok_or(BackendFault::RxTooLong)?;
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
    fn extra(&mut self, extra: Extra, takes_gso: (bool, bool)) -> Result<bool, BackendFault> {
        self.extras = self.extras.saturating_add(1);
        if self.extras > EXTRAS_MAX {
            return Err(BackendFault::RxSlots);
        }
        if let ExtraKind::Gso { size, kind } = extra.kind {
            let taken = match kind {
                GsoKind::TcpV4 => takes_gso.0,
                GsoKind::TcpV6 => takes_gso.1,
            };
            if !taken {
                return Err(BackendFault::RxGso);
            }
            self.gso = Some(Gso { size, kind });
        }
        if extra.more {
            return Ok(false);
        }
        self.next = Next::Data;
        Ok(!self.more)
    }
}
