//! The header of a sparse extent, checked.
//!
//! Its structure is in [`layout`](super::layout). Limits that are not part of the format are those of
//! QEMU (`block/vmdk.c`): QEMU rejects these images as well.

use super::super::metadata::{Content, ContentError, buffer, read_struct};
use super::layout::{RawHeader, SECTOR, flags};
use alloc::format;
use alloc::vec::Vec;
use zerocopy::little_endian::U64;

/// Maximum number of entries, of 4 bytes, which are read when the disk is opened: 4 TiB with grains
/// of 64 KiB.
const MOST_ENTRIES: u64 = 1 << 26;
/// Maximum length of a descriptor. QEMU writes 20 sectors.
pub const LONGEST_DESCRIPTOR: u64 = 1 << 20;

/// The header of a sparse extent. Offsets are in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Number of sectors of the disk in the extent.
    pub sectors: u64,
    /// Bytes of a grain, a power of two.
    pub grain: u64,
    /// Number of entries of a grain table.
    pub entries: u64,
    /// Number of tables in the directory.
    pub tables: u64,
    /// Offset of the directory.
    pub directory: u64,
    /// Offset of the redundant directory, which has its own tables.
    pub redundant: Option<u64>,
    /// Offset of the descriptor, and its length in bytes.
    pub descriptor: Option<(u64, u64)>,
    /// Whether an entry of 1 means a grain of zeroes.
    pub zeroed_grains: bool,
    /// Whether grains are compressed, and the extent is read-only.
    pub compressed: bool,
    /// Whether the last writer did not close it.
    pub unclean: bool,
    /// 1, 2 or 3.
    pub version: u32,
}

impl Header {
    /// Returns whether an entry of a grain table refers to a grain: 0 is a grain that was never
    /// written, and 1 may mean a grain of zeroes.
    #[must_use]
    pub const fn has(&self, entry: u32) -> bool {
        entry != 0 && !(entry == 1 && self.zeroed_grains)
    }

    /// Reads and checks the header.
    ///
    /// # Errors
    /// [`ContentError`].
    pub fn read(content: &dyn Content) -> Result<Self, ContentError> {
        let first = Self::read_at(content, 0)?;
        if first.directory != RawHeader::GD_AT_END {
            return first.checked(content);
        }
        // The end has a marker, the header, and an end-of-stream marker.
        let at = content.length().checked_sub(1024);
        let at = at.ok_or_else(|| ContentError::truncated("there is no header at its end"))?;
        let mut last = Self::read_at(content, at).map_err(|error| match error {
            ContentError::NotThis(_) => ContentError::truncated("there is no header at its end"),
            other => other,
        })?;
        last.descriptor = first.descriptor;
        last.checked(content)
    }

    fn read_at(content: &dyn Content, at: u64) -> Result<Self, ContentError> {
        if content.length() < SECTOR {
            return Err(ContentError::truncated("a header has 512 bytes"));
        }
        let raw: RawHeader = read_struct(content, at)?;
        if raw.magic_number != RawHeader::MAGIC {
            return Err(ContentError::NotThis("vmdk"));
        }
        let (version, flags) = (raw.version.get(), raw.flags.get());
        if !(1..=3).contains(&version) {
            return Err(ContentError::unsupported(format!("extents of version {version}")));
        }
        if raw.line_ends != RawHeader::LINE_ENDS {
            return Err(ContentError::corrupt("it was transferred as text"));
        }
        let (sectors, grain) = (raw.capacity.get(), raw.grain_size.get());
        let entries = u64::from(raw.num_gtes_per_gt.get());
        if !grain.is_power_of_two() || grain > 8192 {
            return Err(ContentError::corrupt(format!("grains of {grain} sectors")));
        }
        if !(1..=512).contains(&entries) {
            return Err(ContentError::corrupt(format!("grain tables of {entries} entries")));
        }
        if sectors == 0 || sectors > MOST_ENTRIES * grain {
            return Err(ContentError::corrupt(format!("an extent of {sectors} sectors")));
        }
        let compressed = flags & flags::COMPRESSED != 0;
        let method = raw.compress_algorithm.get();
        if compressed && method != RawHeader::DEFLATE {
            let what = format!("compression by method {method}");
            return Err(ContentError::unsupported(what));
        }
        let place = |sector: U64| match sector.get() {
            RawHeader::GD_AT_END => Ok(RawHeader::GD_AT_END),
            sector => sector.checked_mul(SECTOR).ok_or_else(|| {
                ContentError::truncated(format!("an offset points to sector {sector}"))
            }),
        };
        let descriptor = (place(raw.descriptor_offset)?, raw.descriptor_size.get());
        if descriptor.1 > LONGEST_DESCRIPTOR / SECTOR {
            let what = format!("its descriptor has {} sectors", descriptor.1);
            return Err(ContentError::corrupt(what));
        }
        Ok(Self {
            sectors,
            grain: grain * SECTOR,
            entries,
            tables: sectors.div_ceil(entries * grain),
            directory: place(raw.gd_offset)?,
            redundant: (flags & flags::REDUNDANT != 0).then_some(place(raw.rgd_offset)?),
            descriptor: (descriptor.0 != 0 && descriptor.1 != 0)
                .then_some((descriptor.0, descriptor.1 * SECTOR)),
            zeroed_grains: flags & flags::ZEROED_GRAINS != 0,
            compressed,
            unclean: raw.unclean_shutdown == 1,
            version,
        })
    }

    /// Checks that everything the header refers to lies inside the extent.
    fn checked(self, content: &dyn Content) -> Result<Self, ContentError> {
        let inside = |what: &str, at: u64, len: u64| match at.checked_add(len) {
            Some(end) if at >= SECTOR && end <= content.length() => Ok(()),
            Some(_) if at < SECTOR => {
                Err(ContentError::corrupt(format!("{what} is where the header is")))
            }
            _ => Err(ContentError::truncated(format!("{what} is behind the end of the file"))),
        };
        inside("the grain directory", self.directory, self.tables * 4)?;
        if let Some(redundant) = self.redundant {
            inside("the redundant grain directory", redundant, self.tables * 4)?;
        }
        if let Some((at, len)) = self.descriptor {
            inside("the descriptor", at, len)?;
        }
        Ok(self)
    }

    /// Reads the descriptor that is embedded in the extent, if there is one.
    ///
    /// # Errors
    /// [`ContentError`].
    pub fn read_descriptor(&self, content: &dyn Content) -> Result<Option<Vec<u8>>, ContentError> {
        let Some((at, len)) = self.descriptor else { return Ok(None) };
        let mut text = buffer(len)?;
        content.read(at, &mut text)?;
        Ok(Some(text))
    }
}
