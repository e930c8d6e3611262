//! Types of storage of pvio's disks.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::dom0::backend::Backend;
use crate::dom0::disk::{Disk, Medium, sum_of};
use crate::dom0::lab::{SHORT, wait_until};
use crate::sys;

/// dom0's memory.
pub const TMP: &str = "/tmp";

/// A type of storage.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum StorageKind {
    /// A raw file, through dom0's page cache.
    Raw,
    /// A raw file without the page cache, where the file system supports it.
    Direct,
    /// A block device without the page cache.
    Device,
    /// A qcow2 image.
    Qcow2,
    /// An NBD export of a raw file by `qemu-nbd`.
    Nbd,
}

/// The storage of one disk.
pub struct Store {
    kept: StorageKind,
    disk: Disk,
    /// The disk as configured for pvio.
    place: String,
    qcow2: Option<PathBuf>,
    server: Option<Child>,
}

impl Store {
    /// Creates storage of `mib` MiB of zeros, in files in a directory; `number` makes their names
    /// unique.
    ///
    /// # Errors
    /// There is no space, or the server does not start.
    pub fn new(kept: StorageKind, folder: &str, number: usize, mib: u64) -> Result<Self> {
        let medium = if kept == StorageKind::Device { Medium::Device } else { Medium::File };
        let disk = Disk::within(folder, mib, Backend::Pvio, medium)?;
        let image = disk.image.display().to_string();
        let (mut qcow2, mut server) = (None, None);
        let place = match kept {
            StorageKind::Raw | StorageKind::Direct => format!("raw:{image}"),
            StorageKind::Device => format!("raw:{}", disk.device().context("a loop device")?),
            StorageKind::Qcow2 => {
                let path = PathBuf::from(format!("{folder}/disk{number}.qcow2"));
                make_qcow2(&path, mib)?;
                let place = format!("qcow2:{}", path.display());
                qcow2 = Some(path);
                place
            }
            StorageKind::Nbd => {
                let socket = format!("/run/nbd{number}.sock");
                // The socket of an earlier server.
                let _ = fs::remove_file(&socket);
                let words = ["-t", "-e", "8", "-f", "raw", "-k", &socket, &image];
                server = Some(Command::new("qemu-nbd").args(words).spawn().context("qemu-nbd")?);
                let there = wait_until(SHORT, || Ok(Path::new(&socket).exists()))?;
                ensure!(there, "qemu-nbd does not listen");
                format!("nbd+unix:///?socket={socket}")
            }
        };
        Ok(Self { kept, disk, place, qcow2, server })
    }

    /// Returns the entry of `disk=[…]`; `words` are options of pvio.
    pub fn line(&self, name: &str, access: &str, words: &str) -> String {
        let cache = match self.kept {
            StorageKind::Direct | StorageKind::Device => "direct",
            _ => "buffered",
        };
        let comma = if words.is_empty() { "" } else { "," };
        Disk::by_pvio(name, access, &format!("[{cache}{comma}{words}]{}", self.place))
    }

    /// Returns a file with the current contents of the disk, which may be in use.
    ///
    /// # Errors
    /// The image is not consistent.
    pub fn bytes(&self) -> Result<&Path> {
        if let Some(qcow2) = &self.qcow2 {
            // The image is locked by pvio. Its flushed contents can be read in any case.
            let (from, to) = (text(qcow2), text(&self.disk.image));
            sys::succeed(&["qemu-img", "convert", "-U", "-O", "raw", &from, &to], SHORT)?;
        }
        Ok(&self.disk.image)
    }

    /// Returns the checksum of the first `mib` MiB, when the disk is not in use.
    ///
    /// # Errors
    /// The image is not consistent.
    pub fn sum(&self, mib: u64) -> Result<Value> {
        if let Some(qcow2) = &self.qcow2 {
            sys::succeed(&["qemu-img", "check", "-q", &text(qcow2)], SHORT)?;
        }
        sum_of(self.bytes()?, mib)
    }

    /// Writes bytes to its start, before it is served.
    ///
    /// # Errors
    /// There is no space.
    pub fn fill(&self, bytes: &[u8]) -> Result<()> {
        fs::write(&self.disk.image, bytes)?;
        let Some(qcow2) = &self.qcow2 else { return Ok(()) };
        let (from, to) = (text(&self.disk.image), text(qcow2));
        sys::succeed(&["qemu-img", "convert", "-f", "raw", "-O", "qcow2", &from, &to], SHORT)
            .map(drop)
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Creates an empty qcow2 image.
///
/// # Errors
/// There is no space.
pub fn make_qcow2(path: &Path, mib: u64) -> Result<()> {
    let (path, size) = (text(path), format!("{mib}M"));
    sys::succeed(&["qemu-img", "create", "-q", "-f", "qcow2", &path, &size], SHORT).map(drop)
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            let _ = server.kill();
            let _ = server.wait();
        }
        if let Some(qcow2) = &self.qcow2 {
            let _ = fs::remove_file(qcow2);
        }
    }
}
