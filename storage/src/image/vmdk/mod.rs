//! VMDK images: consecutive extents, flat or sparse, in separate files with a descriptor, or all in
//! one file. Compressed extents are read-only. Images with a parent and ESX's sparse formats are
//! not supported.

mod descriptor;
mod header;
mod layout;
mod sparse;

use super::error::ImageError;
use super::escaped::EscapedPath;
use super::file::{Access, FileHandle};
use super::metadata::{Content, ContentError, FileContent, Meter, buffer};
use super::provider::{ImageFiles, LocalFiles};
use super::reference::ReferencePolicy;
use super::storage::{Opened, Purpose};
use super::{Format, ImageOptions, raw};
use crate::engine::store::{FileStore, Store};
use crate::engine::{Discard, Geometry};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};
use descriptor::{Descriptor, ExtentData};
use header::{Header, LONGEST_DESCRIPTOR};
use layout::SECTOR;
use sparse::Sparse;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::time::SystemTime;

/// Opens a VMDK image.
pub(super) fn open(
    path: &Path,
    options: ImageOptions,
    files: &dyn ImageFiles,
    meter: &Meter,
) -> Result<Opened, ImageError> {
    let (vmdk, geometry) = open_for(Purpose::Serve, path, options, files, meter)?;
    Ok((Arc::new(vmdk), geometry))
}

/// Checks an image as [`open`] does, and changes nothing.
pub(super) fn resolve(
    path: &Path,
    options: ImageOptions,
    files: &dyn ImageFiles,
    meter: &Meter,
) -> Result<Geometry, ImageError> {
    Ok(open_for(Purpose::Check, path, options, files, meter)?.1)
}

fn open_for(
    purpose: Purpose,
    path: &Path,
    options: ImageOptions,
    files: &dyn ImageFiles,
    meter: &Meter,
) -> Result<(Vmdk, Geometry), ImageError> {
    let access = Access { write: !options.read_only, direct: options.direct, lock: true };
    let vmdk = Vmdk::open(path, access, purpose, files, meter)?;
    let mut geometry = raw::geometry(path, vmdk.size(), 512, 4096, options.read_only)?;
    geometry.discard = access.write.then_some(Discard {
        granularity: geometry.physical_sector_size,
        alignment: 0,
        secure: false,
    });
    Ok((vmdk, geometry))
}

/// Returns the bytes of the disk and a description of its properties, without taking a lock.
pub(super) fn inspect(
    path: &Path,
    policy: &ReferencePolicy,
) -> Result<(u64, Vec<String>), ImageError> {
    let access = Access { write: false, direct: false, lock: false };
    let files = LocalFiles(policy);
    let vmdk = Vmdk::open(path, access, Purpose::Check, &files, &Meter::default())?;
    let mut features = alloc::vec![vmdk.kind.clone()];
    if vmdk.extents.len() > 1 {
        features.push(format!("{} extents", vmdk.extents.len()));
    }
    for extent in &vmdk.extents {
        if let Data::Sparse(sparse) = &extent.data {
            for feature in sparse.features() {
                if !features.contains(&feature) {
                    features.push(feature);
                }
            }
        }
    }
    features.retain(|feature| !feature.is_empty());
    Ok((vmdk.size(), features))
}

/// An open image.
struct Vmdk {
    kind: String,
    extents: Vec<Extent>,
    /// The descriptor's file, and the offset and length of the content id in it.
    content_id: Option<(File, u64, usize)>,
    /// Whether the content id was changed since opening.
    changed: AtomicBool,
}

struct Extent {
    /// Offset of its first byte on the disk, and of the byte after its last one.
    at: u64,
    end: u64,
    data: Data,
}

enum Data {
    Flat(FileStore, u64),
    Sparse(Sparse),
    Zero,
}

impl Vmdk {
    fn open(
        path: &Path,
        access: Access,
        purpose: Purpose,
        files: &dyn ImageFiles,
        meter: &Meter,
    ) -> Result<Self, ImageError> {
        let fail = |path: &Path| {
            let path = path.to_path_buf();
            move |error| ImageError::Content { path, format: Format::Vmdk, error }
        };
        // Tables and text have any length, and cannot be read with `O_DIRECT`.
        let buffered = Access { direct: false, ..access };
        let written = access.write.then_some(purpose);
        let image = files.named(path)?;
        let roots = files.references(&image)?;
        let first = image.open(buffered)?;
        let found = Found::read(&first, meter).map_err(fail(path))?;
        let descriptor = Descriptor::parse(&found.text).map_err(fail(path))?;
        let find = |name: &[u8]| {
            let name = Path::new(OsStr::from_bytes(name));
            if access.write { roots.find_written(&image, name) } else { roots.find(&image, name) }
        };
        let locate = |name: &[u8]| {
            let mut found = Err(ImageError::Missing(path.into()));
            for name in descriptor.spellings(name) {
                found = found.or_else(|_| find(&name));
            }
            found
        };
        let id =
            first.try_clone().map_err(|error| ImageError::Other { path: path.into(), error })?;
        let id = descriptor.content_id.map(|(at, digits)| (id, found.at + at, digits));
        let mut this = Self {
            kind: descriptor.kind.clone(),
            extents: Vec::new(),
            content_id: id.filter(|_| access.write),
            changed: AtomicBool::new(false),
        };
        let mut at: u64 = 0;
        let mut whole = found.sparse.map(|header| (first, header));
        if whole.is_some() && descriptor.extents.len() != 1 {
            return Err(fail(path)(ContentError::corrupt("it is one file with several extents")));
        }
        for extent in &descriptor.extents {
            // An extent without a file cannot store writes.
            if access.write && (!extent.write || extent.data == ExtentData::Zero) {
                return Err(ImageError::OnlyRead(format!("vmdk:{}", EscapedPath::new(path))));
            }
            let bytes = extent.sectors * SECTOR;
            let end = at.checked_add(bytes);
            let end = end.ok_or_else(|| {
                fail(path)(ContentError::corrupt("the sum of its extents exceeds 64 bits"))
            })?;
            let data = match (whole.take(), &extent.data) {
                // All in one file; its name in the descriptor is ignored, because the file may have
                // been renamed.
                (Some((file, header)), ExtentData::Sparse(_)) => {
                    open_sparse(path, file, header, bytes, written, meter)?
                }
                (Some(_), _) => {
                    return Err(fail(path)(ContentError::corrupt("its one extent is not sparse")));
                }
                (None, ExtentData::Zero) => Data::Zero,
                (None, ExtentData::Flat(name, offset)) => {
                    open_flat(&locate(name)?, offset * SECTOR, bytes, access, meter)?
                }
                (None, ExtentData::Sparse(name)) => {
                    let extent = locate(name)?;
                    let file = extent.open(buffered)?;
                    let content = FileContent::new(&file, meter);
                    let content = content.map_err(|e| fail(extent.path())(e.into()))?;
                    let header = Header::read(&content).map_err(fail(extent.path()))?;
                    open_sparse(extent.path(), file, header, bytes, written, meter)?
                }
            };
            this.extents.push(Extent { at, end, data });
            at = end;
        }
        Ok(this)
    }

    fn size(&self) -> u64 {
        self.extents.last().map_or(0, |extent| extent.end)
    }

    /// Calls `each` for every part of a range that lies in one extent: offset in the range, offset
    /// in the extent, length.
    fn parts(
        &self,
        at: u64,
        len: u64,
        mut each: impl FnMut(&Data, usize, u64, usize) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = at.checked_add(len).filter(|end| *end <= self.size());
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let first = self.extents.partition_point(|extent| extent.end <= at);
        for extent in self.extents.iter().skip(first).take_while(|extent| extent.at < end) {
            let (from, to) = (at.max(extent.at), end.min(extent.end));
            each(&extent.data, (from - at) as usize, from - extent.at, (to - from) as usize)?;
        }
        Ok(())
    }

    /// Changes the content id on the first write, so that images which depend on the old content
    /// are no longer used.
    fn change(&self) -> io::Result<()> {
        if self.changed.load(Ordering::Relaxed) || self.changed.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        let Some((file, at, digits)) = &self.content_id else { return Ok(()) };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let id = format!("{:08x}", now.as_secs() as u32 ^ now.subsec_nanos());
        // Eight digits, or the last ones if the old id has fewer.
        let id = id.get(id.len() - digits..).unwrap_or_default();
        file.write_all_at(id.as_bytes(), *at)
    }
}

/// The contents of the file that names an image.
struct Found {
    /// The descriptor and its offset.
    text: Vec<u8>,
    at: u64,
    /// The header, if the descriptor is embedded in a sparse extent.
    sparse: Option<Header>,
}

impl Found {
    fn read(file: &File, meter: &Meter) -> Result<Self, ContentError> {
        let content = FileContent::new(file, meter)?;
        let mut head = [0; 4];
        content.read(0, &mut head)?;
        match &head {
            b"KDMV" => {
                let header = Header::read(&content)?;
                let text = header.read_descriptor(&content)?;
                let text = text.ok_or(ContentError::Extent)?;
                let at = header.descriptor.map_or(0, |(at, _)| at);
                Ok(Self { text, at, sparse: Some(header) })
            }
            // An ESX sparse extent. Only its descriptor contains the parent.
            b"COWD" => Err(ContentError::Extent),
            b"# Di" => {
                let len = content.length();
                if len > LONGEST_DESCRIPTOR {
                    return Err(ContentError::corrupt(format!("its descriptor has {len} bytes")));
                }
                let mut text = buffer(len)?;
                content.read(0, &mut text)?;
                Ok(Self { text, at: 0, sparse: None })
            }
            _ => Err(ContentError::NotThis("vmdk")),
        }
    }
}

fn open_flat(
    extent: &FileHandle,
    offset: u64,
    bytes: u64,
    access: Access,
    meter: &Meter,
) -> Result<Data, ImageError> {
    let path = extent.path();
    // Buffers of the calls may have any alignment.
    let file = extent.open(Access { direct: false, ..access })?;
    let content = |error| ImageError::Content { path: path.into(), format: Format::Vmdk, error };
    let there = FileContent::new(&file, meter).map_err(|error| content(error.into()))?.length();
    let end = offset.saturating_add(bytes);
    if end > there {
        let what = format!("it needs {end} bytes, and has {there}");
        return Err(content(ContentError::truncated(what)));
    }
    let store = FileStore::new(file);
    let store = store.map_err(|error| ImageError::Other { path: path.into(), error })?;
    Ok(Data::Flat(store, offset))
}

fn open_sparse(
    path: &Path,
    file: File,
    header: Header,
    bytes: u64,
    written: Option<Purpose>,
    meter: &Meter,
) -> Result<Data, ImageError> {
    let content = |error| ImageError::Content { path: path.into(), format: Format::Vmdk, error };
    if header.sectors * SECTOR < bytes {
        let what = format!("an extent of {} sectors for {bytes} bytes", header.sectors);
        return Err(content(ContentError::corrupt(what)));
    }
    let kind = file.metadata().map_err(|error| content(error.into()))?.file_type();
    // A block device does not grow.
    if written.is_some() && (header.compressed || header.version >= 3 || kind.is_block_device()) {
        return Err(ImageError::OnlyRead(format!("vmdk:{}", EscapedPath::new(path))));
    }
    Ok(Data::Sparse(Sparse::open(file, header, written, meter).map_err(content)?))
}

impl Store for Vmdk {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.parts(at, into.len() as u64, |data, from, at, n| {
            let into = into.get_mut(from..from + n).ok_or(io::ErrorKind::UnexpectedEof)?;
            match data {
                Data::Flat(file, offset) => file.read(offset + at, into),
                Data::Sparse(sparse) => sparse.read(at, into),
                Data::Zero => {
                    into.fill(0);
                    Ok(())
                }
            }
        })
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.change()?;
        self.parts(at, from.len() as u64, |data, begin, at, n| {
            let from = from.get(begin..begin + n).ok_or(io::ErrorKind::UnexpectedEof)?;
            match data {
                Data::Flat(file, offset) => file.write(offset + at, from),
                Data::Sparse(sparse) => sparse.write(at, from),
                Data::Zero => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
            }
        })
    }

    fn flush(&self) -> io::Result<()> {
        if let Some((file, ..)) = &self.content_id {
            file.sync_data()?;
        }
        self.extents.iter().try_for_each(|extent| match &extent.data {
            Data::Flat(file, _) => file.flush(),
            Data::Sparse(sparse) => sparse.flush(),
            Data::Zero => Ok(()),
        })
    }

    fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        self.change()?;
        self.parts(at, len, |data, _, at, n| match data {
            Data::Flat(file, offset) => file.discard(offset + at, n as u64),
            Data::Sparse(sparse) => sparse.discard(at, n as u64),
            Data::Zero => Ok(()),
        })
    }

    fn write_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        self.discard(at, len)
    }
}
