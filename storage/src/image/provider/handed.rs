//! Descriptors that other processes have opened.

use super::super::error::ImageError;
use super::super::file::{Access, FileHandle};
use super::super::files::{Description, FileRecord, Opened};
use super::super::reference::referenced_path;
use super::super::{Disk, Format, ImageOptions, Spec, raw};
use super::local::scratch;
use super::{DiskFiles, ImageFiles, References};
use crate::engine::nbd::{Dial, Export, NbdLink, NbdOptions};
use crate::image::spec::NbdSpec;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::PoisonError;

/// What a descriptor is.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum HandedRecord {
    /// A file or block device.
    File(FileRecord),
    /// The unnamed file for the writes of an overlay.
    Scratch,
    /// A connection to a server of network block devices, after the handshake, with the parameters
    /// of the export.
    Server(Export),
}

/// The descriptors of a disk, with a record of each: what one process opens and another uses. To
/// pass it on, send the [records](Self::records) and the [descriptors](Self::descriptors) in the
/// same order; a message with `SCM_RIGHTS` has room for 253 descriptors. [`new`](Self::new) puts
/// them together again.
#[derive(Clone, Default)]
pub struct HandedFiles {
    list: Vec<(HandedRecord, Arc<OwnedFd>)>,
    dial: Option<Arc<dyn Dial>>,
}

impl HandedFiles {
    /// Opens and locks what a disk is defined by, without reading it: the file or block
    /// device, as its format and options require, and the temporary file of an overlay. Connects to
    /// no server. The definition must have an absolute path. May block for as long as storage does.
    ///
    /// # Errors
    /// Any [`ImageError`] of opening a file.
    pub fn open_named(disk: &Disk) -> Result<Self, ImageError> {
        let mut this = Self::default();
        this.open_spec(&disk.storage_spec(), disk.options.image_options())?;
        Ok(this)
    }

    fn open_spec(&mut self, spec: &Spec, options: ImageOptions) -> Result<(), ImageError> {
        match spec {
            Spec::Nbd(_) | Spec::Ram { .. } => Ok(()),
            Spec::Overlay(below) => {
                self.list.push((HandedRecord::Scratch, Arc::new(scratch()?.into())));
                self.open_spec(below, ImageOptions::BELOW_OVERLAY)
            }
            Spec::File { format, path, .. } => self.open_file(*format, path, options),
        }
    }

    fn open_file(
        &mut self,
        format: Format,
        path: &Path,
        options: ImageOptions,
    ) -> Result<(), ImageError> {
        let other = |error| ImageError::Other { path: path.into(), error };
        if !path.is_absolute() {
            return Err(other(io::Error::new(io::ErrorKind::InvalidInput, "the path is relative")));
        }
        let access = Access { write: !options.read_only, direct: options.direct, lock: true };
        let buffered = Access { direct: false, ..access };
        let opened = Opened::default();
        let handle = FileHandle::locate(path)?.recorded(&opened);
        let first = match format {
            Format::Raw => handle.open(access)?,
            // Metadata is read through the page cache. The first description has the lock.
            Format::Qcow2 | Format::Vhd if options.direct => {
                let first = handle.open(buffered)?;
                handle.open(access)?;
                first
            }
            Format::Qcow2 | Format::Vhd | Format::Vmdk => handle.open(buffered)?,
        };
        let mut device = None;
        if matches!(format, Format::Raw | Format::Vhd)
            && raw::needs_properties(handle.is_block_device(), options.direct)
        {
            device = Some(handle.device(&first).map_err(other)?);
        }
        let mut opened = opened.lock().unwrap_or_else(PoisonError::into_inner);
        self.list.extend(opened.drain(..).map(|Description { record, fd }| {
            (HandedRecord::File(FileRecord { device, ..record }), fd)
        }));
        Ok(())
    }

    /// Puts records and their descriptors together.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] if there are more of one than of the other.
    pub fn new(records: Vec<HandedRecord>, descriptors: Vec<OwnedFd>) -> io::Result<Self> {
        if records.len() != descriptors.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let descriptors = descriptors.into_iter().map(Arc::new);
        Ok(Self { list: records.into_iter().zip(descriptors).collect(), dial: None })
    }

    /// Adds the descriptors of another process.
    #[must_use]
    pub fn with(mut self, more: Self) -> Self {
        self.list.extend(more.list);
        self.dial = self.dial.or(more.dial);
        self
    }

    /// Connects with `dial` when the connection to a server is lost, or there is none.
    #[must_use]
    pub fn redialing(self, dial: Arc<dyn Dial>) -> Self {
        Self { dial: Some(dial), ..self }
    }

    /// Returns the descriptors that also serve the successor of a device process: all but
    /// connections, on which replies to the predecessor arrive.
    #[must_use]
    pub fn lasting(&self) -> Self {
        let lasts = |(record, _): &&(HandedRecord, _)| !matches!(record, HandedRecord::Server(_));
        Self { list: self.list.iter().filter(lasts).cloned().collect(), dial: self.dial.clone() }
    }

    /// Returns the records.
    #[must_use]
    pub fn records(&self) -> Vec<HandedRecord> {
        self.list.iter().map(|(record, _)| record.clone()).collect()
    }

    /// Returns the descriptors, in the order of the [records](Self::records).
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.list.iter().map(|(_, fd)| fd.as_fd())
    }

    pub(super) fn push(&mut self, record: HandedRecord, fd: Arc<OwnedFd>) {
        self.list.push((record, fd));
    }

    /// Returns the descriptions of the file that is named so.
    pub(super) fn descriptions(&self, path: &Path) -> Vec<Description> {
        let of_file = |(record, fd): &(HandedRecord, Arc<OwnedFd>)| match record {
            HandedRecord::File(record) if record.path == path => {
                Some(Description { record: record.clone(), fd: Arc::clone(fd) })
            }
            _ => None,
        };
        self.list.iter().filter_map(of_file).collect()
    }
}

impl core::fmt::Debug for HandedFiles {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_list().entries(&self.list).finish()
    }
}

impl ImageFiles for HandedFiles {
    fn named(&self, path: &Path) -> Result<FileHandle, ImageError> {
        FileHandle::handed(self.descriptions(path), path.into(), None)
    }

    fn references(&self, _: &FileHandle) -> Result<Box<dyn References + '_>, ImageError> {
        Ok(Box::new(HandedReferences(self)))
    }
}

impl DiskFiles for HandedFiles {
    fn scratch(&self) -> Result<File, ImageError> {
        let mut all = self.list.iter();
        let found = all.find(|(record, _)| *record == HandedRecord::Scratch);
        let path = Path::new("the temporary file of an overlay");
        let missing = || ImageError::Changed { path: path.into(), what: "it was not opened" };
        let (_, fd) = found.ok_or_else(missing)?;
        let copy = fd.try_clone();
        Ok(copy.map_err(|error| ImageError::Other { path: path.into(), error })?.into())
    }

    fn link(&self, spec: &NbdSpec, options: NbdOptions) -> Result<NbdLink, ImageError> {
        let server = self.list.iter().find_map(|(record, fd)| match record {
            HandedRecord::Server(export) => Some((fd, *export)),
            HandedRecord::File(_) | HandedRecord::Scratch => None,
        });
        let dial: Arc<dyn Dial> = match &self.dial {
            Some(dial) => Arc::clone(dial),
            None => Arc::new(NoDial),
        };
        Ok(match server {
            Some((socket, export)) => {
                let other =
                    |error| ImageError::Other { path: alloc::format!("{spec}").into(), error };
                NbdLink::resume(spec, options, socket.try_clone().map_err(other)?, export, dial)?
            }
            None => NbdLink::connect_by(spec, options, dial)?,
        })
    }
}

/// The files that image headers may name: those that were handed over under the same path.
struct HandedReferences<'a>(&'a HandedFiles);

impl References for HandedReferences<'_> {
    fn find(&self, image: &FileHandle, name: &Path) -> Result<FileHandle, ImageError> {
        let path = referenced_path(image.path(), name)?;
        FileHandle::handed(self.0.descriptions(&path), path, Some(image.path().into()))
    }

    fn find_written(&self, image: &FileHandle, name: &Path) -> Result<FileHandle, ImageError> {
        self.find(image, name)
    }
}

/// Makes no connections.
struct NoDial;

impl Dial for NoDial {
    fn dial(&self, _: &crate::image::spec::NbdServer) -> io::Result<OwnedFd> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "this process makes no connections"))
    }
}
