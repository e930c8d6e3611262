//! Transmitted packets.

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
    /// Whether each request is in flight, by id, which is also the number of its page.
    in_flight: Vec<bool>,
    free: Vec<u16>,
    /// Number of extra segments without a response.
    extras: u32,
    /// A packet found no room since the last response was taken.
    blocked: bool,
    /// Id of the outstanding request that names a group.
    group_request: Option<u16>,
    /// Outcome of the last group request, until it is taken.
    group_result: Option<bool>,
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
        let (extras, blocked, group_request, group_result) = (0, false, None, None);
        Ok(Self {
            ring,
            ring_page,
            data,
            in_flight,
            free,
            extras,
            blocked,
            group_request,
            group_result,
        })
    }
}

impl<P: Granter> Tx<P> {
    pub fn ring_page(&self) -> &Granted<P> {
        &self.ring_page
    }

    pub fn data_grefs(&self) -> &[GrantRef] {
        self.data.grefs()
    }

    /// Writes a packet into free pages and its slots into the ring; if it fails, nothing is sent.
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
        // The size in the first slot is that of the whole packet.
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

    /// Sends a request without a packet that adds a multicast group to the backend's filter, or
    /// removes it. At most one is outstanding.
    pub fn tell_group(
        &mut self,
        kind: ExtraKind,
        counters: &mut Counters,
    ) -> Result<(), SendError> {
        if self.group_request.is_some() || !self.has_room(2, counters)? {
            return Err(SendError::Full);
        }
        (self.group_request, self.group_result) = (self.free.last().copied(), None);
        self.push(&[], 0, TxFlags::EXTRA_INFO);
        self.push_extra(kind);
        Ok(())
    }

    /// Returns whether the last group request succeeded, once it is completed.
    pub fn group_answer(&mut self, counters: &mut Counters) -> Result<Option<bool>, BackendFault> {
        if self.group_request.is_some() {
            self.take_answers(counters)?;
        }
        Ok(self.group_result.take())
    }

    /// Returns whether a packet of `slots` slots can be sent; takes responses if there is no room.
    pub fn has_room(
        &mut self,
        slots: usize,
        counters: &mut Counters,
    ) -> Result<bool, BackendFault> {
        // An extra segment uses a slot of the ring but no page.
        let full = |tx: &Self| tx.free.len() < slots || (tx.ring.free() as usize) < slots;
        if full(self) {
            self.take_answers(counters)?;
        }
        self.blocked = full(self);
        Ok(!self.blocked)
    }

    /// Takes all responses that are available and frees their pages.
    pub fn take_answers(&mut self, counters: &mut Counters) -> Result<(), BackendFault> {
        while let Some(mut slot) = self.ring.pop().map_err(BackendFault::TxRing)? {
            // A slot of the ring is never shorter than a response.
            let TxResponse { id, status } = TxResponse::read(&mut slot).unwrap_or_default();
            if status == rsp::NULL {
                // The response to an extra segment, whose id has no meaning. It must not be matched
                // with a request, which would then never be completed.
                self.extras = self.extras.checked_sub(1).ok_or(BackendFault::TxId(id))?;
                continue;
            }
            let place = self.in_flight.get_mut(usize::from(id));
            if !place.is_some_and(core::mem::take) {
                return Err(BackendFault::TxId(id));
            }
            self.free.push(id);
            if self.group_request == Some(id) {
                (self.group_request, self.group_result) = (None, Some(status == rsp::OKAY));
            } else if status != rsp::OKAY {
                counters.tx_errors = counters.tx_errors.wrapping_add(1);
            }
        }
        Ok(())
    }

    /// Publishes the requests; returns whether the backend must be notified.
    pub fn publish(&mut self) -> bool {
        self.ring.publish()
    }

    /// Arms a notification and returns whether there are events to handle. Responses matter only if
    /// a packet found no room, or if a group request is outstanding. Each is reported once: the
    /// packet may have been dropped, and the sender must then be able to sleep.
    pub fn final_check(&mut self, counters: &mut Counters) -> Result<bool, BackendFault> {
        while self.is_waiting() {
            if !self.ring.final_check().map_err(BackendFault::TxRing)? {
                return Ok(false);
            }
            if self.take_relevant(counters)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns whether there are events to handle, without arming a notification; each is reported
    /// once.
    pub fn has_work(&mut self, counters: &mut Counters) -> Result<bool, BackendFault> {
        let came = self.is_waiting() && self.ring.has_responses().map_err(BackendFault::TxRing)?;
        Ok(came && self.take_relevant(counters)?)
    }

    const fn is_waiting(&self) -> bool {
        self.blocked || self.group_request.is_some()
    }

    /// Returns whether the responses that arrived are relevant: free slots, or the group request.
    fn take_relevant(&mut self, counters: &mut Counters) -> Result<bool, BackendFault> {
        let room = core::mem::take(&mut self.blocked);
        if self.group_request.is_none() {
            return Ok(room);
        }
        self.take_answers(counters)?;
        Ok(room || self.group_request.is_none())
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

    /// Sends one slot. The caller has checked that a page is free.
    fn push(&mut self, part: &[u8], size: usize, flags: TxFlags) {
        let Some(id) = self.free.pop() else { return };
        let page = usize::from(id);
        let at = page.saturating_mul(PAGE_SIZE);
        let written = self.data.pages().write_bytes(at, part);
        debug_assert!(written.is_some(), "a part lies in its page");
        let request =
            TxRequest { gref: self.data.gref(page), offset: 0, flags, id, size: size as u16 };
        // There are as many pages as slots, so a slot is free as well.
        let pushed = self.ring.push(&request.to_bytes());
        debug_assert!(pushed.is_ok(), "more requests than slots");
        if let Some(place) = self.in_flight.get_mut(page) {
            *place = true;
        }
    }
}

/// Returns whether the backend supports GSO for this packet.
fn segments(features: &Features, frame: &[u8], gso: Gso) -> bool {
    let (taken, version) = match gso.kind {
        GsoKind::TcpV4 => (features.gso_v4, IpVersion::V4),
        GsoKind::TcpV6 => (features.gso_v6, IpVersion::V6),
    };
    let fits = |t: Transport| !t.udp && t.version == version;
    taken && gso.size > 0 && Transport::of(frame).is_ok_and(fits)
}

/// Returns whether the backend completes the checksum of this packet.
fn completes(features: &Features, frame: &[u8]) -> bool {
    Transport::of(frame).is_ok_and(|transport| match transport.version {
        IpVersion::V4 => features.checksum_v4,
        IpVersion::V6 => features.checksum_v6,
    })
}
