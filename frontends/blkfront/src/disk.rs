//! The device: a virtual disk's frontend end, from the toolstack's words to a usable queue.

use crate::queue::{Queue, SetupError, Shape};
use alloc::vec::Vec;
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::Granter;
use pvio_xenbus::Xenstore;
use pvio_xenbus::driver::{Ends, Fault, FrontendClass};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::vbd::{
    BackDisk, BackOffer, FrontRequest, Protocol, Queue as QueueKeys, ToolstackFront,
};

/// How many earlier sessions' queues may wait for the backend to let go of them. One is the rule
/// when a backend is restarted; a backend that starts over and over and unmaps nothing would take
/// all of the guest's memory.
const MAX_OLD: usize = 2;

/// A virtual disk's frontend, to be driven by [`pvio_xenbus::driver::FrontendDriver`].
pub struct Disk<P: Granter + EventChannels + Clone> {
    platform: P,
    /// How large a queue it would like, where the backend offers that.
    wish: Shape,
    /// The queue of this session, or of the last one with its unanswered requests.
    queue: Option<Queue<P>>,
    /// Whether the queue may be used.
    connected: bool,
    served: Option<BackDisk>,
    /// Queues of earlier sessions that the backend still had mapped.
    old: Vec<Queue<P>>,
    sessions: u32,
}

impl<P: Granter + EventChannels + Clone> Disk<P> {
    /// A disk that is not attached yet, with a queue that every backend serves.
    pub fn new(platform: P) -> Self {
        Self::with_shape(platform, Shape::LEAST)
    }

    /// A disk that is not attached yet. Its queue is as large as wished for or as offered, whichever
    /// is less. It stays as large for as long as the disk lives: a backend that takes over must
    /// offer that again.
    pub fn with_shape(platform: P, wish: Shape) -> Self {
        Self {
            platform,
            wish,
            queue: None,
            connected: false,
            served: None,
            old: Vec::new(),
            sessions: 0,
        }
    }

    /// The queue, while the disk is connected.
    pub fn queue(&mut self) -> Option<&mut Queue<P>> {
        self.queue.as_mut().filter(|_| self.connected)
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
}

/// What can be had of a wish.
fn shape(wish: Shape, offer: &BackOffer) -> Shape {
    let segments = offer.max_indirect_segments.map_or(0, |most| most as usize);
    Shape {
        ring_pages: wish.ring_pages.min(1 << offer.ring_page_order()),
        pages_per_slot: wish.pages_per_slot.min(segments.max(Shape::LEAST.pages_per_slot)),
    }
}

impl<P: Granter + EventChannels + Clone> FrontendClass for Disk<P> {
    fn prepare(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), Fault> {
        let toolstack = ToolstackFront::read(xs, &ends.front)?;
        let offer = BackOffer::read(xs, &ends.back)?;
        let handle = (toolstack.virtual_device & 0xffff) as u16;
        self.release();
        if self.old.len() >= MAX_OLD {
            let text =
                "the backend starts over and over, and keeps the rings of earlier sessions mapped";
            return Err(Fault::new("front-rings-kept", text));
        }
        let made = match self.queue.take() {
            // Requests the last backend left unanswered are the first ones of this session.
            Some(last) => {
                if shape(last.shape(), &offer) != last.shape() {
                    let text = "the backend offers less than the one before it, \
                                and requests are under way that it would not take";
                    return Err(Fault::new("front-shape", text));
                }
                let again = last.replay(toolstack.backend_id);
                self.old.extend(last.dismantle().err());
                again
            }
            None => {
                let shape = shape(self.wish, &offer);
                Queue::with_shape(self.platform.clone(), toolstack.backend_id, handle, shape)
            }
        };
        self.queue = Some(made.map_err(|error: SetupError| Fault::new("front-setup", error))?);
        Ok(())
    }

    fn request(&self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), HandshakeError> {
        let Some(queue) = &self.queue else {
            return Err(HandshakeError::Unwritable("a ring that was never made"));
        };
        let keys = QueueKeys {
            ring_refs: queue.ring_grefs().iter().map(|gref| gref.0).collect(),
            event_channel: queue.channel().port().0,
        };
        let request = FrontRequest {
            protocol: Some(Protocol::X86_64),
            // Every buffer keeps its grant for as long as the queue lives, whoever keeps it mapped.
            persistent: true,
            queues: Vec::from([keys]),
        };
        request.write(xs, &ends.front)
    }

    fn connect(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), Fault> {
        self.served = Some(BackDisk::read(xs, &ends.back)?);
        if !core::mem::replace(&mut self.connected, true) {
            self.sessions = self.sessions.saturating_add(1);
            if let Some(queue) = &mut self.queue {
                queue.publish().map_err(|fault| Fault::new(fault.code(), fault))?;
            }
        }
        Ok(())
    }

    fn disconnect(&mut self) {
        self.connected = false;
    }

    fn release(&mut self) {
        if !self.connected {
            let still = core::mem::take(&mut self.old);
            self.old.extend(still.into_iter().filter_map(|queue| queue.dismantle().err()));
        }
    }
}
