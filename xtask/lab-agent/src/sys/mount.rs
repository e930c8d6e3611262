//! File systems that are mounted at boot.

use std::fs;

use anyhow::{Context, Result};
use rustix::mount::MountFlags;

/// Mounts a file system; creates the directory if it does not exist.
///
/// # Errors
/// The mount fails.
pub fn mount(kind: &str, source: &str, folder: &str, options: &str) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| folder.to_owned())?;
    let options = std::ffi::CString::new(options)?;
    rustix::mount::mount(source, folder, kind, MountFlags::empty(), options.as_c_str())
        .with_context(|| format!("mount {kind} on {folder}"))
}

/// Mounts the file systems that every domain needs.
///
/// # Errors
/// A mount fails.
pub fn basics() -> Result<()> {
    mount("proc", "proc", "/proc", "")?;
    mount("sysfs", "sys", "/sys", "")?;
    mount("devtmpfs", "dev", "/dev", "")?;
    mount("devpts", "devpts", "/dev/pts", "")?;
    mount("tmpfs", "shm", "/dev/shm", "")?;
    mount("tmpfs", "run", "/run", "")?;
    mount("tmpfs", "tmp", "/tmp", "size=90%")
}
