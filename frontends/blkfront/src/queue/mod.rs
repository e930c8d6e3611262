//! The data path of a virtual disk: slots with granted buffers, requests, responses.
//!
//! Every buffer is a run of zeroed pages that are granted whole when the queue is made. So a
//! request needs no grant operation, and the backend, trusted or not, can read no data of the guest
//! other than what the guest writes there (XSA-403). A backend may cache its mappings (persistent
//! grants).
//!
//! | module | contents |
//! |---|---|
//! | `memory` | ring, buffers and segment tables, and their grants |
//! | `limits` | limits and features of the backend |
//! | `flight` | requests and responses |
//! | this | the types of requests and errors, and making a queue again for the next backend |
//!
//! A slot's request is usually one request of the ring. It is split into several if the backend
//! supports less per request than the slot holds: a later backend than the one the slot was made
//! for. The status is then the first that is not `Okay`. Operations that the backend does not
//! support are completed without being sent.

mod flight;
mod limits;
mod memory;
mod remedy;

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

/// Minimum number of pages of a slot's buffer: one request without indirect segments.
pub const PAGES_PER_SLOT: usize = MAX_SEGMENTS;
/// Minimum size of a slot's buffer, and so of the largest request, in bytes: 44 KiB.
pub const SLOT_BYTES: usize = PAGES_PER_SLOT * PAGE_SIZE;
/// Size of a sector of the protocol, in bytes.
pub const SECTOR: usize = 512;

/// Operation of a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Reads `bytes` bytes from `sector` on into the slot's buffer.
    Read {
        /// First sector.
        sector: u64,
        /// Length in bytes: whole sectors, at most [`Queue::slot_bytes`].
        bytes: usize,
    },
    /// Writes the first `bytes` bytes of the slot's buffer from `sector` on.
    Write {
        /// First sector.
        sector: u64,
        /// Length in bytes: whole sectors, at most [`Queue::slot_bytes`].
        bytes: usize,
    },
    /// Flushes every write that was completed before this request to stable storage.
    Flush,
    /// Discards these sectors: their contents are no longer needed.
    Discard {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u64,
    },
    /// Discards these sectors so that they cannot be read again, including copies inside the
    /// storage device. Few disks support it.
    SecureDiscard {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u64,
    },
}

/// A slot: the buffer and the number of one request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SlotId(u16);

impl SlotId {
    /// Returns a number below [`Queue::depth`], usable as an index into the caller's tables.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// A protocol violation by the backend, or a failure to reach it. The device is unusable; the guest
/// is not affected.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BackendFault {
    /// Invalid ring indices.
    #[error(transparent)]
    Ring(#[from] RingFault),
    /// A response to a request that is not in flight.
    #[error("the backend answered request {0}, which is not in flight")]
    UnknownId(u64),
    /// The event channel failed.
    #[error(transparent)]
    Event(#[from] EventError),
    /// The ring's slots have another size than the ABI's: a bug in this crate.
    #[error(transparent)]
    Slot(#[from] ShortSlot),
}

impl BackendFault {
    /// Returns a short stable code for logs, counters and `error` nodes.
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
    /// Out of memory or grants.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// No event channel is available.
    #[error(transparent)]
    Event(#[from] EventError),
    /// The ring cannot have that size.
    #[error(transparent)]
    Ring(#[from] RingFault),
}

/// Why a slot could not be started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StartError {
    /// The slot is not reserved: it is free, or in flight.
    #[error("the slot is not reserved")]
    NotReserved,
    /// Empty, not whole sectors, or larger than a slot.
    #[error("a request is of whole sectors, and no more than a slot's buffer holds")]
    Size,
    /// Out of bounds of the disk's current size.
    #[error("request out of range: {sectors} sectors at {sector}, and the disk has {size}")]
    OutOfRange {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u64,
        /// Size of the disk, in sectors.
        size: u64,
    },
}

/// Size of a queue. Anything above the minimum must be advertised by the backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Pages of the ring, a power of two of at most 32; each page has 32 slots.
    pub ring_pages: usize,
    /// Pages of a slot's buffer, 11 to 4096; more than 11 need indirect requests. A queue allocates
    /// them for all of its slots.
    pub pages_per_slot: usize,
}

impl Shape {
    /// The minimum, which every backend supports: 32 slots of 44 KiB.
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
    /// Pages of this session's ring, and pages of a slot's buffer, which never change.
    shape: Shape,
    limits: QueueLimits,
    slots: Vec<Slot>,
    free: Vec<SlotId>,
    /// Slots whose requests are not, or only partly, in the ring.
    backlog: VecDeque<SlotId>,
    /// Requests that are completed without being sent, and their status.
    local: VecDeque<(SlotId, Status)>,
    /// Whether buffers are wiped when their slots are released.
    wipes: bool,
    /// The queue's number in its disk.
    number: usize,
    /// State shared with the other queues of the session.
    shared: Arc<Shared>,
    /// `virtual-device`, truncated to the width of the wire field.
    handle: u16,
}

/// What a queue is made from, besides its shape.
pub(crate) struct Maker<P> {
    pub platform: P,
    pub backend: DomId,
    pub handle: u16,
    pub shape: Shape,
    /// Number of slots; the number of the ring's slots for the first queue with this number.
    pub slots: Option<usize>,
    /// Pages in one request; more than 11 need indirect requests.
    pub segments: usize,
    pub number: usize,
    pub shared: Arc<Shared>,
    pub wipes: bool,
}

impl<P: Granter + EventChannels> Queue<P> {
    /// Makes a queue of the [minimum shape](Shape::LEAST).
    ///
    /// # Errors
    /// [`SetupError`]; everything made so far is released.
    pub fn new(platform: P, backend: DomId, handle: u16) -> Result<Self, SetupError> {
        Self::with_shape(platform, backend, handle, Shape::LEAST)
    }

    /// Allocates and grants a ring and a buffer for each of its slots, and makes an event channel
    /// that the backend binds to. Until [`limit`](Self::limit) is called, the backend is assumed to
    /// support everything.
    ///
    /// # Errors
    /// [`SetupError`]; everything made so far is released.
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
                // No backend knows the grants.
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

    /// Makes the same queue for another backend, after the old one is gone. Every request in flight
    /// is in the new ring, with its data, and the new backend completes it. Call `publish`
    /// afterwards.
    ///
    /// # Errors
    /// [`SetupError`]; the old queue is unchanged.
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

    /// Takes over the slots of an earlier queue, with their data; its outstanding requests are sent
    /// by [`limit`](Self::limit). This queue must have as many slots, all of them free.
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

    /// Sets the backend's limits and sends the requests that waited for them. Call `publish`
    /// afterwards. The queue must have no requests in flight.
    pub fn limit(&mut self, limits: QueueLimits) {
        let mut segments = self.memory.segments_of(limits.segments);
        if !(segments * PAGE_SIZE).is_multiple_of(limits.sector_size.max(1)) {
            // Sectors of more than a page: a part has as many as fit into a direct request.
            segments = PAGES_PER_SLOT;
        }
        self.limits = QueueLimits { segments, ..limits };
        self.shared.resize(limits.sectors);
        for _ in 0..self.backlog.len() {
            let Some(id) = self.backlog.pop_front() else { break };
            self.send(id);
        }
    }

    /// Returns the backend's limits, with the current size of the disk.
    #[must_use]
    pub fn limits(&self) -> QueueLimits {
        QueueLimits { sectors: self.shared.sectors(), ..self.limits }
    }

    /// Sets whether a buffer is wiped when its slot is [released](Self::release), so that an
    /// untrusted backend finds no data of earlier requests. Buffers are never used for other data
    /// of the guest, with or without this setting.
    pub fn wipe(&mut self, whether: bool) {
        self.wipes = whether;
    }

    /// Returns the queue's number in its disk, from 0.
    #[must_use]
    pub fn number(&self) -> usize {
        self.number
    }

    /// Returns whether its session is over: no more responses arrive, and the queue must be put
    /// back into its [`Disk`](crate::Disk). Callable from any thread.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.shared.is_over()
    }

    /// Returns the grant references of the ring's pages, in order, for the handshake.
    #[must_use]
    pub fn ring_grefs(&self) -> &[GrantRef] {
        self.memory.ring_grefs()
    }

    /// Returns the shape of the queue.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Returns the size of a slot's buffer, and so of the largest request, in bytes.
    #[must_use]
    pub fn slot_bytes(&self) -> usize {
        self.shape.pages_per_slot * PAGE_SIZE
    }

    /// Returns this side's event channel.
    #[must_use]
    pub fn channel(&self) -> &P::Channel {
        &self.channel
    }

    /// Returns the number of requests that can be in flight.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.slots.len()
    }

    /// Returns the number of requests in the ring without a response.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.ring.in_flight() as usize
    }

    /// Returns the number of slots that are reserved or in flight.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Reserves a slot, if one is free.
    pub fn reserve(&mut self) -> Option<SlotId> {
        let id = self.free.pop()?;
        self.slots[id.index()] = Slot::Reserved;
        Some(id)
    }

    /// Releases a reserved slot.
    pub fn release(&mut self, id: SlotId) {
        if let Some(slot @ Slot::Reserved) = self.slots.get_mut(id.index()) {
            *slot = Slot::Free;
            self.free.push(id);
            if self.wipes {
                self.memory.wipe(id.index());
            }
        }
    }

    /// Copies into a slot's buffer, before a write. `None` if the data does not fit.
    pub fn fill(&self, id: SlotId, offset: usize, data: &[u8]) -> Option<()> {
        self.memory.fill(id.index(), offset, data)
    }

    /// Copies out of a slot's buffer, after a read. `None` if the range is out of bounds.
    pub fn fetch(&self, id: SlotId, offset: usize, out: &mut [u8]) -> Option<()> {
        self.memory.fetch(id.index(), offset, out)
    }
}

impl<P: Granter + EventChannels> Queue<P> {
    /// Revokes all grants and frees the memory.
    ///
    /// # Errors
    /// The queue, if the backend has still mapped some of it; retry when the backend reports that
    /// it has unmapped everything.
    #[expect(clippy::result_large_err, reason = "the queue itself, moved at the end of a session")]
    pub fn dismantle(mut self) -> Result<(), Self> {
        if self.memory.revoke(&self.platform) { Ok(()) } else { Err(self) }
    }
}

impl<P: Granter + EventChannels> Drop for Queue<P> {
    /// Revokes all grants. Memory that the backend has still mapped is never freed: it must not be
    /// reused while another domain can access it (XSA-396).
    fn drop(&mut self) {
        self.memory.abandon(&self.platform);
    }
}
