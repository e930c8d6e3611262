//! The request of a disk's frontend: rings, event channels, features.

use alloc::format;
use alloc::vec::Vec;

use crate::handshake::HandshakeError;
use crate::handshake::common::{NUM_QUEUES, Used, read_count, read_each, write_each};
use crate::handshake::encoding::{ANY, Between, FLAG, OneOf, PowerOfTwo};
use crate::handshake::fields::{Reader, Writer};
use crate::handshake::record::{Optional, Or, Record as _, record};
use crate::xenstore::{Xenstore, transaction};

use super::BackOffer;

/// Layout of requests in the rings (`protocol`, `io/protocols.h`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Protocol {
    /// `x86_32-abi`
    X86_32,
    /// `x86_64-abi`
    X86_64,
    /// `arm-abi`, for 32 and 64 bits; its layout is that of x86_64.
    Arm,
}

const PROTOCOL: OneOf<Protocol> = OneOf(
    &[
        (Protocol::X86_32, "x86_32-abi"),
        (Protocol::X86_64, "x86_64-abi"),
        (Protocol::Arm, "arm-abi"),
    ],
    "x86_32-abi, x86_64-abi or arm-abi",
);

impl Protocol {
    /// Returns the value on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        PROTOCOL.word(&self)
    }
}

/// One queue of a [`FrontRequest`].
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Queue {
    /// The grant references of the ring's pages, in order: a power of two of them, all different.
    pub ring_refs: Vec<u32>,
    /// The frontend's event channel; never 0.
    pub event_channel: u32,
}

record! {
    /// The request of a disk's frontend, written before it enters `Initialised` (3) or, in many
    /// implementations, `Connected` (4).
    #[derive(Clone, PartialEq, Eq, Debug)]
    pub struct FrontRequest {
        /// `protocol`. If it is missing, the frontend uses its native layout; Linux's backend
        /// assumes `x86_32-abi` on x86, others assume their own layout.
        pub protocol: Option<Protocol> = "protocol" => Optional(PROTOCOL),
        /// `feature-persistent`: the frontend reuses its grants. Many write it even if it was not
        /// advertised.
        pub persistent: bool = "feature-persistent" => Or(FLAG, false),
    }
    other keys(RING_KEYS) {
        /// The queues, at least one; all rings have the same number of pages.
        pub queues: Vec<Queue>,
    }
}

/// Keys of the rings, which depend on the number of queues and pages.
const RING_KEYS: &[&str] = &[
    NUM_QUEUES,
    "queue-%u",
    "ring-page-order",
    "num-ring-pages",
    "ring-ref",
    "ring-ref%u",
    "event-channel",
];

impl FrontRequest {
    /// Reads a frontend's request, and validates it against the offer.
    ///
    /// A single queue has its keys at the top level, several queues have theirs in `queue-<n>`. If
    /// `ring-page-order` is present, even as 0, the ring is `ring-ref0` and so on, as in Linux's
    /// backend; otherwise `num-ring-pages` is the number of pages; otherwise the ring is `ring-ref`
    /// alone.
    ///
    /// # Errors
    /// [`HandshakeError`] for values that are missing, malformed, used twice, or beyond the offer.
    pub fn read<X: Xenstore + ?Sized>(
        xs: &mut X,
        base: &str,
        offer: &BackOffer,
    ) -> Result<Self, HandshakeError> {
        transaction(xs, |tx| {
            let mut r = Reader { xs: tx, base };
            let count = read_count(&mut r, offer.queues())?;
            let ring = RingKeys::read(&mut r, offer)?;
            let mut request = Self::read_keys(&mut r, Vec::new())?;
            let mut used = Used::default();
            request.queues = read_each(&mut r, count, |r| read_queue(r, ring, &mut used))?;
            Ok(request)
        })
    }

    /// Writes the request, and removes keys of an earlier one.
    ///
    /// # Errors
    /// [`HandshakeError::Unwritable`] if there is no queue, or the rings do not all have the same
    /// number of pages, a power of two.
    pub fn write<X: Xenstore + ?Sized>(
        &self,
        xs: &mut X,
        base: &str,
    ) -> Result<(), HandshakeError> {
        let pages = self.queues.first().map_or(0, |q| q.ring_refs.len());
        if !pages.is_power_of_two() || self.queues.iter().any(|q| q.ring_refs.len() != pages) {
            return Err(HandshakeError::Unwritable("rings of unequal or impossible size"));
        }
        transaction(xs, |tx| {
            let mut w = Writer { xs: tx, base };
            w.clear_listed(RING_KEYS)?;
            self.write_keys(&mut w)?;
            if pages > 1 {
                // Both forms are written, because some backends support only one of them.
                w.put("ring-page-order", pages.ilog2())?;
                w.put("num-ring-pages", pages)?;
            }
            write_each(&mut w, &self.queues, write_queue)
        })
    }

    /// Returns the number of pages of each ring.
    #[must_use]
    pub fn ring_pages(&self) -> usize {
        self.queues.first().map_or(0, |q| q.ring_refs.len())
    }
}

/// How a frontend names the pages of a ring.
#[derive(Clone, Copy)]
struct RingKeys {
    pages: u32,
    /// For a single page: whether `ring-ref0` is tried before `ring-ref`.
    numbered_first: bool,
}

impl RingKeys {
    fn read(r: &mut Reader<'_>, offer: &BackOffer) -> Result<Self, HandshakeError> {
        let max_order = offer.ring_page_order();
        let max_pages = 1_u32.checked_shl(max_order).unwrap_or(1);
        if let Some(order) = r.get("ring-page-order", Between(0, max_order))? {
            let pages = 1_u32.checked_shl(order).unwrap_or(1);
            return Ok(Self { pages, numbered_first: true });
        }
        let pages = r.get("num-ring-pages", PowerOfTwo(1, max_pages))?.unwrap_or(1);
        Ok(Self { pages, numbered_first: false })
    }
}

fn read_queue(
    r: &mut Reader<'_>,
    ring: RingKeys,
    used: &mut Used,
) -> Result<Queue, HandshakeError> {
    let ring_refs = if ring.pages == 1 {
        let (first, second) =
            if ring.numbered_first { ("ring-ref0", "ring-ref") } else { ("ring-ref", "ring-ref0") };
        let (key, gref) = match r.get(first, ANY)? {
            Some(gref) => (first, gref),
            None => match r.get(second, ANY)? {
                Some(gref) => (second, gref),
                None => return Err(r.missing(first)),
            },
        };
        Vec::from([used.add_ref(r, key, gref)?])
    } else {
        let refs = (0..ring.pages).map(|n| used.read_ref(r, &format!("ring-ref{n}")));
        refs.collect::<Result<_, _>>()?
    };
    Ok(Queue { ring_refs, event_channel: used.read_channel(r, "event-channel")? })
}

fn write_queue(w: &mut Writer<'_>, queue: &Queue) -> Result<(), HandshakeError> {
    match queue.ring_refs.as_slice() {
        [one] => w.put("ring-ref", one)?,
        many => {
            for (n, gref) in many.iter().enumerate() {
                w.put(&format!("ring-ref{n}"), gref)?;
            }
        }
    }
    w.put("event-channel", queue.event_channel)
}
