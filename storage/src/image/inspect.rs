//! Inspection of a disk without serving it. Also works for disks that cannot be served, and for
//! disks that are being served by another process.

use super::error::ImageError;
use super::file::{Access, FileHandle};
use super::lock::{self, LockState};
use super::metadata::{FileContent, Meter};
use super::open::open;
use super::provider::LocalFiles;
use super::qcow2::chain::{Backing, Layer};
use super::qcow2::header::{Header, Snapshot, incompatible};
use super::reference::{ImageRoots, ReferencePolicy};
use super::vhd::footer::{Footer, Kind};
use super::{Disk, Format, ImageOptions, Spec, qcow2, vhd, vmdk};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The result of an inspection.
#[derive(Debug)]
pub struct Inspection {
    /// Bytes of the disk as the guest sees it; `None` if unknown.
    pub size: Option<u64>,
    /// The files of the disk: the named one, then its backing files.
    pub files: Vec<FileReport>,
    /// The reason why the disk cannot be served.
    pub problem: Option<ImageError>,
}

/// Properties of one file of a disk.
#[derive(Debug)]
pub struct FileReport {
    /// Path of the file.
    pub path: PathBuf,
    /// Format in which it is read.
    pub format: Format,
    /// Its length in bytes.
    pub length: u64,
    /// Bytes allocated on storage.
    pub allocated: u64,
    /// Whether it is in use.
    pub lock: LockState,
    /// Bytes of the virtual disk in it, if its header could be read.
    pub size: Option<u64>,
    /// Properties from its header, as text.
    pub features: Vec<String>,
    /// Its internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// Another format whose magic number a raw image begins with: the format may be given wrongly,
    /// or the guest wrote it.
    pub resembles: Option<Format>,
    /// An unsupported format whose magic number a raw image begins with; for example, a disk that
    /// its guest encrypts begins like `luks`.
    pub resembles_foreign: Option<&'static str>,
}

/// Inspects a disk. Nothing is locked or changed.
///
/// # Errors
/// [`ImageError`] if the disk cannot be opened.
pub fn inspect(spec: &Spec) -> Result<Inspection, ImageError> {
    inspect_within(spec, &ReferencePolicy::default())
}

/// Inspects a disk, with those of its options that determine which files its images may name.
///
/// # Errors
/// [`ImageError`] if the disk cannot be opened.
pub fn inspect_as(disk: &Disk) -> Result<Inspection, ImageError> {
    inspect_within(&disk.spec, &disk.options.references())
}

fn inspect_within(spec: &Spec, policy: &ReferencePolicy) -> Result<Inspection, ImageError> {
    let (path, format, snapshot) = match spec {
        Spec::File { path, format, snapshot } => (path, *format, snapshot.as_deref()),
        Spec::Overlay(below) => return inspect_within(below, policy),
        Spec::Nbd(_) => {
            let options = ImageOptions { read_only: true, direct: false };
            let (_, geometry) = open(spec, options, &LocalFiles(policy), &Meter::default())?;
            let size = Some(geometry.sectors * 512);
            return Ok(Inspection { size, files: Vec::new(), problem: None });
        }
        Spec::Ram { bytes } => {
            return Ok(Inspection { size: Some(*bytes), files: Vec::new(), problem: None });
        }
    };
    let mut found = Inspection { size: None, files: Vec::new(), problem: None };
    let file = FileHandle::locate(path)?;
    found.files.push(file_report(&file, format)?);
    let problem = match format {
        Format::Raw => Ok(found.files.first().map(|file| file.length)),
        Format::Qcow2 => of_qcow2(&mut found, file, snapshot, policy).map(Some),
        Format::Vmdk => of_vmdk(&mut found, path, policy).map(Some),
        Format::Vhd => of_vhd(&mut found, &file).map(Some),
    };
    match problem {
        Ok(size) => found.size = size,
        Err(problem) => found.problem = Some(problem),
    }
    let unit = 512;
    if let Some(size) = found.size
        && (size == 0 || !size.is_multiple_of(unit.into()))
    {
        found.problem = Some(ImageError::OddSize { path: path.clone(), size, unit });
    }
    if let Some(file) = found.files.first_mut()
        && file.size.is_none()
    {
        file.size = found.size;
    }
    Ok(found)
}

/// Reports the properties that files of any format have.
fn file_report(file: &FileHandle, format: Format) -> Result<FileReport, ImageError> {
    let path = file.path();
    let mut file = file.open(Access { write: false, direct: false, lock: false })?;
    let other = |error| ImageError::Other { path: path.into(), error };
    let length = file.seek(SeekFrom::End(0)).map_err(other)?;
    let allocated = file.metadata().map_err(other)?.blocks() * 512;
    let lock = lock::query(&file).map_err(other)?;
    let mut head = [0; 128];
    let got = file.read_at(&mut head, 0).unwrap_or_default();
    let head = head.get(..got).unwrap_or_default();
    let (resembles, foreign) = (Format::resembled(head), Format::foreign_resembled(head));
    Ok(FileReport {
        path: path.into(),
        format,
        length,
        allocated,
        lock,
        size: None,
        features: Vec::new(),
        snapshots: Vec::new(),
        resembles: resembles.filter(|_| format == Format::Raw),
        resembles_foreign: foreign.filter(|_| format == Format::Raw),
    })
}

fn of_qcow2(
    found: &mut Inspection,
    file: FileHandle,
    snapshot: Option<&str>,
    policy: &ReferencePolicy,
) -> Result<u64, ImageError> {
    // First without its backing files, which may be missing.
    let open = file.open(Access { write: false, direct: false, lock: false })?;
    let path = file.path();
    let wrap = |error| ImageError::Content { path: path.into(), format: Format::Qcow2, error };
    let meter = Meter::default();
    let content = FileContent::new(&open, &meter).map_err(|e| wrap(e.into()))?;
    let header = Header::read(&content).map_err(wrap)?;
    describe_qcow2(found.files.first_mut(), &header);
    let roots = ImageRoots::of(&file, policy)?;
    let meter = Meter::default();
    let mut layer = qcow2::chain::read(file, &roots, false, &meter)?;
    report_backing(found, &layer)?;
    let written = found.files.first().is_some_and(|file| file.lock == LockState::Written);
    if written {
        // The mark is expected while the image is being written.
        layer.header.incompatible &= !incompatible::DIRTY;
    }
    qcow2::check_features(&layer, false)?;
    let size = match snapshot {
        Some(name) => qcow2::snapshot_size(&layer, name)?,
        None => header.size,
    };
    // The tables of an image that is being written may be inconsistent.
    if !written {
        qcow2::try_open(&layer, &meter)?;
    }
    Ok(size)
}

fn describe_qcow2(report: Option<&mut FileReport>, header: &Header) {
    let Some(report) = report else { return };
    report.size = Some(header.size);
    report.snapshots = header.snapshots.clone();
    let words = &mut report.features;
    words.push(format!("version {}", header.version));
    words.push(format!("clusters of {} bytes", header.cluster()));
    let bits = [
        (incompatible::DIRTY, "not closed"),
        (incompatible::CORRUPT, "marked corrupt"),
        (incompatible::DATA_FILE, "data in another file"),
        (incompatible::COMPRESSION, "compressed by zstd"),
        (incompatible::EXTENDED_L2, "extended L2 entries"),
    ];
    let set = bits.iter().filter(|(bit, _)| header.incompatible & bit != 0);
    words.extend(set.map(|(_, word)| word.to_string()));
    if header.compatible & 1 != 0 {
        words.push("lazy reference counts".into());
    }
    if header.autoclear & 1 != 0 {
        words.push("dirty bitmaps".into());
    }
}

/// Reports all backing files of an image.
fn report_backing(found: &mut Inspection, layer: &Layer) -> Result<(), ImageError> {
    match &layer.backing {
        None => Ok(()),
        Some(Backing::Raw(file)) => {
            let mut report = file_report(file, Format::Raw)?;
            report.size = Some(report.length);
            found.files.push(report);
            Ok(())
        }
        Some(Backing::Qcow2(layer)) => {
            let mut report = file_report(&layer.file, Format::Qcow2)?;
            describe_qcow2(Some(&mut report), &layer.header);
            found.files.push(report);
            report_backing(found, layer)
        }
    }
}

fn of_vhd(found: &mut Inspection, file: &FileHandle) -> Result<u64, ImageError> {
    let path = file.path();
    let file = file.open(Access { write: false, direct: false, lock: false })?;
    let wrap = |error| ImageError::Content { path: path.into(), format: Format::Vhd, error };
    let meter = Meter::default();
    let content = FileContent::new(&file, &meter).map_err(|e| wrap(e.into()))?;
    let footer = Footer::read(&content).map_err(wrap)?;
    if let Some(report) = found.files.first_mut() {
        report.features.push(match footer.kind {
            Kind::Fixed => "fixed".into(),
            Kind::Dynamic { block, .. } => format!("dynamic, blocks of {block} bytes"),
        });
    }
    vhd::check(file, &footer, &meter).map_err(wrap)?;
    Ok(footer.size)
}

fn of_vmdk(
    found: &mut Inspection,
    path: &Path,
    policy: &ReferencePolicy,
) -> Result<u64, ImageError> {
    let (size, features) = vmdk::inspect(path, policy)?;
    if let Some(report) = found.files.first_mut() {
        report.features = features;
    }
    Ok(size)
}
