//! File systems of a domain that has just started.

use std::fs;

use anyhow::{Context, Result};
use rustix::mount::MountFlags;

/// Mounts a file system, making the folder if needed.
///
/// # Errors
/// The kernel refuses.
pub fn mount(kind: &str, source: &str, folder: &str, options: &str) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| folder.to_owned())?;
    let options = std::ffi::CString::new(options)?;
    rustix::mount::mount(source, folder, kind, MountFlags::empty(), options.as_c_str())
        .with_context(|| format!("mount {kind} on {folder}"))
}

/// What every domain needs.
///
/// # Errors
/// The kernel refuses.
pub fn basics() -> Result<()> {
    mount("proc", "proc", "/proc", "")?;
    mount("sysfs", "sys", "/sys", "")?;
    mount("devtmpfs", "dev", "/dev", "")?;
    mount("devpts", "devpts", "/dev/pts", "")?;
    mount("tmpfs", "shm", "/dev/shm", "")?;
    mount("tmpfs", "run", "/run", "")?;
    mount("tmpfs", "tmp", "/tmp", "size=90%")
}
