//! Resolving a disk: opening and checking everything that its definition and its image headers
//! name, for a process that opens nothing.

use super::super::error::ImageError;
use super::super::file::FileHandle;
use super::super::files::{Description, Opened};
use super::super::metadata::Meter;
use super::super::open;
use super::super::reference::{ImageRoots, ReferencePolicy};
use super::super::{Disk, IoMode, raw};
use super::handed::{HandedFiles, HandedRecord};
use super::{ImageFiles, References};
use crate::engine::Geometry;
use crate::engine::nbd::{Dial, Export, Network};
use alloc::boxed::Box;
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

/// Maximum length of a path, `PATH_MAX`.
const MAX_PATH: usize = 4096;

/// A resolved disk.
#[derive(Debug)]
pub struct Resolved {
    /// The geometry of the disk.
    pub geometry: Geometry,
    /// The files that were opened in addition to the named ones, and the connection to a server.
    pub files: HandedFiles,
}

/// The description of a resolved disk, which is sent together with the descriptors of its files.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct DiskDescription {
    /// The geometry of the disk.
    pub geometry: Geometry,
    /// A record of each descriptor.
    pub files: Vec<HandedRecord>,
    /// The export of its server, if it has one.
    #[cfg_attr(feature = "serde", serde(default))]
    pub export: Option<Export>,
}

impl Resolved {
    /// Maximum number of files of a disk. A VMDK image has up to 2048 extents.
    pub const MAX_FILES: usize = 4096;

    /// Returns the description.
    #[must_use]
    pub fn description(&self) -> DiskDescription {
        let export = self.files.export();
        DiskDescription { geometry: self.geometry, files: self.files.records(), export }
    }

    /// Puts a description and the descriptors together, as received from a process that has parsed
    /// an image. The image may have taken that process over: a description that no disk has is
    /// rejected. What the descriptors are is checked when the disk is opened from them.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`].
    pub fn new(
        disk: &Disk,
        description: DiskDescription,
        descriptors: Vec<OwnedFd>,
    ) -> io::Result<Self> {
        let DiskDescription { geometry, files, .. } = description;
        let read_only = disk.options.read_only.unwrap_or_default();
        let described = files.len() <= Self::MAX_FILES && files.iter().all(is_plausible);
        if !described || !is_possible(&geometry) || geometry.read_only != read_only {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no disk has this description"));
        }
        Ok(Self { geometry, files: HandedFiles::new(files, descriptors)? })
    }
}

fn is_plausible(record: &HandedRecord) -> bool {
    match record {
        HandedRecord::File(file) => {
            file.path.is_absolute() && file.path.as_os_str().len() <= MAX_PATH
        }
        HandedRecord::Server(_) => true,
        // Opened by the process that opens what the definition names.
        HandedRecord::Scratch | HandedRecord::Connection => false,
    }
}

fn is_possible(geometry: &Geometry) -> bool {
    let Geometry { sectors, sector_size, physical_sector_size, read_only, discard, .. } = *geometry;
    matches!(sector_size, 512 | 4096)
        && sectors > 0
        && sectors.is_multiple_of(u64::from(sector_size / 512))
        && sectors.checked_mul(512).is_some()
        && physical_sector_size >= sector_size
        && physical_sector_size.is_multiple_of(512)
        && discard.is_none_or(|discard| !read_only && discard.granularity >= sector_size)
}

/// Resolves a disk: opens and locks the files that its image headers name, below its image roots,
/// and connects to its server. `named` are the descriptors from [`HandedFiles::open_named`], and the
/// connection of [`HandedFiles::connected`], if that is to be used.
///
/// Runs the code of the formats, with their limits, and changes nothing. An image that is
/// repaired before it is written is checked in full only then.
///
/// # Errors
/// Any [`ImageError`] that opening the disk would have, except those of its I/O mode.
pub fn resolve(disk: &Disk, named: &HandedFiles) -> Result<Resolved, ImageError> {
    let options = disk.options.image_options();
    let policy = disk.options.references();
    let resolver = Resolver { named, policy: &policy, opened: Opened::default() };
    let mut files = HandedFiles::default();
    let handed = named.handed_connection();
    let dial: &dyn Dial = handed.as_ref().map_or(&Network, |handed| handed);
    let found = open::resolve(&disk.storage_spec(), options, &resolver, dial, &Meter::default())?;
    let io = disk.options.io.unwrap_or_default();
    if io != IoMode::Normal && !found.is_file {
        return Err(ImageError::NoIoMode(io.word(), disk.spec.to_string()));
    }
    let geometry = raw::with_sector_options(found.geometry, disk)?;
    let mut opened = resolver.opened.lock().unwrap_or_else(PoisonError::into_inner);
    for Description { record, fd } in opened.drain(..) {
        files.push(HandedRecord::File(record), fd);
    }
    if let Some((socket, export)) = found.server {
        files.push(HandedRecord::Server(export), Arc::new(socket));
    }
    drop(opened);
    Ok(Resolved { geometry, files })
}

/// Returns the directories below which the image headers of a disk may name files: what a process
/// that resolves the disk must be able to read, and for VMDK images to write.
///
/// # Errors
/// [`ImageError`] if the file that the definition names was not handed over.
pub fn image_roots(disk: &Disk, named: &HandedFiles) -> Result<Vec<PathBuf>, ImageError> {
    let Some(path) = disk.spec.path() else { return Ok(Vec::new()) };
    let image = named.named(path)?;
    Ok(ImageRoots::of(&image, &disk.options.references())?.into_paths())
}

/// The files of a disk that is being resolved.
struct Resolver<'a> {
    named: &'a HandedFiles,
    policy: &'a ReferencePolicy,
    opened: Opened,
}

impl ImageFiles for Resolver<'_> {
    fn named(&self, path: &Path) -> Result<FileHandle, ImageError> {
        self.named.named(path)
    }

    fn references(&self, image: &FileHandle) -> Result<Box<dyn References + '_>, ImageError> {
        Ok(Box::new(Recorded { roots: ImageRoots::of(image, self.policy)?, opened: &self.opened }))
    }
}

/// Files below image roots, whose descriptors are collected.
struct Recorded<'a> {
    roots: ImageRoots,
    opened: &'a Opened,
}

impl References for Recorded<'_> {
    fn find(&self, image: &FileHandle, name: &Path) -> Result<FileHandle, ImageError> {
        Ok(self.roots.find(image, name)?.recorded(self.opened))
    }

    fn find_written(&self, image: &FileHandle, name: &Path) -> Result<FileHandle, ImageError> {
        Ok(self.roots.find_written(image, name)?.recorded(self.opened))
    }
}
