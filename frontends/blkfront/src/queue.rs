//! The data path of a virtual disk: slots with granted buffers, requests, answers.
//!
//! Every buffer is a run of pages allocated zeroed and granted whole when the queue is made: a
//! request costs no grant operation, and nothing of the guest's but what it writes there can be
//! read by the backend, trusted or not (XSA-403).

use alloc::vec::Vec;
use pvio_event_channel::{EventChannel, EventChannels, EventError};
use pvio_grant_table::{Access, DomId, GrantError, GrantRef, Granter};
use pvio_ring::proto::blkif::{Abi, DataOp, Request, Response, Segment, Segments, Status};
use pvio_ring::shm::{PAGE_SIZE, Region};
use pvio_ring::{FrontRing, RingFault, ShortSlot};

/// Pages of a slot's buffer: what fits into one request without indirect segments.
pub const PAGES_PER_SLOT: usize = pvio_ring::proto::blkif::MAX_SEGMENTS;
/// Bytes of a slot's buffer, and so of the largest request: 44 KiB.
pub const SLOT_BYTES: usize = PAGES_PER_SLOT * PAGE_SIZE;
/// Bytes of a sector of the protocol.
pub const SECTOR: usize = 512;

/// What a slot is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Fill the slot's buffer with `bytes` bytes from `sector` on.
    Read {
        /// First sector.
        sector: u64,
        /// How much, in bytes: whole sectors, at most [`SLOT_BYTES`].
        bytes: usize,
    },
    /// Write the first `bytes` bytes of the slot's buffer from `sector` on.
    Write {
        /// First sector.
        sector: u64,
        /// How much, in bytes: whole sectors, at most [`SLOT_BYTES`].
        bytes: usize,
    },
    /// Bring every write answered before now to the medium.
    Flush,
    /// These sectors are not needed any more.
    Discard {
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u64,
    },
}

/// One request's place: a buffer and a number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SlotId(u16);

impl SlotId {
    /// A small number, below [`Queue::depth`], for tables beside the queue.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// What the backend did that it must not, or that it cannot be reached. The device is finished;
/// the guest is not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BackendFault {
    /// The ring cannot be believed any more.
    #[error(transparent)]
    Ring(#[from] RingFault),
    /// It answered a request that is not in flight.
    #[error("the backend answered request {0}, which is not in flight")]
    UnknownId(u64),
    /// The event channel failed.
    #[error(transparent)]
    Event(#[from] EventError),
    /// The ring's slots are not those of the ABI: a mistake of ours.
    #[error(transparent)]
    Slot(#[from] ShortSlot),
}

impl BackendFault {
    /// A short stable code for logs, counters and `error` nodes.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Ring(fault) => fault.reason(),
            Self::UnknownId(_) => "unknown-response-id",
            Self::Event(error) => error.code(),
            Self::Slot(_) => "short-slot",
        }
    }
}

/// Why a queue could not be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SetupError {
    /// No memory or no grants.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// No event channel.
    #[error(transparent)]
    Event(#[from] EventError),
    /// No ring of that size.
    #[error(transparent)]
    Ring(#[from] RingFault),
}

/// Why a slot could not be started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StartError {
    /// The slot is not the caller's: free, or in flight already.
    #[error("the slot is not reserved")]
    NotReserved,
    /// No bytes, no whole sectors, or more than fit into a slot.
    #[error("a request is of whole sectors, at most {SLOT_BYTES} bytes")]
    Size,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Slot {
    Free,
    Reserved,
    InFlight(Op),
}

/// One queue of a virtual disk, frontend side.
pub struct Queue<P: Granter + EventChannels> {
    platform: P,
    ring: FrontRing<P::Pages>,
    /// `None` once it was taken back.
    ring_gref: Option<GrantRef>,
    channel: P::Channel,
    pages: P::Pages,
    grefs: Vec<GrantRef>,
    slots: Vec<Slot>,
    free: Vec<SlotId>,
    /// `virtual-device`, truncated as the wire has it.
    handle: u16,
}

impl<P: Granter + EventChannels> Queue<P> {
    /// Allocates and grants a ring of one page and a buffer for each of its slots, and an event
    /// channel for the backend to bind to.
    ///
    /// # Errors
    /// [`SetupError`]; everything made so far is taken back.
    pub fn new(platform: P, backend: DomId, handle: u16) -> Result<Self, SetupError> {
        let ring_page = platform.alloc_pages(1)?;
        let ring = FrontRing::init(ring_page.clone(), Abi::X86_64.slot_size())?;
        let depth = ring.layout().slots() as usize;
        let pages = platform.alloc_pages(depth * PAGES_PER_SLOT)?;
        let channel = platform.alloc_unbound(backend)?;
        let ring_gref = platform.grant(backend, &ring_page, 0, Access::ReadWrite)?;
        let mut queue = Self {
            ring,
            ring_gref: Some(ring_gref),
            channel,
            grefs: Vec::with_capacity(depth * PAGES_PER_SLOT),
            slots: (0..depth).map(|_| Slot::Free).collect(),
            free: (0..depth as u16).rev().map(SlotId).collect(),
            pages,
            platform,
            handle,
        };
        for page in 0..depth * PAGES_PER_SLOT {
            // What was granted before a failure is taken back by `drop`.
            let gref = queue.platform.grant(backend, &queue.pages, page, Access::ReadWrite)?;
            queue.grefs.push(gref);
        }
        Ok(queue)
    }

    /// The same queue made anew towards a (new) backend, after the old one is gone: every request
    /// in flight is in the new ring, with its data, to be answered after all. Publish afterwards.
    ///
    /// # Errors
    /// [`SetupError`]; the old queue is untouched then.
    pub fn replay(&self, backend: DomId) -> Result<Self, SetupError>
    where
        P: Clone,
    {
        let mut new = Self::new(self.platform.clone(), backend, self.handle)?;
        new.free.clear();
        let mut page = [0; PAGE_SIZE];
        for (i, slot) in self.slots.iter().enumerate() {
            let id = SlotId(i as u16);
            match *slot {
                Slot::Free => new.free.push(id),
                Slot::Reserved | Slot::InFlight(_) => new.slots[i] = Slot::Reserved,
            }
            let holds_data = matches!(*slot, Slot::Reserved | Slot::InFlight(Op::Write { .. }));
            if holds_data {
                for n in 0..PAGES_PER_SLOT {
                    let at = i * SLOT_BYTES + n * PAGE_SIZE;
                    // Inside both by construction.
                    let _ = self.pages.read_bytes(at, &mut page);
                    let _ = new.pages.write_bytes(at, &page);
                }
            }
            if let Slot::InFlight(op) = *slot {
                let again = new.start(id, op);
                debug_assert_eq!(again, Ok(()), "it was started before");
            }
        }
        Ok(new)
    }

    /// The grant reference of the ring page, for the handshake.
    #[must_use]
    pub fn ring_gref(&self) -> GrantRef {
        self.ring_gref.unwrap_or_default()
    }

    /// Our end of the event channel.
    #[must_use]
    pub fn channel(&self) -> &P::Channel {
        &self.channel
    }

    /// How many requests can be in flight.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.slots.len()
    }

    /// Requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.ring.in_flight() as usize
    }

    /// Takes a slot, if one is free.
    pub fn reserve(&mut self) -> Option<SlotId> {
        let id = self.free.pop()?;
        self.slots[id.index()] = Slot::Reserved;
        Some(id)
    }

    /// Gives a reserved slot back.
    pub fn release(&mut self, id: SlotId) {
        if self.slots.get(id.index()) == Some(&Slot::Reserved) {
            self.slots[id.index()] = Slot::Free;
            self.free.push(id);
        }
    }

    /// Copies into a slot's buffer, before a write. `None` when it does not fit.
    pub fn fill(&self, id: SlotId, offset: usize, data: &[u8]) -> Option<()> {
        let end = offset.checked_add(data.len())?;
        (end <= SLOT_BYTES).then_some(())?;
        self.pages.write_bytes(id.index() * SLOT_BYTES + offset, data)
    }

    /// Copies out of a slot's buffer, after a read. `None` when it is not all there.
    pub fn fetch(&self, id: SlotId, offset: usize, out: &mut [u8]) -> Option<()> {
        let end = offset.checked_add(out.len())?;
        (end <= SLOT_BYTES).then_some(())?;
        self.pages.read_bytes(id.index() * SLOT_BYTES + offset, out)
    }

    /// Writes a reserved slot's request into the ring. The backend sees it after
    /// [`publish`](Self::publish).
    ///
    /// # Errors
    /// [`StartError`]; the slot stays reserved.
    pub fn start(&mut self, id: SlotId, op: Op) -> Result<(), StartError> {
        if self.slots.get(id.index()) != Some(&Slot::Reserved) {
            return Err(StartError::NotReserved);
        }
        let wire_id = u64::from(id.0);
        let data = |op, sector, segments| Request::Data { op, id: wire_id, sector, segments };
        let request = match op {
            Op::Read { sector, bytes } => data(DataOp::Read, sector, self.segments(id, bytes)?),
            Op::Write { sector, bytes } => data(DataOp::Write, sector, self.segments(id, bytes)?),
            Op::Flush => data(DataOp::Flush, 0, Segments::default()),
            Op::Discard { sector, sectors } => {
                Request::Discard { id: wire_id, sector, sectors, secure: false }
            }
        };
        let mut bytes = [0; 112];
        let pushed = self.ring.push(request.write(Abi::X86_64, self.handle, &mut bytes));
        debug_assert!(pushed.is_ok(), "there are as many slots here as in the ring");
        self.slots[id.index()] = Slot::InFlight(op);
        Ok(())
    }

    /// Shows every started request to the backend and wakes it if it asked for that.
    ///
    /// # Errors
    /// [`BackendFault::Event`].
    pub fn publish(&mut self) -> Result<(), BackendFault> {
        if self.ring.publish() {
            self.channel.notify()?;
        }
        Ok(())
    }

    /// Calls `each` for every answer that has come, and returns how many. The slot is the
    /// caller's again: to be read, started anew, or released.
    ///
    /// # Errors
    /// A [`BackendFault`] ends the device; what was answered before it was reported.
    pub fn poll(
        &mut self,
        mut each: impl FnMut(SlotId, Op, Status),
    ) -> Result<usize, BackendFault> {
        let mut count = 0;
        while let Some(mut slot) = self.ring.pop()? {
            let Response { id, status, .. } = Response::read(&mut slot)?;
            let place = usize::try_from(id).ok().and_then(|i| self.slots.get_mut(i));
            let Some(place @ &mut Slot::InFlight(op)) = place else {
                return Err(BackendFault::UnknownId(id));
            };
            *place = Slot::Reserved;
            each(SlotId(id as u16), op, status);
            count += 1;
        }
        Ok(count)
    }

    /// Whether an answer is waiting, by a look at shared memory that asks for nothing.
    ///
    /// # Errors
    /// [`BackendFault::Ring`].
    pub fn has_answers(&mut self) -> Result<bool, BackendFault> {
        Ok(self.ring.has_responses()?)
    }

    /// To be called before waiting for an event: asks to be woken for the next answer and looks
    /// once more. Wait only if it says `false`.
    ///
    /// # Errors
    /// [`BackendFault::Ring`].
    pub fn final_check(&mut self) -> Result<bool, BackendFault> {
        Ok(self.ring.final_check()?)
    }

    /// The segments of the first `bytes` bytes of a slot's buffer.
    fn segments(&self, id: SlotId, bytes: usize) -> Result<Segments, StartError> {
        if bytes == 0 || bytes > SLOT_BYTES || !bytes.is_multiple_of(SECTOR) {
            return Err(StartError::Size);
        }
        let mut all = [Segment::default(); PAGES_PER_SLOT];
        let first = id.index() * PAGES_PER_SLOT;
        let count = bytes.div_ceil(PAGE_SIZE);
        for (n, segment) in all.iter_mut().take(count).enumerate() {
            let here = (bytes - n * PAGE_SIZE).min(PAGE_SIZE);
            let gref = self.grefs.get(first + n).copied().ok_or(StartError::Size)?;
            *segment = Segment { gref, first: 0, last: (here / SECTOR - 1) as u8 };
        }
        Segments::from_slice(&all[..count]).ok_or(StartError::Size)
    }
}

impl<P: Granter + EventChannels> Queue<P> {
    /// Takes every grant back and frees the memory.
    ///
    /// # Errors
    /// The queue, if the backend has some of it mapped still; try again when it says that it has
    /// let go.
    #[expect(clippy::result_large_err, reason = "the queue itself, moved at the end of a session")]
    pub fn dismantle(mut self) -> Result<(), Self> {
        if self.revoke() { Ok(()) } else { Err(self) }
    }

    /// Ends what grants it can, and tells whether none is left.
    fn revoke(&mut self) -> bool {
        let platform = &self.platform;
        self.grefs.retain(|gref| platform.end_access(*gref).is_err());
        self.ring_gref = self.ring_gref.filter(|gref| platform.end_access(*gref).is_err());
        self.grefs.is_empty() && self.ring_gref.is_none()
    }
}

impl<P: Granter + EventChannels> Drop for Queue<P> {
    /// Takes every grant back. Memory the backend still has mapped stays allocated for ever: it
    /// must never become something else while another domain can reach it (XSA-396).
    fn drop(&mut self) {
        if !self.revoke() {
            core::mem::forget(self.pages.clone());
            core::mem::forget(self.ring.memory().clone());
        }
    }
}
