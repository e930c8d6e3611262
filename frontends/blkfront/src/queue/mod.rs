//! The data path of a virtual disk: slots with granted buffers, requests, answers.
//!
//! Every buffer is a run of pages allocated zeroed and granted whole when the queue is made: a
//! request costs no grant operation, and nothing of the guest's but what it writes there can be
//! read by the backend, trusted or not (XSA-403). A backend may keep them mapped (persistent grants).
//!
//! | module | holds |
//! |---|---|
//! | `memory` | ring, buffers and tables of segments, and their grants |
//! | this | requests and answers |

mod memory;

use alloc::vec::Vec;
use memory::Memory;
use pvio_event_channel::{EventChannel, EventChannels, EventError};
use pvio_grant_table::{DomId, GrantError, GrantRef, Granter};
use pvio_ring::proto::blkif::{
    Abi, DataOp, MAX_INDIRECT_SEGMENTS, MAX_SEGMENTS, Request, Response, Segments, Status,
};
use pvio_ring::shm::PAGE_SIZE;
use pvio_ring::{FrontRing, RingFault, ShortSlot};

/// Pages of a slot's buffer at least: what fits into one request without indirect segments.
pub const PAGES_PER_SLOT: usize = MAX_SEGMENTS;
/// Bytes of a slot's buffer at least, and so of the largest request: 44 KiB.
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
        /// How much, in bytes: whole sectors, at most [`Queue::slot_bytes`].
        bytes: usize,
    },
    /// Write the first `bytes` bytes of the slot's buffer from `sector` on.
    Write {
        /// First sector.
        sector: u64,
        /// How much, in bytes: whole sectors, at most [`Queue::slot_bytes`].
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
    #[error("a request is of whole sectors, and no more than a slot's buffer holds")]
    Size,
}

/// How large a queue is. A backend has to offer what is more than the least.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Pages of the ring, a power of two of at most 32: 32 slots for each.
    pub ring_pages: usize,
    /// Pages of a slot's buffer, 11 to 4096; more than 11 take indirect requests. A queue allocates
    /// them for all of its slots.
    pub pages_per_slot: usize,
}

impl Shape {
    /// What every backend serves: 32 slots of 44 KiB.
    pub const LEAST: Self = Self { ring_pages: 1, pages_per_slot: PAGES_PER_SLOT };

    fn is_possible(self) -> bool {
        (PAGES_PER_SLOT..=MAX_INDIRECT_SEGMENTS).contains(&self.pages_per_slot)
    }
}

impl Default for Shape {
    fn default() -> Self {
        Self::LEAST
    }
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
    memory: Memory<P::Pages>,
    channel: P::Channel,
    shape: Shape,
    slots: Vec<Slot>,
    free: Vec<SlotId>,
    /// `virtual-device`, truncated as the wire has it.
    handle: u16,
}

impl<P: Granter + EventChannels> Queue<P> {
    /// A queue of the [least shape](Shape::LEAST).
    ///
    /// # Errors
    /// [`SetupError`]; everything made so far is taken back.
    pub fn new(platform: P, backend: DomId, handle: u16) -> Result<Self, SetupError> {
        Self::with_shape(platform, backend, handle, Shape::LEAST)
    }

    /// Allocates and grants a ring and a buffer for each of its slots, and an event channel for the
    /// backend to bind to.
    ///
    /// # Errors
    /// [`SetupError`]; everything made so far is taken back.
    pub fn with_shape(
        platform: P,
        backend: DomId,
        handle: u16,
        shape: Shape,
    ) -> Result<Self, SetupError> {
        let slot_size = Abi::X86_64.slot_size();
        if !shape.is_possible() || !shape.ring_pages.is_power_of_two() {
            let bytes = shape.ring_pages.saturating_mul(PAGE_SIZE);
            return Err(RingFault::Geometry { bytes, slot_size }.into());
        }
        let ring_pages = platform.alloc_pages(shape.ring_pages)?;
        let ring = FrontRing::init(ring_pages.clone(), slot_size)?;
        let depth = ring.layout().slots() as usize;
        let mut memory = Memory::alloc(&platform, ring_pages, depth, shape.pages_per_slot)?;
        let granted = memory.grant(&platform, backend);
        let channel = granted.map_err(SetupError::from).and_then(|()| {
            let channel = platform.alloc_unbound(backend)?;
            Ok(channel)
        });
        let channel = match channel {
            Ok(channel) => channel,
            Err(error) => {
                // Nobody was told of the grants.
                memory.abandon(&platform);
                return Err(error);
            }
        };
        Ok(Self {
            ring,
            memory,
            channel,
            shape,
            slots: (0..depth).map(|_| Slot::Free).collect(),
            free: (0..depth as u16).rev().map(SlotId).collect(),
            platform,
            handle,
        })
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
        let platform = self.platform.clone();
        let mut new = Self::with_shape(platform, backend, self.handle, self.shape)?;
        new.free.clear();
        for (i, slot) in self.slots.iter().enumerate() {
            let id = SlotId(i as u16);
            match *slot {
                Slot::Free => new.free.push(id),
                Slot::Reserved | Slot::InFlight(_) => new.slots[i] = Slot::Reserved,
            }
            let holds_data = matches!(*slot, Slot::Reserved | Slot::InFlight(Op::Write { .. }));
            if holds_data {
                new.memory.copy_slot(&self.memory, i);
            }
            if let Slot::InFlight(op) = *slot {
                let again = new.start(id, op);
                debug_assert_eq!(again, Ok(()), "it was started before");
            }
        }
        Ok(new)
    }

    /// The grant references of the ring's pages, in order, for the handshake.
    #[must_use]
    pub fn ring_grefs(&self) -> &[GrantRef] {
        self.memory.ring_grefs()
    }

    /// How large it is.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Bytes of a slot's buffer, and so of the largest request.
    #[must_use]
    pub fn slot_bytes(&self) -> usize {
        self.shape.pages_per_slot * PAGE_SIZE
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
        self.memory.fill(id.index(), offset, data)
    }

    /// Copies out of a slot's buffer, after a read. `None` when it is not all there.
    pub fn fetch(&self, id: SlotId, offset: usize, out: &mut [u8]) -> Option<()> {
        self.memory.fetch(id.index(), offset, out)
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
        let request = match op {
            Op::Read { sector, bytes } => self.data(DataOp::Read, id, sector, bytes)?,
            Op::Write { sector, bytes } => self.data(DataOp::Write, id, sector, bytes)?,
            Op::Flush => {
                let (op, segments) = (DataOp::Flush, Segments::default());
                Request::Data { op, id: wire_id, sector: 0, segments }
            }
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

    /// A request for the first `bytes` bytes of a slot's buffer, indirect if it has to be.
    fn data(
        &self,
        op: DataOp,
        slot: SlotId,
        sector: u64,
        bytes: usize,
    ) -> Result<Request, StartError> {
        if bytes == 0 || bytes > self.slot_bytes() || !bytes.is_multiple_of(SECTOR) {
            return Err(StartError::Size);
        }
        let id = u64::from(slot.0);
        let request = if bytes <= SLOT_BYTES {
            let segments = self.memory.segments(slot.index(), bytes);
            segments.map(|segments| Request::Data { op, id, sector, segments })
        } else {
            let indirect = self.memory.write_table(slot.index(), bytes);
            indirect.map(|indirect| Request::Indirect { op, id, sector, indirect })
        };
        request.ok_or(StartError::Size)
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
        if self.memory.revoke(&self.platform) { Ok(()) } else { Err(self) }
    }
}

impl<P: Granter + EventChannels> Drop for Queue<P> {
    /// Takes every grant back. Memory the backend still has mapped stays allocated for ever: it
    /// must never become something else while another domain can reach it (XSA-396).
    fn drop(&mut self) {
        self.memory.abandon(&self.platform);
    }
}
