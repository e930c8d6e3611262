use super::{BackOffer, Discard, FrontRequest, Protocol};

/// What both ends of a disk agreed on: offered and asked for. What is not in here is not used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Negotiated {
    /// The rings' layout, if the frontend named one.
    pub protocol: Option<Protocol>,
    /// How many queues there are, at least 1.
    pub queues: usize,
    /// How many pages each ring has, a power of two.
    pub ring_pages: usize,
    /// Whether grants may stay mapped.
    pub persistent: bool,
    /// Segments in one indirect request; 0 if there are none.
    pub max_indirect_segments: u32,
    /// Whether flushes may be sent.
    pub flush: bool,
    /// Whether barriers may be sent.
    pub barrier: bool,
    /// Whether and how discards may be sent.
    pub discard: Option<Discard>,
}

impl Negotiated {
    /// What an offer and a request have in common. Operations need no asking: what is offered may
    /// be used.
    #[must_use]
    pub fn new(offer: &BackOffer, request: &FrontRequest) -> Self {
        Self {
            protocol: request.protocol,
            queues: request.queues.len(),
            ring_pages: request.ring_pages(),
            persistent: offer.persistent && request.persistent,
            max_indirect_segments: offer.max_indirect_segments.unwrap_or(0),
            flush: offer.flush,
            barrier: offer.barrier,
            discard: offer.discard,
        }
    }
}
