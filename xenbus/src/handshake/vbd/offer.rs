//! The offer of a disk's backend, and the properties of the disk.

use crate::handshake::HandshakeError;
use crate::handshake::common::{read_state, write_state};
use crate::handshake::encoding::{
    ANY, Between, Encoding as _, FLAG, Form, POSITIVE, PowerOfTwo, display,
};
use crate::handshake::fields::{Reader, Writer};
use crate::handshake::record::{Optional, Or, Record as _, Required, concat, record};
use crate::state::XenbusState;
use crate::xenstore::{Xenstore, transaction};

use super::{MAX_QUEUES, MAX_RING_PAGE_ORDER};

/// Limits of a frontend's implementation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrontLimits {
    /// Maximum number of queues.
    pub max_queues: u32,
    /// Maximum order of each ring.
    pub max_ring_page_order: u32,
}

/// What to request, given an offer: see [`BackOffer::plan`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrontPlan {
    /// Number of queues to set up, at least 1.
    pub queues: u32,
    /// Order of each queue's ring: it has 2 to this power pages.
    pub ring_page_order: u32,
}

record! {
    /// Properties of discards. A missing key has the header's default: a granularity of one sector,
    /// an alignment of 0.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
    pub struct Discard {
        /// `discard-granularity`, in bytes.
        pub granularity: Option<u32> = "discard-granularity" => Optional(ANY),
        /// `discard-alignment`, in bytes.
        pub alignment: Option<u32> = "discard-alignment" => Optional(ANY),
        /// `discard-secure`: whether discarded data can be made unrecoverable.
        pub secure: bool = "discard-secure" => Or(FLAG, false),
    }
}

record! {
    /// The offer of a disk's backend, written before it enters [`XenbusState::InitWait`]. A missing
    /// key means that the feature is not supported.
    #[derive(Clone, PartialEq, Eq, Debug, Default)]
    pub struct BackOffer {
        /// `feature-max-indirect-segments`: maximum number of segments in an indirect request.
        pub max_indirect_segments: Option<u32> =
            "feature-max-indirect-segments" => Optional(ANY),
        /// `multi-queue-max-queues`.
        pub max_queues: Option<u32> = "multi-queue-max-queues" => Optional(POSITIVE),
        /// `max-ring-page-order`: a ring may have up to 2 to this power pages.
        pub max_ring_page_order: Option<u32> = "max-ring-page-order" => Optional(ANY),
        /// `max-ring-pages`, the older form of that key.
        pub max_ring_pages: Option<u32> = "max-ring-pages" => Optional(POSITIVE),
        /// `feature-persistent`: the backend caches mappings (persistent grants).
        pub persistent: bool = "feature-persistent" => Or(FLAG, false),
        /// `feature-flush-cache`.
        pub flush: bool = "feature-flush-cache" => Or(FLAG, false),
        /// `feature-barrier`.
        pub barrier: bool = "feature-barrier" => Or(FLAG, false),
    }
    other keys(&concat::<4>(&[DISCARD], Discard::KEYS)) {
        /// `feature-discard` and the keys that belong to it.
        pub discard: Option<Discard>,
    }
}

const DISCARD: &str = "feature-discard";

impl BackOffer {
    /// Reads a backend's offer.
    ///
    /// # Errors
    /// [`HandshakeError`] for values that are not numbers, or zero queues or ring pages.
    pub fn read<X: Xenstore + ?Sized>(xs: &mut X, base: &str) -> Result<Self, HandshakeError> {
        transaction(xs, |tx| {
            let mut r = Reader { xs: tx, base };
            let has_discard = r.flag(DISCARD, false)?;
            let discard = has_discard.then(|| Discard::read_keys(&mut r)).transpose()?;
            Self::read_keys(&mut r, discard)
        })
    }

    /// Writes the offer, and removes keys of an earlier one.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub fn write<X: Xenstore + ?Sized>(
        &self,
        xs: &mut X,
        base: &str,
    ) -> Result<(), HandshakeError> {
        transaction(xs, |tx| {
            let mut w = Writer { xs: tx, base };
            self.write_keys(&mut w)?;
            w.flag(DISCARD, self.discard.is_some())?;
            match &self.discard {
                Some(discard) => discard.write_keys(&mut w),
                None => w.clear_listed(Discard::KEYS),
            }
        })
    }

    /// Returns the maximum order of a ring that is advertised, at most [`MAX_RING_PAGE_ORDER`].
    #[must_use]
    pub fn ring_page_order(&self) -> u32 {
        let by_count = self.max_ring_pages.map_or(0, |pages| pages.max(1).ilog2());
        self.max_ring_page_order.unwrap_or(by_count).min(MAX_RING_PAGE_ORDER)
    }

    /// Returns the number of queues that is advertised, at most [`MAX_QUEUES`].
    #[must_use]
    pub fn queues(&self) -> u32 {
        self.max_queues.unwrap_or(1).clamp(1, MAX_QUEUES)
    }

    /// Returns what a frontend with these limits should request.
    #[must_use]
    pub fn plan(&self, limits: FrontLimits) -> FrontPlan {
        FrontPlan {
            queues: limits.max_queues.clamp(1, self.queues()),
            ring_page_order: limits.max_ring_page_order.min(self.ring_page_order()),
        }
    }
}

/// `info`: properties of the disk (`VDISK_*`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct DiskInfo {
    /// Bit 0: a CD drive.
    pub cdrom: bool,
    /// Bit 1: a drive with removable media.
    pub removable: bool,
    /// Bit 2: read-only.
    pub read_only: bool,
}

impl DiskInfo {
    /// Decodes the bits; unknown ones are dropped.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        Self { cdrom: bits & 1 != 0, removable: bits & 2 != 0, read_only: bits & 4 != 0 }
    }

    /// Returns the bits as encoded on the wire.
    #[must_use]
    pub const fn bits(self) -> u32 {
        (self.cdrom as u32) | ((self.removable as u32) << 1) | ((self.read_only as u32) << 2)
    }
}

const INFO: Form<DiskInfo> =
    Form(|bytes| ANY.decode(bytes).map(DiskInfo::from_bits), |info| display(&info.bits()));

record! {
    /// The properties of the disk, written together with the backend's [`XenbusState::Connected`].
    #[derive(Clone, PartialEq, Eq, Debug)]
    pub struct BackDisk {
        /// `sectors`: the disk's size in units of 512 bytes, whatever `sector_size` is. Below 2⁵⁵,
        /// so that the size in bytes fits into a `u64`.
        pub sectors: u64 = "sectors" => Required(SECTORS),
        /// `info`.
        pub info: DiskInfo = "info" => Required(INFO),
        /// `sector-size`, in bytes: requests are multiples of it. A power of two of 512 to 65536.
        pub sector_size: u32 = "sector-size" => Required(SECTOR_SIZE),
        /// `physical-sector-size`, in bytes: the size with the best performance. At least
        /// `sector_size`.
        pub physical_sector_size: u32 =
            "physical-sector-size" => Or(sizes_from(&sector_size), sizes_from(&sector_size).0),
    }
    other keys(BackOffer::KEYS) {
        /// The final features. Linux's backend writes most of them only when it is connected.
        pub offer: BackOffer,
    }
}

/// The maximum is 2⁵⁵ − 1, such that the size in bytes fits into a `u64`.
const SECTORS: Between<u64> = Between(0, u64::MAX / 512);
const SECTOR_SIZE: PowerOfTwo = PowerOfTwo(512, 65_536);

const fn sizes_from(sector_size: &u32) -> PowerOfTwo {
    PowerOfTwo(*sector_size, 1 << 30)
}

impl BackDisk {
    /// Reads the properties of a connected backend's disk.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub fn read<X: Xenstore + ?Sized>(xs: &mut X, base: &str) -> Result<Self, HandshakeError> {
        transaction(xs, |tx| {
            let offer = BackOffer::read(tx, base)?;
            Self::read_keys(&mut Reader { xs: tx, base }, offer)
        })
    }

    /// Writes the properties of the disk and its features, without the state.
    ///
    /// # Errors
    /// [`HandshakeError::Unwritable`] if a size violates the bounds of its field.
    pub fn write<X: Xenstore + ?Sized>(
        &self,
        xs: &mut X,
        base: &str,
    ) -> Result<(), HandshakeError> {
        if !SECTORS.allows(self.sectors)
            || !SECTOR_SIZE.allows(self.sector_size)
            || !sizes_from(&self.sector_size).allows(self.physical_sector_size)
        {
            return Err(IMPOSSIBLE_SIZE);
        }
        transaction(xs, |tx| {
            self.offer.write(tx, base)?;
            self.write_keys(&mut Writer { xs: tx, base })
        })
    }
}

const IMPOSSIBLE_SIZE: HandshakeError =
    HandshakeError::Unwritable("the disk has an impossible size");

/// Reads the size of a disk's logical sectors, which some backends write before they are connected.
///
/// # Errors
/// An error of xenstore; the value is not a valid size.
pub fn read_sector_size<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    backend: &str,
) -> Result<Option<u32>, HandshakeError> {
    (Reader { xs: &mut xs, base: backend }).get("sector-size", SECTOR_SIZE)
}

/// Notifies a connected frontend of a new size (in units of 512 bytes): the size and the unchanged
/// state are written in one transaction, and the frontend's watch on the state fires. If the
/// backend is not Connected, nothing is written: no frontend uses the size, and the keys of a
/// device that is closing or removed must not be recreated.
///
/// # Errors
/// [`HandshakeError::Unwritable`] if there are 2⁵⁵ sectors or more.
pub fn announce_resize<X: Xenstore + ?Sized>(
    xs: &mut X,
    base: &str,
    sectors: u64,
) -> Result<(), HandshakeError> {
    if !SECTORS.allows(sectors) {
        return Err(IMPOSSIBLE_SIZE);
    }
    transaction(xs, |tx| {
        if read_state(tx, base)? != XenbusState::Connected {
            return Ok(());
        }
        Writer { xs: tx, base }.put("sectors", sectors)?;
        write_state(tx, base, XenbusState::Connected)
    })
}
