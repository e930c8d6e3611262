//! What disks of pvio's are kept in.

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

/// What a disk is kept in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum StorageKind {
    /// A raw file, through dom0's page cache.
    Raw,
    /// A raw file around it, where its file system can.
    Direct,
    /// A block device around it.
    Device,
    /// A qcow2 image.
    Qcow2,
    /// An export of `qemu-nbd`'s, of a raw file.
    Nbd,
}

/// Where one disk's bytes are.
pub struct Store {
    kept: StorageKind,
    disk: Disk,
    /// As pvio names it.
    place: String,
    qcow2: Option<PathBuf>,
    server: Option<Child>,
}

impl Store {
    /// A new one of so many MiB of zeroes, in files of a folder; its number tells it from others.
    ///
    /// # Errors
    /// No room, or no server.
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
                // One that was there before listens no more.
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

    /// What stands in `disk=[…]` for it; `words` are options of pvio's.
    pub fn line(&self, name: &str, access: &str, words: &str) -> String {
        let cache = match self.kept {
            StorageKind::Direct | StorageKind::Device => "direct",
            _ => "buffered",
        };
        let comma = if words.is_empty() { "" } else { "," };
        Disk::by_pvio(name, access, &format!("[{cache}{comma}{words}]{}", self.place))
    }

    /// A file with the disk's bytes as they are now, the disk being served or not.
    ///
    /// # Errors
    /// Not a sound image.
    pub fn bytes(&self) -> Result<&Path> {
        if let Some(qcow2) = &self.qcow2 {
            // The guest has it, and its word that what it flushed is there.
            let (from, to) = (text(qcow2), text(&self.disk.image));
            sys::succeed(&["qemu-img", "convert", "-U", "-O", "raw", &from, &to], SHORT)?;
        }
        Ok(&self.disk.image)
    }

    /// The sum of the first MiBs of what is kept, when it is served no more.
    ///
    /// # Errors
    /// Not a sound image.
    pub fn sum(&self, mib: u64) -> Result<Value> {
        if let Some(qcow2) = &self.qcow2 {
            sys::succeed(&["qemu-img", "check", "-q", &text(qcow2)], SHORT)?;
        }
        sum_of(self.bytes()?, mib)
    }

    /// Puts bytes at its start, before it is served.
    ///
    /// # Errors
    /// No room.
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

/// Makes an empty qcow2 image.
///
/// # Errors
/// No room.
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
