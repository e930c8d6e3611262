//! The definition of a disk, from the toolstack's keys.

use crate::image::{Disk, DiskOptions, Format, Spec};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::vbd::{Backing, Mode, ToolstackBack};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// Parses the definition of a disk. Options in its own xenstore node take precedence over those in
/// its name, and these over the default options.
///
/// # Errors
/// A [`Fault`] with the remedy.
pub fn definition(told: &ToolstackBack, usual: &DiskOptions) -> Result<Disk, Fault> {
    let disk = match told.backing() {
        _ if told.is_empty_drive() => Ok(Spec::Ram { bytes: 0 }.into()),
        Backing::Own(text) => Disk::from_bytes(text),
        Backing::Format(format, rest) => Disk::with_format(format, rest),
    };
    let mut disk = disk.map_err(|e| Fault::of(e.code(), &e))?;
    let words = told.options.as_deref().unwrap_or_default();
    let said = DiskOptions::from_bytes(words).map_err(|e| Fault::of("disk-options", &e))?;
    disk.options = said.or(disk.options).or(usual.clone());
    let options = &mut disk.options;
    options.read_only = Some(told.mode == Mode::ReadOnly || options.read_only == Some(true));
    options.direct = options.direct.or(Some(told.direct_io_safe));
    Ok(disk)
}

/// Returns the name of a disk in logs, and of its fence.
#[must_use]
pub fn disk_name(told: &ToolstackBack) -> String {
    format!("vbd-{}-{}", told.frontend_id, told.dev.replace('/', "_"))
}

/// Returns the disk with its path replaced by the device that the toolstack's script created for
/// it.
#[must_use]
pub fn backed_by(mut disk: Disk, device: Option<&Vec<u8>>) -> Disk {
    if let (Some(device), Spec::File { format: Format::Raw, path, .. }) = (device, &disk.spec)
        && !path.is_file()
    {
        // If the path is a file, the device is a loop device, which would only add overhead.
        disk.spec = Spec::file(Format::Raw, OsStr::from_bytes(device));
    }
    disk
}

/// Applies those options that may change while a disk is open; a warning is logged for the others.
pub fn change_live(current: &mut DiskOptions, requested: &DiskOptions) {
    if current.fixed() != requested.fixed() {
        tracing::warn!(
            current = %current.fixed(),
            requested = %requested.fixed(),
            "some options take effect when the disk is attached again"
        );
    }
    *current = requested.live().or(current.fixed());
}
