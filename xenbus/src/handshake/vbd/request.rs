//! The request of a disk's frontend: rings, event channels, features.

use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::handshake::HandshakeError;
use crate::handshake::fields::{Reader, Writer, is_numbered};
use crate::xenstore::{Xenstore, transaction};

use super::BackOffer;

/// Layout of requests in the rings (`protocol`, `io/protocols.h`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Protocol {
    /// `x86_32-abi`
    X86_32,
    /// `x86_64-abi`
    X86_64,
    /// `arm-abi`, for 32 and 64 bits; its layout is that of x86_64.
    Arm,
}

impl Protocol {
    const ALL: [Self; 3] = [Self::X86_32, Self::X86_64, Self::Arm];

    /// Returns the value on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::X86_32 => "x86_32-abi",
            Self::X86_64 => "x86_64-abi",
            Self::Arm => "arm-abi",
        }
    }
}

/// One queue of a [`FrontRequest`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Queue {
    /// The grant references of the ring's pages, in order: a power of two of them, all different.
    pub ring_refs: Vec<u32>,
    /// The frontend's event channel; never 0.
    pub event_channel: u32,
}

/// The request of a disk's frontend, written before it enters `Initialised` (3) or, in many
/// implementations, `Connected` (4).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FrontRequest {
    /// `protocol`. If it is missing, the frontend uses its native layout; Linux's backend assumes
    /// `x86_32-abi` on x86, others assume their own layout.
    pub protocol: Option<Protocol>,
    /// `feature-persistent`: the frontend reuses its grants. Many write it even if it was not
    /// advertised.
    pub persistent: bool,
    /// The queues, at least one; all rings have the same number of pages.
    pub queues: Vec<Queue>,
}

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
            let queues = r.opt_u32("multi-queue-num-queues", 1, offer.queues())?.unwrap_or(1);
            let ring = RingKeys::read(&mut r, offer)?;
            let mut request = Self {
                protocol: read_protocol(&mut r)?,
                persistent: r.flag("feature-persistent", false)?,
                queues: Vec::new(),
            };
            let mut used = Used::default();
            for n in 0..queues {
                let dir =
                    if queues == 1 { String::from(base) } else { format!("{base}/queue-{n}") };
                let mut r = Reader { xs: &mut *r.xs, base: &dir };
                request.queues.push(read_queue(&mut r, ring, &mut used)?);
            }
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
            w.clear_all(|key| {
                is_numbered(key, "ring-ref")
                    || is_numbered(key, "queue-")
                    || matches!(
                        key,
                        "ring-ref" | "ring-page-order" | "num-ring-pages" | "event-channel"
                    )
                    || key == "multi-queue-num-queues"
            })?;
            w.opt("protocol", self.protocol.map(Protocol::as_str))?;
            w.flag("feature-persistent", self.persistent)?;
            if pages > 1 {
                // Both forms are written, because some backends support only one of them.
                w.put("ring-page-order", pages.ilog2())?;
                w.put("num-ring-pages", pages)?;
            }
            if let [queue] = self.queues.as_slice() {
                return write_queue(&mut w, queue);
            }
            w.put("multi-queue-num-queues", self.queues.len())?;
            for (n, queue) in self.queues.iter().enumerate() {
                let dir = format!("{base}/queue-{n}");
                write_queue(&mut Writer { xs: &mut *w.xs, base: &dir }, queue)?;
            }
            Ok(())
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
    fn read<X: Xenstore + ?Sized>(
        r: &mut Reader<'_, X>,
        offer: &BackOffer,
    ) -> Result<Self, HandshakeError> {
        let max_order = offer.ring_page_order();
        let max_pages = 1_u32.checked_shl(max_order).unwrap_or(1);
        if let Some(order) = r.opt_u32("ring-page-order", 0, max_order)? {
            let pages = 1_u32.checked_shl(order).unwrap_or(1);
            return Ok(Self { pages, numbered_first: true });
        }
        let pages = r.opt_u32("num-ring-pages", 1, max_pages)?.unwrap_or(1);
        if !pages.is_power_of_two() {
            let value = format!("{pages}");
            return Err(r.malformed("num-ring-pages", value.as_bytes(), "a power of two"));
        }
        Ok(Self { pages, numbered_first: false })
    }
}

#[derive(Default)]
struct Used {
    refs: BTreeSet<u32>,
    channels: BTreeSet<u32>,
}

fn read_queue<X: Xenstore + ?Sized>(
    r: &mut Reader<'_, X>,
    ring: RingKeys,
    used: &mut Used,
) -> Result<Queue, HandshakeError> {
    let mut ring_refs = Vec::new();
    if ring.pages == 1 {
        let (first, second) =
            if ring.numbered_first { ("ring-ref0", "ring-ref") } else { ("ring-ref", "ring-ref0") };
        let (key, gref) = match r.opt_u32(first, 0, u32::MAX)? {
            Some(gref) => (first, gref),
            None => match r.opt_u32(second, 0, u32::MAX)? {
                Some(gref) => (second, gref),
                None => return Err(r.missing(first)),
            },
        };
        once(r, key, gref, &mut used.refs)?;
        ring_refs.push(gref);
    } else {
        for n in 0..ring.pages {
            let key = format!("ring-ref{n}");
            let gref = r.need_u32(&key, 0, u32::MAX)?;
            once(r, &key, gref, &mut used.refs)?;
            ring_refs.push(gref);
        }
    }
    let event_channel = r.need_u32("event-channel", 1, u32::MAX)?;
    once(r, "event-channel", event_channel, &mut used.channels)?;
    Ok(Queue { ring_refs, event_channel })
}

fn once<X: Xenstore + ?Sized>(
    r: &Reader<'_, X>,
    key: &str,
    value: u32,
    used: &mut BTreeSet<u32>,
) -> Result<(), HandshakeError> {
    if used.insert(value) {
        return Ok(());
    }
    Err(HandshakeError::Duplicate { path: r.path(key), value: u64::from(value) })
}

fn write_queue<X: Xenstore + ?Sized>(
    w: &mut Writer<'_, X>,
    queue: &Queue,
) -> Result<(), HandshakeError> {
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

fn read_protocol<X: Xenstore + ?Sized>(
    r: &mut Reader<'_, X>,
) -> Result<Option<Protocol>, HandshakeError> {
    let Some(word) = r.raw("protocol")? else {
        return Ok(None);
    };
    match Protocol::ALL.into_iter().find(|p| p.as_str().as_bytes() == word) {
        Some(protocol) => Ok(Some(protocol)),
        None => Err(r.malformed("protocol", &word, "x86_32-abi, x86_64-abi or arm-abi")),
    }
}
