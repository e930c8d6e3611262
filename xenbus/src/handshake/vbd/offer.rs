//! What a disk's backend offers, and what the disk is.

use crate::handshake::HandshakeError;
use crate::handshake::common::{read_state, write_state};
use crate::handshake::fields::{Reader, Writer};
use crate::state::XenbusState;
use crate::xenstore::{Xenstore, transaction};

use super::{MAX_QUEUES, MAX_RING_PAGE_ORDER};

/// What a frontend of its own can use at most.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrontLimits {
    /// Queues.
    pub max_queues: u32,
    /// Order of each ring.
    pub max_ring_page_order: u32,
}

/// What to ask for, given an offer: see [`BackOffer::plan`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrontPlan {
    /// Queues to set up, at least 1.
    pub queues: u32,
    /// Each queue's ring has 2 to this power pages.
    pub ring_page_order: u32,
}

/// How the backend takes discards. What is missing has the header's default: a granularity of one
/// sector, an alignment of 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Discard {
    /// `discard-granularity`, in bytes.
    pub granularity: Option<u32>,
    /// `discard-alignment`, in bytes.
    pub alignment: Option<u32>,
    /// `discard-secure`: whether what is discarded can be made unrecoverable.
    pub secure: bool,
}

/// What a disk's backend offers, written before it enters [`XenbusState::InitWait`]; a frontend
/// that finds a key missing must do without.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BackOffer {
    /// `feature-max-indirect-segments`: segments in one indirect request.
    pub max_indirect_segments: Option<u32>,
    /// `multi-queue-max-queues`.
    pub max_queues: Option<u32>,
    /// `max-ring-page-order`: a ring may have 2 to this power pages.
    pub max_ring_page_order: Option<u32>,
    /// `max-ring-pages`, the older way to say it.
    pub max_ring_pages: Option<u32>,
    /// `feature-persistent`: grants may stay mapped.
    pub persistent: bool,
    /// `feature-flush-cache`.
    pub flush: bool,
    /// `feature-barrier`.
    pub barrier: bool,
    /// `feature-discard` and what belongs to it.
    pub discard: Option<Discard>,
}

impl BackOffer {
    /// Reads what a backend offers.
    ///
    /// # Errors
    /// [`HandshakeError`] on what is no number, or zero queues or ring pages.
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

    /// Writes the offer, and removes what an earlier one left.
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

    /// The largest order of a ring that is offered, at most [`MAX_RING_PAGE_ORDER`].
    #[must_use]
    pub fn ring_page_order(&self) -> u32 {
        let by_count = self.max_ring_pages.map_or(0, |pages| pages.max(1).ilog2());
        self.max_ring_page_order.unwrap_or(by_count).min(MAX_RING_PAGE_ORDER)
    }

    /// How many queues are offered, at most [`MAX_QUEUES`].
    #[must_use]
    pub fn queues(&self) -> u32 {
        self.max_queues.unwrap_or(1).clamp(1, MAX_QUEUES)
    }

    /// What a frontend with these limits should ask for.
    #[must_use]
    pub fn plan(&self, limits: FrontLimits) -> FrontPlan {
        FrontPlan {
            queues: limits.max_queues.clamp(1, self.queues()),
            ring_page_order: limits.max_ring_page_order.min(self.ring_page_order()),
        }
    }
}

/// `info`: what the disk is like (`VDISK_*`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct DiskInfo {
    /// Bit 0: a CD.
    pub cdrom: bool,
    /// Bit 1: a removable medium.
    pub removable: bool,
    /// Bit 2: may not be written.
    pub read_only: bool,
}

impl DiskInfo {
    /// Takes the bits apart; unknown ones are dropped.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        Self { cdrom: bits & 1 != 0, removable: bits & 2 != 0, read_only: bits & 4 != 0 }
    }

    /// The bits on the wire.
    #[must_use]
    pub const fn bits(self) -> u32 {
        (self.cdrom as u32) | ((self.removable as u32) << 1) | ((self.read_only as u32) << 2)
    }
}

/// The disk itself, written together with the backend's [`XenbusState::Connected`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackDisk {
    /// `sectors`: the disk's size in units of 512 bytes, whatever `sector_size` says. Below 2⁵⁵,
    /// so that the size in bytes is a `u64`.
    pub sectors: u64,
    /// `info`.
    pub info: DiskInfo,
    /// `sector-size`, in bytes: requests are multiples of it. A power of two of 512 to 65536.
    pub sector_size: u32,
    /// `physical-sector-size`, in bytes: what is best for speed. At least `sector_size`.
    pub physical_sector_size: u32,
    /// The features again, as they turned out to be. Linux's backend writes most only now.
    pub offer: BackOffer,
}

/// 2⁵⁵ − 1: the most sectors of 512 bytes whose bytes a `u64` counts.
const MAX_SECTORS: u64 = u64::MAX / 512;
const MAX_SECTOR_SIZE: u32 = 65_536;
const MAX_PHYSICAL_SECTOR_SIZE: u32 = 1 << 30;

impl BackDisk {
    /// Reads a connected backend's disk.
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

    /// Writes the disk and its features, without the state.
    ///
    /// # Errors
    /// [`HandshakeError::Unwritable`] if a size is not as the fields say.
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

/// Reads the size of a disk's logical sectors, which some backends tell before they are connected.
///
/// # Errors
/// xenstore's; the key holds no possible size.
pub fn read_sector_size<X: Xenstore + ?Sized>(
    xs: &mut X,
    backend: &str,
) -> Result<Option<u32>, HandshakeError> {
    power_of_two(&mut Reader { xs, base: backend }, "sector-size", 512, MAX_SECTOR_SIZE)
}

/// Tells a connected frontend of a new size (in units of 512 bytes): the size and the unchanged
/// state are written in one transaction, and the frontend's watch on the state fires. Nothing is
/// written where this end is not Connected: there is nobody to tell, and a device that is closing,
/// or gone, must not be called back.
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
