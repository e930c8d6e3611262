//! The offer of a disk's backend, and the properties of the disk.

use crate::handshake::HandshakeError;
use crate::handshake::common::{read_state, write_state};
use crate::handshake::fields::{Reader, Writer};
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

/// Properties of discards. A missing key has the header's default: a granularity of one sector, an
/// alignment of 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Discard {
    /// `discard-granularity`, in bytes.
    pub granularity: Option<u32>,
    /// `discard-alignment`, in bytes.
    pub alignment: Option<u32>,
    /// `discard-secure`: whether discarded data can be made unrecoverable.
    pub secure: bool,
}

/// The offer of a disk's backend, written before it enters [`XenbusState::InitWait`]. A missing key
/// means that the feature is not supported.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BackOffer {
    /// `feature-max-indirect-segments`: maximum number of segments in an indirect request.
    pub max_indirect_segments: Option<u32>,
    /// `multi-queue-max-queues`.
    pub max_queues: Option<u32>,
    /// `max-ring-page-order`: a ring may have up to 2 to this power pages.
    pub max_ring_page_order: Option<u32>,
    /// `max-ring-pages`, the older form of that key.
    pub max_ring_pages: Option<u32>,
    /// `feature-persistent`: the backend caches mappings (persistent grants).
    pub persistent: bool,
    /// `feature-flush-cache`.
    pub flush: bool,
    /// `feature-barrier`.
    pub barrier: bool,
    /// `feature-discard` and the keys that belong to it.
    pub discard: Option<Discard>,
}

impl BackOffer {
    /// Reads a backend's offer.
    ///
    /// # Errors
    /// [`HandshakeError`] for values that are not numbers, or zero queues or ring pages.
    pub fn read<X: Xenstore + ?Sized>(xs: &mut X, base: &str) -> Result<Self, HandshakeError> {
        transaction(xs, |tx| {
            let mut r = Reader { xs: tx, base };
            let discard = if r.flag("feature-discard", false)? {
                Some(Discard {
                    granularity: r.opt_u32("discard-granularity", 0, u32::MAX)?,
                    alignment: r.opt_u32("discard-alignment", 0, u32::MAX)?,
                    secure: r.flag("discard-secure", false)?,
                })
            } else {
                None
            };
            Ok(Self {
                max_indirect_segments: r.opt_u32("feature-max-indirect-segments", 0, u32::MAX)?,
                max_queues: r.opt_u32("multi-queue-max-queues", 1, u32::MAX)?,
                max_ring_page_order: r.opt_u32("max-ring-page-order", 0, u32::MAX)?,
                max_ring_pages: r.opt_u32("max-ring-pages", 1, u32::MAX)?,
                persistent: r.flag("feature-persistent", false)?,
                flush: r.flag("feature-flush-cache", false)?,
                barrier: r.flag("feature-barrier", false)?,
                discard,
            })
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
            w.opt("feature-max-indirect-segments", self.max_indirect_segments)?;
            w.opt("multi-queue-max-queues", self.max_queues)?;
            w.opt("max-ring-page-order", self.max_ring_page_order)?;
            w.opt("max-ring-pages", self.max_ring_pages)?;
            w.flag("feature-persistent", self.persistent)?;
            w.flag("feature-flush-cache", self.flush)?;
            w.flag("feature-barrier", self.barrier)?;
            w.flag("feature-discard", self.discard.is_some())?;
            w.opt("discard-granularity", self.discard.and_then(|d| d.granularity))?;
            w.opt("discard-alignment", self.discard.and_then(|d| d.alignment))?;
            w.opt("discard-secure", self.discard.map(|d| u8::from(d.secure)))
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

/// The properties of the disk, written together with the backend's [`XenbusState::Connected`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackDisk {
    /// `sectors`: the disk's size in units of 512 bytes, whatever `sector_size` is. Below 2⁵⁵, so
    /// that the size in bytes fits into a `u64`.
    pub sectors: u64,
    /// `info`.
    pub info: DiskInfo,
    /// `sector-size`, in bytes: requests are multiples of it. A power of two of 512 to 65536.
    pub sector_size: u32,
    /// `physical-sector-size`, in bytes: the size with the best performance. At least
    /// `sector_size`.
    pub physical_sector_size: u32,
    /// The final features. Linux's backend writes most of them only when it is connected.
    pub offer: BackOffer,
}

/// 2⁵⁵ − 1: maximum number of sectors of 512 bytes, such that the size in bytes fits into a `u64`.
const MAX_SECTORS: u64 = u64::MAX / 512;
const MAX_SECTOR_SIZE: u32 = 65_536;
const MAX_PHYSICAL_SECTOR_SIZE: u32 = 1 << 30;

impl BackDisk {
    /// Reads the properties of a connected backend's disk.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub fn read<X: Xenstore + ?Sized>(xs: &mut X, base: &str) -> Result<Self, HandshakeError> {
        transaction(xs, |tx| {
            let offer = BackOffer::read(tx, base)?;
            let mut r = Reader { xs: tx, base };
            let sectors =
                r.number("sectors", 0, MAX_SECTORS)?.ok_or_else(|| r.missing("sectors"))?;
            let info = DiskInfo::from_bits(r.need_u32("info", 0, u32::MAX)?);
            let sector_size =
                read_sector_size(r.xs, base)?.ok_or_else(|| r.missing("sector-size"))?;
            let physical_sector_size = power_of_two(
                &mut r,
                "physical-sector-size",
                sector_size,
                MAX_PHYSICAL_SECTOR_SIZE,
            )?
            .unwrap_or(sector_size);
            Ok(Self { sectors, info, sector_size, physical_sector_size, offer })
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
        let fits =
            |size: u32, min: u32, max: u32| size.is_power_of_two() && size >= min && size <= max;
        if self.sectors > MAX_SECTORS
            || !fits(self.sector_size, 512, MAX_SECTOR_SIZE)
            || !fits(self.physical_sector_size, self.sector_size, MAX_PHYSICAL_SECTOR_SIZE)
        {
            return Err(HandshakeError::Unwritable("the disk has an impossible size"));
        }
        transaction(xs, |tx| {
            self.offer.write(tx, base)?;
            let mut w = Writer { xs: tx, base };
            w.put("sectors", self.sectors)?;
            w.put("info", self.info.bits())?;
            w.put("sector-size", self.sector_size)?;
            w.put("physical-sector-size", self.physical_sector_size)
        })
    }
}

/// Reads the size of a disk's logical sectors, which some backends write before they are connected.
///
/// # Errors
/// An error of xenstore; the value is not a valid size.
pub fn read_sector_size<X: Xenstore + ?Sized>(
    xs: &mut X,
    backend: &str,
) -> Result<Option<u32>, HandshakeError> {
    power_of_two(&mut Reader { xs, base: backend }, "sector-size", 512, MAX_SECTOR_SIZE)
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
    if sectors > MAX_SECTORS {
        return Err(HandshakeError::Unwritable("the disk has an impossible size"));
    }
    transaction(xs, |tx| {
        if read_state(tx, base)? != XenbusState::Connected {
            return Ok(());
        }
        Writer { xs: tx, base }.put("sectors", sectors)?;
        write_state(tx, base, XenbusState::Connected)
    })
}

fn power_of_two<X: Xenstore + ?Sized>(
    r: &mut Reader<'_, X>,
    key: &str,
    min: u32,
    max: u32,
) -> Result<Option<u32>, HandshakeError> {
    let size = r.opt_u32(key, min, max)?;
    match size {
        Some(n) if !n.is_power_of_two() => {
            Err(r.malformed(key, alloc::format!("{n}").as_bytes(), "a power of two"))
        }
        _ => Ok(size),
    }
}
