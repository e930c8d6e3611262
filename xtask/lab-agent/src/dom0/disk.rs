//! Disk images in dom0's memory, and their lines in an `xl` configuration.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::backend::Backend;
use crate::pattern::Sum;
use crate::sys;

const QUICK: Duration = Duration::from_secs(20);

/// Access mode of a disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// `rw`
    Write,
    /// `ro`
    Read,
}

impl Access {
    fn word(self) -> &'static str {
        match self {
            Self::Write => "rw",
            Self::Read => "ro",
        }
    }
}

/// Type of storage that a backend opens.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Medium {
    /// A loop device, if the backend can serve block devices; QEMU uses the file.
    Device,
    /// The file itself, if the backend can serve files; the kernel uses a loop device.
    File,
}

/// An image; its loop device and file are removed when dropped.
pub struct Disk {
    /// Path of the file.
    pub image: PathBuf,
    device: Option<String>,
}

impl Disk {
    /// Creates an image of zeros.
    ///
    /// # Errors
    /// dom0 has no space, or no loop device.
    pub fn new(mib: u64, backend: Backend, medium: Medium) -> Result<Self> {
        Self::within("/tmp", mib, backend, medium)
    }

    /// Does as [`new`](Self::new), in a directory.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn within(folder: &str, mib: u64, backend: Backend, medium: Medium) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let image = PathBuf::from(format!("{folder}/disk{number}.img"));
        File::create(&image)?.set_len(mib << 20)?;
        let mut disk = Self { image, device: None };
        let needs_device = match backend {
            Backend::Linux => true,
            Backend::Qdisk | Backend::PvioDm => false,
            Backend::Pvio => medium == Medium::Device,
        };
        if needs_device {
            let file = disk.path()?.to_owned();
            let device = sys::succeed(&["losetup", "--find", "--show", &file], QUICK)?;
            disk.device = Some(device.trim().to_owned());
        }
        Ok(disk)
    }

    /// Returns the entry of `disk=[…]`, without quotes.
    ///
    /// # Errors
    /// The path is not UTF-8.
    pub fn line(&self, name: &str, access: Access, backend: Backend) -> Result<String> {
        let access = access.word();
        let target = match (backend, &self.device) {
            (Backend::Qdisk | Backend::PvioDm, _) => {
                format!("backendtype=qdisk,target={}", self.path()?)
            }
            (_, Some(device)) => format!("backendtype=phy,target={device}"),
            (_, None) => return Ok(Self::by_pvio(name, access, self.path()?)),
        };
        Ok(format!("format=raw,vdev={name},access={access},{target}"))
    }

    /// Returns the checksum of its first `mib` MiB.
    ///
    /// # Errors
    /// The image cannot be read.
    pub fn sum(&self, mib: u64) -> Result<Value> {
        sum_of(&self.image, mib)
    }

    /// Returns the entry of `disk=[…]` for a path that a driver domain opens.
    pub fn elsewhere(path: &str, name: &str, access: Access) -> String {
        format!("format=raw,vdev={name},access={},backendtype=phy,target={path}", access.word())
    }

    /// Returns the entry of `disk=[…]` for a disk as pvio's hotplug script accepts it.
    pub fn by_pvio(name: &str, access: &str, place: &str) -> String {
        format!(
            "format=raw,vdev={name},access={access},backendtype=phy,script=block-pvio,target={place}"
        )
    }

    /// Returns the loop device, if the backend uses it.
    pub fn device(&self) -> Option<&str> {
        self.device.as_deref()
    }

    fn path(&self) -> Result<&str> {
        self.image.to_str().context("a path in UTF-8")
    }
}

/// Returns the checksum of a file's first `mib` MiB, in the format of a guest's.
///
/// # Errors
/// The file cannot be read, or is shorter.
pub fn sum_of(path: &Path, mib: u64) -> Result<Value> {
    let file = File::open(path)?;
    let mut bytes = vec![0; 1 << 20];
    let mut sum = Sum::NEW;
    for i in 0..mib {
        file.read_exact_at(&mut bytes, i << 20).context("the image")?;
        sum.add(&bytes);
    }
    Ok(json!(sum.text()))
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Some(device) = &self.device {
            let _ = sys::run(&["losetup", "--detach", device], QUICK);
        }
        let _ = fs::remove_file(&self.image);
    }
}
