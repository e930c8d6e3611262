//! Packets out.

use crate::fault::{BackendFault, SendError, SetupError};
use crate::granted::Granted;
use crate::packet::{Checksum, Counters, Features, Gso};
use alloc::vec::Vec;
use pvio_grant_table::{Access, DomId, GrantRef, Granter};
use pvio_ring::FrontRing;
use pvio_ring::proto::checksum::{ETHERNET_HEADER, IpVersion, Transport};
use pvio_ring::proto::netif::{
    Extra, ExtraKind, GsoKind, MAX_PACKET, TX_SLOT_SIZE, TxFlags, TxRequest, TxResponse, rsp,
};
use pvio_ring::shm::{PAGE_SIZE, Region};

/// The transmit ring, and a page for each of its slots.
pub struct Tx<P: Granter> {
    ring: FrontRing<P::Pages>,
    ring_page: Granted<P>,
    data: Granted<P>,
    /// Requests in flight, by id, which is also the number of the page.
    in_flight: Vec<bool>,
    free: Vec<u16>,
    /// Extra segments that were not answered yet.
    extras: u32,
    /// A packet found no room since the last answer was taken.
    blocked: bool,
    /// The request that names a group, while it is not answered.
    telling: Option<u16>,
    /// The answer to the last of those, until it is taken.
    told: Option<bool>,
}

impl<P: Granter + Clone> Tx<P> {
    pub fn new(platform: &P, backend: DomId) -> Result<Self, SetupError> {
        let ring_page = Granted::new(platform.clone(), backend, 1, Access::ReadWrite)?;
        let ring = FrontRing::init(ring_page.pages().clone(), TX_SLOT_SIZE)?;
        let slots = ring.layout().slots() as u16;
        let count = usize::from(slots);
        let data = Granted::new(platform.clone(), backend, count, Access::ReadOnly)?;
        let in_flight = (0..slots).map(|_| false).collect();
        let free = (0..slots).rev().collect();
        let (extras, blocked, telling, told) = (0, false, None, None);
        Ok(Self { ring, ring_page, data, in_flight, free, extras, blocked, telling, told })
    }
}

impl<P: Granter> Tx<P> {
    pub fn ring_page(&self) -> &Granted<P> {
        &self.ring_page
    }

    pub fn data_grefs(&self) -> &[GrantRef] {
        self.data.grefs()
    }

    /// Writes a packet into free pages and its slots into the ring, all or nothing.
    pub fn send(
        &mut self,
        frame: &[u8],
        checksum: Checksum,
        gso: Option<Gso>,
        features: &Features,
        counters: &mut Counters,
    ) -> Result<(), SendError> {
        let most = if features.sg { MAX_PACKET } else { PAGE_SIZE };
        if frame.len() < ETHERNET_HEADER || frame.len() > most {
            return Err(SendError::Size(frame.len()));
        }
        if checksum == Checksum::Blank && !completes(features, frame) {
            return Err(SendError::Checksum);
        }
        if gso.is_some_and(|gso| !segments(features, frame, gso)) {
            return Err(SendError::Gso);
        }
        let slots = frame.len().div_ceil(PAGE_SIZE).saturating_add(usize::from(gso.is_some()));
        if !self.has_room(slots, counters)? {
            return Err(SendError::Full);
        }
        let mut flags = match checksum {
            Checksum::Unknown => TxFlags::empty(),
            Checksum::Validated => TxFlags::DATA_VALIDATED,
            Checksum::Blank => TxFlags::CSUM_BLANK | TxFlags::DATA_VALIDATED,
        };
        flags.set(TxFlags::EXTRA_INFO, gso.is_some());
        // The first slot has the size of the whole packet.
        let mut size = frame.len();
        let mut parts = frame.chunks(PAGE_SIZE).peekable();
        while let Some(part) = parts.next() {
            flags.set(TxFlags::MORE_DATA, parts.peek().is_some());
            self.push(part, size, flags);
            if flags.contains(TxFlags::EXTRA_INFO)
                && let Some(Gso { size, kind }) = gso
            {
                self.push_extra(ExtraKind::Gso { size, kind });
            }
            flags = TxFlags::empty();
            size = parts.peek().map_or(0, |part| part.len());
        }
        counters.tx_packets = counters.tx_packets.wrapping_add(1);
        counters.tx_bytes = counters.tx_bytes.wrapping_add(frame.len() as u64);
        Ok(())
    }

    /// Names a multicast group to the backend, or takes it back, in a request without a packet. One at a
    /// time.
    pub fn tell_group(
        &mut self,
        kind: ExtraKind,
        counters: &mut Counters,
    ) -> Result<(), SendError> {
        if self.telling.is_some() || !self.has_room(2, counters)? {
            return Err(SendError::Full);
        }
        (self.telling, self.told) = (self.free.last().copied(), None);
        self.push(&[], 0, TxFlags::EXTRA_INFO);
        self.push_extra(kind);
        Ok(())
    }

    /// The answer to that, if it is there: whether it was done.
    pub fn group_answer(&mut self, counters: &mut Counters) -> Result<Option<bool>, BackendFault> {
        if self.telling.is_some() {
            self.take_answers(counters)?;
        }
        Ok(self.told.take())
    }

    /// Whether a packet of so many slots can be sent; takes answers if there is no room.
    pub fn has_room(
        &mut self,
        slots: usize,
        counters: &mut Counters,
    ) -> Result<bool, BackendFault> {
        // An extra segment takes a slot of the ring and no page.
        let full = |tx: &Self| tx.free.len() < slots || (tx.ring.free() as usize) < slots;
        if full(self) {
            self.take_answers(counters)?;
        }
        self.blocked = full(self);
        Ok(!self.blocked)
    }

    /// Takes every answer there is; their pages are free again.
    pub fn take_answers(&mut self, counters: &mut Counters) -> Result<(), BackendFault> {
        while let Some(mut slot) = self.ring.pop().map_err(BackendFault::TxRing)? {
            // A slot of the ring's size is never short.
            let TxResponse { id, status } = TxResponse::read(&mut slot).unwrap_or_default();
            if status == rsp::NULL {
                // An extra segment's answer, whose number means nothing. Not a request's: that
                // would leave it unanswered for ever.
                self.extras = self.extras.checked_sub(1).ok_or(BackendFault::TxId(id))?;
                continue;
            }
            let place = self.in_flight.get_mut(usize::from(id));
            if !place.is_some_and(core::mem::take) {
                return Err(BackendFault::TxId(id));
            }
            self.free.push(id);
            if self.telling == Some(id) {
                (self.telling, self.told) = (None, Some(status == rsp::OKAY));
            } else if status != rsp::OKAY {
                counters.tx_errors = counters.tx_errors.wrapping_add(1);
            }
        }
        Ok(())
    }

    /// Shows the backend what was sent; tells whether it must be notified.
    pub fn publish(&mut self) -> bool {
        self.ring.publish()
    }

    /// Whether something waits here, after asking to be woken. Answers matter only to a sender
    /// that found no room, and to who has named a group. They are told of once: a packet may have been
    /// given up, and its sender must be able to sleep then.
    pub fn final_check(&mut self, counters: &mut Counters) -> Result<bool, BackendFault> {
        while self.is_waiting() {
            if !self.ring.final_check().map_err(BackendFault::TxRing)? {
                return Ok(false);
            }
            if self.is_told(counters)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether something waits here, without asking for a wake-up; told of once, too.
    pub fn has_work(&mut self, counters: &mut Counters) -> Result<bool, BackendFault> {
        let came = self.is_waiting() && self.ring.has_responses().map_err(BackendFault::TxRing)?;
        Ok(came && self.is_told(counters)?)
    }

    const fn is_waiting(&self) -> bool {
        self.blocked || self.telling.is_some()
    }

    /// Whether the answers that came are what somebody waits for: room, or the one about a group.
    fn is_told(&mut self, counters: &mut Counters) -> Result<bool, BackendFault> {
        let room = core::mem::take(&mut self.blocked);
        if self.telling.is_none() {
            return Ok(room);
        }
        self.take_answers(counters)?;
        Ok(room || self.telling.is_none())
    }

    pub fn revoke(&mut self) -> bool {
        let data = self.data.revoke();
        self.ring_page.revoke() && data
    }

    fn push_extra(&mut self, kind: ExtraKind) {
        let pushed = self.ring.push(&Extra { kind, more: false }.to_bytes());
        debug_assert!(pushed.is_ok(), "the caller has counted the slots");
        self.extras = self.extras.saturating_add(1);
    }

    /// Sends one slot. There is a free page: the caller has counted them.
    fn push(&mut self, part: &[u8], size: usize, flags: TxFlags) {
        let Some(id) = self.free.pop() else { return };
        let page = usize::from(id);
        let at = page.saturating_mul(PAGE_SIZE);
        let written = self.data.pages().write_bytes(at, part);
        debug_assert!(written.is_some(), "a part lies in its page");
        let request =
            TxRequest { gref: self.data.gref(page), offset: 0, flags, id, size: size as u16 };
        // As many pages as slots, so there is a slot as well.
        let pushed = self.ring.push(&request.to_bytes());
        debug_assert!(pushed.is_ok(), "more requests than slots");
        if let Some(place) = self.in_flight.get_mut(page) {
            *place = true;
        }
    }
}

/// Whether the backend segments this packet so.
fn segments(features: &Features, frame: &[u8], gso: Gso) -> bool {
    let (taken, version) = match gso.kind {
        GsoKind::TcpV4 => (features.gso_v4, IpVersion::V4),
        GsoKind::TcpV6 => (features.gso_v6, IpVersion::V6),
    };
    let fits = |t: Transport| !t.udp && t.version == version;
    taken && gso.size > 0 && Transport::of(frame).is_ok_and(fits)
}

/// Whether the backend completes the checksum of this packet.
fn completes(features: &Features, frame: &[u8]) -> bool {
    Transport::of(frame).is_ok_and(|transport| match transport.version {
        IpVersion::V4 => features.checksum_v4,
        IpVersion::V6 => features.checksum_v6,
    })
}
