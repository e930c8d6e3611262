use super::{BackOffer, Discard, FrontRequest, Protocol};

/// Negotiated features of a disk: advertised and requested. Features not listed here are not used.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Negotiated {
    /// The rings' layout, if the frontend wrote one.
    pub protocol: Option<Protocol>,
    /// Number of queues, at least 1.
    pub queues: usize,
    /// Number of pages of each ring, a power of two.
    pub ring_pages: usize,
    /// Whether persistent grants are used.
    pub persistent: bool,
    /// Maximum number of segments in an indirect request; 0 if indirect requests are not used.
    pub max_indirect_segments: u32,
    /// Whether the frontend may send flushes.
    pub flush: bool,
    /// Whether the frontend may send barriers.
    pub barrier: bool,
    /// Whether the frontend may send discards, and their properties.
    pub discard: Option<Discard>,
}

impl Negotiated {
    /// Combines an offer and a request. Operations need no request: the frontend may use those that
    /// are advertised.
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
