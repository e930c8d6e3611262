//! The data path of a virtual disk: slots with granted buffers, requests, answers.
//!
//! Every buffer is a run of pages allocated zeroed and granted whole when the queue is made: a
//! request costs no grant operation, and nothing of the guest's but what it writes there can be
//! read by the backend, trusted or not (XSA-403). A backend may keep them mapped (persistent grants).
//!
//! | module | holds |
//! |---|---|
//! | `memory` | ring, buffers and tables of segments, and their grants |
//! | `limits` | what the backend takes |
//! | `flight` | requests and answers |
//! | this | what they are made of, and making it anew for the next backend |
//!
//! A slot's request is one of the ring's, mostly. It is several where the backend takes less at a
//! time than the slot holds, because it is another one than the slot was made for; its answer is
//! then the first that is not good. What a backend does not take at all is answered here.

mod flight;
mod limits;
mod memory;

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use flight::Flight;
pub(crate) use limits::Shared;
pub use limits::{FlushBy, QueueLimits};
use memory::Memory;
use pvio_event_channel::{EventChannels, EventError};
use pvio_grant_table::{DomId, GrantError, GrantRef, Granter};
use pvio_ring::proto::blkif::{Abi, MAX_INDIRECT_SEGMENTS, MAX_SEGMENTS, Status};
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
    /// These sectors must not be readable any more by any means, copies that the medium made of them
    /// included. Answered "not supported" by all but a few disks.
    SecureDiscard {
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
    /// It is not on the disk, as large as that is now.
    #[error("request out of range: {sectors} sectors at {sector}, and the disk has {size}")]
    OutOfRange {
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u64,
        /// How many the disk has.
        size: u64,
    },
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
    InFlight(Flight),
}

/// One queue of a virtual disk, frontend side.
pub struct Queue<P: Granter + EventChannels> {
    platform: P,
    ring: FrontRing<P::Pages>,
    memory: Memory<P::Pages>,
    channel: P::Channel,
    /// Pages of the ring of this session, and of a slot's buffer ever since the first.
    shape: Shape,
    limits: QueueLimits,
    slots: Vec<Slot>,
    free: Vec<SlotId>,
    /// Slots with requests that are not, or not all, in the ring.
    backlog: VecDeque<SlotId>,
    /// Requests that no backend is asked, and their answers.
    local: VecDeque<(SlotId, Status)>,
    /// Buffers are wiped when they are given back.
    wipes: bool,
    /// Which of its disk's queues it is.
    number: usize,
    /// What it shares with the others of its session.
    shared: Arc<Shared>,
    /// `virtual-device`, truncated as the wire has it.
    handle: u16,
}

/// What a queue is made for, besides its shape.
pub(crate) struct Maker<P> {
    pub platform: P,
    pub backend: DomId,
    pub handle: u16,
    pub shape: Shape,
    /// Slots; as many as the ring has, if it is the first of its kind.
    pub slots: Option<usize>,
    /// Pages in one request; more than 11 take indirect ones.
    pub segments: usize,
    pub number: usize,
    pub shared: Arc<Shared>,
    pub wipes: bool,
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
    /// backend to bind to. The backend is taken to be able to do all there is, until
    /// [`limit`](Self::limit) says otherwise.
    ///
    /// # Errors
    /// [`SetupError`]; everything made so far is taken back.
    pub fn with_shape(
        platform: P,
        backend: DomId,
        handle: u16,
        shape: Shape,
    ) -> Result<Self, SetupError> {
        let (slots, segments, number) = (None, shape.pages_per_slot, 0);
        let shared = Arc::default();
        let wipes = false;
        Self::make(Maker {
            platform,
            backend,
            handle,
            shape,
            slots,
            segments,
            number,
            shared,
            wipes,
        })
    }

    pub(crate) fn make(maker: Maker<P>) -> Result<Self, SetupError> {
        let Maker { platform, backend, handle, shape, slots, segments, number, shared, wipes } =
            maker;
        let slot_size = Abi::X86_64.slot_size();
        if !shape.is_possible() || !shape.ring_pages.is_power_of_two() {
            let bytes = shape.ring_pages.saturating_mul(PAGE_SIZE);
            return Err(RingFault::Geometry { bytes, slot_size }.into());
        }
        let ring_pages = platform.alloc_pages(shape.ring_pages)?;
        let ring = FrontRing::init(ring_pages.clone(), slot_size)?;
        let depth = slots.unwrap_or(ring.layout().slots() as usize);
        let pages = shape.pages_per_slot;
        let mut memory = Memory::alloc(&platform, ring_pages, depth, pages, segments)?;
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
            limits: QueueLimits { segments, ..QueueLimits::MOST },
            slots: (0..depth).map(|_| Slot::Free).collect(),
            free: (0..depth as u16).rev().map(SlotId).collect(),
            backlog: VecDeque::with_capacity(depth),
            local: VecDeque::new(),
            wipes,
            number,
            shared,
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
        let mut new = Self::make(Maker {
            platform: self.platform.clone(),
            backend,
            handle: self.handle,
            shape: self.shape,
            slots: Some(self.slots.len()),
            segments: self.limits.segments,
            number: self.number,
            shared: Arc::default(),
            wipes: self.wipes,
        })?;
        new.inherit(self);
        new.limit(self.limits());
        Ok(new)
    }

    /// Takes over the slots of a queue that went before, with their data: its unanswered requests
    /// wait for [`limit`](Self::limit). This one must have as many slots, none of them used.
    pub(crate) fn inherit(&mut self, old: &Self) {
        self.free.clear();
        self.backlog.clear();
        for (i, slot) in old.slots.iter().enumerate().take(self.slots.len()) {
            let id = SlotId(i as u16);
            if let Slot::Reserved | Slot::InFlight(Flight { op: Op::Write { .. }, .. }) = slot {
                self.memory.copy_slot(&old.memory, i);
            }
            self.slots[i] = match slot {
                Slot::Free => {
                    self.free.push(id);
                    Slot::Free
                }
                Slot::Reserved => Slot::Reserved,
                Slot::InFlight(flight) => {
                    self.backlog.push_back(id);
                    Slot::InFlight(Flight::new(flight.op))
                }
            };
        }
    }

    /// Says what the backend takes, and sends it what waited for that. Publish afterwards. Requests
    /// in flight must not be there yet.
    pub fn limit(&mut self, limits: QueueLimits) {
        let mut segments = self.memory.segments_of(limits.segments);
        if !(segments * PAGE_SIZE).is_multiple_of(limits.sector_size.max(1)) {
            // Sectors of more than a page: parts are as many of them as a direct request has.
            segments = PAGES_PER_SLOT;
        }
        self.limits = QueueLimits { segments, ..limits };
        self.shared.resize(limits.sectors);
        for _ in 0..self.backlog.len() {
            let Some(id) = self.backlog.pop_front() else { break };
            self.send(id);
        }
    }

    /// What the backend takes, and the disk's size as it is now.
    #[must_use]
    pub fn limits(&self) -> QueueLimits {
        QueueLimits { sectors: self.shared.sectors(), ..self.limits }
    }

    /// Wipes each buffer when its slot is [released](Self::release): a backend that is not trusted
    /// finds nothing of earlier requests there. Buffers are never memory that the guest uses for
    /// anything else, whether or not this is asked for.
    pub fn wipe(&mut self, whether: bool) {
        self.wipes = whether;
    }

    /// Which of its disk's queues it is, from 0.
    #[must_use]
    pub fn number(&self) -> usize {
        self.number
    }

    /// Whether its session is over: no answer comes any more, and it is to be put back into its
    /// [`Disk`](crate::Disk). Any thread may ask.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.shared.is_over()
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

    /// Requests in the ring without an answer.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.ring.in_flight() as usize
    }

    /// Slots that are reserved or have requests that are not answered.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes a slot, if one is free.
    pub fn reserve(&mut self) -> Option<SlotId> {
        let id = self.free.pop()?;
        self.slots[id.index()] = Slot::Reserved;
        Some(id)
    }

    /// Gives a reserved slot back.
    pub fn release(&mut self, id: SlotId) {
        if let Some(slot @ Slot::Reserved) = self.slots.get_mut(id.index()) {
            *slot = Slot::Free;
            self.free.push(id);
            if self.wipes {
                self.memory.wipe(id.index());
            }
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
