//! The header of a qcow2 image, checked completely before anything else of the image is used.
//!
//! The structures are in `layout.rs`. Limits that are not part of the format are those
//! of QEMU (`block/qcow2.h`), or bound the cost of opening an image.

use super::super::metadata::{Content, ContentError, buffer, try_vec};
use super::layout::{MAGIC, RawExtension, RawHeader, RawSnapshot, RawSnapshotExtra, extension};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// `QCOW2_INCOMPAT_*`.
pub mod incompatible {
    /// Reference counts may be wrong: the image was not closed.
    pub const DIRTY: u64 = 1 << 0;
    /// A program found the image to be corrupt.
    pub const CORRUPT: u64 = 1 << 1;
    /// The data is in another file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// Compressed clusters do not use deflate.
    pub const COMPRESSION: u64 = 1 << 3;
    /// Subclusters: parts of clusters have their own state.
    pub const EXTENDED_L2: u64 = 1 << 4;
}

/// Maximum length of a first-level table in bytes: 512 TiB with clusters of 64 KiB, 2 TiB with 4
/// KiB. QEMU reads tables of four times this length (`QCOW_MAX_L1_SIZE`).
const MAX_L1_BYTES: u64 = 8 << 20;
/// `QCOW_MAX_REFTABLE_SIZE`, in bytes.
const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// `QCOW_MAX_SNAPSHOTS`.
const MAX_SNAPSHOTS: u32 = 65536;
/// Maximum length of the snapshot table in bytes: twenty thousand snapshots.
const MAX_SNAPSHOT_BYTES: u64 = 2 << 20;
/// Maximum length of the header and its extensions, in bytes, and number of extensions. Programs
/// write about five hundred bytes, and three or four extensions. The library reads each extension
/// separately and holds it in memory.
const MAX_HEADER: u64 = 64 << 10;
const MAX_EXTENSIONS: u32 = 64;

/// The header of a qcow2 image.
#[derive(Clone, Debug)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Logarithm to base 2 of the bytes of a cluster.
    pub cluster_bits: u32,
    /// Bits of [`incompatible`].
    pub incompatible: u64,
    /// Bit 0: lazy reference counts.
    pub compatible: u64,
    /// Bit 0: persistent dirty bitmaps are consistent; bit 1: the data file can be read as raw.
    pub autoclear: u64,
    /// 0 is deflate, 1 zstd.
    pub compression: u8,
    /// Name of the backing file, in the bytes of the image.
    pub backing: Option<Vec<u8>>,
    /// Name of the backing file's format, in the bytes of the image.
    pub backing_format: Option<Vec<u8>>,
    /// Name of the external data file. It has no meaning without [`incompatible::DATA_FILE`].
    pub data_file: Option<Vec<u8>>,
    /// Ranges of the header with names that are not UTF-8.
    pub not_utf8: Vec<Range<u64>>,
    /// Offset of the first-level table, and the number of its entries.
    pub l1: (u64, u32),
    /// Offset of the reference count table, and its length in bytes.
    pub refcounts: (u64, u64),
    /// Logarithm to base 2 of the bits of a reference count.
    pub refcount_order: u32,
    /// Offset of the snapshot table, and its length in bytes.
    pub snapshot_table: (u64, u64),
    /// Internal snapshots.
    pub snapshots: Vec<Snapshot>,
}

/// An internal snapshot.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its id, as text.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Time of its creation, in seconds of Unix time.
    pub seconds: u32,
    /// Bytes of the virtual disk at that time.
    pub size: u64,
    /// Offset of its first-level table, and the number of its entries.
    pub l1: (u64, u32),
}

impl Header {
    /// Returns the bytes of a cluster.
    #[must_use]
    pub const fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Reads and checks an image's header.
    ///
    /// # Errors
    /// [`ContentError`].
    pub fn read(content: &dyn Content) -> Result<Self, ContentError> {
        let mut raw = RawHeader::new_zeroed();
        let len = content.length().min(RawHeader::LEN_V3 as u64) as usize;
        if len < RawHeader::LEN_V2 {
            return Err(ContentError::truncated("a qcow2 header has 72 bytes at least"));
        }
        content.read(0, raw.as_mut_bytes().get_mut(..len).unwrap_or_default())?;
        if raw.magic != MAGIC {
            return Err(ContentError::NotThis("qcow2"));
        }
        let version = raw.version.get();
        let header_length = match version {
            2 => {
                raw.as_mut_bytes().get_mut(RawHeader::LEN_V2..).unwrap_or_default().fill(0);
                raw.refcount_order = 4.into();
                RawHeader::LEN_V2 as u32
            }
            3 => raw.header_length.get(),
            _ => return Err(ContentError::unsupported(format!("qcow2 version {version}"))),
        };
        if version == 3 {
            let is_possible = header_length >= RawHeader::LEN_V3 as u32
                && header_length.is_multiple_of(8)
                && u64::from(header_length) <= MAX_HEADER;
            if len < RawHeader::LEN_V3 || !is_possible {
                return Err(ContentError::corrupt("the header's length is impossible"));
            }
            if header_length >= RawHeader::LEN_WITH_COMPRESSION as u32 {
                let more = raw.as_mut_bytes().get_mut(RawHeader::LEN_V3..).unwrap_or_default();
                content.read(RawHeader::LEN_V3 as u64, more)?;
            }
        }
        let cluster_bits = raw.cluster_bits.get();
        if !(9..=21).contains(&cluster_bits) {
            return Err(ContentError::corrupt(format!("clusters of 2^{cluster_bits} bytes")));
        }
        match raw.crypt_method.get() {
            0 => {}
            1 => return Err(ContentError::Encrypted("AES")),
            2 => return Err(ContentError::Encrypted("LUKS")),
            other => return Err(ContentError::corrupt(format!("encryption method {other}"))),
        }
        let refcount_table = u64::from(raw.refcount_table_clusters.get()) << cluster_bits;
        let mut header = Self {
            version,
            size: raw.size.get(),
            cluster_bits,
            incompatible: raw.incompatible_features.get(),
            compatible: raw.compatible_features.get(),
            autoclear: raw.autoclear_features.get(),
            compression: raw.compression_type,
            backing: None,
            backing_format: None,
            data_file: None,
            not_utf8: Vec::new(),
            l1: (raw.l1_table_offset.get(), raw.l1_size.get()),
            refcounts: (raw.refcount_table_offset.get(), refcount_table),
            refcount_order: raw.refcount_order.get(),
            snapshot_table: (raw.snapshots_offset.get(), 0),
            snapshots: Vec::new(),
        };
        header.check_tables(content)?;
        header.read_extensions(content, header_length.into())?;
        let backing = raw.backing_file_offset.get();
        header.backing =
            read_name(content, backing, raw.backing_file_size.get(), header.cluster())?;
        if let Some(name) = &header.backing
            && str::from_utf8(name).is_err()
        {
            header.not_utf8.push(backing..backing + name.len() as u64);
        }
        header.read_snapshots(content, raw.snapshots_offset.get(), raw.nb_snapshots.get())?;
        Ok(header)
    }

    fn check_tables(&self, content: &dyn Content) -> Result<(), ContentError> {
        if self.refcount_order > 6 {
            let what = format!("reference counts of 2^{} bits", self.refcount_order);
            return Err(ContentError::corrupt(what));
        }
        if self.size > 1 << 62 {
            return Err(ContentError::corrupt(format!("a disk of {} bytes", self.size)));
        }
        self.check_l1(content, "the first-level table", self.l1, self.size)?;
        if self.refcounts.1 == 0 || self.refcounts.1 > MAX_REFTABLE_BYTES {
            return Err(ContentError::corrupt(
                "the size of the reference-count table is impossible",
            ));
        }
        self.check_range(content, "the reference-count table", self.refcounts)
    }

    /// Checks that a table maps a disk of `size` bytes and lies inside the file.
    fn check_l1(
        &self,
        content: &dyn Content,
        what: &str,
        (at, entries): (u64, u32),
        size: u64,
    ) -> Result<(), ContentError> {
        let per_entry = 1u64 << (2 * self.cluster_bits - 3);
        let bytes = u64::from(entries) * 8;
        if u64::from(entries) < size.div_ceil(per_entry) || bytes > MAX_L1_BYTES {
            let what = format!("{what} has {entries} entries, for a disk of {size} bytes");
            return Err(ContentError::corrupt(what));
        }
        self.check_range(content, what, (at, bytes))
    }

    fn check_range(
        &self,
        content: &dyn Content,
        what: &str,
        (at, bytes): (u64, u64),
    ) -> Result<(), ContentError> {
        if !at.is_multiple_of(self.cluster()) {
            return Err(ContentError::corrupt(format!("{what} begins inside a cluster")));
        }
        match at.checked_add(bytes) {
            Some(end) if end <= content.length() => Ok(()),
            _ => Err(ContentError::truncated(format!("{what} ends behind the end of the file"))),
        }
    }

    fn read_extensions(&mut self, content: &dyn Content, at: u64) -> Result<(), ContentError> {
        // The extensions end with the first cluster, even if the file is longer.
        let end = self.cluster().min(content.length()).min(MAX_HEADER);
        let mut area = buffer(end.saturating_sub(at))?;
        content.read(at, &mut area)?;
        let mut rest = area.as_slice();
        let mut count = 0;
        while let Ok((head, after)) = RawExtension::ref_from_prefix(rest) {
            let (kind, len) = (head.kind.get(), head.len.get() as usize);
            if kind == extension::END {
                return Ok(());
            }
            let Some(data) = after.get(..len) else {
                return Err(ContentError::corrupt("a header extension is longer than the header"));
            };
            count += 1;
            if count > MAX_EXTENSIONS {
                return Err(ContentError::corrupt("the header has too many extensions"));
            }
            let name = match kind {
                extension::BACKING_FORMAT => Some(&mut self.backing_format),
                extension::DATA_FILE_NAME => Some(&mut self.data_file),
                _ => None,
            };
            if let Some(name) = name {
                *name = Some(data.to_vec());
                if str::from_utf8(data).is_err() {
                    let at = end - after.len() as u64;
                    self.not_utf8.push(at..at + len as u64);
                }
            }
            rest = after.get(len.next_multiple_of(8)..).unwrap_or_default();
        }
        if end == MAX_HEADER {
            return Err(ContentError::corrupt("the header's extensions have no end"));
        }
        Ok(())
    }

    fn read_snapshots(
        &mut self,
        content: &dyn Content,
        offset: u64,
        count: u32,
    ) -> Result<(), ContentError> {
        if count > MAX_SNAPSHOTS {
            return Err(ContentError::corrupt(format!("{count} snapshots")));
        }
        self.snapshots = try_vec(count.into())?;
        let mut table = Window { content, offset, bytes: Vec::new() };
        let mut at = 0;
        for _ in 0..count {
            let mut entry = RawSnapshot::new_zeroed();
            table.read(at, entry.as_mut_bytes())?;
            let l1 = (entry.l1_table_offset.get(), entry.l1_size.get());
            let id = u64::from(entry.id_str_size.get());
            let name = u64::from(entry.name_size.get());
            let extra_len = u64::from(entry.extra_data_size.get());
            let extra_at = at + size_of::<RawSnapshot>() as u64;
            // Old images do not record the size: the current size applies.
            let mut size = self.size;
            if extra_len >= size_of::<RawSnapshotExtra>() as u64 {
                let mut extra = RawSnapshotExtra::new_zeroed();
                table.read(extra_at, extra.as_mut_bytes())?;
                size = extra.disk_size.get();
            }
            let text = extra_at + extra_len;
            let mut read = |at, len: u64| {
                let mut text = buffer(len)?;
                table.read(at, &mut text)?;
                Ok::<_, ContentError>(String::from_utf8_lossy(&text).into_owned())
            };
            let (id_text, name_text) = (read(text, id)?, read(text + id, name)?);
            at = (text + id + name).next_multiple_of(8);
            if at > MAX_SNAPSHOT_BYTES {
                return Err(ContentError::corrupt("the snapshot table is impossibly long"));
            }
            content
                .meter()
                .retain((size_of::<Snapshot>() + id_text.len() + name_text.len()) as u64)?;
            self.check_l1(content, "a snapshot's first-level table", l1, size)?;
            let seconds = entry.date_sec.get();
            self.snapshots.push(Snapshot { id: id_text, name: name_text, seconds, size, l1 });
        }
        self.snapshot_table.1 = at;
        Ok(())
    }
}

/// A table that is read in large parts, front to back. Offsets are relative to its beginning.
struct Window<'a> {
    content: &'a dyn Content,
    offset: u64,
    /// The bytes read so far.
    bytes: Vec<u8>,
}

impl Window<'_> {
    fn read(&mut self, at: u64, into: &mut [u8]) -> Result<(), ContentError> {
        const PART: u64 = 64 << 10;
        let end = at.saturating_add(into.len() as u64);
        if end > MAX_SNAPSHOT_BYTES {
            return Err(ContentError::corrupt("the snapshot table is impossibly long"));
        }
        let have = self.bytes.len() as u64;
        if end > have {
            let there = self.content.length().saturating_sub(self.offset).min(MAX_SNAPSHOT_BYTES);
            let upto = end.next_multiple_of(PART).min(there).max(end);
            self.bytes.resize(upto as usize, 0);
            let more = self.bytes.get_mut(have as usize..).unwrap_or_default();
            self.content.read(self.offset.saturating_add(have), more)?;
        }
        let found = self.bytes.get(at as usize..end as usize).unwrap_or_default();
        into.copy_from_slice(found);
        Ok(())
    }
}

/// Reads the name of the backing file, which lies in the first cluster.
fn read_name(
    content: &dyn Content,
    at: u64,
    len: u32,
    cluster: u64,
) -> Result<Option<Vec<u8>>, ContentError> {
    if at == 0 || len == 0 {
        return Ok(None);
    }
    if len > 1023 || at.checked_add(len.into()).is_none_or(|end| end > cluster) {
        return Err(ContentError::corrupt("the name of the backing file is not in the header"));
    }
    let mut text = buffer(len.into())?;
    content.read(at, &mut text)?;
    Ok(Some(text))
}
