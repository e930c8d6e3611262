//! Descriptors that other processes have opened.

use super::super::error::ImageError;
use super::super::file::{Access, FileHandle};
use super::super::files::{Description, FileRecord, Opened};
use super::super::reference::referenced_path;
use super::super::{Disk, Format, ImageOptions, Spec, raw};
use super::local::scratch;
use super::{DiskFiles, ImageFiles, References};
use crate::engine::nbd::{self, Dial, Export, NbdLink, NbdOptions};
use crate::image::spec::{NbdServer, NbdSpec};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// What a descriptor is.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum HandedRecord {
    /// A file or block device.
    File(FileRecord),
    /// The unnamed file for the writes of an overlay.
    Scratch,
    /// A connection to a server of network block devices, before the handshake.
    Connection,
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
    /// The export of a server whose connection was left out.
    export: Option<Export>,
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
        Ok(Self { list: records.into_iter().zip(descriptors).collect(), ..Self::default() })
    }

    /// Adds the descriptors of another process.
    #[must_use]
    pub fn with(mut self, more: Self) -> Self {
        self.list.extend(more.list);
        self.dial = self.dial.or(more.dial);
        self.export = self.export.or(more.export);
        self
    }

    /// Connects with `dial` to the server of a disk, if it has one. Sends and receives nothing.
    /// Blocks for a few seconds at most.
    ///
    /// # Errors
    /// [`ImageError`] if the server cannot be reached.
    pub fn connected(mut self, disk: &Disk, dial: &dyn Dial) -> Result<Self, ImageError> {
        if let Some(spec) = disk.storage_spec().server() {
            let socket = nbd::dial(spec, dial)?;
            self.list.push((HandedRecord::Connection, Arc::new(socket)));
        }
        Ok(self)
    }

    /// Connects with `dial` when the connection to a server is lost, or there is none.
    #[must_use]
    pub fn redialing(self, dial: Arc<dyn Dial>) -> Self {
        Self { dial: Some(dial), ..self }
    }

    /// Remembers the export of a server to which no connection was handed over: the first request
    /// connects, and fails if the server has another export then.
    #[must_use]
    pub fn exporting(self, export: Option<Export>) -> Self {
        Self { export, ..self }
    }

    /// Returns the export of the disk's server, if it has one.
    #[must_use]
    pub fn export(&self) -> Option<Export> {
        self.server().map(|(_, export)| export).or(self.export)
    }

    /// Returns the descriptors that also serve the successor of a device process: all but
    /// connections, on which replies to the predecessor arrive.
    #[must_use]
    pub fn lasting(&self) -> Self {
        let lasts = |(record, _): &&(HandedRecord, _)| {
            !matches!(record, HandedRecord::Connection | HandedRecord::Server(_))
        };
        let list = self.list.iter().filter(lasts).cloned().collect();
        Self { list, dial: self.dial.clone(), export: self.export() }
    }

    fn server(&self) -> Option<(&Arc<OwnedFd>, Export)> {
        self.list.iter().find_map(|(record, fd)| match record {
            HandedRecord::Server(export) => Some((fd, *export)),
            _ => None,
        })
    }

    /// Returns a `dial` that returns the connection that was handed over, once.
    pub(super) fn handed_connection(&self) -> Option<HandedConnection> {
        let connections = |(record, _): &&(HandedRecord, _)| *record == HandedRecord::Connection;
        let (_, fd) = self.list.iter().find(connections)?;
        Some(HandedConnection(Mutex::new(Some(Arc::clone(fd)))))
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
        let dial: Arc<dyn Dial> = match &self.dial {
            Some(dial) => Arc::clone(dial),
            None => Arc::new(NoDial),
        };
        let other = |error| ImageError::Other { path: alloc::format!("{spec}").into(), error };
        Ok(match (self.server(), self.export) {
            (Some((socket, export)), _) => {
                let socket = socket.try_clone().map_err(other)?;
                NbdLink::resume(spec, options, Some(socket), export, dial)?
            }
            (None, Some(export)) => NbdLink::resume(spec, options, None, export, dial)?,
            (None, None) => NbdLink::connect_by(spec, options, dial)?,
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

/// Returns a connection that another process has made.
pub(super) struct HandedConnection(Mutex<Option<Arc<OwnedFd>>>);

impl Dial for HandedConnection {
    fn dial(&self, server: &NbdServer) -> io::Result<OwnedFd> {
        let handed = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        handed.map_or_else(|| NoDial.dial(server), |fd| fd.try_clone())
    }
}

/// Makes no connections.
struct NoDial;

impl Dial for NoDial {
    fn dial(&self, _: &NbdServer) -> io::Result<OwnedFd> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "this process makes no connections"))
    }
}
