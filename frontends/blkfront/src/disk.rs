//! The vbd device: from the toolstack's configuration to connected queues.
//!
//! # Queues and threads
//! A disk has one queue, or several if several are requested and advertised. A thread that needs
//! exclusive use of a queue [takes](Disk::take) it. From then on the queue shares nothing with
//! other threads, only with the backend, and takes no lock. When the session of the queue is over
//! ([`Queue::is_over`]: the backend died, or the device closes), the thread puts the queue
//! [back](Disk::put_back). It takes it again once the disk is connected. The queue holds its
//! outstanding requests, and the next backend completes them.

use crate::queue::{Maker, Queue, QueueLimits, Shape, Shared};
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{DomId, Granter};
use pvio_xenbus::Xenstore;
use pvio_xenbus::driver::{Fault, FrontendClass, FrontendContext};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::vbd::{
    BackDisk, BackOffer, FrontRequest, Protocol, Queue as QueueKeys, ToolstackFront,
};

/// Maximum number of queues of earlier sessions that wait for the backend to unmap them, per queue
/// of the disk. A backend restart leaves one. A backend that restarts again and again and unmaps
/// nothing would otherwise exhaust the guest's memory.
const MAX_OLD: usize = 2;

/// Features that a disk requests, where the backend advertises them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestedFeatures {
    /// Size of each queue.
    pub shape: Shape,
    /// Number of queues.
    pub queues: usize,
    /// Whether the backend is trusted.
    pub trust: Trust,
}

impl Default for RequestedFeatures {
    fn default() -> Self {
        Self { shape: Shape::LEAST, queues: 1, trust: Trust::default() }
    }
}

/// Whether the backend is trusted not to read buffers that no request uses. If it is not trusted,
/// buffers are wiped when they are released ([`Queue::wipe`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Trust {
    /// As the toolstack configures (`trusted`).
    #[default]
    AsTold,
    /// Never trusted, whatever the toolstack configures.
    Never,
}

/// Frontend of a virtual disk, driven by [`pvio_xenbus::driver::FrontendDriver`].
pub struct Disk<P: Granter + EventChannels + Clone> {
    platform: P,
    requested: RequestedFeatures,
    /// One entry per queue that this disk ever had.
    seats: Vec<Seat<P>>,
    /// Whether queues may be used.
    connected: bool,
    served: Option<BackDisk>,
    /// The backend's offer that this session's queues were made for.
    asked: Option<BackOffer>,
    /// State shared with this session's queues: the disk's size, and whether the session is over.
    shared: Arc<Shared>,
    /// Queues of earlier sessions that the backend had still mapped.
    old: Vec<Queue<P>>,
    sessions: u32,
}

/// State of one queue number.
struct Seat<P: Granter + EventChannels> {
    /// The queue of this session, or of the last one with its outstanding requests. `None` if it is
    /// taken, or if this session has fewer queues.
    queue: Option<Queue<P>>,
    /// A queue is taken: this session's, or, if this session's is present, an earlier session's
    /// with outstanding requests.
    out: bool,
    /// Number of slots of the first queue with this number; it never changes.
    depth: usize,
    pages_per_slot: usize,
}

impl<P: Granter + EventChannels + Clone> Disk<P> {
    /// Creates a disk that is not attached, with a queue of the size that every backend supports.
    pub fn new(platform: P) -> Self {
        Self::with_shape(platform, Shape::LEAST)
    }

    /// Creates a disk that is not attached. Its queue has the requested or the advertised size,
    /// whichever is less.
    pub fn with_shape(platform: P, shape: Shape) -> Self {
        Self::with(platform, RequestedFeatures { shape, ..RequestedFeatures::default() })
    }

    /// Creates a disk that is not attached. It has the requested or the advertised features,
    /// whichever are less. The number and size of its slots do not change during the life of the
    /// disk: if the next backend advertises less, requests are split.
    pub fn with(platform: P, requested: RequestedFeatures) -> Self {
        Self {
            platform,
            requested,
            seats: Vec::new(),
            connected: false,
            served: None,
            asked: None,
            shared: Arc::default(),
            old: Vec::new(),
            sessions: 0,
        }
    }

    /// Returns the first queue, if the disk is connected and the queue is not taken.
    pub fn queue(&mut self) -> Option<&mut Queue<P>> {
        self.queue_at(0)
    }

    /// Returns a queue, if the disk is connected and the queue is not taken.
    pub fn queue_at(&mut self, number: usize) -> Option<&mut Queue<P>> {
        let seat = self.seats.get_mut(number).filter(|seat| self.connected && !seat.out)?;
        seat.queue.as_mut()
    }

    /// Returns the number of queues of this session; 0 before the first session.
    pub fn queues(&self) -> usize {
        self.seats.iter().filter(|seat| seat.out || seat.queue.is_some()).count()
    }

    /// Takes a queue for exclusive use by a thread, if the disk is connected and the queue is not
    /// taken.
    pub fn take(&mut self, number: usize) -> Option<Queue<P>> {
        self.queue_at(number)?;
        let seat = self.seats.get_mut(number)?;
        let queue = seat.queue.take();
        seat.out = queue.is_some();
        queue
    }

    /// Puts a queue back. If its session is over and the next one has started, its outstanding
    /// requests are sent to the new session's backend.
    ///
    /// # Errors
    /// A [`Fault`] with which to [fail](pvio_xenbus::driver::FrontendDriver::fail) the device.
    pub fn put_back(&mut self, queue: Queue<P>) -> Result<(), Fault> {
        let Some(seat) = self.seats.get_mut(queue.number()) else { return Ok(()) };
        if !seat.out {
            // The queue belongs to another disk; dropping it revokes its grants.
            return Ok(());
        }
        seat.out = false;
        let Some(new) = &mut seat.queue else {
            seat.queue = Some(queue);
            return Ok(());
        };
        new.inherit(&queue);
        self.old.extend(queue.dismantle().err());
        match &self.served {
            Some(disk) if self.connected => begin(new, disk),
            _ => Ok(()),
        }
    }

    /// Returns what the backend advertised: size, sector sizes, features. Known from the first
    /// connection on.
    pub fn served(&self) -> Option<&BackDisk> {
        self.served.as_ref()
    }

    /// Returns whether requests can be made now.
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// Returns how often the disk was connected: more than once if the backend was restarted.
    pub fn sessions(&self) -> u32 {
        self.sessions
    }

    /// Makes this session's queues, with the outstanding requests of the last session's queues.
    fn make(&mut self, backend: DomId, handle: u16, offer: &BackOffer, trusted: bool) -> Made {
        let Self { platform, requested, seats, shared, old, .. } = self;
        let count = requested.queues.clamp(1, offer.queues() as usize);
        let segments = offer.max_indirect_segments.map_or(0, |most| most as usize);
        let least = Shape::LEAST.pages_per_slot;
        while seats.len() < count {
            let pages_per_slot = requested.shape.pages_per_slot.min(segments.max(least));
            seats.push(Seat { queue: None, out: false, depth: 0, pages_per_slot });
        }
        for (number, seat) in seats.iter_mut().enumerate() {
            let mut last = seat.queue.take();
            if number >= count {
                if seat.out || last.as_ref().is_some_and(|queue| queue.in_use() > 0) {
                    let text = "the new backend advertises fewer queues than the previous one, and \
                                the missing ones have requests in flight";
                    seat.queue = last;
                    return Err(Fault::new("front-queues", text));
                }
                old.extend(last.and_then(|queue| queue.dismantle().err()));
                continue;
            }
            let ring_pages = requested.shape.ring_pages.min(1 << offer.ring_page_order());
            let made = Queue::make(Maker {
                platform: platform.clone(),
                backend,
                handle,
                shape: Shape { ring_pages, pages_per_slot: seat.pages_per_slot },
                slots: Some(seat.depth).filter(|depth| *depth > 0),
                segments,
                number,
                shared: Arc::clone(shared),
                wipes: requested.trust == Trust::Never || !trusted,
            });
            let mut queue = match made {
                Ok(queue) => queue,
                Err(error) => {
                    seat.queue = last;
                    return Err(Fault::of("front-setup", &error));
                }
            };
            seat.depth = queue.depth();
            // If a queue is taken, the one here was made for a session and never used.
            if let Some(last) = last.take_if(|_| !seat.out) {
                queue.inherit(&last);
                old.extend(last.dismantle().err());
            }
            old.extend(last.and_then(|queue| queue.dismantle().err()));
            seat.queue = Some(queue);
        }
        Ok(())
    }
}

type Made = Result<(), Fault>;

/// Sends a queue's requests to the backend that it was made for, once that backend is connected.
fn begin<P: Granter + EventChannels>(queue: &mut Queue<P>, disk: &BackDisk) -> Result<(), Fault> {
    queue.limit(QueueLimits::of(disk));
    queue.publish().map_err(|fault| Fault::of(fault.code(), &fault))
}

impl<P: Granter + EventChannels + Clone> FrontendClass for Disk<P> {
    fn prepare(&mut self, xs: &mut dyn Xenstore, context: &FrontendContext) -> Result<(), Fault> {
        let toolstack = ToolstackFront::read(xs, &context.front)?;
        let offer = BackOffer::read(xs, &context.back)?;
        let handle = (toolstack.virtual_device & 0xffff) as u16;
        self.release();
        if self.old.len() >= MAX_OLD * self.seats.len().max(1) {
            let text =
                "the backend restarts repeatedly without unmapping the rings of earlier sessions";
            return Err(Fault::new("front-rings-kept", text));
        }
        self.shared.end();
        self.shared = Arc::default();
        self.make(context.back_id, handle, &offer, toolstack.trusted)?;
        self.asked = Some(offer);
        Ok(())
    }

    fn is_outdated(&mut self, xs: &mut dyn Xenstore, context: &FrontendContext) -> bool {
        let now = BackOffer::read(xs, &context.back);
        self.asked.as_ref().is_some_and(|asked| now.is_ok_and(|now| now != *asked))
    }

    fn request(
        &self,
        xs: &mut dyn Xenstore,
        context: &FrontendContext,
    ) -> Result<(), HandshakeError> {
        let queues = self.seats.iter().filter_map(|seat| seat.queue.as_ref());
        let keys = |queue: &Queue<P>| QueueKeys {
            ring_refs: queue.ring_grefs().iter().map(|gref| gref.0).collect(),
            event_channel: queue.channel().port().0,
        };
        let request = FrontRequest {
            protocol: Some(Protocol::X86_64),
            // Every buffer stays granted for the life of the queue, so the backend may cache its
            // mappings.
            persistent: true,
            queues: queues.map(keys).collect(),
        };
        if request.queues.is_empty() {
            return Err(HandshakeError::Unwritable("a ring that was never made"));
        }
        request.write(xs, &context.front)
    }

    fn connect(&mut self, xs: &mut dyn Xenstore, context: &FrontendContext) -> Result<(), Fault> {
        let now = BackDisk::read(xs, &context.back)?;
        if self.connected
            && let Some(served) = &mut self.served
        {
            // Nothing else can change within a session.
            served.sectors = now.sectors;
            self.shared.resize(now.sectors);
            return Ok(());
        }
        self.connected = true;
        self.sessions = self.sessions.saturating_add(1);
        for seat in self.seats.iter_mut().filter(|seat| !seat.out) {
            if let Some(queue) = &mut seat.queue {
                begin(queue, &now)?;
            }
        }
        self.served = Some(now);
        Ok(())
    }

    fn disconnect(&mut self) {
        self.connected = false;
        self.shared.end();
    }

    fn release(&mut self) {
        if !self.connected {
            let still = core::mem::take(&mut self.old);
            self.old.extend(still.into_iter().filter_map(|queue| queue.dismantle().err()));
        }
    }
}
