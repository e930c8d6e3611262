//! Files for the image library (`imago`), with calls to a [`WriteOrdering`] before and after each change.
//!
//! The order in which the parts of an image reach the storage device is not controlled by the library. An
//! implementation of [`WriteOrdering`] controls it.
//!
//! The library's trait for files has `unsafe` methods for every implementation. This crate contains that
//! `unsafe` code, so that a [`WriteOrdering`] needs none.
//! ```
//! use imago::{StorageExt, StorageOpenOptions};
//! use pvio_imagefile::{Change, ImageFile, WriteOrdering};
//! use std::io;
//! use std::sync::{Arc, Mutex};
//!
//! #[derive(Debug, Default)]
//! struct Log(Mutex<Vec<(u64, u64)>>);
//!
//! impl WriteOrdering for Log {
//!     fn before(&self, change: &Change<'_>) -> io::Result<()> {
//!         self.0.lock().unwrap().push((change.at, change.len));
//!         Ok(())
//!     }
//!     fn after(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
//!         Ok(())
//!     }
//!     fn sync(&self) -> io::Result<()> {
//!         Ok(())
//!     }
//! }
//!
//! let log = Arc::new(Log::default());
//! let options = StorageOpenOptions::new().write(true);
//! let file = ImageFile::new(tempfile::tempfile()?, options, Some(log.clone()))?;
//! file.write(&b"a table"[..], 512)?;
//! assert_eq!(*log.0.lock().unwrap(), [(512, 7)]);
//! # Ok::<(), io::Error>(())
//! ```

use imago::file::File;
use imago::io_buffers::{IoBuffer, IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageOpenOptions};
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A range of a file that is about to be written.
#[derive(Debug)]
pub struct Change<'a> {
    /// Offset of the first byte.
    pub at: u64,
    /// Number of bytes.
    pub len: u64,
    /// `None` for zeroes.
    data: Option<&'a IoVector<'a>>,
}

impl<'a> Change<'a> {
    /// Returns the change that writes `data` at offset `at`.
    #[must_use]
    pub fn of(at: u64, data: &'a IoVector<'a>) -> Self {
        Self { at, len: data.len(), data: Some(data) }
    }

    /// Returns the change that writes zeroes.
    #[must_use]
    pub fn of_zeroes(at: u64, len: u64) -> Self {
        Self { at, len, data: None }
    }

    /// Returns a copy of the bytes to be written. Use it for small ranges only.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.len).unwrap_or_default()];
        if let Some(data) = self.data {
            data.copy_into_slice(&mut bytes);
        }
        bytes
    }
}

/// Controls the order in which changes of a file reach the storage device. Called by any thread.
pub trait WriteOrdering: fmt::Debug + Send + Sync {
    /// Called before a change. Flushes whatever must be on the storage device before it.
    ///
    /// # Errors
    /// Any I/O error; the change is then not made.
    fn before(&self, change: &Change<'_>) -> io::Result<()>;

    /// Called after a change at this offset and of this length was `made` or has failed. After a
    /// failure, a part of it may have been written.
    ///
    /// # Errors
    /// Any I/O error; the change then fails with it.
    fn after(&self, at: u64, len: u64, made: bool) -> io::Result<()>;

    /// Flushes every finished change to the storage device.
    ///
    /// # Errors
    /// Any I/O error.
    fn sync(&self) -> io::Result<()>;
}

/// An open file for the library.
#[derive(Debug)]
pub struct ImageFile {
    file: File,
    order: Option<Arc<dyn WriteOrdering>>,
    /// Bytes that reads return instead of the file's contents, with their offsets.
    instead: Vec<(u64, Vec<u8>)>,
}

impl ImageFile {
    /// Wraps an open file. `options` must be those with which it was opened.
    ///
    /// # Errors
    /// Any error of a query of the file's properties.
    pub fn new(
        file: std::fs::File,
        options: StorageOpenOptions,
        order: Option<Arc<dyn WriteOrdering>>,
    ) -> io::Result<Self> {
        Ok(Self { file: File::from_open_file(file, options)?, order, instead: Vec::new() })
    }

    /// Makes reads return a question mark for each byte of these ranges, and rejects writes to them.
    /// The library rejects an image with a name that is not UTF-8, even if it does not use the name.
    ///
    /// ```
    /// use imago::{StorageExt, StorageOpenOptions};
    /// use pvio_imagefile::ImageFile;
    ///
    /// let file = tempfile::tempfile()?;
    /// std::os::unix::fs::FileExt::write_all_at(&file, b"ab\xff\xffef", 0)?;
    /// let options = StorageOpenOptions::new().write(true);
    /// let file = ImageFile::new(file, options, None)?.hiding(vec![2..4]);
    /// let mut found = [0; 6];
    /// file.read(&mut found[..], 0)?;
    /// assert_eq!(&found, b"ab??ef");
    /// assert!(file.write(&b"x"[..], 3).is_err());
    /// file.write(&b"x"[..], 4)?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn hiding(mut self, hidden: Vec<Range<u64>>) -> Self {
        self.instead.extend(hidden.into_iter().map(|range| {
            let len = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or_default();
            (range.start, vec![b'?'; len])
        }));
        self
    }

    /// Makes reads at this offset return these bytes, and rejects writes to them. For a part of a file
    /// with information that the library does not support.
    #[must_use]
    pub fn reading_as(mut self, at: u64, bytes: Vec<u8>) -> Self {
        self.instead.push((at, bytes));
        self
    }

    /// Returns the replaced bytes of a range, with their offsets in the range.
    fn instead(&self, at: u64, len: u64) -> impl Iterator<Item = (usize, u8)> {
        let inside = move |place: u64| place.checked_sub(at).filter(|inside| *inside < len);
        let end = at.saturating_add(len);
        let near = self.instead.iter().filter(move |(from, bytes)| {
            *from < end && at < from.saturating_add(bytes.len() as u64)
        });
        let places = near.flat_map(|(from, bytes)| (*from..).zip(bytes));
        places.filter_map(move |(place, byte)| Some((inside(place)? as usize, *byte)))
    }

    fn check_shown(&self, at: u64, len: u64) -> io::Result<()> {
        match self.instead(at, len).next() {
            None => Ok(()),
            Some(_) => Err(io::Error::other("what was hidden would be written over")),
        }
    }

    fn change(&self, change: Change<'_>, make: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let Some(order) = &self.order else { return make() };
        order.before(&change)?;
        let made = make();
        let after = order.after(change.at, change.len, made.is_ok());
        made.and(after)
    }
}

impl fmt::Display for ImageFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.fmt(f)
    }
}

/// Every call is forwarded to the library's own implementation, between the calls of the order.
#[allow(unsafe_code)]
impl Storage for ImageFile {
    fn mem_align(&self) -> usize {
        self.file.mem_align()
    }

    fn req_align(&self) -> usize {
        self.file.req_align()
    }

    fn zero_align(&self) -> usize {
        self.file.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.file.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        self.file.resolve_relative_path(relative)
    }

    fn get_filename(&self) -> Option<PathBuf> {
        self.file.get_filename()
    }

    unsafe fn pure_readv(&self, mut bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let len = bufv.len();
        if self.instead(offset, len).next().is_some() {
            let mut all = IoBuffer::new(len as usize, self.file.mem_align())?;
            // It is not initialised, and all of it is read below, whatever the file returns.
            all.as_mut().into_slice().fill(0);
            // SAFETY: as below, and the buffer has the alignment that the file requires.
            unsafe { self.file.pure_readv((&mut all).into(), offset) }?;
            let bytes = all.as_mut().into_slice();
            for (place, byte) in self.instead(offset, len) {
                if let Some(there) = bytes.get_mut(place) {
                    *there = byte;
                }
            }
            bufv.copy_from_slice(bytes);
            return Ok(());
        }
        // SAFETY: the caller's guarantees are those that the same call of `File` requires: this type
        // reports that file's alignments (above), and the guards of ranges are that file's too.
        unsafe { self.file.pure_readv(bufv, offset) }
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let (len, order) = (bufv.len(), self.order.as_deref());
        self.check_shown(offset, len)?;
        if let Some(order) = order {
            order.before(&Change::of(offset, &bufv))?;
        }
        // SAFETY: as for reading.
        let made = unsafe { self.file.pure_writev(bufv, offset) };
        let after = order.map_or(Ok(()), |order| order.after(offset, len, made.is_ok()));
        made.and(after)
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let change = Change::of_zeroes(offset, length);
        // SAFETY: as for reading.
        self.change(change, || unsafe { self.file.pure_write_zeroes(offset, length) })
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let change = Change::of_zeroes(offset, length);
        // SAFETY: as for reading.
        self.change(change, || unsafe { self.file.pure_write_allocated_zeroes(offset, length) })
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        let change = Change::of_zeroes(offset, length);
        // SAFETY: as for reading.
        self.change(change, || unsafe { self.file.pure_discard(offset, length) })
    }

    fn flush(&self) -> io::Result<()> {
        // Nothing is buffered in memory.
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        match &self.order {
            Some(order) => order.sync(),
            None => self.file.sync(),
        }
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: as for reading.
        unsafe { self.file.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.file.get_storage_helper()
    }

    fn resize(&self, new_size: u64, prealloc_mode: PreallocateMode) -> io::Result<()> {
        let old = self.file.size()?;
        let change = Change::of_zeroes(old, new_size.saturating_sub(old));
        self.change(change, || self.file.resize(new_size, prealloc_mode))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use imago::StorageExt;
    use std::os::unix::fs::FileExt;

    #[test]
    fn read_substitution_applies_exactly_to_its_byte_range() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 64], 0).unwrap();
        let options = StorageOpenOptions::new();
        let image = ImageFile::new(file, options, None).unwrap().reading_as(16, vec![1, 2, 3, 4]);
        let mut expected = [7; 64];
        expected[16..20].copy_from_slice(&[1, 2, 3, 4]);
        for from in 0..24 {
            for len in 1..24 {
                let mut found = vec![0; len];
                image.read(found.as_mut_slice(), from as u64).unwrap();
                assert_eq!(found, expected[from..from + len], "{from}+{len}");
            }
        }
    }
}
