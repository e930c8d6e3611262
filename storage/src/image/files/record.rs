//! Descriptors of a disk's files, with what must be known about each.

use super::device::DeviceProperties;
use alloc::sync::Arc;
use alloc::vec::Vec;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Mutex;

/// The way in which a file of a disk is open, and which file it is.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct FileRecord {
    /// The path by which the disk's definition or an image header names the file. It is only
    /// compared, and shown in messages.
    #[cfg_attr(feature = "serde", serde(with = "super::path_text"))]
    pub path: PathBuf,
    /// Whether it is open for writing, in addition to reading.
    pub write: bool,
    /// Whether it bypasses the page cache (`O_DIRECT`).
    pub direct: bool,
    /// Whether it holds the lock of the file. The lock belongs to the open file description: every
    /// duplicate of the descriptor holds it, and it ends with the last one.
    pub locked: bool,
    /// Properties of its block device, if they affect the disk.
    pub device: Option<DeviceProperties>,
}

/// An open file description of a file.
#[derive(Clone, Debug)]
pub(in crate::image) struct Description {
    pub record: FileRecord,
    pub fd: Arc<OwnedFd>,
}

/// The descriptions that were opened while a disk was resolved, in this order.
pub(in crate::image) type Opened = Arc<Mutex<Vec<Description>>>;
