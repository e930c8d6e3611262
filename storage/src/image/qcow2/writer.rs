//! qcow2 images that are open for writing.
//!
//! # Allocation
//! A data cluster of the image stays allocated to the guest's range: a discard punches a hole in
//! the file, which reads as zeroes. This does not change the image's metadata, so that there is
//! nothing a power loss could tear or another queue could conflict with. A later write goes to the
//! same cluster.
//!
//! Only compressed clusters are freed when they are overwritten. The library makes their space
//! available immediately, while the durable tables may still refer to them. Therefore no other call
//! is made until the new tables are durable.

use super::super::file::Access;
use super::super::library::{Library, LibraryImage};
use super::super::metadata::{ContentError, Meter};
use super::super::{Format, ImageError};
use super::chain::Layer;
use super::changes::TableChanges;
use super::header::Header;
use super::write_order::WriteOrder;
use super::{open_layer, refcounts};
use crate::engine::store::Store;
use crate::engine::{EngineError, FlushState};
use alloc::sync::Arc;
use imago::ShallowMapping;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

const ENOSPC: i32 = 28;
const EDQUOT: i32 = 122;

/// An image that is open for writing, and marked as not closed (version 2 has no such mark).
pub(super) struct Writer {
    /// Declared before the mark, so that it is dropped first.
    library: Library,
    order: Arc<WriteOrder>,
    changes: TableChanges,
    /// Whether compressed clusters may have been freed, and the new tables are not durable.
    unsynced: AtomicBool,
    mark: Option<Mark>,
    cluster: u64,
}

struct Mark {
    file: File,
    /// The image's incompatible features.
    features: u64,
    /// Whether the image is consistent.
    closed: bool,
}

impl Writer {
    pub fn open(layer: &Layer, access: Access, meter: &Meter) -> Result<Self, ImageError> {
        let (path, header) = (layer.path(), &layer.header);
        let other = |error| ImageError::Other { path: path.into(), error };
        let content =
            |error| ImageError::Content { path: path.into(), format: Format::Qcow2, error };
        // A block device drops its cached data only when its exclusive descriptor requests it,
        // which is this one.
        let file = layer.file.open(Access { direct: false, ..access })?;
        let library_file = match access.direct {
            true => layer.file.open(Access { lock: false, ..access })?,
            false => file.try_clone().map_err(other)?,
        };
        if header.autoclear != 0 && !header.not_utf8.is_empty() {
            // Otherwise the library rewrites the whole header to clear them, without the names that
            // are hidden from it.
            refcounts::clear_autoclear(&file).map_err(other)?;
        }
        let order = Self::order(file.try_clone().map_err(other)?, header, meter);
        let order = order.map_err(content)?;
        let (order, cluster) = (Arc::new(order), header.cluster());
        let open = || open_layer(layer, access, Some((library_file, order.clone())));
        let library = Library::open(path, Format::Qcow2, true, open)?;
        let mut mark = None;
        if header.version >= 3 {
            let features = header.incompatible;
            refcounts::set_dirty(&file, features, true).map_err(other)?;
            mark = Some(Mark { file, features, closed: false });
        }
        Ok(Self {
            library,
            order,
            changes: TableChanges::default(),
            unsynced: AtomicBool::new(false),
            mark,
            cluster,
        })
    }

    /// Checks the tables that are only read when an image is opened for writing.
    pub fn check(layer: &Layer, meter: &Meter) -> Result<(), ImageError> {
        let file = layer.file.open(Access { write: false, direct: false, lock: true })?;
        let order = Self::order(file, &layer.header, meter);
        order.map(drop).map_err(|error| ImageError::Content {
            path: layer.path().into(),
            format: Format::Qcow2,
            error,
        })
    }

    fn order(file: File, header: &Header, meter: &Meter) -> Result<WriteOrder, ContentError> {
        // The library holds this table in memory when it writes; it does not use it when it only
        // reads.
        meter.retain(header.refcounts.1)?;
        WriteOrder::new(file, header, meter)
    }

    /// Makes a range read as zeroes. Punches holes in its data clusters. Ranges without data of
    /// their own use no space; with `must`, the image's metadata is changed to make them read as
    /// zeroes.
    fn clear(&self, at: u64, len: u64, must: bool) -> io::Result<()> {
        let compressed = self.shared(|image| {
            let mut compressed = false;
            each(image, at, len, |at, len, mapping| match mapping {
                ShallowMapping::Raw { offset, writable: true, .. } => self.order.punch(offset, len),
                ShallowMapping::Zero { .. } => Ok(()),
                ShallowMapping::Special { .. } => {
                    compressed = true;
                    Ok(())
                }
                _ if must => {
                    let zero = || image.write_zeroes(at, len);
                    self.changes.write(true, zero, || self.write_tables(image))
                }
                _ => Ok(()),
            })?;
            Ok(compressed)
        })?;
        if !must || !compressed {
            return Ok(());
        }
        self.library.alone(|image| {
            self.sync_freed(image)?;
            each(image, at, len, |at, len, mapping| match mapping {
                ShallowMapping::Special { .. } => {
                    self.unsynced.store(true, Ordering::SeqCst);
                    image.write_zeroes(at, len).and_then(|()| self.sync_freed(image))
                }
                _ => Ok(()),
            })
        })
    }

    /// Calls the library, concurrently with other calls, unless clusters were freed.
    fn shared<T>(&self, call: impl Fn(&LibraryImage) -> io::Result<T>) -> io::Result<T> {
        loop {
            let result =
                self.library.shared(|image| match self.unsynced.load(Ordering::SeqCst) {
                    true => Ok(None),
                    false => call(image).map(Some),
                })?;
            if let Some(result) = result {
                return Ok(result);
            }
            self.library.alone(|image| self.sync_freed(image))?;
        }
    }

    /// Makes the tables durable if clusters were freed. No other call is made at this time.
    fn sync_freed(&self, image: &LibraryImage) -> io::Result<()> {
        if self.unsynced.load(Ordering::SeqCst) {
            self.write_tables(image)?;
            image.sync()?;
            self.unsynced.store(false, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Writes changed tables to the file. An error leaves them in memory, to be written again.
    fn write_tables(&self, image: &LibraryImage) -> io::Result<()> {
        self.order.repeat_failed()?;
        image.flush()?;
        self.order.repeat_failed()
    }

    /// Makes all writes durable.
    fn make_durable(&self) -> io::Result<()> {
        self.shared(|image| {
            self.write_tables(image).map_err(repeatable)?;
            image.sync()
        })
    }
}

/// Marks the error of writing tables if the storage is full: nothing was lost.
fn repeatable(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(errno @ (ENOSPC | EDQUOT)) => io::Error::other(EngineError::StorageFull(errno)),
        _ => error,
    }
}

/// Calls `each` for every part of a range with the same mapping.
fn each(
    image: &LibraryImage,
    mut at: u64,
    mut len: u64,
    mut each: impl FnMut(u64, u64, ShallowMapping<'_, pvio_imagefile::ImageFile>) -> io::Result<()>,
) -> io::Result<()> {
    while len > 0 {
        let (mapping, n) = image.get_shallow_mapping(at, len)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        each(at, n, mapping)?;
        (at, len) = (at + n, len - n);
    }
    Ok(())
}

impl Store for Writer {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.library.read(at, into)
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        let compressed = self.shared(|image| {
            let (mut compressed, mut allocates) = (false, false);
            each(image, at, from.len() as u64, |_, _, mapping| {
                compressed |= matches!(mapping, ShallowMapping::Special { .. });
                allocates |= !matches!(mapping, ShallowMapping::Raw { writable: true, .. });
                Ok(())
            })?;
            if compressed {
                return Ok(true);
            }
            let write = || image.write(from, at);
            self.changes.write(allocates, write, || self.write_tables(image))?;
            Ok(false)
        })?;
        if !compressed {
            return Ok(());
        }
        self.library.alone(|image| {
            self.sync_freed(image)?;
            let (mut at, mut from) = (at, from);
            while !from.is_empty() {
                let n = from.len().min((self.cluster - at % self.cluster) as usize);
                let (part, rest) = from.split_at(n);
                let (mapping, _) = image.get_shallow_mapping(at, n as u64)?;
                let compressed = matches!(mapping, ShallowMapping::Special { .. });
                if compressed {
                    self.unsynced.store(true, Ordering::SeqCst);
                    image.write(part, at)?;
                    self.sync_freed(image)?;
                } else {
                    let write = || image.write(part, at);
                    self.changes.write(true, write, || self.write_tables(image))?;
                }
                (at, from) = (at + n as u64, rest);
            }
            Ok(())
        })
    }

    fn flush(&self) -> io::Result<()> {
        self.make_durable()
    }

    fn flush_state(&self) -> Option<Arc<FlushState>> {
        Some(Arc::clone(self.order.flush_state()))
    }

    fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        self.clear(at, len, false)
    }

    fn write_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        self.clear(at, len, true)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let closed = self.library.close(|| self.make_durable());
        if let Some(mark) = &mut self.mark {
            mark.closed = closed;
        }
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if self.closed
            && let Err(error) = refcounts::set_dirty(&self.file, self.features, false)
        {
            tracing::error!(%error, "the dirty mark of a disk image cannot be removed");
        }
    }
}
