//! The device: from the toolstack's words to usable queues.
//!
//! # Queues and threads
//! A disk has one queue or, where that is wished for and offered, several. A thread that wants one
//! for itself [takes](Disk::take) it: from then on it shares nothing with anybody but the backend,
//! and takes no lock. When its session is over ([`Queue::is_over`]: the backend died, or the device
//! closes) it puts the queue [back](Disk::put_back), and takes it again once the disk is connected:
//! what was unanswered is in there, and will be answered by the next backend.

use crate::queue::{Maker, Queue, QueueLimits, Shape, Shared};
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{DomId, Granter};
use pvio_xenbus::Xenstore;
use pvio_xenbus::driver::{Fault, FrontendClass, FrontendEnds};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::vbd::{
    BackDisk, BackOffer, FrontRequest, Protocol, Queue as QueueKeys, ToolstackFront,
};

/// How many earlier sessions' queues may wait for the backend to let go of them, for each queue of
/// the disk. One is the rule when a backend is restarted; a backend that starts over and over and
/// unmaps nothing would take all of the guest's memory.
const MAX_OLD: usize = 2;

/// Features that a disk requests, where the backend advertises them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestedFeatures {
    /// How large each queue is.
    pub shape: Shape,
    /// How many there are.
    pub queues: usize,
    /// Whom to take for trusted.
    pub trust: Trust,
}

impl Default for RequestedFeatures {
    fn default() -> Self {
        Self { shape: Shape::LEAST, queues: 1, trust: Trust::default() }
    }
}

/// Whether a backend is trusted not to look at what is in buffers that no request uses. If not,
/// buffers are wiped when they are given back ([`Queue::wipe`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Trust {
    /// As the toolstack says (`trusted`).
    #[default]
    AsTold,
    /// Not, whatever the toolstack says.
    Never,
}

/// A virtual disk's frontend, to be driven by [`pvio_xenbus::driver::FrontendDriver`].
pub struct Disk<P: Granter + EventChannels + Clone> {
    platform: P,
    wish: RequestedFeatures,
    /// One for each queue there ever was.
    seats: Vec<Seat<P>>,
    /// Whether queues may be used.
    connected: bool,
    served: Option<BackDisk>,
    /// What this session's queues were made for.
    asked: Option<BackOffer>,
    /// What this session's queues are told: the disk's size, and that the session is over.
    shared: Arc<Shared>,
    /// Queues of earlier sessions that the backend still had mapped.
    old: Vec<Queue<P>>,
    sessions: u32,
}

/// A queue's place.
struct Seat<P: Granter + EventChannels> {
    /// The queue of this session, or of the last one with its unanswered requests. None if it is
    /// out, or this session has fewer.
    queue: Option<Queue<P>>,
    /// A queue is out: that of this session, or, if this session's is here, that of an earlier one
    /// with unanswered requests.
    out: bool,
    /// How large it was made at first, which never changes.
    depth: usize,
    pages_per_slot: usize,
}

impl<P: Granter + EventChannels + Clone> Disk<P> {
    /// A disk that is not attached yet, with a queue that every backend serves.
    pub fn new(platform: P) -> Self {
        Self::with_shape(platform, Shape::LEAST)
    }

    /// A disk that is not attached yet. Its queue is as large as wished for or as offered, whichever
    /// is less.
    pub fn with_shape(platform: P, shape: Shape) -> Self {
        Self::with(platform, RequestedFeatures { shape, ..RequestedFeatures::default() })
    }

    /// A disk that is not attached yet. It has what is wished for or offered, whichever is less.
    /// Its slots stay as many and as large for as long as the disk lives: a backend that takes over
    /// and offers less is asked in smaller parts.
    pub fn with(platform: P, wish: RequestedFeatures) -> Self {
        Self {
            platform,
            wish,
            seats: Vec::new(),
            connected: false,
            served: None,
            asked: None,
            shared: Arc::default(),
            old: Vec::new(),
            sessions: 0,
        }
    }

    /// The first queue, while the disk is connected and it is here.
    pub fn queue(&mut self) -> Option<&mut Queue<P>> {
        self.queue_at(0)
    }

    /// A queue, while the disk is connected and it is here.
    pub fn queue_at(&mut self, number: usize) -> Option<&mut Queue<P>> {
        let seat = self.seats.get_mut(number).filter(|seat| self.connected && !seat.out)?;
        seat.queue.as_mut()
    }

    /// How many queues this session has; 0 before the first.
    pub fn queues(&self) -> usize {
        self.seats.iter().filter(|seat| seat.out || seat.queue.is_some()).count()
    }

    /// Takes a queue out, for a thread of its own, while the disk is connected and it is here.
    pub fn take(&mut self, number: usize) -> Option<Queue<P>> {
        self.queue_at(number)?;
        let seat = self.seats.get_mut(number)?;
        let queue = seat.queue.take();
        seat.out = queue.is_some();
        queue
    }

    /// Puts a queue back. If its session is over and there is another already, its unanswered
    /// requests are sent to that one's backend.
    ///
    /// # Errors
    /// A [`Fault`] with which to [fail](pvio_xenbus::driver::FrontendDriver::fail) the device.
    pub fn put_back(&mut self, queue: Queue<P>) -> Result<(), Fault> {
        let Some(seat) = self.seats.get_mut(queue.number()) else { return Ok(()) };
        if !seat.out {
            // Of another disk; dropping it takes its grants back.
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

    /// What the backend serves: size, sector sizes, features. Known from the first connection on.
    pub fn served(&self) -> Option<&BackDisk> {
        self.served.as_ref()
    }

    /// Whether requests can be made now.
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// How often it was connected: more than once after the backend was restarted.
    pub fn sessions(&self) -> u32 {
        self.sessions
    }

    /// Makes this session's queues, with the unanswered requests of the last one's.
    fn make(&mut self, backend: DomId, handle: u16, offer: &BackOffer, trusted: bool) -> Made {
        let Self { platform, wish, seats, shared, old, .. } = self;
        let count = wish.queues.clamp(1, offer.queues() as usize);
        let segments = offer.max_indirect_segments.map_or(0, |most| most as usize);
        let least = Shape::LEAST.pages_per_slot;
        while seats.len() < count {
            let pages_per_slot = wish.shape.pages_per_slot.min(segments.max(least));
            seats.push(Seat { queue: None, out: false, depth: 0, pages_per_slot });
        }
        for (number, seat) in seats.iter_mut().enumerate() {
            let mut last = seat.queue.take();
            if number >= count {
                if seat.out || last.as_ref().is_some_and(|queue| queue.in_use() > 0) {
                    let text = "the backend offers fewer queues than the one before it, \
                                and those that are missing have requests under way";
                    seat.queue = last;
                    return Err(Fault::new("front-queues", text));
                }
                old.extend(last.and_then(|queue| queue.dismantle().err()));
                continue;
            }
            let ring_pages = wish.shape.ring_pages.min(1 << offer.ring_page_order());
            let made = Queue::make(Maker {
                platform: platform.clone(),
                backend,
                handle,
                shape: Shape { ring_pages, pages_per_slot: seat.pages_per_slot },
                slots: Some(seat.depth).filter(|depth| *depth > 0),
                segments,
                number,
                shared: Arc::clone(shared),
                wipes: wish.trust == Trust::Never || !trusted,
            });
            let mut queue = match made {
                Ok(queue) => queue,
                Err(error) => {
                    seat.queue = last;
                    return Err(Fault::new("front-setup", error));
                }
            };
            seat.depth = queue.depth();
            // If one is out, this was made for it and never used.
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

/// Sends a queue's requests to the backend it was made for, now that it serves.
fn begin<P: Granter + EventChannels>(queue: &mut Queue<P>, disk: &BackDisk) -> Result<(), Fault> {
    queue.limit(QueueLimits::of(disk));
    queue.publish().map_err(|fault| Fault::new(fault.code(), fault))
}

impl<P: Granter + EventChannels + Clone> FrontendClass for Disk<P> {
    fn prepare(&mut self, xs: &mut dyn Xenstore, ends: &FrontendEnds) -> Result<(), Fault> {
        let toolstack = ToolstackFront::read(xs, &ends.front)?;
        let offer = BackOffer::read(xs, &ends.back)?;
        let handle = (toolstack.virtual_device & 0xffff) as u16;
        self.release();
        if self.old.len() >= MAX_OLD * self.seats.len().max(1) {
            let text =
                "the backend starts over and over, and keeps the rings of earlier sessions mapped";
            return Err(Fault::new("front-rings-kept", text));
        }
        self.shared.end();
        self.shared = Arc::default();
        self.make(ends.back_id, handle, &offer, toolstack.trusted)?;
        self.asked = Some(offer);
        Ok(())
    }

    fn is_outdated(&mut self, xs: &mut dyn Xenstore, ends: &FrontendEnds) -> bool {
        let now = BackOffer::read(xs, &ends.back);
        self.asked.as_ref().is_some_and(|asked| now.is_ok_and(|now| now != *asked))
    }

    fn request(&self, xs: &mut dyn Xenstore, ends: &FrontendEnds) -> Result<(), HandshakeError> {
        let queues = self.seats.iter().filter_map(|seat| seat.queue.as_ref());
        let keys = |queue: &Queue<P>| QueueKeys {
            ring_refs: queue.ring_grefs().iter().map(|gref| gref.0).collect(),
            event_channel: queue.channel().port().0,
        };
        let request = FrontRequest {
            protocol: Some(Protocol::X86_64),
            // Every buffer keeps its grant for as long as the queue lives, whoever keeps it mapped.
            persistent: true,
            queues: queues.map(keys).collect(),
        };
        if request.queues.is_empty() {
            return Err(HandshakeError::Unwritable("a ring that was never made"));
        }
        request.write(xs, &ends.front)
    }

    fn connect(&mut self, xs: &mut dyn Xenstore, ends: &FrontendEnds) -> Result<(), Fault> {
        let now = BackDisk::read(xs, &ends.back)?;
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
