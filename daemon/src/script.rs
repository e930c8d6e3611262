//! Replacements of hotplug scripts of `xl`: `block-pvio` and `vif-pvio`, links to `pvio` in the
//! scripts directory.
//!
//! A disk line with `script=block-pvio` may specify a disk in any way that pvio supports, including
//! options (`target=[iops=500]qcow2:/srv/guest.qcow2`). An image file is opened directly. The stock
//! script, `block`, attaches a loop device to the file; that works too, but the loop device has no
//! benefit.
//!
//! The script checks whether the image exists and whether it is in use, so that `xl` itself reports
//! the error, and then marks the device as ready to be served.

mod sharing;

use crate::failure::Failure;
use pvio_ring::error::Report;
use pvio_storage::image::{Disk, EscapedPath};
use pvio_xenbus::client::{Client, default_path};
use pvio_xenbus::handshake::common::{Hotplug, write_hotplug};
use pvio_xenbus::handshake::vbd::{Backing, OWN_SCRIPT, ToolstackBack};
use std::ffi::OsString;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// Name under which `pvio` is a hotplug script for disks.
pub const NAME: &str = OWN_SCRIPT;
/// Name under which `pvio` is a hotplug script for NICs without a bridge of the kernel:
/// `script=vif-pvio`.
pub const NIC_NAME: &str = "vif-pvio";

/// Runs the script as `xl` does: `add` or `remove`, for the device at `XENBUS_PATH`.
///
/// # Errors
/// A [`Failure`], which `xl` shows.
pub fn run(mut args: impl Iterator<Item = OsString>) -> Result<(), Failure> {
    let action = args.next().unwrap_or_default();
    let misuse = || {
        Failure::input(
            format!("{NAME} cannot be run directly: it is a hotplug script of xl"),
            format!("write script={NAME} in a disk's line"),
        )
    };
    let base = std::env::var("XENBUS_PATH").map_err(|_| misuse())?;
    match action.to_str() {
        Some("add") => add(&base),
        // The toolstack removes the directory with everything that the script wrote.
        Some("remove") => Ok(()),
        _ => Err(misuse()),
    }
}

/// Runs the script for a NIC. The driver domain connects the NIC itself, so the script only reports
/// success.
///
/// # Errors
/// A [`Failure`], which `xl` shows.
pub fn run_nic(mut args: impl Iterator<Item = OsString>) -> Result<(), Failure> {
    let action = args.next().unwrap_or_default();
    let base = std::env::var("XENBUS_PATH").map_err(|_| {
        Failure::input(
            format!("{NIC_NAME} cannot be run directly: it is a hotplug script of xl"),
            format!("write script={NIC_NAME} in a NIC's line"),
        )
    })?;
    if action != "online" {
        return Ok(());
    }
    write_hotplug(&mut connect()?, &base, &Hotplug::Connected).map_err(Failure::of)
}

fn connect() -> Result<Client, Failure> {
    let path = default_path();
    Client::connect(&path).map_err(|e| {
        let what = format!("xenstore cannot be reached at {}: {}", path.display(), Report(&e));
        Failure::new(what, "check that xenstored is running")
    })
}

fn add(base: &str) -> Result<(), Failure> {
    let mut xs = connect()?;
    let config = ToolstackBack::read(&mut xs, base).map_err(Failure::of)?;
    let outcome = configured_disk(&config).and_then(|disk| {
        // Images that are not files, such as NBD exports, are only checked by the daemon.
        disk.spec.path().map_or(Ok(()), check_image)?;
        sharing::check(&mut xs, base, &config, &disk)
    });
    let status = match &outcome {
        Ok(()) => Hotplug::Connected,
        Err(failure) => Hotplug::Failed(failure.line().into()),
    };
    write_hotplug(&mut xs, base, &status).map_err(Failure::of)?;
    outcome
}

/// Returns the disk that the toolstack configured.
fn configured_disk(config: &ToolstackBack) -> Result<Disk, Failure> {
    let disk = match config.backing() {
        Backing::Own(text) => Disk::from_bytes(text),
        Backing::Format(format, rest) => Disk::with_format(format, rest),
    };
    disk.map_err(|e| Failure::of(e).as_input())
}

fn check_image(image: &Path) -> Result<(), Failure> {
    let kind = std::fs::metadata(image).map_err(|e| {
        let what = format!("disk image {} cannot be opened: {e}", EscapedPath::new(image));
        Failure::input(what, "check the disk's line")
    })?;
    if !kind.is_file() && !kind.file_type().is_block_device() {
        let what = format!("{} is neither a file nor a block device", EscapedPath::new(image));
        return Err(Failure::input(what, "name a disk image"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_path_must_be_file_or_block_device() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.img");
        assert!(check_image(&image).unwrap_err().to_string().contains("No such file"));
        std::fs::write(&image, "").unwrap();
        assert_eq!(check_image(&image), Ok(()));
        assert!(check_image(dir.path()).unwrap_err().to_string().contains("neither"));
    }
}
